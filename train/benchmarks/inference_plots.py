"""The charts of the inference benchmark: Figures 1c, 1d and 9 of arXiv 2504.14992."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

Measurement = dict[str, Any]
"""A row of `train.benchmarks.inference`."""

Coordinate = Callable[[Measurement], float]
"""What a chart shows of a measurement along one of its axes."""


class Style(NamedTuple):
    """The look of a variant in every chart. Lines that others may cover have larger markers."""

    label: str
    color: str
    marker: str
    markersize: int


VARIANTS = {
    "vanilla": Style("vanilla", "black", "*", 6),
    "naive_repeat": Style("naive repetition", "tab:red", "s", 6),
    "phd": Style("PHD", "tab:green", "o", 9),
    "phd_swa": Style("PHD-SWA", "tab:orange", "^", 10),
    "phd_cswa": Style("PHD-CSWA", "tab:blue", "D", 5),
}


def draw(rows: list[Measurement], subject: str, folder: Path) -> list[Path]:
    """Write `figure_1c.png`, `figure_1d.png`, `figure_9.png` and `kv_bytes.png`; returns them.

    Times are drawn as the table has them: vanilla's, multiplied by the ratio to it. A bar at a
    point goes from the first to the third quartile of the ratio.

    Args:
        rows: the rows of `train.benchmarks.inference.measure_inference`.
        subject: the model and device that were measured, for the titles.
        folder: the directory for the files; it is made if it is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    prefills, decodes = longest(rows, "prefill"), longest(rows, "decode")
    charts = {
        "figure_1c": latency_over_cache(decodes, subject),
        "figure_1d": prefill_over_copies(prefills, subject),
        "figure_9": times_over_copies(prefills, decodes, subject),
        "kv_bytes": cache_over_context(rows, subject),
    }
    written = []
    for name, figure in charts.items():
        written.append(folder / f"{name}.png")
        figure.savefig(written[-1], dpi=150)
    return written


def longest(rows: list[Measurement], work: str) -> list[Measurement]:
    """The rows of `prefill` or `decode` at the longest length."""
    found = [row for row in rows if row["work"] == work and row["variant"] in VARIANTS]
    most = max(row["tokens"] for row in found)
    return [row for row in found if row["tokens"] == most]


def latency_over_cache(rows: list[Measurement], subject: str) -> Figure:
    """Figure 1c: decode latency over KV bytes. Each point is a K."""
    figure, axes = _chart(f"Decoding at {rows[0]['tokens']} tokens\n{subject}")
    _lines(axes, _from_vanilla(rows), x=_mebibytes, y=_milliseconds)
    _bars(axes, rows, x=_mebibytes, y=_milliseconds)
    # Labels on all variants would overlap: their points lie close together.
    for variant in ("naive_repeat", "phd_cswa"):
        labelled = sorted((row for row in rows if row["variant"] == variant), key=_copies)
        for below, row in enumerate(reversed(labelled)):
            # PHD-CSWA's points may lie side by side, so that each label is lower than the next.
            place = (7, -11 - 10 * below * (variant == "phd_cswa"))
            point = (_mebibytes(row), _milliseconds(row))
            axes.annotate(f"K={row['K']}", point, place, textcoords="offset points", fontsize=8)
    _powers_of_two(axes)
    axes.set(xlabel="KV cache of a sequence (MiB)", ylabel="decode latency (ms per token)")
    axes.margins(x=0.12)
    _from_zero(axes)
    axes.legend()
    return figure


def prefill_over_copies(rows: list[Measurement], subject: str) -> Figure:
    """Figure 1d: prefill time over vanilla's, as K grows."""
    figure, axes = _chart(f"Reading a prompt of {rows[0]['tokens']} tokens\n{subject}")
    _lines(axes, _from_vanilla(rows), x=_copies, y=_ratio)
    _bars(axes, rows, x=_copies, y=_ratio)
    _copies_axis(axes, rows)
    axes.axhline(1, color="black", linewidth=0.8, linestyle="--")
    axes.set(ylabel="prefill time / vanilla's")
    _from_zero(axes)
    axes.legend()
    return figure


