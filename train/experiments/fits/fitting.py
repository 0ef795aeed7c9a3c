"""Fits a law to runs, with bootstrap intervals, where the runs determine it."""

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

    def draw(self, rng: np.random.Generator) -> Floats:
        """The errors of all runs of a replicate."""
        found = rng.choice(self._about, sum(map(len, self._groups)))
        for places in self._groups:
            found[places] += rng.choice(self._means) - found[places].mean()
        return found

    def draw_of_seeds(self, rng: np.random.Generator) -> float:
        """The error of the mean of all seeds."""
        return float(self._of_seeds * rng.standard_t(self._seeds - 1)) if self._of_seeds else 0.0
