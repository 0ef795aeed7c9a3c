"""What the ranks of a run tell each other, on the CPU and beside the engine's own traffic."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from itertools import count
from typing import NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from conf.errors import ConfigError, DataError, Problem, TransientError
from train.distributed.dist_env import DistEnv

T = TypeVar("T")
R = TypeVar("R")

# A rank may wait this long for another that trains a tokenizer or unpacks a shard. One that died
# closes its connections, which is noticed at once; a rank that hangs in a step is the watchdog's.
TIMEOUT = timedelta(hours=2)
RENDEZVOUS_TIMEOUT = timedelta(minutes=10)  # within which all ranks have to have come


@dataclass(frozen=True)
class ProcessGroups:
    """The ranks that train together, and this one among them; `ProcessGroups()` is a lone process.

    Attributes:
        dist_env: which rank this is.
        control: the gloo group of the main thread; None for a lone process.
        saving: another one, for the thread that writes checkpoints.
    """

    dist_env: DistEnv = field(default_factory=DistEnv)
    control: dist.ProcessGroup | None = None
    saving: dist.ProcessGroup | None = None

    @property
    def rank(self) -> int:
        return self.dist_env.rank

    @property
    def world_size(self) -> int:
        return self.dist_env.world_size

    @property
    def is_rank_zero(self) -> bool:
        """Whether this is the rank that writes what is written once, and prints."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in the order of ranks, on every rank."""
        if self.control is None:
            return [value]
        values: list[T] = [value] * self.world_size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def broadcast(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        if self.control is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.control)
        return values[0]

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.control is not None:
            dist.barrier(group=self.control)

    def sum(self, x: Tensor) -> Tensor:
        """The sum of x over all ranks, in place; on a device without waiting for it."""
        if self.world_size > 1:
            dist.all_reduce(x)
        return x


@contextmanager
def init_process_groups(device: str) -> Iterator[ProcessGroups]:
    """Join the ranks that were started together, and leave them at the end.

    Args:
        device: `auto`, `cpu` or `cuda`; each rank takes the CUDA device of its local rank.

    Raises:
        ConfigError: this machine has fewer devices than ranks.
    """
    dist_env = DistEnv.from_environment()
    cuda = device != "cpu" and torch.cuda.is_available()
    if cuda:
        if dist_env.local_rank >= torch.cuda.device_count():
            raise ConfigError([_too_many_processes(device, dist_env)])
        torch.cuda.set_device(dist_env.local_rank)
    if dist_env.world_size == 1:
        yield ProcessGroups(dist_env)
        return
    # Keys that an earlier run of this process has left in the store must not be taken for this
    # run's: a sweep runs several in one process.
    store = dist.PrefixStore(f"run {next(_RUNS)}", _store())
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=store,
        rank=dist_env.rank,
        world_size=dist_env.world_size,
        timeout=TIMEOUT,
    )
    try:
        control, saving = (dist.new_group(backend="gloo", timeout=TIMEOUT) for _ in range(2))
        yield ProcessGroups(dist_env, control, saving)
    finally:
        dist.destroy_process_group()


_RUNS = count()


@cache
def _store() -> dist.Store:
    """Where the ranks of this start find each other, for all runs of this process."""
    store, _, _ = next(iter(dist.rendezvous("env://", timeout=RENDEZVOUS_TIMEOUT)))
    return store


def _too_many_processes(device: str, dist_env: DistEnv) -> Problem:
    return Problem(
        "engine.device",
        device,
        f"{dist_env.local_rank + 1} or more processes were started on this machine, which has "
        f"{torch.cuda.device_count()} CUDA devices",
        "start one for each, or set engine.device=cpu",
    )


# Errors of the main thread: what fails on one rank is raised on all, or the others would wait for
# that rank until something kills them


def raise_on_all_ranks(
    groups: ProcessGroups,
    make: Callable[[], T],
    kinds: tuple[type[Exception], ...] = (Exception,),
) -> T:
    """What `make` returns; if it raises on any rank, every rank raises (see `shared_error`).

    Args:
        make: raises errors of `kinds` only while no other rank waits for it.
        kinds: errors that are shared; others end this rank at once, which frees the ranks that
            wait for it within `make`.
    """
    value, own = None, None
    try:
        value = make()
    except kinds as error:
        if groups.world_size == 1:
            raise
        own = error
    shared = shared_error(groups, own)
    if shared is None:
        return cast(T, value)
    if shared is own:
        raise shared
    raise shared from own


