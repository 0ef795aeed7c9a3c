"""The loss over the learning rate, a line for each width, and the best rate of each.

without muP               with muP
  \\   \\ __*               \\\\__  __
   \\__*                        *
narrow: to the right      narrow and wide: in one place
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import exp2, log2
from typing import Any

from matplotlib.axes import Axes

from train.experiments import drawings
from train.experiments.charts import Chart, Panel
from train.experiments.document import Section
from train.experiments.drawings import Axis, Point, Row
from train.experiments.experiment import Experiment
from train.experiments.groups import Group, at_shared_seeds, source_of_groups, spelled, told
from train.experiments.source import Source
from train.experiments.spread import Spread
from train.experiments.tables import Cell, Column, Table, number, text
from train.experiments.theme import DASHES, HUES, MARKERS, Style

LR, BASE = "optim.lr", "model.mup_base_dim"
WIDTHS = ("model.ffn_dim", "model.heads", "model.kv_heads", "model.head_dim")
"""What grows with `model.dim`, so that a label need not tell it beside that."""

TICK = "{:g}"
PLAIN = Style(HUES[0], (), MARKERS[0])


@dataclass(frozen=True)
class Entry:
    """A learning rate, and the runs that had it, with their spread."""

    lr: float
    runs: Group
    spread: Spread


@dataclass(frozen=True)
class Sweep:
    """Groups that differ in nothing but the learning rate.

    Attributes:
        entries: by rising learning rate, two at least.
        panel: what it is drawn beside: the sweeps with the same base of muP.
        label: what tells it from the other sweeps of its panel.
        style: of its line.
    """

    entries: tuple[Entry, ...]
    panel: str = ""
    label: str = ""
    style: Style = PLAIN

    @property
    def best(self) -> Entry:
        return min(self.entries, key=lambda entry: entry.spread.mean)

    @property
    def is_at_edge(self) -> bool:
        """Whether a learning rate beyond those with finished runs may well be better."""
        return self.best in (self.entries[0], self.entries[-1])

    @property
    def between(self) -> float | None:
        """Where the parabola over log(lr) through the best and its neighbours is lowest.

        None where the best is at an edge.
        """
        if self.is_at_edge:
            return None
        place = self.entries.index(self.best)
        (a, fa), (b, fb), (c, fc) = (
            (log2(e.lr), e.spread.mean) for e in self.entries[place - 1 : place + 2]
        )
        left, right = (b - a) * (fb - fc), (b - c) * (fb - fa)
        if left == right:  # all three are equal
            return self.best.lr
        return exp2(b - ((b - a) * left - (b - c) * right) / (2 * (left - right)))


def learning_rate(experiment: Experiment) -> Section | None:
    """The chart and the table; None where no runs differ in nothing but the learning rate."""
    sweeps = sweeps_of(experiment)
    if not sweeps:
        return None
    blocks = (_chart(experiment, sweeps), _table(experiment, sweeps))
    return Section("learning-rate", "The best learning rate", blocks)


def sweeps_of(experiment: Experiment) -> list[Sweep]:
    """The sweeps of an experiment, those without muP first, and from narrow to wide."""
    found: dict[Any, list[Group]] = defaultdict(list)
    for group in experiment.groups:
        if LR in group.runs[0].settings and experiment.measure.spread(group):
            found[experiment.kind_of(group), *_others(group)].append(group)
    sweeps = []
    for groups in found.values():
        shared = at_shared_seeds(groups).groups  # a group of one easy seed would look better
        entries = [
            Entry(group.runs[0].settings[LR], group, spread)
            for group in shared
            if (spread := experiment.measure.spread(group))
        ]
        if len({entry.lr for entry in entries}) > 1:
            sweeps.append(Sweep(tuple(sorted(entries, key=lambda entry: entry.lr))))
    return _labelled(sorted(sweeps, key=_place))


def _others(group: Group) -> tuple[Any, ...]:
    """All that makes the model and the run of a group, but for the learning rate."""
    run = group.runs[0]
    settings = {key: value for key, value in told(run.settings).items() if key != LR}
    return group.model, run.size, run.tokens, repr(sorted(settings.items()))


def _source(sweeps: Sequence[Sweep]) -> Source:
    return source_of_groups([entry.runs for sweep in sweeps for entry in sweep.entries])


def _settings(sweep: Sweep) -> dict[str, Any]:
    return sweep.entries[0].runs.runs[0].settings


def _place(sweep: Sweep) -> tuple[Any, ...]:
    settings, run = _settings(sweep), sweep.entries[0].runs.runs[0]
    return settings.get(BASE) or 0, run.parameters, run.model, run.tokens, run.group


def _labelled(sweeps: Sequence[Sweep]) -> list[Sweep]:
    """The sweeps with their panels, and labels that tell in what they differ."""
    bases = {_settings(sweep).get(BASE) for sweep in sweeps}
    every = [
        {
            "": sweep.entries[0].runs.model,
            "model.size": sweep.entries[0].runs.runs[0].size,
            "tokens": drawings.tokens(sweep.entries[0].runs.runs[0].tokens),
            **{key: spelled(x) for key, x in told(_settings(sweep)).items() if key != BASE},
        }
        for sweep in sweeps
    ]
    keys = list(dict.fromkeys(key for settings in every for key in settings if key != LR))
    differing = [key for key in keys if len({settings.get(key) for settings in every}) > 1]
    if "model.dim" in differing:
        differing = [key for key in differing if key not in WIDTHS]
    labels = [_label(settings, differing) for settings in every]
    looks = {label: _style(n) for n, label in enumerate(dict.fromkeys(labels))}
    panels = ["" if len(bases) == 1 else _panel(_settings(sweep).get(BASE)) for sweep in sweeps]
    return [
        replace(sweep, panel=panel, label=label, style=looks[label])
        for sweep, panel, label in zip(sweeps, panels, labels, strict=True)
    ]


def _label(settings: dict[str, str], differing: Sequence[str]) -> str:
    parts = [
        f"{key.rpartition('.')[2]}={settings.get(key, '')}" if key else settings[key]
        for key in differing
    ]
    return ", ".join(parts) or settings[""]


def _panel(base: int | None) -> str:
    return "without muP" if base is None else f"muP, from D = {base}"


def _style(number: int) -> Style:
    dashes = DASHES[number // len(HUES) % len(DASHES)]
    return Style(HUES[number % len(HUES)], dashes, MARKERS[number % len(MARKERS)])


# Chart and table


def _chart(experiment: Experiment, sweeps: Sequence[Sweep]) -> Chart:
    measure = experiment.measure
    spreads = [entry.spread for sweep in sweeps for entry in sweep.entries]
    ends = [(spread.mean, spread.least, spread.greatest) for spread in spreads]
    values = [value for own in ends for value in own if value is not None]  # one seed has no bar
    room = 0.06 * (max(values) - min(values)) or 0.01
    y_range = (min(values) - room, max(values) + room)
    x, y = Axis("learning rate", TICK.format), Axis(measure.unit)
    panels = []
    for place, name in enumerate(dict.fromkeys(sweep.panel for sweep in sweeps)):
        own = [sweep for sweep in sweeps if sweep.panel == name]
        best = ", ".join(f"{TICK.format(s.best.lr)} of {s.label}" for s in own)
        alt = f"The {measure.words} over the learning rate{name and f', {name}'}; best: {best}."
        draw = partial(_draw, sweeps=own, x=x, y=y, y_range=y_range)
        panels.append(Panel(f"panel-{place}", alt, draw))
    looks = dict.fromkeys((sweep.label, sweep.style) for sweep in sweeps)
    return Chart(
        "over-lr",
        f"The {measure.words} at the end, over the learning rate",
        tuple(panels),
        _source(sweeps),
        tuple(looks),
        "Bars reach from the lowest to the highest seed; a ring marks the best of a line. A line "
        "joins runs that differ in nothing but the learning rate; diverged ones have no point.",
    )


def _draw(
    axes: Axes, sweeps: Sequence[Sweep], x: Axis, y: Axis, y_range: tuple[float, float]
) -> None:
    rows = [
        Row(
            sweep.style,
            [Point(e.lr, e.spread.mean, e.spread.least, e.spread.greatest) for e in sweep.entries],
        )
        for sweep in sweeps
    ]
    drawings.draw_points(axes, rows, x, y, log=True)
    for sweep in sweeps:
        ring = axes.plot(
            [sweep.best.lr],
            [sweep.best.spread.mean],
            color=sweep.style.color,
            marker="o",
            markersize=14,
            fillstyle="none",
        )
        drawings.mark_series(ring[0], sweep.style)
    axes.set_ylim(*y_range)
    if sweeps[0].panel:
        axes.set_title(sweeps[0].panel)


def _table(experiment: Experiment, sweeps: Sequence[Sweep]) -> Table:
    columns = (
        Column("runs", "runs", numeric=False),
        *((Column("parametrisation", "parametrisation", numeric=False),) * bool(sweeps[0].panel)),
        Column("best_lr", "best", "learning rate"),
        Column("lr_between", "between", "learning rate"),
        Column("loss", "mean", experiment.measure.unit),
        Column("lowest_lr", "finished", "from"),
        Column("highest_lr", "finished", "to"),
        Column("note", "", numeric=False),
    )
    return Table(
        "best-lr",
        "The best learning rate",
        columns,
        tuple(_row(sweep) for sweep in sweeps),
        _source(sweeps),
        "The best of those whose runs have finished, and where a parabola over the logarithm "
        "of the learning rate, through the best and its two neighbours, is lowest.",
    )


def _row(sweep: Sweep) -> tuple[Cell, ...]:
    return (
        text(sweep.label, sweep.style),
        *([text(sweep.panel)] * bool(sweep.panel)),
        number(sweep.best.lr, TICK),
        number(sweep.between),
        number(sweep.best.spread.mean, "{:.3f}"),
        number(sweep.entries[0].lr, TICK),
        number(sweep.entries[-1].lr, TICK),
        text("at the edge of what has finished" if sweep.is_at_edge else ""),
    )
