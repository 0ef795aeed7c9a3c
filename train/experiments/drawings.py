"""What is drawn on the axes of a report: curves, values with intervals, and points."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import (
    Formatter,
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
    ScalarFormatter,
)

from conf.wording import short_count
from train.experiments.theme import INK, MUTED, PALETTE, Style

CUT = 0.3
"""The part of each curve, from its start, that does not choose the range of the y axis: there the
losses of all variants fall from that of a random model."""

MOST_POINTS = 400
"""Of a curve: one a pixel, the width of a panel."""

LONG = 24
"""Characters of a label, from which on it is written in two lines."""

WIDE = 8
"""How many times the shortest curve the longest has to be for a logarithmic axis."""

SERIES = "series:"
"""The start of the id of an artist that belongs to a group of runs; see `mark_series`."""

TIMES = "\N{MULTIPLICATION SIGN}"
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Axis:
    """What an axis shows, and how a number is written; None: with the digits that all need."""

    label: str
    text: Callable[[float], str] | None = None

    def formatter(self) -> Formatter:
        """What writes the numbers at the ticks."""
        if self.text is None:
            return ScalarFormatter(useOffset=False, useMathText=False)
        text = self.text
        return FuncFormatter(lambda value, _: text(value))


@dataclass(frozen=True)
class Curve:
    """The mean over the seeds of a group, their spread, and what it was smoothed from.

    Attributes:
        x, y: the mean.
        low, high: of the seeds, at each x; None for one seed.
        raw: the x and y of each seed as they were measured, drawn faintly.
    """

    style: Style
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    raw: Sequence[tuple[Sequence[float], Sequence[float]]] = ()


@dataclass(frozen=True)
class Mark:
    """A value with an interval, or without one where `low` and `high` are None.

    Where there is no value, `absent` says why.
    """

    label: str
    style: Style
    value: float | None
    low: float | None = None
    high: float | None = None
    absent: str = ""


@dataclass(frozen=True)
class Point:
    """A value at a place, with an interval where `low` and `high` are not None."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Row:
    """Points of one style, joined by a line if `joined`."""

    style: Style
    points: Sequence[Point]
    joined: bool = True


def line(x: Sequence[float], y: Sequence[float], style: Style, label: str = "") -> Line2D:
    """A line with its markers, in a style."""
    made = Line2D(x, y, color=style.color, marker=style.marker, linewidth=1.8, label=label)
    if style.dashes:
        made.set_dashes(style.dashes)
    return made


def mark_series(artist: Artist, style: Style) -> None:
    """Let the page find what belongs to a group of runs: its legend then points it out."""
    artist.set_gid(SERIES + style.key)


# Numbers


def power(number: float) -> str:
    """A number of many digits, as on an axis of FLOPs.

    >>> power(1e15), power(1e6), power(0)
    ('10¹⁵', '10⁶', '0')
    """
    if number == 0:
        return "0"
    mantissa, _, exponent = f"{number:.2e}".partition("e")
    tens = "10" + str(int(exponent)).translate(_SUPERSCRIPT)
    factor = f"{float(mantissa):g}"
    return tens if factor == "1" else f"{factor}{TIMES}{tens}"


def tokens(number: float) -> str:
    """A number of tokens or parameters, short.

    >>> tokens(1_000_000), tokens(1_500_000), tokens(0)
    ('1M', '1.5M', '0')
    """
    return short_count(number) if number else "0"


# Drawings


def after_the_start(curves: Sequence[Curve]) -> tuple[float, float]:
    """The range of the values of curves with their bands, but for their start; see `CUT`."""
    kept = [
        value
        for curve in curves
        for values in (curve.y, curve.low, curve.high)
        for value in (values or ())[int(CUT * len(curve.x)) :]
    ]
    room = 0.04 * (max(kept) - min(kept)) or 0.01 * abs(max(kept))
    return min(kept) - room, max(kept) + room


def draw_curves(
    axes: Axes, curves: Sequence[Curve], x: Axis, y: Axis, y_range: tuple[float, float]
) -> None:
    """Curves, each in a band of its seeds, above what was measured."""
    for curve in curves:
        _draw_curve(axes, curve)
    axes.set_ylim(*y_range)
    ends = [curve.x[-1] for curve in curves]
    if max(ends) > WIDE * min(ends):
        axes.set_xscale("log")
        axes.set_xlim(CUT * min(ends), max(ends) * 1.05)
    else:
        axes.set_xlim(0, max(ends) * 1.02)
    label_axes(axes, x, y)


def _draw_curve(axes: Axes, curve: Curve) -> None:
    color, style = curve.style.color, curve.style
    for xs, ys in curve.raw:
        xs, ys = thinned(xs), thinned(ys)
        faint = axes.plot(xs, ys, color=color, linewidth=0.7, alpha=0.16, zorder=1)
        mark_series(faint[0], style)
    xs, ys = thinned(curve.x), thinned(curve.y)
    if curve.low is not None and curve.high is not None:
        low, high = thinned(curve.low), thinned(curve.high)
        band = axes.fill_between(xs, low, high, color=color, alpha=0.15, linewidth=0, zorder=2)
        mark_series(band, style)
    drawn = axes.add_line(line(xs, ys, style))
    drawn.set(markevery=[-1], markersize=5, zorder=3)
    mark_series(drawn, style)


