"""Losses of runs and the laws that were fitted to them."""

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes

from train.experiments import drawings
from train.experiments.charts import Chart, Panel
from train.experiments.drawings import Axis, Row, power
from train.experiments.experiment import Experiment
from train.experiments.fits.families import source_of_fits, variants
from train.experiments.fits.fit import Fit, Fitted
from train.experiments.fits.law import Law, Quantity, Term
from train.experiments.fits.points import Floats, Point, Points
from train.experiments.theme import Style, styles

AXES: dict[Quantity, Axis] = {
    "parameters": Axis("parameters", drawings.tokens),
    "tokens": Axis("tokens", drawings.tokens),
    "FLOPs": Axis("training FLOPs", power),
}


class Line(NamedTuple):
    """A law as it is drawn."""

    style: Style
    x: Floats
    y: Floats


class Looks:
    """One style for each variant, whatever its size and length.

    Args:
        fits: whose runs are drawn.
        experiment: that has these runs.
    """

    def __init__(self, fits: Sequence[Fitted], experiment: Experiment) -> None:
        used = {point.run for fitted in fits for point in fitted.fit.points.runs}
        found = variants(run for run in experiment.results if run.name in used)
        look = styles({family.label: family.runs[0].model for family in found})
        self.of_run = {run.name: look[family.label] for family in found for run in family.runs}
        self.legend = tuple(look.items())


def law_chart(fits: Sequence[Fitted], experiment: Experiment) -> Chart:
    """The losses with the fitted curves, over each quantity of the laws."""
    looks = Looks(fits, experiment)
    quantities = dict.fromkeys(term.of for fitted in fits for term in fitted.fit.law.terms)
    return Chart(
        "laws",
        "Losses at the end, and the fitted laws",
        tuple(_law_panel(quantity, fits, looks, experiment) for quantity in quantities),
        source_of_fits(fits, experiment.results),
        looks.legend,
        "Over parameters: the longest runs of each size. Over tokens: the largest models. The "
        "shifts that seeds have in common are taken off; bars reach from the lowest to the highest "
        "seed.",
    )


def _law_panel(
    quantity: Quantity, fits: Sequence[Fitted], looks: Looks, experiment: Experiment
) -> Panel:
    rows: list[Row] = []
    lines: list[Line] = []
    for _, fit in fits:
        term = next((term for term in fit.law.terms if term.of == quantity), None)
        if term is None:
            continue
        points = _slice(quantity, fit.points)
        x = fit.law.base(term, points, [])
        rows += _rows(points, x, points.loss, looks)
        between = _between(points, fit.law, term)
        style = looks.of_run[points.runs[0].run]
        curve = fit.law.loss(fit.constants, between)
        lines.append(Line(style, fit.law.base(term, between, []), curve))
    axis, y = AXES[quantity], Axis(experiment.measure.unit, "{:.3g}".format)
    alt = f"The {experiment.measure.words} over {axis.label}, with fitted curves."
    draw = partial(_draw, rows=rows, lines=lines, x=axis, y=y)
    return Panel(f"over-{quantity.lower()}", alt, draw)


def _slice(quantity: Quantity, points: Points) -> Points:
    """The longest runs of each size, or all lengths of the largest models; of a ladder, all."""
    if quantity == "FLOPs":
        return points
    sizes = [p.once + p.repeated for p in points.runs]
    longest: dict[float, float] = defaultdict(float)
    for size, p in zip(sizes, points.runs, strict=True):
        longest[size] = max(longest[size], p.tokens)
    pairs = zip(sizes, points.runs, strict=True)
    if quantity == "tokens":
        return Points(tuple(p for size, p in pairs if size == max(sizes)))
    return Points(tuple(p for size, p in pairs if p.tokens == longest[size]))


def _between(points: Points, law: Law, term: Term) -> Points:
    """Runs that never were, on straight lines in logarithms between those that are drawn."""
    by_x = {float(x): p for x, p in zip(law.base(term, points, []), points.runs, strict=True)}
    known = sorted(by_x)
    places = np.geomspace(known[0], known[-1], 60)

    def at(name: str) -> list[float]:
        values = np.array([getattr(by_x[x], name) for x in known])
        return np.exp(np.interp(np.log(places), np.log(known), np.log(values))).tolist()

    columns = [at(name) for name in ("once", "repeated", "tokens", "flops")]
    K = points.runs[0].K
    return Points(
        tuple(
            Point("", "", once, repeated, K, tokens, flops, 0.0)
            for once, repeated, tokens, flops in zip(*columns, strict=True)
        )
    )


def phi_chart(fits: Sequence[Fitted], experiment: Experiment) -> Chart:
    """The losses of all K over the parameters that they count as: one curve, if the law holds."""
    looks = Looks(fits, experiment)
    return Chart(
        "phi",
        "Losses of all K on one curve",
        tuple(_phi_panel(place, fitted, looks, experiment) for place, fitted in enumerate(fits)),
        source_of_fits(fits, experiment.results),
        looks.legend,
        "L = E + A (N_once + K^phi N_rep)^-a + B D^-b (arXiv 2604.21106). N_once are the "
        "parameters of embedding and head, N_rep those of the blocks. What the law has for the "
        "data is taken off, and the shifts that seeds have in common. The better the law, the "
        "closer all runs are to the curve.",
    )


def _phi_panel(place: int, fitted: Fitted, looks: Looks, experiment: Experiment) -> Panel:
    label, fit = fitted
    term, constants = fit.law.terms[0], fit.constants
    x = fit.law.base(term, fit.points, [constants[name] for name in fit.law.exponents])
    places = np.geomspace(x.min(), x.max(), 60)
    plain = next(point.run for point in fit.points.runs if point.K == 1)
    curve = constants["E"] + constants["A"] * places ** -constants["a"]
    draw = partial(
        _draw,
        rows=_rows(fit.points, x, fit.points.loss - _of_data(fit), looks),
        lines=[Line(looks.of_run[plain], places, curve)],
        x=Axis("N_once + K^phi N_rep", drawings.tokens),
        y=Axis(experiment.measure.unit + (", without B D^-b" if "B" in constants else "")),
    )
    alt = f"The losses of {label} and of vanilla over the parameters that they count as."
    return Panel(f"family-{place}", alt, draw)


def _of_data(fit: Fit) -> Floats:
    """What the law has for the data, for each run; 0 if it has no such term."""
    if "B" not in fit.constants:
        return np.zeros(len(fit.points.runs))
    return np.asarray(fit.constants["B"] * fit.points.tokens ** -fit.constants["b"])


def _rows(points: Points, x: Floats, y: Floats, looks: Looks) -> list[Row]:
    """A point for each group of seeds, with a bar from its lowest to its highest seed."""
    rows = []
    for places in points.groups:
        losses = y[places]
        ends = (float(losses.min()), float(losses.max())) if len(places) > 1 else (None, None)
        point = drawings.Point(float(x[places[0]]), float(losses.mean()), *ends)
        rows.append(Row(looks.of_run[points.runs[places[0]].run], [point], joined=False))
    return rows


def _draw(axes: Axes, rows: Sequence[Row], lines: Sequence[Line], x: Axis, y: Axis) -> None:
    for style, xs, ys in lines:
        drawn = axes.plot(xs, ys, color=style.color, linewidth=1.4, zorder=1)
        drawings.mark_series(drawn[0], style)
    drawings.draw_points(axes, rows, x, y, log=True)
