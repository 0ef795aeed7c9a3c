"""The chart of the throughput benchmark: tokens per second over the batch, a line for each K."""

from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator, StrMethodFormatter

Row = dict[str, Any]
"""A row of `train.benchmarks.throughput`."""

OTHERS = {"vanilla": ("black", "*"), "transformers": ("tab:orange", "s")}
"""The color and marker of what has no K."""


def draw(rows: list[Row], subject: str, path: Path) -> None:
    """Write the chart; see `chart`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    chart(rows, subject).savefig(path, dpi=150)


def chart(rows: list[Row], subject: str) -> Figure:
    """Tokens per second on the left, and over vanilla's at the same batch on the right.

    Args:
        rows: those of `train.benchmarks.throughput.bench_throughput`.
        subject: what was measured, on which device.
    """
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    figure.suptitle(subject, fontsize=10)
    whole, relative = figure.subplots(1, 2)
    for label, (color, marker) in _looks(rows).items():
        found = sorted((row for row in rows if _label(row) == label), key=lambda r: r["batch"])
        batches = [row["batch"] for row in found]
        for axes, values in (
            (whole, [row["tokens_per_s"] for row in found]),
            (relative, [1 / row["x_vanilla"] for row in found]),
        ):
            axes.plot(batches, values, color=color, marker=marker, label=label)
    whole.set_yscale("log")
    whole.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    whole.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    whole.yaxis.set_minor_formatter(NullFormatter())
    whole.set_ylabel("tokens/s")
    whole.legend(fontsize=8)
    relative.set_ylabel("tokens/s / vanilla's")
    relative.set_ylim(0, relative.dataLim.y1 * 1.12)
    for axes in (whole, relative):
        _batch_axis(axes, sorted({row["batch"] for row in rows}))
    return figure


def _label(row: Row) -> str:
    return row["variant"] if row["variant"] in OTHERS else f"PHD-CSWA, K = {row['K']}"


def _looks(rows: list[Row]) -> dict[str, tuple[Any, str]]:
    """The color and marker of each line: the darker, the more copies."""
    copies = sorted({row["K"] for row in rows if row["variant"] not in OTHERS})
    looks: dict[str, tuple[Any, str]] = dict(OTHERS)
    for place, K in enumerate(copies):
        shade = 0.4 + 0.5 * (place + 1) / len(copies)
        looks[f"PHD-CSWA, K = {K}"] = (colormaps["Blues"](shade), "D")
    return looks


def _batch_axis(axes: Axes, batches: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("rows of the batch")
    axes.grid(alpha=0.3)
