"""Runs as a fit sees them: parameters, copies, tokens, FLOPs and the loss at the end."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from train.experiments.result import Result

Floats = NDArray[np.float64]
Exponents = Sequence[float] | Floats


class Point(NamedTuple):
    """One run.

    Attributes:
        run: its name.
        group: equal for runs that differ in nothing but their seed.
        once: N_once, the parameters that a token passes once: the embedding and the head.
        repeated: N_rep, the parameters that every copy of a token passes: those of the blocks.
        K: copies of each token; 1 of vanilla.
        tokens: D, of the whole run.
        flops: C, of the whole training.
        loss: at the end.
    """

    run: str
    group: str
    once: float
    repeated: float
    K: int
    tokens: float
    flops: float
    loss: float


@dataclass(frozen=True)
class Points:
    """The runs of a fit, each property as an array over them; see `Point`."""

    runs: tuple[Point, ...]

    @cached_property
    def once(self) -> Floats:
        return np.array([point.once for point in self.runs])

    @cached_property
    def repeated(self) -> Floats:
        return np.array([point.repeated for point in self.runs])

    @cached_property
    def K(self) -> Floats:  # noqa: N802
        return np.array([float(point.K) for point in self.runs])

    @cached_property
    def tokens(self) -> Floats:
        return np.array([point.tokens for point in self.runs])

    @cached_property
    def flops(self) -> Floats:
        return np.array([point.flops for point in self.runs])

    @cached_property
    def loss(self) -> Floats:
        return np.array([point.loss for point in self.runs])

    @property
    def parameters(self) -> Floats:
        return self.once + self.repeated

    @cached_property
    def groups(self) -> list[list[int]]:
        """The places of the runs of each group."""
        places = defaultdict(list)
        for place, point in enumerate(self.runs):
            places[point.group].append(place)
        return list(places.values())


def points_of(results: Iterable[Result], loss: Callable[[Result], float | None]) -> Points:
    """The finished runs that have a loss; of several settings of one size and length, the best.

    Of groups of runs with equal parameters, copies and tokens, those with the least mean loss are
    taken, as a law says what a size and a length can reach. So a sweep over learning rates gives
    one point.

    Args:
        results: runs of one variant, or of one variant and of vanilla.
        loss: the loss of a run; None if it has none.
    """
    points = [
        _point(result, value)
        for result in results
        if result.status == "finished" and (value := loss(result)) is not None
    ]
    rivals: dict[tuple[float, ...], dict[str, list[Point]]] = defaultdict(lambda: defaultdict(list))
    for point in points:
        rivals[point.once, point.repeated, point.K, point.tokens][point.group].append(point)
    best = (min(groups.values(), key=_mean_loss) for groups in rivals.values())
    return Points(tuple(point for group in best for point in group))


def _mean_loss(points: Sequence[Point]) -> float:
    return fmean(point.loss for point in points)


def _point(result: Result, loss: float) -> Point:
    return Point(
        run=result.name,
        group=result.group,
        once=result.embedding_parameters,
        repeated=result.parameters - result.embedding_parameters,
        K=copies(result),
        tokens=result.tokens,
        flops=result.train_flops,
        loss=loss,
    )


def copies(result: Result) -> int:
    """K of a run; 1 of vanilla.

    The name of the variant tells it: `phd_cswa-2-16-32`, `naive_repeat-3`, `vanilla`.
    """
    return int(result.model.split("-")[1]) if "-" in result.model else 1
