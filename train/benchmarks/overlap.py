"""How much of what context parallelism sends is hidden behind a layer, on a slow link.

Two gloo ranks of this machine share a row. What they send each other is taken to come over a link
of a given speed, one thing after another. No rank really waits for it: a clock counts the CPU
seconds of the rank, and goes on by what it would have waited. So other work on the machine hardly
changes what is found.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from time import thread_time
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from phd.block import FeedForward
from phd.config import ModelConfig
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
RANKS, HEADS, KV_HEADS, HEAD_DIM = 2, 8, 4, 64


class Turn(NamedTuple):
    """Seconds of a layer's forward and backward pass, with what is sent...

    Attributes:
        at_once: waited for at once.
        whole: in one piece, and waited for when it is needed.
        pieces: some heads after others.
        ahead: in pieces, and the keys under way while the hidden copies of the layer before go
            through their feed-forward.
        no_link: as fast as this machine does it.
    """

    at_once: float
    whole: float
    pieces: float
    ahead: float
    no_link: float


def bench_overlap(tokens: int, bytes_per_s: float, repeat: int) -> Result:
    """A feed-forward of the hidden copies and a layer's attention, for each pattern.

    Args:
        tokens: T, of the one row.
        bytes_per_s: of the link.
        repeat: how often each is measured.
    """
    found = on_gloo_ranks(RANKS, measured, tokens, bytes_per_s, repeat)[0]
    rows, metrics = [], {}
    for name, turns in found.items():
        row: dict[str, Any] = {"work": name}
        row |= {f"{way}_s": median(getattr(turn, way) for turn in turns) for way in Turn._fields}
        for way in ("whole", "pieces", "ahead"):
            ratio = median(getattr(turn, way) / turn.at_once for turn in turns)
            row[f"{way}_ratio"] = metrics[f"{name}_{way}_ratio"] = ratio
        rows.append(row)
    return Result(
        rows,
        metrics,
        f"one row of {tokens} tokens on {RANKS} ranks, {HEADS} query and {KV_HEADS} key heads of "
        f"{HEAD_DIM}, a link of {bytes_per_s / 1e6:g} MB/s",
        method=f"seconds of a rank, medians of {repeat} turns; ratios: to waiting at once, within "
        "a turn",
    )


def measured(
    groups: ProcessGroups, tokens: int, bytes_per_s: float, repeat: int
) -> dict[str, list[Turn]]:
    """The turns of each pattern, as one of the ranks finds them."""
    group = dist.group.WORLD
    assert group is not None
    place = ContextRank.of(group)
    link = _Link(bytes_per_s)
    return {
        name: _turns(groups, ContextPart.of(place, tokens, None), pattern, link, repeat)
        for name, pattern in PATTERNS.items()
    }


def _turns(
    groups: ProcessGroups, part: ContextPart, pattern: Pattern, link: "_Link", repeat: int
) -> list[Turn]:
    own, dim = part.position.shape[1], HEADS * HEAD_DIM
    feed_forward = FeedForward(ModelConfig(dim=dim, heads=HEADS, kv_heads=KV_HEADS))
    x = torch.randn(1, pattern.K - 1, own, dim, requires_grad=True)
    q = torch.randn(1, HEADS, pattern.K, own, HEAD_DIM, requires_grad=True)
    k, v = (
        torch.randn(1, KV_HEADS, pattern.key_copies, own, HEAD_DIM, requires_grad=True)
        for _ in range(2)
    )

    def seconds(*, ahead: bool = False) -> float:
        groups.barrier()
        start = link.now
        hidden = feed_forward(x)
        link.asked = start if ahead else None
        out = part.attend(q, k, v, pattern, "packed")
        link.asked = None
        torch.autograd.grad(out.sum(), (q, k, v))
        torch.autograd.grad(hidden.sum(), (x, *feed_forward.parameters()))
        return link.now - start

    seconds()
    turns: list[Turn] = []
    for _ in range(repeat):
        with link.slow(at_once=True, pieces=1):
            at_once = seconds()
        with link.slow(pieces=1):
            whole = seconds()
        with link.slow():
            pieces, ahead = seconds(), seconds(ahead=True)
        turns.append(Turn(at_once, whole, pieces, ahead, seconds()))
    return turns


@dataclass
class _Link:
    """A link that sends one thing after another, and the clock of the rank that waits for it.

    Attributes:
        free: from when on it has nothing to send.
        waited: seconds that the rank would have waited so far.
        asked: when the link was asked for what comes next; None: when it is asked.
    """

    bytes_per_s: float
    free: float = 0.0
    waited: float = 0.0
    asked: float | None = None

    @property
    def now(self) -> float:
        """Seconds that this thread has computed and would have waited."""
        return thread_time() + self.waited

    def send(self, size: float) -> float:
        """When so many bytes have come that this rank asks for."""
        asked = self.now if self.asked is None else self.asked
        self.free = max(self.free, asked) + size / self.bytes_per_s
        return self.free

    def wait_until(self, moment: float) -> None:
        self.waited += max(0.0, moment - self.now)

    @contextmanager
    def slow(self, *, at_once: bool = False, pieces: int | None = None) -> Iterator[None]:
        """Within this context the large collectives are as slow as the link.

        Args:
            at_once: whether each is waited for when it starts.
            pieces: of a layer's keys at most; None: as context parallelism has it.
        """
        module = context_parallel
        before = module.start_all_gather, module.start_reduce_scatter, module.PIECES

        def held_back(start: Any, sent: float) -> Any:
            def call(out: Tensor, given: Tensor, group: dist.ProcessGroup) -> _HeldBack:
                work = _HeldBack(start(out, given, group), self, self.send(given.nbytes * sent))
                if at_once:
                    work.wait()
                return work

            return call

        gather, scatter, most = before
        module.start_all_gather = held_back(gather, RANKS - 1)
        module.start_reduce_scatter = held_back(scatter, (RANKS - 1) / RANKS)
        module.PIECES = most if pieces is None else pieces
        try:
            yield
        finally:
            module.start_all_gather, module.start_reduce_scatter, module.PIECES = before


class _HeldBack(NamedTuple):
    """A collective whose result comes no sooner than over a slow link."""

    work: dist.Work
    link: _Link
    until: float

    def wait(self) -> None:
        self.work.wait()
        self.link.wait_until(self.until)
