"""Runs as a fit sees them: parameters, copies, tokens, FLOPs and the loss at the end."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

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
