"""What copies are worth, in parameters and tokens of a model without them."""

from math import inf

import pytest

from tests.train.experiments.fits.synthetic import LENGTHS, TRUTH, synthetic
from train.experiments.fits.equivalents import equivalents
from train.experiments.fits.fit import Fit
from train.experiments.fits.fitting import fit
from train.experiments.fits.law import COPIES, COPIES_AT_ONE_LENGTH, Law
from train.experiments.fits.points import Point, Points


def fitted(law: Law, points: Points) -> Fit:
    found = fit(law, points, replicates=40)
    assert isinstance(found, Fit), found.reasons
    return found


@pytest.fixture(scope="module")
def exact() -> Fit:
    return fitted(COPIES, synthetic(noise=0.0, seeds=1))


def test_models_that_are_equivalent_have_one_loss(exact: Fit) -> None:
    point = exact.points.runs[1]
    assert point.K == 2
    found = equivalents(exact, point)
    assert found.tokens is not None
    larger = point._replace(K=1, repeated=found.parameters.value - point.once)
    longer = point._replace(K=1, tokens=found.tokens.value)
    losses = COPIES.loss(exact.constants, Points((point, larger, longer)))
    assert losses[1:] == pytest.approx(losses[0], rel=1e-9)
    assert found.parameters.value == pytest.approx(
        point.once + 2 ** TRUTH["phi"] * point.repeated, rel=1e-4
    )
    assert found.tokens.value > point.tokens


def test_vanilla_is_its_own_equivalent(exact: Fit) -> None:
    point = exact.points.runs[0]
    assert point.K == 1
    found = equivalents(exact, point)
    assert found.tokens is not None
    assert found.parameters.value == pytest.approx(point.once + point.repeated)
    assert found.tokens.value == pytest.approx(point.tokens)


def test_what_no_number_of_tokens_reaches_is_infinite(exact: Fit) -> None:
    # Of so many tokens that more of them change nothing any more.
    found = equivalents(exact, Point("", "", 1e4, 1e5, 8, 1e13, 0.0, 0.0))
    assert found.tokens is not None
    assert found.tokens.value == found.tokens.high == inf


def test_of_one_length_no_equivalent_tokens_are_known() -> None:
    found = fitted(COPIES_AT_ONE_LENGTH, synthetic(lengths=LENGTHS[:1], seeds=3))
    assert equivalents(found, found.points.runs[-1]).tokens is None


def test_noise_gives_the_equivalent_an_interval_around_the_truth() -> None:
    found = fitted(COPIES, synthetic(seed=5))
    point = next(point for point in found.points.runs if point.K == 3)
    parameters = equivalents(found, point).parameters
    assert point.once + 3 ** TRUTH["phi"] * point.repeated in parameters
    assert parameters.low < parameters.value < parameters.high
