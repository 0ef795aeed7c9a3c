"""Which law the runs of a variant can bear."""

from typing import NamedTuple

from train.experiments.fits.fit import Fit, Unfit
from train.experiments.fits.fitting import fit
from train.experiments.fits.law import (
    ALONG_LADDER,
    COPIES,
    COPIES_AT_ONE_LENGTH,
    OVER_DATA,
    OVER_SIZE,
    SIZE_AND_DATA,
    Law,
)
from train.experiments.fits.missing import VALUES, different, follows
from train.experiments.fits.points import Points


class Choice(NamedTuple):
    """What came of the law that was asked for, and of a lesser one where it is refused.

    Attributes:
        fit: None if no law can be fitted.
        refused: what the law that was asked for lacks; None if it is the one that was fitted.
    """

    fit: Fit | None
    refused: Unfit | None


def over_size_and_data(points: Points) -> Choice:
    """The law over size and data; or that over what the runs have several values of."""
    return _choose(SIZE_AND_DATA, _lesser(points), points)


def with_copies(points: Points) -> Choice:
    """The law with phi; without the term of the data where all runs have one length."""
    one_length = points.runs and different(points.tokens) == 1
    return _choose(COPIES, COPIES_AT_ONE_LENGTH if one_length else None, points)


def _lesser(points: Points) -> Law | None:
    sizes, lengths = (different(values) for values in (points.parameters, points.tokens))
    if sizes >= VALUES and lengths == 1:
        return OVER_SIZE
    if sizes == 1 and lengths >= VALUES:
        return OVER_DATA
    on_a_line = sizes >= VALUES and follows(points.tokens, points.parameters)
    return ALONG_LADDER if on_a_line else None


def _choose(law: Law, lesser: Law | None, points: Points) -> Choice:
    found = fit(law, points)
    if isinstance(found, Fit):
        return Choice(found, None)
    other = fit(lesser, points) if lesser else None
    return Choice(other if isinstance(other, Fit) else None, found)
