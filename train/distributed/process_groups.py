"""What the ranks of a run tell each other, on the CPU and beside the engine's own traffic.

There may be thousands of ranks, so what most of them do must not grow with their number:

    greatest, broadcast        each rank gets one value, however many ranks there are
    gather_on_rank_zero        rank 0 gets a value of each rank, the others nothing
    gather                     each rank gets all values: for a handful of times in a run

docs/distributed.md has what each costs, measured for up to 4,096 ranks.
"""

import os
import pickle
import resource
from collections.abc import Callable, Iterator, Sequence
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

Number = TypeVar("Number", int, float)
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
        values = self.gather_on_rank_zero(value)
        return cast(list[T], self.broadcast(values))

    def gather_on_rank_zero(self, value: T) -> list[T] | None:
        """Every rank's value, in the order of ranks, on rank 0; None on the others."""
        if self.control is None:
            return [value]
        return _gather(self, self.control, value)

    def greatest(self, value: Number) -> Number:
        """The largest of the ranks' numbers, on every rank."""
        if self.control is None:
            return value
        dtype = torch.float64 if isinstance(value, float) else torch.int64
        number = torch.tensor(value, dtype=dtype)
        dist.all_reduce(number, op=dist.ReduceOp.MAX, group=self.control)
        return cast(Number, number.item())

    def broadcast(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        return value if self.control is None else _broadcast(self.control, value)

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
        ConfigError: this machine has fewer devices than ranks, or allows too few open files.
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
    allow_open_files(dist_env)
    # Without this, gloo connects every rank with every other one, in each group: a rank of 1,024
    # would hold 3,069 connections, and would read 1,023 lists of 1,023 addresses for each group.
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
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
        for group in (control, saving) if cuda else (None, control, saving):
            _connect(group, dist_env)
        yield ProcessGroups(dist_env, control, saving)
    finally:
        dist.destroy_process_group()


def _connect(group: dist.ProcessGroup | None, dist_env: DistEnv) -> None:
    """Make the connections that a gloo group will use.

        all-reduce          a ring                        2 of each rank
        barrier, broadcast  to ranks 1, 2, 4, ... away    2 log2(ranks) of each rank
        gather, scatter     a star                        1 of each rank, all of them of rank 0

    A rank that dies is noticed by those that are connected with it. To connect with one that has
    died would be tried again until `TIMEOUT`.
    """
    flag = torch.zeros(1)
    dist.all_reduce(flag, group=group)
    dist.barrier(group=group)
    all_flags = [torch.zeros(1) for _ in range(dist_env.world_size)]
    dist.gather(flag, all_flags if dist_env.rank == 0 else None, dst=0, group=group)


FILES = 512
"""Files that a rank may have open beside its connections: shards of text, libraries, logs."""


def allow_open_files(dist_env: DistEnv) -> None:
    """Raise this process's limit of open files to what its connections need, if it is lower.

    Rank 0 has a connection with every other rank in each of three groups, and in the store.

    Raises:
        ConfigError: the machine does not allow as many.
    """
    needed = FILES + (4 * dist_env.world_size if dist_env.rank == 0 else 0)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        problem = (
            f"rank {dist_env.rank} of {dist_env.world_size} needs {needed} open files, and this "
            f"machine allows {hard}; raise the hard limit there (ulimit -Hn, or LimitNOFILE of "
            "the scheduler's daemon)"
        )
        raise ConfigError([problem], "the machine")
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


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
    if not groups.greatest(int(own is not None)):
        return None  # nearly always, and for the price of one number
    if groups.world_size == 1:
        return own
    mine = _RankError.of(groups.rank, own)
    given = groups.gather_on_rank_zero(mine)
    first = groups.broadcast(None if given is None else _RankError.joined(given))
    assert first is not None
    if first.kind is RuntimeError and mine is not None and mine.kind is RuntimeError:
        return own
    return ConfigError(first.problems) if first.kind is ConfigError else first.kind(first.text)


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

    @classmethod
    def joined(cls, errors: Sequence["_RankError | None"]) -> "_RankError | None":
        """What all ranks raise: the errors of the kind that comes first, each text once."""
        for kind in (RuntimeError, TransientError, DataError, ConfigError):
            if found := [error for error in errors if error is not None and error.kind is kind]:
                text = "; ".join(dict.fromkeys(error.text for error in found))
                problems = {str(p): p for error in found for p in error.problems}
                return cls(kind, text, tuple(problems.values()))
        return None


# Work that all ranks do together in the thread that saves


def on_all_ranks(groups: ProcessGroups, work: Callable[[], T], answer: Callable[[list[T]], R]) -> R:
    """Do `work` on every rank, then `answer` on rank 0; all ranks get the answer.

        rank 0   work() --+-- answer([..]) --+-> R
        rank 1   work() --+                  +-> R

    It uses the group of the thread that saves. No rank is left waiting: all of them get here
    whether their work succeeded or not, and `answer` is only called if all did.

    Raises:
        OSError: on all ranks, if the operating system refused something on any of them.
        RuntimeError: on all ranks, if something else went wrong; or if a rank has died.
    """
    mine, cause = _attempt(groups.rank, work)
    reply: R | _Failure | None = None
    if (given := _gather(groups, groups.saving, mine)) is not None:
        reply, cause = _answer(given, answer, cause)
    if groups.saving is not None:
        reply = _broadcast(groups.saving, reply)
    return _unless_failed(cast(R | _Failure, reply), cause)


def deal_to_ranks(
    groups: ProcessGroups, work: Callable[[], T], deal: Callable[[list[T]], list[R]]
) -> R:
    """As `on_all_ranks`, but the answer of rank 0 is a list, and each rank gets its item of it."""
    mine, cause = _attempt(groups.rank, work)
    replies: list[R | _Failure] = []
    if (given := _gather(groups, groups.saving, mine)) is not None:
        dealt, cause = _answer(given, deal, cause)
        failed = isinstance(dealt, _Failure)
        replies = [cast(_Failure, dealt)] * groups.world_size if failed else [*cast(list[R], dealt)]
    return _unless_failed(_scatter(groups, replies), cause)


def on_rank_zero(groups: ProcessGroups, work: Callable[[], R]) -> R:
    """Do `work` on rank 0; every rank gets its result, or its failure. Uses the same group."""
    reply: R | _Failure | None = None
    cause = None
    if groups.is_rank_zero:
        reply, cause = _attempt(0, work)
    if groups.saving is not None:
        reply = _broadcast(groups.saving, reply)
    return _unless_failed(cast(R | _Failure, reply), cause)


def _answer(
    given: list[T | "_Failure"], answer: Callable[[list[T]], R], cause: Exception | None
) -> tuple[R | "_Failure", Exception | None]:
    """What `answer` makes of all ranks' results, or the first failure."""
    failures = [value for value in given if isinstance(value, _Failure)]
    if failures:
        return failures[0], cause
    return _attempt(0, lambda: answer(cast(list[T], given)))


def _unless_failed(reply: R | "_Failure", cause: Exception | None) -> R:
    if isinstance(reply, _Failure):
        where = f"rank {reply.rank}: " if reply.rank else ""
        raise (OSError if reply.refused else RuntimeError)(where + reply.text) from cause
    return reply


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


def _gather(groups: ProcessGroups, group: dist.ProcessGroup | None, value: T) -> list[T] | None:
    """Every rank's value on rank 0, None on the others.

    `dist.gather_object` would tell each rank the sizes of all ranks' values.
    """
    if group is None:
        return [value]
    pickled = pickle.dumps(value)
    size = torch.tensor([len(pickled)])
    sizes = [torch.empty_like(size) for _ in range(groups.world_size)]
    dist.gather(size, sizes if groups.is_rank_zero else None, dst=0, group=group)
    longest = max(sizes) if groups.is_rank_zero else size
    dist.broadcast(longest, src=0, group=group)
    sent = torch.frombuffer(bytearray(pickled.ljust(int(longest))), dtype=torch.uint8)
    if not groups.is_rank_zero:
        dist.gather(sent, None, dst=0, group=group)
        return None
    received = [torch.empty_like(sent) for _ in range(groups.world_size)]
    dist.gather(sent, received, dst=0, group=group)
    return [pickle.loads(x.numpy().data) for x in received]  # ignores what follows the value


def _broadcast(group: dist.ProcessGroup, value: T) -> T:
    """Rank 0's value, on every rank."""
    values = [value]
    dist.broadcast_object_list(values, src=0, group=group)
    return values[0]


def _scatter(groups: ProcessGroups, values: list[T]) -> T:
    """This rank's one of rank 0's values."""
    if groups.saving is None:
        return values[0]
    mine: list[T | None] = [None]
    dist.scatter_object_list(mine, values or None, src=0, group=groups.saving)
    return cast(T, mine[0])
