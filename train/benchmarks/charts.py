"""The charts of the benchmarks of training: panels of horizontal bars."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from train.benchmarks.timing import Bar, Kind, Panel

COLORS = {
    Kind.BASE: "black",
    Kind.OURS: "tab:blue",
    Kind.PEER: "tab:orange",
    Kind.CEILING: "tab:gray",
}

BAR_INCHES = 0.27
FRAME_INCHES = 1.1
"""The height of a bar, and of what is above and below the bars of a panel."""


def draw(panels: list[Panel], subject: str, path: Path) -> None:
    """Write the panels, one below the other, to `path`; see `chart`."""
    chart(panels, subject).savefig(path, dpi=150)


def chart(panels: list[Panel], subject: str) -> Figure:
    """A chart of all panels. A bar's value stands at its end, and a line joins its quartiles.

    Args:
        subject: what was measured, on which device; it stands above all panels.
    """
    heights = [FRAME_INCHES + BAR_INCHES * len(panel.bars) for panel in panels]
    figure = Figure(figsize=(9, sum(heights) + 0.7), layout="constrained")
    figure.suptitle(subject, fontsize=10)
    grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)
    for axes, panel in zip(grid[:, 0], panels, strict=True):
        _draw_panel(axes, panel)
    kinds = [kind for kind in Kind if any(bar.kind == kind for p in panels for bar in p.bars)]
    handles = [Patch(color=COLORS[kind], label=kind.value) for kind in kinds]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8)
    return figure


def _draw_panel(axes: Axes, panel: Panel) -> None:
    places = range(len(panel.bars))
    values = [bar.value for bar in panel.bars]
    axes.barh(places, values, color=[COLORS[bar.kind] for bar in panel.bars], height=0.7)
    for place, bar in enumerate(panel.bars):
        if bar.low is not None and bar.high is not None:
            axes.plot([bar.low, bar.high], [place] * 2, color="tab:red", linewidth=1.5)
    ends = [max(bar.value, bar.high or 0) for bar in panel.bars]
    longest = max([*ends, *panel.marks.values()])
    for place, (bar, end) in enumerate(zip(panel.bars, ends, strict=True)):
        axes.text(end + longest * 0.01, place, _number(bar), va="center", fontsize=8)
    for name, value in panel.marks.items():
        axes.axvline(value, color="black", linewidth=0.8, linestyle="--")
        axes.text(value, -0.62, name, ha="center", va="bottom", fontsize=7)
    axes.set_yticks(places, [bar.label for bar in panel.bars], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, longest * 1.12)  # room for the numbers
    axes.set_title(panel.title, fontsize=9)
    axes.set_xlabel(panel.unit, fontsize=8)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)


def _number(bar: Bar) -> str:
    return f"{bar.value:,.0f}" if bar.value >= 100 else f"{bar.value:.3g}"
