"""The charts of the inference benchmark, in the manner of arXiv 2504.14992's figures."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

Row = dict[str, Any]
DistEnv = Callable[[Row], float]


class Style(NamedTuple):
    """How a variant looks in every chart; what may lie beneath another has the larger marker."""

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


def draw(rows: list[Row], subject: str, folder: Path) -> None:
    """Writes `figure_1c.png`, `figure_1d.png`, `figure_9.png` and `kv_bytes.png`.

    Args:
        rows: of `train.benchmarks.inference.bench_inferring`.
        subject: what was measured, for the titles.
        folder: is made where there is none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stats, writing = longest(rows, "prefill"), longest(rows, "decode")
    charts = {
        "figure_1c": latency_over_cache(writing, subject),
        "figure_1d": prefill_over_copies(stats, subject),
        "figure_9": times_over_copies(stats, writing, subject),
        "kv_bytes": cache_over_context(rows, subject),
    }
    for name, figure in charts.items():
        figure.savefig(folder / f"{name}.png", dpi=150)


def longest(rows: list[Row], work: str) -> list[Row]:
    """The rows of one kind of work at the most tokens."""
    found = [row for row in rows if row["work"] == work and row["variant"] in VARIANTS]
    most = max(row["tokens"] for row in found)
    return [row for row in found if row["tokens"] == most]


def latency_over_cache(rows: list[Row], subject: str) -> Figure:
    """Figure 1c: what a copy costs in time and in memory; each point is a K."""
    figure, axes = _chart(f"Decoding at {rows[0]['tokens']} tokens\n{subject}")
    _lines(axes, _from_vanilla(rows), x=_mebibytes, y=_milliseconds)
    for row in rows:
        if row["variant"] in ("naive_repeat", "phd_cswa"):
            place = (_mebibytes(row), _milliseconds(row))
            axes.annotate(f"K={row['K']}", place, (7, -11), textcoords="offset points", fontsize=8)
    _powers_of_two(axes)
    axes.set(xlabel="KV cache of a sequence (MiB)", ylabel="decode latency (ms per token)", ylim=0)
    axes.margins(x=0.12)
    axes.legend()
    return figure


def prefill_over_copies(rows: list[Row], subject: str) -> Figure:
    """Figure 1d: how many times as long as vanilla a prompt takes."""
    figure, axes = _chart(f"Reading a prompt of {rows[0]['tokens']} tokens\n{subject}")
    _lines(axes, _from_vanilla(rows), x=_copies, y=lambda row: row["x_vanilla"])
    _copies_axis(axes, rows)
    axes.axhline(1, color="black", linewidth=0.8, linestyle="--")
    axes.set(ylabel="prefill time / vanilla's", ylim=0)
    axes.legend()
    return figure


def times_over_copies(stats: list[Row], writing: list[Row], subject: str) -> Figure:
    """Figure 9: the times of PHD, PHD-SWA and PHD-CSWA as K grows."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    figure.suptitle(subject)
    for axes, rows, what, unit in zip(
        figure.subplots(1, 2),
        (stats, writing),
        ("Prefill", "Decode"),
        ("prefill time (ms)", "decode latency (ms per token)"),
        strict=True,
    ):
        rows = [row for row in rows if row["variant"] != "naive_repeat"]
        [vanilla] = [row for row in rows if row["variant"] == "vanilla"]
        _lines(axes, _from_vanilla(rows), x=_copies, y=_milliseconds)
        axes.axhline(vanilla["median_ms"], color="black", linewidth=0.8, linestyle="--")
        _copies_axis(axes, rows)
        axes.set(title=f"{what} at {vanilla['tokens']} tokens", ylabel=unit, ylim=0)
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def cache_over_context(rows: list[Row], subject: str) -> Figure:
    """The bytes of caches that were allocated, at the most copies that naive repetition has, or
    PHD's variants where it is left out."""
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
        axes.set(xlabel="context (tokens)", xlim=0, ylim=0)
        axes.grid(alpha=0.3)
    whole.legend()
    return figure


def _chart(title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    return figure, axes


def _from_vanilla(rows: list[Row]) -> list[Row]:
    """With one copy every variant is vanilla, so each line begins there."""
    [vanilla] = [row for row in rows if row["variant"] == "vanilla"]
    variants = dict.fromkeys(row["variant"] for row in rows)
    return [*rows, *(vanilla | {"variant": variant} for variant in variants)]


def _lines(axes: Axes, rows: list[Row], x: DistEnv, y: DistEnv) -> None:
    """A line for each variant, through its rows from left to right; vanilla's above the others."""
    for variant, style in VARIANTS.items():
        points = sorted({(x(row), y(row)) for row in rows if row["variant"] == variant})
        above = 3 if variant == "vanilla" else 2
        axes.plot(*zip(*points, strict=True), **style._asdict(), zorder=above)


def _copies(row: Row) -> float:
    return row["K"]


def _tokens(row: Row) -> float:
    return row["tokens"]


def _milliseconds(row: Row) -> float:
    return row["median_ms"]


def _mebibytes(row: Row) -> float:
    return row["kv_bytes"] / 2**20


def _copies_axis(axes: Axes, rows: list[Row]) -> None:
    _powers_of_two(axes)
    axes.set_xticks(sorted({row["K"] for row in rows}))
    axes.set_xlabel("K, copies of each token")


def _powers_of_two(axes: Axes) -> None:
    """A scale of x in powers of two, written as plain numbers."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
