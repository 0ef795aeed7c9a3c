"""A law that is fitted to runs, with bootstrap intervals; or why it cannot be."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.stats import norm, t

from train.experiments.fits.law import Law
from train.experiments.fits.points import Floats, Points

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
        points: to which runs, without the shifts of their seeds.
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
        """By how much each run's loss is above the law's, without the shift of its seed."""
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


class Fitted(NamedTuple):
    """A fit, and the name of the runs that it is made of."""

    label: str
    fit: Fit


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