def times_over_copies(
    prefills: list[Measurement], decodes: list[Measurement], subject: str
) -> Figure:
    """Figure 9: prefill and decode times of PHD, PHD-SWA and PHD-CSWA as K grows."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    figure.suptitle(subject)
    for axes, rows, what, unit in zip(
        figure.subplots(1, 2),
        (prefills, decodes),
        ("Prefill", "Decode"),
        ("prefill time (ms)", "decode latency (ms per token)"),
        strict=True,
    ):
        # Naive repetition would stretch the y axis to several times the height of the others.
        rows = [row for row in rows if row["variant"] != "naive_repeat"]
        [vanilla] = [row for row in rows if row["variant"] == "vanilla"]
        _lines(axes, _from_vanilla(rows), x=_copies, y=_milliseconds)
        _bars(axes, rows, x=_copies, y=_milliseconds)
        axes.axhline(_milliseconds(vanilla), color="black", linewidth=0.8, linestyle="--")
        _copies_axis(axes, rows)
        axes.set(title=f"{what} at {vanilla['tokens']} tokens", ylabel=unit)
        _from_zero(axes)
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def cache_over_context(rows: list[Measurement], subject: str) -> Figure:
    """KV bytes that were allocated, as the context grows.

    All variants have the largest K of naive repetition, or of PHD's variants if naive repetition
    was not measured.
    """
    naive = [row["K"] for row in rows if row["variant"] == "naive_repeat"]
    most = max(naive or [row["K"] for row in rows])
    found = [row for row in rows if row["variant"] in VARIANTS and row["K"] in (1, most)]
    vanilla = {row["tokens"]: row["kv_bytes"] for row in found if row["K"] == 1}
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    figure.suptitle(f"KV cache of a sequence at K = {most}; {subject}")
    whole, relative = figure.subplots(1, 2)
    _lines(whole, found, x=_tokens, y=_mebibytes)
    _lines(relative, found, x=_tokens, y=lambda row: row["kv_bytes"] / vanilla[row["tokens"]])
    whole.set(ylabel="KV cache (MiB)")
    relative.set(ylabel="KV cache / vanilla's")
    for axes in (whole, relative):
        axes.set(xlabel="context (tokens)")
        axes.set_xlim(0, axes.get_xlim()[1])
        _from_zero(axes)
        axes.grid(alpha=0.3)
    whole.legend()
    return figure


def _chart(title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    return figure, axes


def _from_vanilla(rows: list[Measurement]) -> list[Measurement]:
    """Add vanilla as the point K = 1 of every variant, which it is."""
    [vanilla] = [row for row in rows if row["variant"] == "vanilla"]
    variants = dict.fromkeys(row["variant"] for row in rows)
    return [*rows, *(vanilla | {"variant": variant} for variant in variants)]


def _lines(axes: Axes, rows: list[Measurement], x: Coordinate, y: Coordinate) -> None:
    """Draw a line for each variant, from left to right. Vanilla's lies above the others."""
    for variant, style in VARIANTS.items():
        points = sorted({(x(row), y(row)) for row in rows if row["variant"] == variant})
        above = 3 if variant == "vanilla" else 2
        axes.plot(*zip(*points, strict=True), **style._asdict(), zorder=above)


def _bars(axes: Axes, rows: list[Measurement], *, x: Coordinate, y: Coordinate) -> None:
    """Draw the quartiles of each ratio, as far from its point as they are from the median."""
    for row in rows:
        scale = y(row) / row["x_vanilla"]
        ends = [row["x_low"] * scale, row["x_high"] * scale]
        color = VARIANTS[row["variant"]].color
        axes.plot([x(row)] * 2, ends, color=color, linewidth=1, alpha=0.6, zorder=1)


def _from_zero(axes: Axes) -> None:
    """Let y begin at 0 and end above the highest marker, which would be clipped otherwise."""
    axes.set_ylim(0, axes.dataLim.y1 * 1.12)


def _copies(row: Measurement) -> float:
    return row["K"]


def _tokens(row: Measurement) -> float:
    return row["tokens"]


def _milliseconds(row: Measurement) -> float:
    return row["ms"]


def _ratio(row: Measurement) -> float:
    return row["x_vanilla"]


def _mebibytes(row: Measurement) -> float:
    return row["kv_bytes"] / 2**20


def _copies_axis(axes: Axes, rows: list[Measurement]) -> None:
    _powers_of_two(axes)
    axes.set_xticks(sorted({row["K"] for row in rows}))
    axes.set_xlabel("K, copies of each token")


def _powers_of_two(axes: Axes) -> None:
    """Scale x in powers of two, and label it with plain numbers."""
    # K goes up to 256. On a linear axis its small values would fall together.
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
