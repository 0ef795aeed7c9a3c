"""The mean of a few seeds, and how sure it is."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy.stats import t

LEVEL = 0.95


@dataclass(frozen=True)
class Spread:
    """A value over the seeds of a group.

    Attributes:
        mean: over the seeds.
        deviation: the standard deviation of a seed (with n - 1); None for one seed.
        low, high: the 95 % confidence interval of the mean by Student's t; None for one seed.
        least, greatest: of the seeds; None for one seed.
        seeds: how many.
    """

    mean: float
    deviation: float | None
    low: float | None
    high: float | None
    least: float | None
    greatest: float | None
    seeds: int


def spread(values: Sequence[float]) -> Spread:
    """The spread of the values of a group's seeds.

    >>> found = spread([1.0, 2.0, 3.0])
    >>> found.mean, found.deviation, round(found.low, 2), round(found.high, 2)
    (2.0, 1.0, -0.48, 4.48)
    >>> spread([1.0])
    Spread(mean=1.0, deviation=None, low=None, high=None, least=None, greatest=None, seeds=1)
    """
    n, mean = len(values), fmean(values)
    if n == 1:
        return Spread(mean, None, None, None, None, None, n)
    deviation = stdev(values)
    half = float(t.ppf(0.5 + LEVEL / 2, n - 1)) * deviation / n**0.5
    return Spread(mean, deviation, mean - half, mean + half, min(values), max(values), n)
