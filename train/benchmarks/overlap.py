"""How much of what context parallelism sends is hidden behind a layer's attention, on a slow link.

Two gloo ranks of this machine share a row. Their collectives are held back as by a link of a given
speed, and waited for when their result is needed, or at once.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from time import perf_counter, sleep
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from phd.pattern import Pattern
from train.benchmarks.gloo_ranks import on_gloo_ranks
from train.benchmarks.timing import Result
from train.distributed.process_groups import ProcessGroups
from train.engines import context_parallel
from train.engines.context_parallel import ContextPart, ContextRank

PATTERNS = {
    "vanilla": Pattern("causal"),
    "phd_cswa-2": Pattern("hidden", K=2, window=16, chunk_tokens=32),
    "phd_cswa-3": Pattern("hidden", K=3, window=16, chunk_tokens=16),
}
RANKS, HEADS, KV_HEADS, HEAD_DIM = 2, 8, 2, 64


def bench_overlap(tokens: int, bytes_per_s: float, repeat: int) -> Result:
    """Forward and backward pass of one layer's attention, for each pattern.

    Args:
        tokens: T, of the one row.
        bytes_per_s: of the link.
        repeat: how often each is measured.
    """
    found = on_gloo_ranks(RANKS, _measured, tokens, bytes_per_s, repeat)[0]
    rows = [
        {
            "work": name,
            "at_once_s": median(x[0] for x in turns),
            "overlapped_s": median(x[1] for x in turns),
            "no_link_s": median(x[2] for x in turns),
            "ratio": median(x[1] / x[0] for x in turns),
        }
        for name, turns in found.items()
    ]
    return Result(
        rows,
        {f"{name}_ratio": median(x[1] / x[0] for x in turns) for name, turns in found.items()},
        f"one row of {tokens} tokens on {RANKS} ranks, {HEADS} query and {KV_HEADS} key heads of "
        f"{HEAD_DIM}, a link of {bytes_per_s / 1e6:g} MB/s",
        method=f"seconds of a rank, medians of {repeat} turns; ratio: overlapped over waited for "
        "at once, within a turn",
    )


def _measured(
    groups: ProcessGroups, tokens: int, bytes_per_s: float, repeat: int
) -> dict[str, list[tuple[float, ...]]]:
    """By pattern and turn: seconds if waited for at once, overlapped, and without the link."""
    group = dist.group.WORLD
    assert group is not None
    place = ContextRank.of(group)
    return {
        name: _turns(groups, ContextPart.of(place, tokens, None), pattern, bytes_per_s, repeat)
        for name, pattern in PATTERNS.items()
    }


def _turns(
    groups: ProcessGroups, part: ContextPart, pattern: Pattern, bytes_per_s: float, repeat: int
) -> list[tuple[float, ...]]:
    own = part.position.shape[1]
    q = torch.randn(1, HEADS, pattern.K, own, HEAD_DIM, requires_grad=True)
    k, v = (
        torch.randn(1, KV_HEADS, pattern.key_copies, own, HEAD_DIM, requires_grad=True)
        for _ in range(2)
    )

    def seconds() -> float:
        groups.barrier()
        start = perf_counter()
        out = part.attend(q, k, v, pattern, "packed")
        torch.autograd.grad(out.sum(), (q, k, v))
        return perf_counter() - start

    seconds()
    turns: list[tuple[float, ...]] = []
    for _ in range(repeat):
        with held_back(bytes_per_s, at_once=True):
            at_once = seconds()
        with held_back(bytes_per_s, at_once=False):
            overlapped = seconds()
        turns.append((at_once, overlapped, seconds()))
    return turns


class _HeldBack:
    """A collective whose result comes no sooner than over a slow link."""

    def __init__(self, work: dist.Work, until: float) -> None:
        self.work, self.until = work, until

    def wait(self) -> None:
        self.work.wait()
        sleep(max(0.0, self.until - perf_counter()))


@contextmanager
def held_back(bytes_per_s: float, *, at_once: bool) -> Iterator[None]:
    """Within this context the large collectives are as slow as a link; `at_once` waits for them."""
    before = context_parallel.start_all_gather, context_parallel.start_reduce_scatter

    def slow(start: Any, sent: float) -> Any:
        def call(out: Tensor, given: Tensor, group: dist.ProcessGroup) -> _HeldBack:
            size = given.nbytes * sent
            work = _HeldBack(start(out, given, group), perf_counter() + size / bytes_per_s)
            if at_once:
                work.wait()
            return work

        return call

    gather, scatter = before
    context_parallel.start_all_gather = slow(gather, RANKS - 1)
    context_parallel.start_reduce_scatter = slow(scatter, (RANKS - 1) / RANKS)
    try:
        yield
    finally:
        context_parallel.start_all_gather, context_parallel.start_reduce_scatter = before
