"""The constants of fitted laws, what copies are worth, and the runs behind them."""

from collections.abc import Sequence
from math import isinf

from train.experiments import drawings
from train.experiments.drawings import power
from train.experiments.experiment import Experiment
from train.experiments.fits.equivalents import equivalents
from train.experiments.fits.families import source_of_fits
from train.experiments.fits.fit import REPLICATES, Fitted, Interval
from train.experiments.fits.points import Point
from train.experiments.tables import Cell, Column, Table, number, signed, text

CONSTANTS = ("E", "A", "a", "B", "b", "phi")

METHOD = (
    "Least squares of the loss, by variable projection with coefficients of at least 0. Brackets "
    f"hold 95 % intervals by {REPLICATES} replicates of a bootstrap over groups of seeds, with "
    "sizes and lengths as they are. A seed shifts the losses of all groups by about as much; these "
    "shifts are taken off, so that groups need not have the same seeds, and E is that of their "
    "mean. The error is the root mean square of what the law leaves. Of "
    "several settings of one size and length, the best is taken. Only losses at the end of a run "
    "count, where the learning rate has fallen. E also holds what these runs do not vary."
)

WORTH = (
    "What a model with K = 1 needs for the same loss: so many parameters and the same tokens, or "
    "the same parameters and so many tokens (none: no number of tokens suffices). Brackets hold 95 "
    "% intervals. The last column is the price in training FLOPs, next to K = 1 of that size and "
    "length."
)


def bracketed(interval: Interval, form: str = "{:.3g}") -> Cell:
    """A value with its interval.

    >>> bracketed(Interval(0.46, 0.4, 0.53)).text
    '0.46 [0.4, 0.53]'
    """
    if isinf(interval.value):
        return Cell("none", None)
    ends = ["no end" if isinf(end) else form.format(end) for end in interval[1:]]
    return Cell(f"{form.format(interval.value)} [{', '.join(ends)}]", interval.value)


def in_millions(interval: Interval) -> Cell:
    """Parameters or tokens with their interval, in millions; the value is in ones."""
    shown = bracketed(Interval(*(end / 1e6 for end in interval)))
    return shown if shown.value is None else Cell(shown.text, interval.value)


def laws(fits: Sequence[Fitted], experiment: Experiment) -> Table:
    """A line for each fit."""
    shown = [name for name in CONSTANTS if any(name in fit.constants for _, fit in fits)]
    columns = (
        Column("runs", "runs", numeric=False),
        Column("law", "law", numeric=False),
        *(Column(name, name) for name in shown),
        Column("error", "error"),
        Column("groups", "groups"),
    )
    rows = tuple(
        (
            text(label),
            text(fit.law.formula),
            *(
                bracketed(fit.interval(name)) if name in fit.constants else number(None)
                for name in shown
            ),
            number(fit.error, "{:.2g}"),
            number(len(fit.points.groups), "{:d}"),
        )
        for label, fit in fits
    )
    return Table(
        "laws", "Fitted laws", columns, rows, source_of_fits(fits, experiment.results), METHOD
    )


def equivalent(fits: Sequence[Fitted], experiment: Experiment) -> Table:
    """What the copies are worth at each size and length, by fits with phi."""
    columns = (
        Column("runs", "runs", numeric=False),
        Column("K", "K"),
        Column("parameters", "parameters"),
        Column("tokens", "tokens"),
        Column("equivalent_parameters", "as good as", "million parameters"),
        Column("parameters_ratio", "parameters", "x"),
        Column("equivalent_tokens", "as good as", "million tokens"),
        Column("flops_ratio", "training", "x FLOPs"),
    )
    rows = tuple(row for fitted in fits for row in _worth(fitted))
    return Table(
        "equivalents",
        "What copies are worth",
        columns,
        rows,
        source_of_fits(fits, experiment.results),
        WORTH,
    )


def _worth(fitted: Fitted) -> list[tuple[Cell, ...]]:
    label, fit = fitted
    settings = [fit.points.runs[places[0]] for places in fit.points.groups]
    plain = {_size_and_length(p): p.flops for p in settings if p.K == 1}
    rows: list[tuple[Cell, ...]] = []
    for p in sorted(settings, key=lambda p: (p.K, p.repeated, p.tokens)):
        if p.K == 1:
            continue
        worth, own = equivalents(fit, p), p.once + p.repeated
        cost = plain.get(_size_and_length(p))
        rows.append(
            (
                text(label),
                number(p.K, "{:d}"),
                Cell(drawings.tokens(own), own),
                Cell(drawings.tokens(p.tokens), p.tokens),
                in_millions(worth.parameters),
                bracketed(Interval(*(end / own for end in worth.parameters))),
                in_millions(worth.tokens) if worth.tokens else number(None),
                number(p.flops / cost if cost else None),
            )
        )
    return rows


def _size_and_length(point: Point) -> tuple[float, ...]:
    return point.once, point.repeated, point.tokens


def constants(fits: Sequence[Fitted], experiment: Experiment) -> Table:
    """A line for each constant, with its interval."""
    columns = (
        Column("runs", "runs", numeric=False),
        Column("law", "law", numeric=False),
        Column("constant", "constant", numeric=False),
        Column("value", "value"),
        Column("low", "from"),
        Column("high", "to"),
    )
    rows = tuple(
        (
            text(label),
            text(fit.law.formula),
            text(name),
            *(number(value, "{:.4g}") for value in fit.interval(name)),
        )
        for label, fit in fits
        for name in fit.law.constants
    )
    return Table(
        "fit-constants", "Constants", columns, rows, source_of_fits(fits, experiment.results)
    )


def points(fits: Sequence[Fitted], experiment: Experiment) -> Table:
    """A line for each run of each fit, with the loss that the law gives it."""
    columns = (
        Column("fit", "fit", numeric=False),
        Column("law", "law", numeric=False),
        Column("run", "run", numeric=False),
        Column("n_once", "N_once"),
        Column("n_rep", "N_rep"),
        Column("K", "K"),
        Column("tokens", "tokens"),
        Column("train_flops", "training", "FLOPs"),
        Column("loss", "loss"),
        Column("seed", "seed"),
        Column("shift", "shift", "of the seed"),
        Column("law_loss", "of the law"),
    )
    rows = tuple(
        (
            text(label),
            text(fit.law.formula),
            text(point.run),
            Cell(drawings.tokens(point.once), point.once),
            Cell(drawings.tokens(point.repeated), point.repeated),
            number(point.K, "{:d}"),
            Cell(drawings.tokens(point.tokens), point.tokens),
            Cell(power(point.flops), point.flops),
            number(point.loss + point.shift, "{:.4f}"),
            Cell(str(point.seed), point.seed),
            Cell(signed(point.shift, "{:+.4f}"), point.shift),
            number(float(of_law) + point.shift, "{:.4f}"),
        )
        for label, fit in fits
        for point, of_law in zip(
            fit.points.runs, fit.law.loss(fit.constants, fit.points), strict=True
        )
    )
    return Table("fit-points", "Runs", columns, rows, source_of_fits(fits, experiment.results))
