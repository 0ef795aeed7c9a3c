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

from conf.errors import ConfigError
from train.distributed.dist_env import DistEnv

T = TypeVar("T")
R = TypeVar("R")

# A rank may wait this long for another that trains a tokenizer or unpacks a shard. One that died
# closes its connections, which is noticed at once; one that hangs in a step is the watchdog's.
TIMEOUT = timedelta(hours=2)
RENDEZVOUS_TIMEOUT = timedelta(minutes=10)  # in which all have to have come


@dataclass(frozen=True)
class ProcessGroups:
    """The ranks that train together, and this one among them; `ProcessGroups()` is a lone process.

    Attributes:
        place: which one this is.
        control: the gloo group through which they agree; None for a lone process.
        saving: another one, that belongs to the thread that writes checkpoints.
    """

    place: DistEnv = field(default_factory=DistEnv)
    control: dist.ProcessGroup | None = None
    saving: dist.ProcessGroup | None = None

    @property
    def rank(self) -> int:
        return self.place.rank

    @property
    def world_size(self) -> int:
        return self.place.world_size

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes what is written once, and speaks for all."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Everybody's value, in the order of ranks, on every rank."""
        if self.control is None:
            return [value]
        values: list[T] = [value] * self.world_size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def broadcast(self, value: T) -> T:
        """The first rank's value, on every rank."""
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
        """The sum of everybody's x, in place; on a device without waiting for it."""
        if self.world_size > 1:
            dist.all_reduce(x)
        return x


@contextmanager
def init_process_groups(device: str) -> Iterator[ProcessGroups]:
    """Join the ranks that were started together, and leave them at the end.

    Args:
        device: `auto`, `cpu` or `cuda`; each rank takes the CUDA device of its local number.

    Raises:
        ConfigError: this machine has fewer devices than ranks.
    """
    place = DistEnv.from_environment()
    cuda = device != "cpu" and torch.cuda.is_available()
    if cuda:
        if place.local_rank >= torch.cuda.device_count():
            too_many = (
                f"engine.device={device}: {place.local_rank + 1} or more processes were started on "
                f"this machine, which has {torch.cuda.device_count()} CUDA devices; start one for "
                "each, or set engine.device=cpu"
            )
            raise ConfigError([too_many])
        torch.cuda.set_device(place.local_rank)
    if place.world_size == 1:
        yield ProcessGroups(place)
        return
    # What an earlier run of this process has left in the store would be taken for this one's.
    store = dist.PrefixStore(f"run {next(_RUNS)}", _store())
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=store,
        rank=place.rank,
        world_size=place.world_size,
        timeout=TIMEOUT,
    )
    try:
        control, saving = (dist.new_group(backend="gloo", timeout=TIMEOUT) for _ in range(2))
        yield ProcessGroups(place, control, saving)
    finally:
        dist.destroy_process_group()


_RUNS = count()


@cache
def _store() -> dist.Store:
    """Where the ranks of this start find each other, for all runs of this process."""
    store, _, _ = next(iter(dist.rendezvous("env://", timeout=RENDEZVOUS_TIMEOUT)))
    return store


class AnyRankError(ValueError):
    """Something went wrong on some ranks, and all of them know it."""


def raise_on_all_ranks(groups: ProcessGroups, make: Callable[[], T]) -> T:
    """What `make` returns; a ValueError of any rank is raised on all of them.

    Else the others would wait for that rank until something kills them. `make` must not talk to
    other ranks.
    """
    value: T | None = None
    failure: ConfigError | str | None = None
    try:
        value = make()
    except ValueError as error:
        if groups.world_size == 1:
            raise
        failure = error if isinstance(error, ConfigError) else str(error)
    failures = [found for found in groups.gather(failure) if found is not None]
    if refusals := [found for found in failures if isinstance(found, ConfigError)]:
        raise ConfigError(problem for refusal in refusals for problem in refusal.problems)
    if failures:
        raise AnyRankError("; ".join(dict.fromkeys(map(str, failures))))
    return cast(T, value)


# Work that all ranks do together, by the group of the thread that saves


class _Failure(NamedTuple):
    """An exception as others can be told of it."""

    rank: int
    refused: bool  # by the operating system: a full disk, a missing right
    text: str


def on_all_ranks(
    groups: ProcessGroups, work: Callable[[], T], answer: Callable[[list[T]], list[R]]
) -> R:
    """Do `work` on every rank, then `answer` on the first; each rank gets its part of the answer.

        rank 0   work() --+-- answer([..]) --+-> R
        rank 1   work() --+                  +-> R

    It uses the group that belongs to the thread that saves. No rank is left waiting: all get here
    whether their work succeeded or not, and `answer` is not called unless all did.

    Raises:
        OSError: on all ranks, if the operating system refused something on any.
        RuntimeError: on all ranks, if something else went wrong; or if a rank has died.
    """
    mine, cause = _attempt(groups.rank, work)
    given = _gather(groups, mine)
    replies: list[R] | list[_Failure] = []
    if failures := [value for value in given if isinstance(value, _Failure)]:
        replies = [failures[0]] * groups.world_size
    elif groups.first:
        answers, cause = _attempt(0, lambda: answer(cast(list[T], given)))
        replies = [answers] * groups.world_size if isinstance(answers, _Failure) else answers
    reply = _scatter(groups, cast(list[R | _Failure], replies))
    if isinstance(reply, _Failure):
        where = f"rank {reply.rank}: " if reply.rank else ""
        raise (OSError if reply.refused else RuntimeError)(where + reply.text) from cause
    return reply


def on_rank_zero(groups: ProcessGroups, work: Callable[[], R]) -> R:
    """Do `work` on the first rank; every rank gets its result, or its failure."""
    return on_all_ranks(groups, lambda: None, lambda _: [work()] * groups.world_size)


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
    """Everybody's value on the first rank, nothing on the others."""
    if groups.saving is None:
        return [value]
    values: list[T] | None = [value] * groups.world_size if groups.first else None
    dist.gather_object(value, values, dst=0, group=groups.saving)
    return values or []


def _scatter(groups: ProcessGroups, values: list[T]) -> T:
    """This rank's one of the first rank's values."""
    if groups.saving is None:
        return values[0]
    mine: list[T | None] = [None]
    dist.scatter_object_list(mine, values or None, src=0, group=groups.saving)
    return cast(T, mine[0])
