"""How many parameters or tokens a model without further copies would need for the same loss."""

from typing import NamedTuple

import numpy as np

from train.experiments.fits.fit import Fit, Interval
from train.experiments.fits.points import Point


class Equivalents(NamedTuple):
    """What K copies are worth at one size and length.

    Attributes:
        parameters: N_once + K^phi N_rep, of a model with K = 1 and the same tokens.
        tokens: of a model with K = 1 and the same parameters; infinite where no number of tokens
            gives it this loss. None: the law knows one length only.
    """

    parameters: Interval
    tokens: Interval | None


def equivalents(fit: Fit, point: Point) -> Equivalents:
    """What the copies of a run are worth, by a fit with phi.

    With N = N_once + N_rep and N' = N_once + K^phi N_rep, the tokens D' are those with
    A N^-a + B D'^-b = A N'^-a + B D^-b.

    Args:
        fit: of a law with copies.
        point: the run; its loss is not used.
    """
    assert fit.law.copies, fit.law.formula
    all_of = {name: fit.replicates[:, fit.place(name)] for name in fit.law.constants}
    one = {name: np.array([value]) for name, value in fit.constants.items()}

    def effective(constants: dict[str, np.ndarray]) -> np.ndarray:
        return np.asarray(point.once + point.K ** constants["phi"] * point.repeated)

    def tokens(constants: dict[str, np.ndarray]) -> np.ndarray:
        plain = (point.once + point.repeated) ** -constants["a"]
        gain = constants["A"] * (plain - effective(constants) ** -constants["a"])
        left = constants["B"] * point.tokens ** -constants["b"] - gain
        with np.errstate(divide="ignore", invalid="ignore"):
            found = (left / constants["B"]) ** (-1 / constants["b"])
        return np.where(left > 0, found, np.inf)

    parameters = fit.interval_of(float(effective(one)[0]), effective(all_of))
    if "b" not in fit.law.constants:
        return Equivalents(parameters, None)
    return Equivalents(parameters, fit.interval_of(float(tokens(one)[0]), tokens(all_of)))
