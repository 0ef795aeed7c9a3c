"""Runs of several sizes, lengths and copies whose losses follow a law, as results."""

from collections.abc import Sequence
from typing import Any

from tests.train.experiments.fits.synthetic import synthetic
from tests.train.experiments.results import a_result
from train.experiments.fits.points import Point
from train.experiments.result import Estimate, Heldout, Result


def a_scaled_run(point: Point, **settings: Any) -> Result:
    """A finished run with the parameters, copies, tokens and loss of a point."""
    model = "vanilla" if point.K == 1 else f"phd_cswa-{point.K}-16-32"
    loss = Estimate(value=point.loss)
    heldout = Heldout(bits_per_byte=loss, loss=point.loss, tokens=1000, bytes=1000)
    own = {"model.variant": model.partition("-")[0], "model.K": point.K}
    own |= {"model.window": 16, "model.chunk": 32}
    return a_result(
        name=f"{model} {point.run}",
        model=model,
        size=f"{point.repeated:g}",
        seed=int(point.run[-1]),
        group=f"{model} {point.group} {settings}",
        parameters=int(point.once + point.repeated),
        embedding_parameters=int(point.once),
        tokens=int(point.tokens),
        train_flops=point.flops,
        heldout={"heldout": heldout},
        settings=own | settings,
    )


def scaled_runs(copies: Sequence[int] = (1, 2, 3), **how: Any) -> list[Result]:
    """Vanilla and PHD-CSWA of three sizes and lengths; see `synthetic`."""
    return [a_scaled_run(point) for point in synthetic(copies=copies, **how).runs]
