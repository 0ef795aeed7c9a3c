"""Timing pieces of work against a base on a machine that is shared with other programs.

Each piece of work is timed between two runs of the base, and its ratio is that to their mean:

    base  A  base  B  base  C  base        one turn
      |___|___|
      A over the mean of the bases around it

A machine that slows down for a while, or from turn to turn, then slows both sides of a ratio.

There is one statistic, the median of these ratios over the turns. The time that is told of a piece
of work follows from it: the base's median time, multiplied by the ratio. So a table never
contradicts itself, as medians of times beside medians of ratios can: on a machine with two speeds,
vanilla may have its median in the one and another work in the other.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

Work = Callable[[], Any]

FLUSHED_BYTES = 1 << 29
"""Written before each timed run on CUDA: 512 MiB, ten times an H200's L2 cache; about 0.13 ms."""


class Ratio(NamedTuple):
    """The median of the turns' ratios, and the quartiles, between which half of them lie."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> "Ratio":
        """The median and quartiles of some values; of a single one, that value."""
        if len(values) < 2:
            return cls(*[values[0]] * 3)
        low, _, high = quantiles(values, method="inclusive")
        return cls(median(values), low, high)


class Kind(Enum):
    """What a bar stands for, which its colour tells."""

    BASE = "the base"
    OURS = "this project"
    PEER = "to compare with"
    CEILING = "the ceiling"


class Bar(NamedTuple):
    """A bar of a chart, and a line from its low to its high end where they are known."""

    label: str
    value: float
    kind: Kind = Kind.OURS
    low: float | None = None
    high: float | None = None


class Panel(NamedTuple):
    """A chart of horizontal bars; `unit` is what their lengths are.

    Attributes:
        marks: values that a dashed line shows, by what they are.
    """

    title: str
    unit: str
    bars: list[Bar]
    marks: Mapping[str, float] = MappingProxyType({})


@dataclass(frozen=True)
class Times:
    """Seconds of pieces of work, turn by turn, and of the base beside each.

    Attributes:
        base: the name of the work that the others are compared with.
        seconds: by name; of the base, all its runs.
        beside: the base's seconds beside each turn of a work, by the name of the work.
    """

    base: str
    seconds: dict[str, list[float]]
    beside: dict[str, list[float]]

    def ratio(self, name: str) -> Ratio:
        """A work's time over the base's.

        The base's own median is 1. Its quartiles are those of a run over the mean of the runs
        before and after it. They tell how much of the other spreads is the machine's.
        """
        if name != self.base:
            pairs = zip(self.seconds[name], self.beside[name], strict=True)
            return Ratio.of([spent / base for spent, base in pairs])
        runs = self.seconds[name]
        noise = [2 * b / (a + c) for a, b, c in zip(runs, runs[1:], runs[2:], strict=False)]
        _, low, high = Ratio.of(noise or [1.0])
        return Ratio(1.0, min(low, 1.0), max(high, 1.0))

    def typical_s(self, name: str) -> float:
        """Seconds of a work: the base's median, multiplied by the work's ratio."""
        return median(self.seconds[self.base]) * self.ratio(name).median

    def columns(self, name: str) -> dict[str, Any]:
        """What a row tells of a work: its time, its ratio to the base and what they come from."""
        ratio, base = self.ratio(name), self.base
        return {
            "ms": self.typical_s(name) * 1e3,
            f"x_{base}": ratio.median,
            "x_low": ratio.low,
            "x_high": ratio.high,
            "seconds": self.seconds[name],
            f"{base}_seconds": self.beside.get(name, self.seconds[name]),
        }

    def divided(self, number: int) -> "Times":
        """The times of one of `number` equal parts of each piece of work."""
        seconds, beside = (
            {name: [value / number for value in spent] for name, spent in times.items()}
            for times in (self.seconds, self.beside)
        )
        return replace(self, seconds=seconds, beside=beside)

    def with_works_of(self, other: "Times") -> "Times":
        """Add works that had turns of their own beside the same base."""
        added = {name: spent for name, spent in other.seconds.items() if name != self.base}
        return replace(self, seconds=self.seconds | added, beside=self.beside | other.beside)


@dataclass(frozen=True)
class Result:
    """A benchmark's measurements.

    Attributes:
        rows: one for each piece of work. Keys that end in `seconds` hold single measurements.
        ratios: the numbers that the benchmark is run for.
        subject: the model that was measured; "" if there was none.
        files: what it has written already, such as charts.
        panels: what is to be drawn into `<name>.png`.
        method: what the rows are; "": medians of turns.
        notes: what comes of it, in words, a line each.
    """

    rows: list[dict[str, Any]]
    ratios: dict[str, float]
    subject: str = ""
    files: list[Path] = field(default_factory=list)
    panels: list[Panel] = field(default_factory=list)
    method: str = ""
    notes: list[str] = field(default_factory=list)


Keep = Callable[[Result], None]
"""Is called with all that has been measured so far, whenever there is more of it."""


def keep_nothing(_: Result) -> None:
    """For those who wait for the end."""


def beside(
    base: str, base_work: Work, works: dict[str, Work], repeat: int, device: torch.device
) -> Times:
    """Time each piece of work between two runs of the base, in `repeat` turns.

    A first turn is not counted: it compiles, allocates and fills caches.
    """
    runs: list[float] = []
    times = Times(base, {base: runs} | {name: [] for name in works}, {name: [] for name in works})
    for turn in range(repeat + 1):
        before = _seconds(base_work, device)
        counted = [before]
        for name, work in works.items():
            spent = _seconds(work, device)
            after = _seconds(base_work, device)
            counted.append(after)
            if turn:
                times.seconds[name].append(spent)
                times.beside[name].append((before + after) / 2)
            before = after
        runs += counted if turn else []
    return times


def interleaved(
    works: dict[str, Work], repeat: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each piece of work in each of `repeat` turns (A B C A B C ...).

    For works that follow from each other, so that no base can come between them. As in `beside`,
    a first turn is not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(repeat + 1):
        for name, work in works.items():
            spent = _seconds(work, device)
            if turn:
                seconds[name].append(spent)
    return seconds


def within_turns(base: str, seconds: dict[str, list[float]]) -> Times:
    """The times of `interleaved`, each compared with the base's of the same turn."""
    return Times(base, seconds, {name: seconds[base] for name in seconds if name != base})


def _seconds(work: Work, device: torch.device) -> float:
    if device.type == "cuda":
        return _cuda_seconds(work, device)
    start = perf_counter()
    work()
    return perf_counter() - start


def _cuda_seconds(work: Work, device: torch.device) -> float:
    """Seconds on the device's own clock, from an empty cache.

    The write that empties the L2 cache takes longer than launching the first kernels, so that the
    device does not wait for the host, as in a run, where the host is ahead.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=device).zero_()
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3
