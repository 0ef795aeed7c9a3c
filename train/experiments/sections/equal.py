"""The same at equal tokens, training FLOPs, time, decode latency and KV bytes."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from matplotlib.axes import Axes

from conf.wording import byte_size, duration, plural
from train.experiments import drawings
from train.experiments.charts import Chart, Panel
from train.experiments.comparison import (
    ALIKE,
    ALIKE_MS,
    ALIKE_S,
    AgainstVanilla,
    Cost,
    EqualCost,
    Standing,
    against_vanilla,
    side_by_side,
)
from train.experiments.document import Fold, Section, missing
from train.experiments.drawings import Axis, Mark
from train.experiments.experiment import Experiment
from train.experiments.groups import source_of_groups
from train.experiments.tables import Cell, Column, Table, difference, number, signed, text

FRAME, ROW = 84, 31
"""Of a panel of values below each other, in pixels: what is around them, and each of them."""

SHARED = (
    "Times of training may be those of a machine that had other work as well, which no run can "
    "tell: differences at equal time are less sure than their intervals say."
)

MIDDLE = "*"
"""Marks a value from the middle of a schedule."""


def equal(experiment: Experiment) -> Section | None:
    """All groups side by side at equal cost, and each beside the best vanilla of its cost."""
    if not experiment.groups:
        return None
    title = "At equal cost"
    rows = against_vanilla(experiment)
    shown = [row for row in rows if any(s.difference for s in row.standings.values())]
    if not shown:
        words = (
            "Nothing can be compared at equal cost: that takes a finished run of vanilla and one "
            "of another variant. `+sweep=variants` runs them."
        )
        return Section("equal", title, (missing(words),))
    pairs = "Each difference with its interval, and the vanilla that it is to"
    blocks = (
        _chart(experiment, shown),
        _side_by_side(experiment),
        Fold(pairs, _pairs(experiment, rows)),
    )
    return Section("equal", title, blocks)


# The differences


def _chart(experiment: Experiment, rows: Sequence[AgainstVanilla]) -> Chart:
    """A panel for each cost, all with the same rows and the same range."""
    costs = [cost for cost in Cost if any(row.standings[cost].difference for row in rows)]
    marks = {cost: [_mark(row, row.standings[cost]) for row in rows] for cost in costs}
    x = Axis(f"{experiment.measure.unit} minus vanilla's", _signed)
    x_range = drawings.range_of([mark for found in marks.values() for mark in found])
    panels = []
    for cost, found in marks.items():
        title = f"at equal {cost.value}"
        draw = partial(_draw, marks=found, x=x, x_range=x_range, title=title)
        means = [mark.value for mark in found if mark.value is not None]
        alt = (
            f"At equal {cost.value}, {experiment.measure.words} of {plural(len(means), 'group')} "
            f"minus those of the best vanilla: from {min(means):+.3f} to {max(means):+.3f}."
        )
        name = cost.name.lower().replace("_", "-")
        panels.append(Panel(name, alt, draw, FRAME + ROW * len(rows)))
    vanilla = [group for group in experiment.groups if group.model == "vanilla"]
    note = (
        "Left of the line a variant is better than vanilla, right of it vanilla wins. Bars are "
        "95 % intervals; a point without a bar is of one seed. Vanilla of equal cost may have seen "
        "more tokens or be a larger model, except at equal tokens. Vanilla that ended with less "
        "and is better all the same stands there with its end."
    )
    if Cost.SECONDS in costs:
        note += f" {SHARED}"
    return Chart(
        "against-vanilla",
        f"The {experiment.measure.words} at the end, minus those of the best vanilla of equal cost",
        tuple(panels),
        source_of_groups([*vanilla, *(row.group for row in rows)]),
        note=note,
    )


def _mark(row: AgainstVanilla, standing: Standing) -> Mark:
    found, group = standing.difference, row.group
    if found is None:
        return Mark(group.label, group.style, None, absent=standing.reason)
    return Mark(group.label, group.style, found.mean, found.low, found.high)


def _draw(
    axes: Axes, marks: Sequence[Mark], x: Axis, x_range: tuple[float, float], title: str
) -> None:
    drawings.draw_marks(axes, marks, x, x_range, zero="vanilla")
    axes.set_title(title, loc="left", pad=18)


def _signed(value: float) -> str:
    return signed(value, "{:+g}") if value else "0"


# The values


def _side_by_side(experiment: Experiment) -> Table:
    shared = experiment.at_shared_seeds()
    every = side_by_side(replace(experiment, groups=shared.groups))
    found = [each for each in every if each.amount is not None]
    columns = [Column("group", "runs", numeric=False)]
    columns += [Column(_key(each.cost), each.cost.value, _amount(each)) for each in found]
    rows = []
    for group in shared.groups:
        standings = [each.standings[group.key] for each in found]
        rows.append((text(group.label, group.style), *map(_value, standings)))
    notes = [
        f"The {experiment.measure.words}, means over the seeds.",
        *filter(None, (shared.note,)),
    ]
    if any(not s.at_end for each in found for s in each.standings.values()):
        notes.append(
            f"{MIDDLE} stands where runs are taken in the middle of their schedule. Their learning "
            "rate is still high there, so that they are worse than runs that end there."
        )
    notes.append(
        f"Amounts count as equal within {100 * ALIKE:g} %, times of training within "
        f"{100 * ALIKE_S:g} %, and latencies within {100 * ALIKE_MS:g} %."
    )
    if any(each.cost == Cost.SECONDS for each in found):
        notes.append(SHARED)
    unlike = (experiment.not_alike, experiment.not_measured, experiment.not_of_one_length)
    notes += [told for told in unlike if told]
    notes += [f"Decode latency is that of {each.setting}." for each in found if each.setting]
    notes += [f"At equal {e.cost.value}: {e.lack}." for e in every if e.amount is None]
    title = f"The {experiment.measure.words} at equal cost"
    source = source_of_groups(shared.groups)
    return Table("equal-cost", title, tuple(columns), tuple(rows), source, " ".join(notes))


def _value(standing: Standing) -> Cell:
    if standing.value is None:
        return Cell(str(standing.lack or ""), None)
    mark = "" if standing.at_end else MIDDLE
    return Cell(f"{standing.value.mean:.3f}{mark}", standing.value.mean)


def _key(cost: Cost) -> str:
    return f"at_equal_{cost.name.lower()}"


def _amount(equal: EqualCost) -> str:
    amount = equal.amount or 0
    match equal.cost:
        case Cost.TOKENS:
            return drawings.tokens(amount)
        case Cost.FLOPS:
            return drawings.power(amount)
        case Cost.SECONDS:
            return duration(amount)
        case Cost.DECODE_MS:
            return f"at most {amount:.3g} ms"
        case Cost.KV_BYTES:
            return f"at most {byte_size(amount)}"


def _pairs(experiment: Experiment, rows: Sequence[AgainstVanilla]) -> Table:
    unit = experiment.measure.unit
    columns = (
        Column("group", "runs", numeric=False),
        Column("equal", "at equal", numeric=False),
        Column("mean", "mean", unit),
        Column("rival", "best vanilla", numeric=False),
        Column("difference", "difference", unit),
        Column("low", "95 % interval", "from"),
        Column("high", "95 % interval", "to"),
        Column("seeds", "seeds"),
        Column("remark", "remark", numeric=False),
    )
    cells = [_pair(row, cost, standing) for row in rows for cost, standing in row.standings.items()]
    source = source_of_groups(experiment.groups)
    title = "Each group at its end, beside the best vanilla of equal cost"
    return Table("against-vanilla", title, columns, tuple(cells), source)


def _pair(row: AgainstVanilla, cost: Cost, standing: Standing) -> tuple[Cell, ...]:
    found, rival = standing.difference, standing.rival
    remarks = [] if found is None or found.paired else ["seeds are not the same"]
    remarks += [] if standing.at_end else ["ended before its schedule"]
    remarks += [] if standing.rival_at_end else ["vanilla in the middle of its schedule"]
    remarks += ["vanilla with less"] if standing.rival_with_less else []
    remarks += [standing.reason] if standing.reason else []
    return (
        text(row.group.label, row.group.style),
        text(cost.value),
        number(row.value.mean, "{:.4f}"),
        text(rival.label, rival.style) if rival else text(""),
        difference(found.mean if found else None),
        difference(found.low if found else None),
        difference(found.high if found else None),
        number(found.seeds if found else None, "{}"),
        text("; ".join(remarks)),
    )