def shared_error(groups: ProcessGroups, own: Exception | None) -> Exception | None:
    """The error that every rank raises if any of them has one; every rank calls this.

    All ranks raise the same kind: an error of the program on any rank comes first, then a transient
    one, then the data's, then the configuration's, whose problems are joined. A rank with an error
    of the program raises its own, which has the traceback.
    """
    if groups.world_size == 1:
        return own
    mine = _RankError.of(groups.rank, own)
    errors = [error for error in groups.gather(mine) if error is not None]
    for kind in (RuntimeError, TransientError, DataError, ConfigError):
        found = [error for error in errors if error.kind is kind]
        if not found:
            continue
        if kind is ConfigError:
            return ConfigError([problem for error in found for problem in error.problems])
        if kind is RuntimeError and mine is not None and mine.kind is RuntimeError:
            return own
        return kind("; ".join(dict.fromkeys(error.text for error in found)))
    return None


class _RankError(NamedTuple):
    """An error as it is sent to other ranks: not every exception can be pickled."""

    kind: type[Exception]
    text: str
    problems: tuple[Problem | str, ...] = ()

    @classmethod
    def of(cls, rank: int, error: Exception | None) -> "_RankError | None":
        match error:
            case None:
                return None
            case ConfigError():
                return cls(ConfigError, str(error), error.problems)
            case DataError():
                return cls(DataError, str(error))
            case TransientError():
                return cls(TransientError, str(error))
        return cls(RuntimeError, f"rank {rank}: {type(error).__name__}: {error}")


# Work that all ranks do together in the thread that saves


def on_all_ranks(
    groups: ProcessGroups, work: Callable[[], T], answer: Callable[[list[T]], list[R]]
) -> R:
    """Do `work` on every rank, then `answer` on rank 0; each rank gets its part of the answer.

        rank 0   work() --+-- answer([..]) --+-> R
        rank 1   work() --+                  +-> R

    It uses the group of the thread that saves. No rank is left waiting: all of them get here
    whether their work succeeded or not, and `answer` is only called if all did.

    Raises:
        OSError: on all ranks, if the operating system refused something on any of them.
        RuntimeError: on all ranks, if something else went wrong; or if a rank has died.
    """
    mine, cause = _attempt(groups.rank, work)
    given = _gather(groups, mine)
    replies: list[R] | list[_Failure] = []
    if failures := [value for value in given if isinstance(value, _Failure)]:
        replies = [failures[0]] * groups.world_size
    elif groups.is_rank_zero:
        answers, cause = _attempt(0, lambda: answer(cast(list[T], given)))
        replies = [answers] * groups.world_size if isinstance(answers, _Failure) else answers
    reply = _scatter(groups, cast(list[R | _Failure], replies))
    if isinstance(reply, _Failure):
        where = f"rank {reply.rank}: " if reply.rank else ""
        raise (OSError if reply.refused else RuntimeError)(where + reply.text) from cause
    return reply


def on_rank_zero(groups: ProcessGroups, work: Callable[[], R]) -> R:
    """Do `work` on rank 0; every rank gets its result, or its failure."""
    return on_all_ranks(groups, lambda: None, lambda _: [work()] * groups.world_size)


class _Failure(NamedTuple):
    """An exception of the saving thread, as it is sent to other ranks."""

    rank: int
    refused: bool  # by the operating system: a full disk, a missing right
    text: str


def _attempt(rank: int, work: Callable[[], T]) -> tuple[T | _Failure, Exception | None]:
    try:
        return work(), None
    except Exception as error:
        refusal = _refusal(error)
        text = str(refusal) if refusal else f"{type(error).__name__}: {error}"
        return _Failure(rank, refusal is not None, text), error


def _refusal(error: BaseException | None) -> OSError | None:
    """The OSError behind an error: `torch.save` reports a full disk as a wrong file position."""
    while error is not None:
        if isinstance(error, OSError):
            return error
        error = error.__cause__ or error.__context__
    return None


def _gather(groups: ProcessGroups, value: T) -> list[T]:
    """Every rank's value on rank 0, nothing on the others."""
    if groups.saving is None:
        return [value]
    values: list[T] | None = [value] * groups.world_size if groups.is_rank_zero else None
    dist.gather_object(value, values, dst=0, group=groups.saving)
    return values or []


def _scatter(groups: ProcessGroups, values: list[T]) -> T:
    """This rank's one of rank 0's values."""
    if groups.saving is None:
        return values[0]
    mine: list[T | None] = [None]
    dist.scatter_object_list(mine, values or None, src=0, group=groups.saving)
    return cast(T, mine[0])
