"""The picture of the coordinate check: activations over the width, a line for each step."""

from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator, StrMethodFormatter

from train.benchmarks.coordinates import (
    PARAMETRISATIONS,
    QUANTITIES,
    Coordinates,
    by_width,
    slope,
)

KINDS = {"change": "changed by training", "size": "mean absolute size"}
STEPS: Colormap = colormaps["viridis_r"]


def draw(found: list[Coordinates], subject: str, path: Path) -> None:
    """Write the picture; see `chart`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    chart(found, subject).savefig(path, dpi=130)


def chart(found: list[Coordinates], subject: str) -> Figure:
    """A column for each quantity; two rows of what training changed, and two of sizes.

    Args:
        found: what `train.benchmarks.coordinates.measure` has measured.
        subject: what was trained, in words.
    """
    rows = [(kind, by) for kind in KINDS for by in PARAMETRISATIONS]
    columns = len(QUANTITIES)
    figure = Figure(figsize=(2.5 * columns, 2.3 * len(rows) + 1.1), layout="constrained")
    figure.suptitle(f"Coordinate check: activations over the width D\n{subject}", fontsize=11)
    grid = figure.subplots(len(rows), columns, sharex=True, squeeze=False)
    for column, quantity in enumerate(QUANTITIES):
        for kind, pair in zip(KINDS, (grid[:2, column], grid[2:, column]), strict=True):
            for axes, by in zip(pair, PARAMETRISATIONS, strict=True):
                own = [x for x in found if (x.quantity, x.parametrisation) == (quantity, by)]
                _draw_panel(axes, own, kind)
            _share_y(pair)
        grid[0, column].set_title(quantity, fontsize=10)
        _width_axis(grid[-1, column], sorted({x.width for x in found}))
    for (kind, by), axes in zip(rows, grid[:, 0], strict=True):
        axes.set_ylabel(f"{by}\n{KINDS[kind]}", fontsize=9)
    _legend(figure, grid[0, 0])
    return figure


def _draw_panel(axes: Axes, own: list[Coordinates], kind: str) -> None:
    steps = sorted({x.step for x in own})
    shown = steps[1:] if kind == "change" else steps
    for step in shown:
        values = by_width([x for x in own if x.step == step], kind)
        look: dict[str, Any] = {"color": STEPS(step / steps[-1]), "linewidth": 1.6, "marker": "o"}
        axes.plot(list(values), list(values.values()), markersize=3.5, label=f"step {step}", **look)
    axes.set_yscale("log")
    axes.text(
        *(0.04, 0.95, f"D$^{{{slope(values):z.2f}}}$ after step {steps[-1]}"),
        transform=axes.transAxes,
        va="top",
        fontsize=8,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5},
    )
    axes.grid(which="major", alpha=0.3)


def _share_y(pair: Any) -> None:
    """Both parametrisations on one scale, with room above for the slope, and below for markers."""
    ends = [axes.get_ylim() for axes in pair]
    low, high = min(low for low, _ in ends), max(high for _, high in ends)
    high = max(high * (high / low) ** 0.25, low * 10)
    low /= (high / low) ** 0.04
    for axes in pair:
        axes.set_ylim(low, high)
        few = high / low < 100
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.tick_params(labelsize=8)


def _width_axis(axes: Axes, widths: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(widths, [str(width) for width in widths])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("D", fontsize=9)


def _legend(figure: Figure, axes: Axes) -> None:
    """The steps by their colours; step 0 changes nothing and has a size alone."""
    start = axes.plot([], [], color=STEPS(0.0), marker="o", markersize=3.5, label="step 0 (sizes)")
    handles = [*start, *axes.get_lines()[:-1]]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8)
