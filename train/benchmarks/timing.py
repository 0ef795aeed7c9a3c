"""Timing pieces of work against each other on a machine that others use, too.

Every measurement is repeated in turn with the others (A B C A B C ...), so that a machine that
slows down slows all of them; a ratio is the median over the turns of the ratio within a turn.
"""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import torch

Work = Callable[[], Any]


@dataclass(frozen=True)
class Result:
    """What a benchmark measured: a row for each piece of work, and what they mean together."""

    rows: list[dict[str, Any]]
    ratios: dict[str, float]


def interleaved(
    works: dict[str, Work], repeat: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each piece of work, `repeat` times in turn, after one that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(repeat + 1):
        for name, work in works.items():
            _synchronize(device)
            start = perf_counter()
            work()
            _synchronize(device)
            if turn:
                seconds[name].append(perf_counter() - start)
    return seconds


def ratio(seconds: dict[str, list[float]], work: str, base: str) -> float:
    """How many times as long `work` took as `base`: the median over the turns."""
    return median(a / b for a, b in zip(seconds[work], seconds[base], strict=True))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
