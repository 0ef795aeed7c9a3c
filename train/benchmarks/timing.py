"""Timing pieces of work against each other on a machine that is shared with other programs.

The pieces take turns (A B C A B C ...). A machine that slows down for a while then slows all of
them. A ratio is the median over the turns of the ratio within a turn.
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
    """A benchmark's measurements: a row for each piece of work, and the ratios between them."""

    rows: list[dict[str, Any]]
    ratios: dict[str, float]


def interleaved(
    works: dict[str, Work], repeat: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each piece of work in each of `repeat` turns.

    A first turn is not counted: it compiles, allocates and fills caches.
    """
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(repeat + 1):
        for name, work in works.items():
            # CUDA runs asynchronously: without these, only the launches would be timed.
            _synchronize(device)
            start = perf_counter()
            work()
            _synchronize(device)
            if turn:
                seconds[name].append(perf_counter() - start)
    return seconds


def ratio(seconds: dict[str, list[float]], work: str, base: str) -> float:
    """The median over the turns of the time of `work` over the time of `base`."""
    # Not the ratio of the medians: within one turn both ran in the same state of the machine.
    return median(a / b for a, b in zip(seconds[work], seconds[base], strict=True))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
