"""Fits a law to runs, with bootstrap intervals, where the runs determine it."""

from collections import defaultdict

import numpy as np

from train.experiments.fits.fit import REPLICATES, Fit, Unfit
from train.experiments.fits.law import Law
from train.experiments.fits.missing import missing, undetermined
from train.experiments.fits.points import Floats, Points, Seeds
from train.experiments.fits.projection import best_exponents, huber_constants, project


def fit(
    law: Law, points: Points, *, huber: bool = False, replicates: int = REPLICATES, seed: int = 0
) -> Fit | Unfit:
    """Fit a law by variable projection, with intervals by the bootstrap over runs and seeds.

    A seed shifts the losses of all groups; see `Seeds`. The law is fitted to losses without these
    shifts, so that groups of other seeds can be compared.

    The bootstrap keeps the runs' sizes, lengths and copies, which were chosen, and draws their
    residuals: each replicate gives every group the mean residual of a group that is drawn with
    replacement, because what the law gets wrong of a setting it gets wrong for all its seeds. They
    are scaled by sqrt(groups / (groups - constants)), as a fit leaves less than the error. To the
    runs within a group it gives residuals about such means, from which the shifts are found anew.
    What all seeds have in common is part of E, as Student's t has it for the mean of so many seeds.
    Decays of one trunk are drawn together: see `_Trunks`.

    Args:
        huber: minimise the Huber loss of the logarithm's error, as most published laws do, and not
            the sum of squares; see `train.experiments.fits.projection.huber_constants`. Shifts of
            seeds, which a few wild runs would move, are not taken off then.
        replicates: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        The fit, or what is missing for it.
    """
    if reasons := missing(law, points):
        return Unfit(law, points, tuple(reasons))
    points = points if huber else points.without_shifts()
    found = _constants(law, points, points.loss, huber=huber)
    constants = dict(zip(law.constants, map(float, found), strict=True))
    drawn = _bootstrap(law, points, found, huber=huber, replicates=replicates, seed=seed)
    made = Fit(law, points, constants, drawn)
    ends = {name: made.interval(name)[1:] for name in law.exponents}
    if reasons := undetermined(law, points, constants, ends):
        return Unfit(law, points, tuple(reasons))
    return made


def _constants(
    law: Law, points: Points, loss: Floats, near: Floats | None = None, *, huber: bool = False
) -> Floats:
    """The constants that fit best, in the law's order."""
    exponents = best_exponents(law, points, loss, near)
    found = np.concatenate([project(law, points, loss, exponents), exponents])
    return huber_constants(law, points, loss, found) if huber else found


def _bootstrap(
    law: Law, points: Points, found: Floats, *, huber: bool, replicates: int, seed: int
) -> Floats:
    rng = np.random.default_rng(seed)
    size, seeds = len(law.coefficients), Seeds(points)
    predicted = law.columns(points, found[size:]) @ found[:size]
    error = _Error(points, seeds, points.loss - predicted, len(law.constants))
    drawn = []
    for _ in range(replicates):
        loss = predicted + error.draw(rng)
        if not huber:
            loss -= seeds.shifts(loss)
        one = _constants(law, points, loss, found[size:], huber=huber)
        one[0] += error.draw_of_seeds(rng)
        drawn.append(one)
    return np.array(drawn)


class _Error:
    """What losses differ by from a law, to be drawn from.

    Args:
        residuals: of each run of `points`, whose shifts are taken off.
        constants: how many the law has.
    """

    def __init__(self, points: Points, seeds: Seeds, residuals: Floats, constants: int) -> None:
        self._groups, count = points.groups, len(points.groups)
        means = [residuals[places].mean() for places in self._groups]
        self._means = np.array(means) * np.sqrt(count / (count - constants))
        several = [places for places in self._groups if len(places) > 1]
        about = [residuals[places] - residuals[places].mean() for places in several]
        # A fit of levels and shifts leaves less than the error, too.
        freedom = len(residuals) - count - len(seeds.numbers) + len(seeds.linked)
        self._about = np.concatenate(about) if freedom else np.zeros(1)
        self._about *= np.sqrt(len(self._about) / max(freedom, 1))
        shifts = np.array(list({p.seed: p.shift for p in points.runs}.values()))
        self._seeds = len(shifts)
        # What seeds differ by that no group links is the error of their groups already.
        known = self._seeds > 1 and len(seeds.linked) == 1
        self._of_seeds = shifts.std(ddof=1) / np.sqrt(self._seeds) if known else 0.0
        self._trunks = _Trunks(points, seeds, residuals)

    def draw(self, rng: np.random.Generator) -> Floats:
        """The errors of all runs of a replicate."""
        found = rng.choice(self._about, sum(map(len, self._groups)))
        for places in self._groups:
            found[places] += rng.choice(self._means) - found[places].mean()
        return found + self._trunks.draw(rng)

    def draw_of_seeds(self, rng: np.random.Generator) -> float:
        """The error of the mean of all seeds."""
        return float(self._of_seeds * rng.standard_t(self._seeds - 1)) if self._of_seeds else 0.0


class _Trunks:
    """What the decays of one trunk have in common beyond their seed, to be drawn from.

    A trunk that went well makes all its decays better. The law cannot tell this from the size of
    the model, so its residuals do not show it; the trunks of other seeds do. By the analysis of
    variance of residuals about the means of their groups,

        mean square of the trunks' means = variance of trunks + variance of decays / decays

    With one seed, or of one size, where it is the seed's shift, nothing is drawn.
    """

    def __init__(self, points: Points, seeds: Seeds, residuals: Floats) -> None:
        about = residuals.copy()
        for places in points.groups:
            about[places] -= residuals[places].mean()
        group_of = {place: n for n, places in enumerate(points.groups) for place in places}
        # Trunks of one size are those whose decays are in the same groups.
        sizes: dict[tuple[int, ...], list[list[int]]] = defaultdict(list)
        for trunk in points.trunks:
            sizes[tuple(sorted(group_of[place] for place in trunk))].append(trunk)
        self._sizes, self._runs = list(sizes.values()), len(residuals)
        links = len(seeds.numbers) - len(seeds.linked)
        self._freedom = len(points.trunks) - len(sizes) - links
        decays = sum(map(len, points.trunks))
        within = decays - len({group_of[p] for t in points.trunks for p in t}) - links
        within -= self._freedom
        self._deviation = 0.0
        if self._freedom > 0 and within > 0:
            means = np.array([about[trunk].mean() for trunk in points.trunks])
            left = [about[trunk] - about[trunk].mean() for trunk in points.trunks]
            of_decays = sum(float(x @ x) for x in left) / within
            of_means = float(means @ means) / self._freedom
            each = decays / len(points.trunks)
            self._deviation = float(np.sqrt(max(0.0, of_means - of_decays / each)))

    def draw(self, rng: np.random.Generator) -> Floats:
        """The errors that the trunks of each size have in common, for all runs of a replicate."""
        found = np.zeros(self._runs)
        for trunks in self._sizes if self._deviation else ():
            mean = rng.normal() * self._deviation / np.sqrt(len(trunks))
            for trunk in trunks:
                found[trunk] += mean
        return found
