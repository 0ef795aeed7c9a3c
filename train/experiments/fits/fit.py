"""A law that is fitted to runs, with bootstrap intervals; or why it cannot be."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.stats import norm, t

from train.experiments.fits.law import Law
from train.experiments.fits.missing import missing, undetermined
from train.experiments.fits.points import Floats, Points
from train.experiments.fits.projection import best_exponents, huber_constants, project

LEVEL = 0.95
REPLICATES = 400


class Interval(NamedTuple):
    """A value and the 95 % interval that the bootstrap gives it."""

    value: float
    low: float
    high: float

    def __contains__(self, value: object) -> bool:
        return isinstance(value, (int, float)) and self.low <= value <= self.high


@dataclass(frozen=True)
class Fit:
    """A law with its constants.

    Attributes:
        law: what was fitted.
        points: to which runs.
        constants: by the names of `law.constants`.
        replicates: the constants of each replicate of the bootstrap, (replicates, constants).
    """

    law: Law
    points: Points
    constants: dict[str, float]
    replicates: Floats

    def interval(self, name: str) -> Interval:
        """A constant and its interval."""
        return self.interval_of(self.constants[name], self.replicates[:, self.place(name)])

    @property
    def freedom(self) -> int:
        """Groups of runs beyond the number of constants."""
        return len(self.points.groups) - len(self.law.constants)

    def place(self, name: str) -> int:
        """The column of a constant in `replicates`."""
        return self.law.constants.index(name)

    def interval_of(self, value: float, replicates: Floats) -> Interval:
        """A value and the interval that holds 95 % of its replicates, and more for few groups."""
        return Interval(value, *percentiles(replicates, self.freedom))

    @property
    def residuals(self) -> Floats:
        """By how much each run's loss is above the law's."""
        return self.points.loss - self.law.loss(self.constants, self.points)

    @property
    def error(self) -> float:
        """The root mean square of the residuals."""
        return float(np.sqrt(np.mean(self.residuals**2)))


@dataclass(frozen=True)
class Unfit:
    """A law that these runs do not determine.

    Attributes:
        reasons: sentences that say what is missing.
    """

    law: Law
    points: Points
    reasons: tuple[str, ...]


def percentiles(replicates: Floats, freedom: int) -> tuple[float, float]:
    """The ends of the expanded percentile interval.

    The percentiles of a bootstrap are too close together for few observations, as those of a normal
    distribution instead of Student's t. So they are taken where the t distribution has 95 %
    (Hesterberg 2015, section 4.3: Phi(-t) in place of 2.5 %). No mean of two replicates is taken,
    since some may be infinite.

    Args:
        replicates: the values of one constant.
        freedom: degrees of freedom, at least 1.
    """
    tail = 100 * float(norm.cdf(t.ppf((1 - LEVEL) / 2, freedom)))
    low = np.percentile(replicates, tail, method="lower")
    high = np.percentile(replicates, 100 - tail, method="higher")
    return float(low), float(high)


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
