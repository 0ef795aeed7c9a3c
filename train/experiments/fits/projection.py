"""Least squares by variable projection: exponents are sought, and coefficients follow from them.

For given exponents the law is linear in its coefficients, so the best ones, none below 0, are those
of non-negative least squares, and what is left to minimise depends on the exponents alone (Golub
and Pereyra 1973). A grid over them finds where to begin: the sum of squares has several minima.
"""

from itertools import product

import numpy as np
from scipy.optimize import least_squares, nnls

from train.experiments.fits.law import Law
from train.experiments.fits.points import Exponents, Floats, Points

GRID = {"phi": (-0.5, 0.0, 0.25, 0.5, 0.75, 1.0, 1.5)}
POWER_GRID = (0.03, 0.06, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.8, 1.1, 1.5)

STARTS = 3
"""The best places of the grid from which a minimum is sought."""

HUBER = 1e-3
"""The error of the logarithm of the loss from which on it counts linearly (arXiv 2203.15556)."""


def project(law: Law, points: Points, loss: Floats, exponents: Exponents) -> Floats:
    """The best coefficients for given exponents.

    Args:
        loss: of each run; that of `points`, or another for the same runs.

    Returns:
        The coefficients in the law's order, each at least 0.
    """
    columns = law.columns(points, exponents)
    scale = columns.max(axis=0)  # N^-a may be 1e-9 beside the constant's 1
    found, _ = nnls(columns / scale, loss)
    return found / scale


def best_exponents(law: Law, points: Points, loss: Floats, near: Floats | None = None) -> Floats:
    """The exponents with the least sum of squares.

    Args:
        near: where to begin; None: anywhere, from the best places of a grid.
    """

    def residual(exponents: Floats) -> Floats:
        left = law.columns(points, exponents) @ project(law, points, loss, exponents) - loss
        return np.asarray(left)

    starts = [near] if near is not None else _best_of_grid(law, points, loss)
    bounds = tuple(np.array(side) for side in zip(*law.bounds, strict=True))
    ends = [
        least_squares(residual, _inside(start, *bounds), bounds=bounds, xtol=1e-10, ftol=1e-12)
        for start in starts
    ]
    return np.asarray(min(ends, key=lambda end: end.cost).x)


def _inside(start: Floats, low: Floats, high: Floats) -> Floats:
    margin = 1e-3 * (high - low)
    return np.clip(start, low + margin, high - margin)


def _best_of_grid(law: Law, points: Points, loss: Floats) -> list[Floats]:
    axes = [GRID.get(name, POWER_GRID) for name in law.exponents]

    def squares(exponents: Floats) -> float:
        left = law.columns(points, exponents) @ project(law, points, loss, exponents) - loss
        return float(left @ left)

    return sorted(map(np.array, product(*axes)), key=squares)[:STARTS]


def huber_constants(law: Law, points: Points, loss: Floats, start: Floats) -> Floats:
    """The constants with the least Huber loss of the error of the loss's logarithm.

    This is the objective of arXiv 2203.15556, with which most published laws are fitted: it is
    indifferent to how far off a few runs are. It is no least squares, so nothing can be projected.

    Args:
        start: the constants to begin with, in the law's order.
    """
    size = len(law.coefficients)

    def residual(values: Floats) -> Floats:
        coefficients = np.exp(values[:size])
        return np.asarray(np.log(law.columns(points, values[size:]) @ coefficients) - np.log(loss))

    smallest = 1e-12 * loss.mean()  # of a coefficient that was projected to 0
    begin = np.concatenate([np.log(np.maximum(start[:size], smallest)), start[size:]])
    options = {"loss": "huber", "f_scale": HUBER, "x_scale": "jac", "max_nfev": 5000}
    end = least_squares(residual, begin, xtol=1e-14, ftol=1e-14, gtol=1e-14, **options)
    return np.concatenate([np.exp(end.x[:size]), end.x[size:]])