def thinned(values: Sequence[float]) -> Sequence[float]:
    """At most `MOST_POINTS` of the values, the last one among them.

    >>> len(thinned(range(1000))), thinned(range(1000))[-1], thinned([1, 2])
    (334, 999, [1, 2])
    """
    every = -(-len(values) // MOST_POINTS)
    return values[::-every][::-1] if every > 1 else values


def in_lines(label: str) -> str:
    """A long label in two lines, the second one for what stands in brackets.

    >>> in_lines("phd-2 (layers=7)"), in_lines("phd_cswa-2-16-32 (copy_positions=flattened)")
    ('phd-2 (layers=7)', 'phd_cswa-2-16-32\\n(copy_positions=flattened)')
    """
    return label.replace(" (", "\n(") if len(label) > LONG else label


def range_of(marks: Sequence[Mark]) -> tuple[float, float]:
    """The range of some values with their intervals and 0, of which at least one is there."""
    ends = [x for mark in marks for x in (mark.low, mark.value, mark.high) if x is not None]
    low, high = min(0.0, *ends), max(0.0, *ends)
    room = 0.06 * (high - low) or 1.0
    return low - room, high + room


def draw_marks(
    axes: Axes, marks: Sequence[Mark], x: Axis, x_range: tuple[float, float], *, zero: str
) -> None:
    """Values below each other with their intervals; each is labelled at the left.

    Args:
        axes: to draw on.
        marks: from top to bottom.
        x: what the values are.
        x_range: of the axis.
        zero: what 0 stands for, written above a line there.
    """
    axes.set_xlim(*x_range)
    axes.axvline(0, color=PALETTE[MUTED].light, linewidth=1, zorder=1)
    _write(axes, zero, (0, 1), ("data", "axes fraction"), ha="center", va="bottom")
    for place, mark in enumerate(marks):
        _draw_mark(axes, mark, place)
    axes.set_yticks(range(len(marks)), [in_lines(mark.label) for mark in marks], fontsize=10.5)
    axes.set_ylim(len(marks) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(x.formatter())
    axes.set_xlabel(x.label)


def _draw_mark(axes: Axes, mark: Mark, place: int) -> None:
    color = mark.style.color
    if mark.value is None:
        _write(axes, mark.absent, (0.02, place), ("axes fraction", "data"), va="center")
        return
    if mark.low is not None and mark.high is not None:
        bar = axes.plot([mark.low, mark.high], [place] * 2, color=color, linewidth=2)
        mark_series(bar[0], mark.style)
    dot = axes.plot([mark.value], [place], color=color, marker=mark.style.marker, markersize=7)
    mark_series(dot[0], mark.style)


def _write(
    axes: Axes, words: str, place: tuple[float, float], along: tuple[str, str], **look: Any
) -> None:
    """Write a remark into a drawing, or just above it."""
    above = (0, 3) if look["va"] == "bottom" else (0, 0)
    look |= {"fontsize": 10.5, "color": PALETTE[MUTED].light, "textcoords": "offset points"}
    axes.annotate(words, place, xycoords=along, xytext=above, **look)


def draw_points(axes: Axes, rows: Sequence[Row], x: Axis, y: Axis, *, log: bool = False) -> None:
    """Points with their intervals.

    Args:
        axes: to draw on.
        rows: of points.
        x, y: what they are.
        log: whether the x axis is logarithmic.
    """
    for row in rows:
        style = row.style
        points = sorted(row.points, key=lambda point: point.x)
        drawn = axes.add_line(line([p.x for p in points], [p.y for p in points], style))
        drawn.set(markersize=6, zorder=3)
        if not row.joined:
            drawn.set_linestyle("none")
        mark_series(drawn, style)
        for p in points:
            if p.low is not None and p.high is not None:
                bar = axes.plot([p.x, p.x], [p.low, p.high], color=style.color, linewidth=1.6)
                mark_series(bar[0], style)
    axes.margins(x=0.08, y=0.1)
    axes.autoscale_view()
    if log:
        axes.set_xscale("log")
    label_axes(axes, x, y)


def draw_text_marks(axes: Axes, places: Sequence[float], names: Sequence[str]) -> None:
    """Replace the numbers of the x axis by names at some places, as for a window without end."""
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(list(places), list(names))


def label_axes(axes: Axes, x: Axis, y: Axis) -> None:
    """Name both axes and write their numbers, few enough to be read on a narrow screen."""
    axes.set_xlabel(x.label)
    axes.set_ylabel(y.label)
    if axes.get_xscale() == "log":
        low, high = axes.get_xlim()
        close = math.log10(high / low) < 1.5
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if close else (1,)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(x.formatter())
    axes.yaxis.set_major_formatter(y.formatter())
    axes.tick_params(color=PALETTE[INK].light)
