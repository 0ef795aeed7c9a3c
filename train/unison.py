"""Work that all ranks do together, where what fails on one fails on all."""

from collections.abc import Callable
from typing import NamedTuple, TypeVar, cast

import torch.distributed as dist

from train.ranks import Ranks

T = TypeVar("T")
R = TypeVar("R")


class _Failure(NamedTuple):
    """An exception as others can be told of it."""

    rank: int
    refused: bool  # by the operating system: a full disk, a missing right
    text: str


def together(ranks: Ranks, work: Callable[[], T], answer: Callable[[list[T]], list[R]]) -> R:
    """Do `work` on every rank, then `answer` on the first; each rank gets its part of the answer.

        rank 0   work() --+-- answer([..]) --+-> R
        rank 1   work() --+                  +-> R

    It uses the group that belongs to the thread that saves. No rank is left waiting: all get here
    whether their work succeeded or not, and `answer` is not called unless all did.

    Raises:
        OSError: on all ranks, if the operating system refused something on any.
        RuntimeError: on all ranks, if something else went wrong; or if a rank has died.
    """
    mine, cause = _attempt(ranks.rank, work)
    given = _gather(ranks, mine)
    replies: list[R] | list[_Failure] = []
    if failures := [value for value in given if isinstance(value, _Failure)]:
        replies = [failures[0]] * ranks.world
    elif ranks.first:
        answers, cause = _attempt(0, lambda: answer(cast(list[T], given)))
        replies = [answers] * ranks.world if isinstance(answers, _Failure) else answers
    reply = _scatter(ranks, cast(list[R | _Failure], replies))
    if isinstance(reply, _Failure):
        where = f"rank {reply.rank}: " if reply.rank else ""
        raise (OSError if reply.refused else RuntimeError)(where + reply.text) from cause
    return reply


def first_alone(ranks: Ranks, work: Callable[[], R]) -> R:
    """Do `work` on the first rank; every rank gets its result, or its failure."""
    return together(ranks, lambda: None, lambda _: [work()] * ranks.world)


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


def _gather(ranks: Ranks, value: T) -> list[T]:
    """Everybody's value on the first rank, nothing on the others."""
    if ranks.saving is None:
        return [value]
    values: list[T] | None = [value] * ranks.world if ranks.first else None
    dist.gather_object(value, values, dst=0, group=ranks.saving)
    return values or []


def _scatter(ranks: Ranks, values: list[T]) -> T:
    """This rank's one of the first rank's values."""
    if ranks.saving is None:
        return values[0]
    mine: list[T | None] = [None]
    dist.scatter_object_list(mine, values or None, src=0, group=ranks.saving)
    return cast(T, mine[0])
