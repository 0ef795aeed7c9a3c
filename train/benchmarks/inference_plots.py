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

SAME_LABEL = 0.05
"""The share of an axis's height within which labels would lie on each other."""

FLOOR = "weights and cache at the copy's speed"


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

    Times are drawn as the table has them: as ratios to vanilla, and on a second axis in ms, which
    is vanilla's time, multiplied by the ratio. A bar at a point goes from the first to the third
    quartile of the ratio.

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
    _lines(axes, _from_vanilla(rows), x=_mebibytes, y=_ratio)
    _bars(axes, rows, x=_mebibytes)
    _name_copies(axes, rows)
    _powers_of_two(axes)
    axes.set_xlabel("KV cache of a sequence (MiB)")
    axes.margins(x=0.12)
    _ratio_axes(axes, rows, "decode latency", "ms per token")
    axes.legend(fontsize=8)
    return figure


def _name_copies(axes: Axes, rows: list[Measurement]) -> None:
    """Write K beside the points of naive repetition, and of PHD-CSWA in one unit of its window.

    On all variants labels would overlap: their points lie close together. Points that are almost
    the same share a label.
    """
    heights = [_ratio(row) for row in rows]
    for variant, place in (("naive_repeat", (7, -11)), ("phd_cswa", (9, -3))):
        labelled = sorted((row for row in rows if row["variant"] == variant), key=_copies)
        groups: list[list[Measurement]] = []
        for row in labelled:
            if row["W_in"] != labelled[0]["W_in"]:
                continue
            last = groups[-1][-1] if groups else None
            if (
                last is not None
                and _mebibytes(last) == _mebibytes(row)
                and abs(_ratio(last) - _ratio(row)) < max(heights) * SAME_LABEL
            ):
                groups[-1].append(row)
            else:
                groups.append([row])
        for group in groups:
            middle = sum(map(_ratio, group)) / len(group)
            text = f"K={', '.join(str(row['K']) for row in group)}"
            axes.annotate(
                text,
                (_mebibytes(group[0]), middle),
                place,
                textcoords="offset points",
                fontsize=8,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5},
            )


def prefill_over_copies(rows: list[Measurement], subject: str) -> Figure:
    """Figure 1d: prefill time over vanilla's, as K grows."""
    figure, axes = _chart(f"Reading a prompt of {rows[0]['tokens']} tokens\n{subject}")
    _over_copies(axes, rows, "prefill time", "ms")
    return figure


def times_over_copies(
    prefills: list[Measurement], decodes: list[Measurement], subject: str
) -> Figure:
    """Figure 9: prefill and decode times of PHD, PHD-SWA and PHD-CSWA as K grows."""
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    figure.suptitle(subject)
    for axes, rows, what, time, unit in zip(
        figure.subplots(1, 2),
        (prefills, decodes),
        ("Prefill", "Decode"),
        ("prefill time", "decode latency"),
        ("ms", "ms per token"),
        strict=True,
    ):
        # Naive repetition would stretch the y axis to several times the height of the others.
        _over_copies(axes, [r for r in rows if r["variant"] != "naive_repeat"], time, unit)
        axes.set_title(f"{what} at {rows[0]['tokens']} tokens")
        axes.grid(alpha=0.3)
    return figure


def _over_copies(axes: Axes, rows: list[Measurement], time: str, unit: str) -> None:
    """Draw the ratios as K grows."""
    _lines(axes, _from_vanilla(rows), x=_copies, y=_ratio)
    _bars(axes, rows, x=_copies)
    _copies_axis(axes, rows)
    axes.axhline(1, color="black", linewidth=0.8, linestyle="--")
    _ratio_axes(axes, rows, time, unit)
    axes.legend(fontsize=8)


