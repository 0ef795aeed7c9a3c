"""Fits a law to runs, with bootstrap intervals, where the runs determine it."""

import numpy as np

from train.experiments.fits.fit import REPLICATES, Fit, Unfit
from train.experiments.fits.law import Law
from train.experiments.fits.missing import missing, undetermined
from train.experiments.fits.points import Floats, Points
from train.experiments.fits.projection import best_exponents, huber_constants, project


def fit(
    law: Law, points: Points, *, huber: bool = False, replicates: int = REPLICATES, seed: int = 0
) -> Fit | Unfit:
    """Fit a law by variable projection, with intervals by the bootstrap over runs and seeds.

    The bootstrap keeps the runs' sizes, lengths and copies, which were chosen, and draws their
    residuals: each replicate gives every group of seeds the residuals of a group that is drawn with
    replacement. Those of one group stay together, because what the law gets wrong of a setting it
    gets wrong for all its seeds. They are scaled by sqrt(groups / (groups - constants)), as a fit
    leaves less than the error.

    Args:
        huber: minimise the Huber loss of the logarithm's error, as most published laws do, and not
            the sum of squares; see `train.experiments.fits.projection.huber_constants`.
        replicates: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        The fit, or what is missing for it.
    """
    if reasons := missing(law, points):
        return Unfit(law, points, tuple(reasons))
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
    size, groups = len(law.coefficients), points.groups
    predicted = law.columns(points, found[size:]) @ found[:size]
    residuals = points.loss - predicted
    residuals *= np.sqrt(len(groups) / (len(groups) - len(law.constants)))
    drawn = []
    for _ in range(replicates):
        loss = predicted.copy()
        for places in groups:
            donor = residuals[groups[rng.integers(len(groups))]]
            loss[places] += rng.choice(donor, len(places), replace=len(places) > len(donor))
        drawn.append(_constants(law, points, loss, found[size:], huber=huber))
    return np.array(drawn)
