"""The loss over K, over the window and over the chunk."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

from matplotlib.axes import Axes

from phd.config import VARIANTS
from train.experiments import drawings
from train.experiments.charts import Chart, Panel
from train.experiments.document import Section, missing
from train.experiments.drawings import Axis, Point, Row
from train.experiments.experiment import Experiment
from train.experiments.groups import Group, told
from train.experiments.source import source_of
from train.experiments.spread import Spread

WITHOUT = 0
"""Stands for no chunk and for a window without end, whose place is after the greatest number."""


class Knob(NamedTuple):
    """A number of the variant that runs may differ in."""

    key: str
    letter: str
    words: str
    families: tuple[str, ...]


WITH_ANY_K = tuple(variant for variant, traits in VARIANTS.items() if traits.most_copies is None)

KNOBS = (
    Knob("K", "K", "copies of each token, K", WITH_ANY_K),
    Knob("window", "W", "window, W", ("phd_swa", "phd_cswa")),
    Knob("chunk", "C", "chunk, C", ("phd_cswa", "phd_swa")),
)


@dataclass(frozen=True)
class Entry:
    """A value of a knob, and the group of runs that have it, with their spread."""

    value: int
    group: Group
    spread: Spread


def ablations(experiment: Experiment) -> Section:
    """A chart for each of K, W and C of which there are several values."""
    found = [chart for knob in KNOBS if (chart := _chart(experiment, knob))]
    absent = [
        k.words for k in KNOBS if not any(chart.name == f"over-{k.key.lower()}" for chart in found)
    ]
    note = missing(
        f"There are no runs that differ in nothing but the {', or the '.join(absent)}: "
        "`+sweep=k`, `+sweep=window` and `+sweep=chunk` run them."
    )
    return Section("ablations", "The loss over K, W and C", (*found, *([note] if absent else [])))


def _chart(experiment: Experiment, knob: Knob) -> Chart | None:
    lines = _lines(experiment, knob)
    if not lines:
        return None
    values = sorted({entry.value for line in lines for entry in line}, key=_order)
    rows = [Row(_named_by(line, knob).style, _points(line, values)) for line in lines]
    used = {id(run) for line in lines for entry in line for run in entry.group.runs}
    runs = [run for group in experiment.groups for run in group.runs if id(run) in used]
    measure = experiment.measure
    alt = f"The {measure.words} over the {knob.words}, of " + ", ".join(map(_name, values)) + "."
    x, y = Axis(knob.words), Axis(measure.unit)
    draw = partial(_draw, rows=rows, names=[_name(value) for value in values], x=x, y=y)
    names = [(_line_label(line, knob), _named_by(line, knob).style) for line in lines]
    return Chart(
        f"over-{knob.key.lower()}",
        f"The {measure.words} at the end, over the {knob.words}",
        (Panel("all", alt, draw),),
        source_of(runs),
        tuple(names),
        "Bars reach from the lowest to the highest seed. Groups that a line joins differ in "
        "nothing else, and are compared by the seeds that all of them have."
        + (" K = 1 is vanilla." if knob.key == "K" else ""),
    )


def _draw(axes: Axes, rows: Sequence[Row], names: Sequence[str], x: Axis, y: Axis) -> None:
    drawings.draw_points(axes, rows, x, y)
    drawings.draw_text_marks(axes, range(len(names)), names)


def _points(line: Sequence[Entry], values: Sequence[int]) -> list[Point]:
    return [
        Point(values.index(e.value), e.spread.mean, e.spread.least, e.spread.greatest) for e in line
    ]


def _named_by(line: Sequence[Entry], knob: Knob) -> Group:
    """The group of a line that gives it its name and style; the ends may be of another variant."""
    return line[0 if knob.key == "chunk" else -1].group


def _line_label(line: Sequence[Entry], knob: Knob) -> str:
    """The name of a line: that of its variants, with the knob's letter for what varies.

    So `phd_cswa-2-16-32` and `phd_cswa-3-16-32` are `phd_cswa-K-16-32`.
    """
    group = _named_by(line, knob)
    family, *numbers = group.model.split("-")
    numbers[KNOBS.index(knob)] = knob.letter
    return "-".join([family, *numbers]) + group.label.removeprefix(group.model)


def _lines(experiment: Experiment, knob: Knob) -> list[list[Entry]]:
    """Groups that differ in nothing but the knob, at two values of it or more."""
    lines: dict[Any, list[Group]] = defaultdict(list)
    for group in experiment.groups:
        family = group.runs[0].settings.get("model.variant")
        if family in knob.families and experiment.measure.spread(group):
            lines[experiment.kind_of(group), *_others(group, knob)].append(group)
    for line in lines.values():
        vanilla = experiment.vanilla_of(line[0])
        known = vanilla and experiment.measure.spread(vanilla)
        if knob.key == "K" and vanilla and known and _alike(vanilla, line[0]):
            line.append(vanilla)
    entries = [_entries(experiment, knob, line) for line in lines.values()]
    return [line for line in entries if len({entry.value for entry in line}) > 1]


def _entries(experiment: Experiment, knob: Knob, line: Sequence[Group]) -> list[Entry]:
    """Groups by their values of a knob, each with the seeds that all of them have, if any.

    Otherwise a group of one easy seed would look better than one of several.
    """
    common = set.intersection(*({run.seed for run in group.runs} for group in line))
    entries = []
    for group in line:
        kept = tuple(run for run in group.runs if run.seed in common) or group.runs
        spread = experiment.measure.spread(replace(group, runs=kept))
        assert spread  # the group has values
        settings = group.runs[0].settings
        value = 1 if group.model == "vanilla" else _value(settings, knob.key)
        entries.append(Entry(value, replace(group, runs=kept), spread))
    return sorted(entries, key=lambda entry: _order(entry.value))


def _others(group: Group, knob: Knob) -> tuple[Any, ...]:
    """All that makes the model and the run of a group, but for the knob."""
    run = group.runs[0]
    knobs = ["K", "window", "chunk"]
    family = run.settings["model.variant"]
    if knob.key == "chunk":
        family = "phd_swa"  # is phd_cswa without chunks
    own = tuple(
        _value(run.settings, key) for key in knobs if key != knob.key and _has(run.settings, key)
    )
    unit = run.settings.get("model.span_unit")
    return family, own, unit, run.size, run.tokens, repr(sorted(told(run.settings).items()))


def _has(settings: dict[str, Any], key: str) -> bool:
    return settings["model.variant"] in next(knob for knob in KNOBS if knob.key == key).families


def _alike(vanilla: Group, group: Group) -> bool:
    mine, theirs = (told(g.runs[0].settings) for g in (vanilla, group))
    return mine == theirs and vanilla.runs[0].tokens == group.runs[0].tokens


def _value(settings: dict[str, Any], key: str) -> int:
    if key == "chunk" and settings["model.variant"] == "phd_swa":
        return WITHOUT
    return settings[f"model.{key}"] or WITHOUT


def _order(value: int) -> float:
    return float("inf") if value == WITHOUT else value


def _name(value: int) -> str:
    return "none" if value == WITHOUT else str(value)