def _ratio_axes(axes: Axes, rows: list[Measurement], time: str, unit: str) -> None:
    """Scale y from 0 on in ratios to vanilla on the left, and in milliseconds on the right.

    In decode a dotted line shows the least that vanilla could take.
    """
    [vanilla] = [row for row in rows if row["variant"] == "vanilla"]
    ms = vanilla["ms"]
    if vanilla["of_copy"] is not None:
        axes.axhline(vanilla["of_copy"], color="gray", linewidth=1, linestyle=":", label=FLOOR)
    axes.set_ylabel(f"{time} / vanilla's")
    _from_zero(axes)
    right = axes.secondary_yaxis("right", functions=(lambda ratio: ratio * ms, lambda y: y / ms))
    right.set_ylabel(f"{time} ({unit})")


def cache_over_context(rows: list[Measurement], subject: str) -> Figure:
    """KV bytes that were allocated, as the context grows.

    All variants have the largest K of naive repetition, or of PHD's variants if naive repetition
    was not measured.
    """
    naive = [row["K"] for row in rows if row["variant"] == "naive_repeat"]
    most = max(naive or [row["K"] for row in rows])
    found = [row for row in rows if row["variant"] in VARIANTS and row["K"] in (1, most)]
    vanilla = {row["tokens"]: row["kv_mib"] for row in found if row["K"] == 1}
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    figure.suptitle(f"KV cache of a sequence at K = {most}; {subject}")
    whole, relative = figure.subplots(1, 2)
    _lines(whole, found, x=_tokens, y=_mebibytes)
    _lines(relative, found, x=_tokens, y=lambda row: row["kv_mib"] / vanilla[row["tokens"]])
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
    """Add vanilla as the point K = 1 of every variant, which it is.

    Where a window was measured in tokens as well, its points begin where both units are the same:
    at K = 2.
    """
    [vanilla] = [row for row in rows if row["variant"] == "vanilla"]
    series = dict.fromkeys(_series(row) for row in rows)
    added = [vanilla | {"variant": variant, "W_in": unit} for variant, unit in series]
    both = {variant for variant, unit in series if unit == "token"}
    shared = [row | {"W_in": "token"} for row in rows if row["variant"] in both and row["K"] == 2]
    return [*rows, *added, *shared]


def _series(row: Measurement) -> tuple[str, str | None]:
    """The line of a chart that a row belongs to."""
    return row["variant"], row["W_in"]


def _lines(axes: Axes, rows: list[Measurement], x: Coordinate, y: Coordinate) -> None:
    """Draw a line for each variant and unit of its window, from left to right.

    Vanilla's lies above the others. Those of windows in tokens are dashed, with hollow markers.
    """
    for variant, style in VARIANTS.items():
        for unit in (None, "hidden", "token"):
            found = {(x(row), y(row)) for row in rows if _series(row) == (variant, unit)}
            if not found:
                continue
            look = style._asdict()
            if unit == "token":
                look |= {"label": f"{style.label}, W in tokens", "fillstyle": "none"}
                look |= {"linestyle": "--"}
            above = 3 if variant == "vanilla" else 2
            axes.plot(*zip(*sorted(found), strict=True), **look, zorder=above)


def _bars(axes: Axes, rows: list[Measurement], *, x: Coordinate) -> None:
    """Draw the quartiles of each ratio."""
    for row in rows:
        color = VARIANTS[row["variant"]].color
        axes.plot([x(row)] * 2, [row["x_low"], row["x_high"]], color=color, linewidth=1, alpha=0.6)


def _from_zero(axes: Axes) -> None:
    """Let y begin at 0 and end above the highest marker, which would be clipped otherwise."""
    axes.set_ylim(0, axes.dataLim.y1 * 1.12)


def _copies(row: Measurement) -> float:
    return row["K"]


def _tokens(row: Measurement) -> float:
    return row["tokens"]


def _ratio(row: Measurement) -> float:
    return row["x_vanilla"]


def _mebibytes(row: Measurement) -> float:
    return row["kv_mib"]


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
