"""The chart of the throughput benchmark: tokens per second over the batch, a line for each K."""

from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator, StrMethodFormatter

Row = dict[str, Any]
"""A row of `train.benchmarks.throughput`."""

GENERATOR = "dashed: requests through Generator"


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
    for (by, label), color in _lines(rows).items():
        found = [row for row in rows if (row["by"], _label(row)) == (by, label)]
        found.sort(key=lambda row: row["batch"])
        look: dict[str, Any] = {"color": color, "marker": "o", "label": label}
        if by == "generator":
            look |= {"linestyle": "--", "fillstyle": "none", "label": None}
        batches = [row["batch"] for row in found]
        whole.plot(batches, [row["tokens_per_s"] for row in found], **look)
        relative.plot(batches, [1 / row["x_vanilla"] for row in found], **look)
    whole.plot([], [], color="gray", linestyle="--", marker="o", fillstyle="none", label=GENERATOR)
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
    if row["by"] == "transformers":
        return "transformers, static cache"
    return "vanilla" if row["variant"] == "vanilla" else f"PHD-CSWA, K = {row['K']}"


def _lines(rows: list[Row]) -> dict[tuple[str, str], Any]:
    """The color of each line, by who decodes and by its label: the darker, the more copies."""
    copies = sorted({row["K"] for row in rows if row["variant"] != "vanilla"})
    colors: dict[str, Any] = {
        f"PHD-CSWA, K = {K}": colormaps["Blues"](0.4 + 0.5 * (place + 1) / len(copies))
        for place, K in enumerate(copies)
    }
    colors |= {"vanilla": "black", "transformers, static cache": "tab:orange"}
    return {(row["by"], label): colors[label] for row in rows if (label := _label(row))}


def _batch_axis(axes: Axes, batches: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("rows of the batch")
    axes.grid(alpha=0.3)
