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
        loss: at the end; less the shift, once it is known.
        seed: of the run.
        shift: by how much the loss of this seed is above that of all seeds, in every group.
        trunk: equal for decays of one trunk; empty for other runs.
    """

    run: str
    group: str
    once: float
    repeated: float
    K: int
    tokens: float
    flops: float
    loss: float
    seed: int = 0
    shift: float = 0.0
    trunk: str = ""


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

    @cached_property
    def trunks(self) -> list[list[int]]:
        """The places of the runs of each trunk that has several decays among them."""
        places = defaultdict(list)
        for place, point in enumerate(self.runs):
            places[point.trunk].append(place)
        return [found for trunk, found in places.items() if trunk and len(found) > 1]

    def without_shifts(self) -> "Points":
        """The runs with the losses of a seed that is neither easier nor harder than the others."""
        shifts = Seeds(self).shifts(self.loss)
        runs = zip(self.runs, map(float, shifts), strict=True)
        return Points(tuple(p._replace(loss=p.loss - s, shift=p.shift + s) for p, s in runs))


class Seeds:
    """What the seeds of some runs have in common.

    A seed chooses the first weights and the order of the text, and so shifts the losses of all
    groups by about as much, which may be more than groups differ by. So a group's mean is compared
    with another's only after the shifts are taken off: loss = level of the group + shift of the
    seed, by least squares over all runs, where the shifts of seeds that groups link sum to 0.

    Attributes:
        numbers: the seeds, in rising order.
        linked: the places in `numbers` of seeds that are linked: a group has two of them, or a
            chain of such groups leads from one to the other.
    """

    def __init__(self, points: Points) -> None:
        seeds = [point.seed for point in points.runs]
        self.numbers = sorted(set(seeds))
        self._of_run = np.array([self.numbers.index(seed) for seed in seeds], dtype=int)
        self.linked = _linked([set(self._of_run[places]) for places in points.groups])
        # A matrix (runs, groups + seeds) that picks a level and a shift for each run.
        chosen = np.zeros((len(seeds), len(points.groups) + len(self.numbers)))
        for column, places in enumerate(points.groups):
            chosen[places, column] = 1
        chosen[np.arange(len(seeds)), len(points.groups) + self._of_run] = 1
        found = np.linalg.pinv(chosen)[len(points.groups) :]
        for places in self.linked:
            found[places] -= found[places].mean(axis=0)
        self._shifts = found

    def of_each(self, loss: Floats) -> Floats:
        """The shift of each seed in `numbers`, given the losses of the runs."""
        return np.asarray(self._shifts @ loss)

    def shifts(self, loss: Floats) -> Floats:
        """The shift of each run's seed, given the losses of the runs."""
        return self.of_each(loss)[self._of_run]


def _linked(groups: Sequence[set[int]]) -> list[list[int]]:
    """Sets that have a member in common, and those in common with these, as one each.

    >>> _linked([{0}, {1, 2}, {0, 3}, {3}])
    [[0, 3], [1, 2]]
    """
    found: list[set[int]] = []
    for group in groups:
        apart = [other for other in found if not other & group]
        found = [*apart, group.union(*(other for other in found if other & group))]
    return sorted(sorted(each) for each in found)
