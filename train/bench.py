"""Measure what PHD costs on this machine.

python train/bench.py attention out=bench
python train/bench.py head out=bench
python train/bench.py step out=bench
python train/bench.py data out=bench
python train/bench.py resume out=bench
python train/bench.py checkpoint size=151m out=bench
python train/bench.py inference out=bench
python train/bench.py inference run=runs/phd_cswa-2-16-32-tiny
python train/bench.py throughput out=bench
python train/bench.py decode out=bench
python train/bench.py coordinates out=bench
python train/bench.py scale ranks='[8, 64, 512, 4096]' out=bench
python train/bench.py cluster out=bench
python train/bench.py overlap link_mb_per_s=4 out=bench
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # first of all: the imports below take seconds
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # see conf/checkout.py
    from conf import arguments
    from train.arguments import BenchArguments

    arguments.run(BenchArguments, "train.bench", positional=["name"])

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from math import inf
from tempfile import TemporaryFile
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from conf.errors import ConfigError, Problem, reason_of
from conf.extras import pip_command
from phd.config import ModelConfig
from phd.torch_private import HAS_TRITON
from train.arguments import BenchArguments
from train.benchmarks.attention import bench_attention
from train.benchmarks.checkpoint import bench_saving
from train.benchmarks.coordinates import Check, bench_coordinates
from train.benchmarks.head import bench_head
from train.benchmarks.loader import bench_loading, bench_resuming
from train.benchmarks.scale import SETTINGS, bench_scale
from train.benchmarks.step import bench_step
from train.benchmarks.timing import Keep, Result
from train.compose import load
from train.engines.device import choose_device, configure_process
from train.experiments.ledger import config_of, is_run, update
from train.run_dir.environment import environment
from train.run_dir.snapshot import read_revision
from train.settings.engine import EngineConfig


def _bench_step(args: BenchArguments, device: torch.device) -> Result:
    sizes = STEP_SIZES[device.type, args.short] if args.size is None else [args.size]
    results = [_bench_step_of(size, args, device) for size in sizes]
    return Result(
        [row for result in results for row in result.rows],
        {name: value for result in results for name, value in result.ratios.items()},
        "\n".join(result.subject for result in results),
        panels=[panel for result in results for panel in result.panels],
    )


def _bench_step_of(size: str, args: BenchArguments, device: torch.device) -> Result:
    shape = SHORT_STEP if args.short and device.type == "cpu" else STEP[device.type]
    seq_len = args.seq_len or shape.seq_len
    overrides = [
        f"size={size}",
        f"train.seq_len={seq_len}",
        f"train.global_batch={args.rows or max(1, shape.tokens // seq_len)}",
        "data.lanes=1",
        # A size also sets the recipe that it is trained with, whose length must not matter here.
        "train.max_steps=1",
        "train.max_tokens=null",
        "train.max_tokens_per_parameter=null",
        "train.micro_batch=null",
        "schedule.warmup_tokens=null",
        f"engine.device={device.type}",
    ]
    return bench_step(load(overrides), args.turns, device, short=args.short)


def _bench_checkpoint(args: BenchArguments, device: torch.device) -> Result:
    config = load([f"size={args.size or 'tiny'}", f"engine.device={device.type}"])
    return bench_saving(config, args.turns, Path(args.out).expanduser(), device)


def _bench_resume(args: BenchArguments, _: torch.device) -> Result:
    most = SHORT_GIGABYTES if args.short else inf
    return bench_resuming(args.turns, min(args.gigabytes, most))


def _bench_inference(args: BenchArguments, device: torch.device) -> Result:
    _need_packages(args.name)
    from train.benchmarks.inference import (
        Asked,
        bench_inference,
        bench_model,
        grid_of,
        grid_of_model,
    )

    lengths: tuple[tuple[int, ...], ...] = args.prompts, args.contexts, args.copies
    if args.short and args.run is None:
        lengths = tuple(a or b for a, b in zip(lengths, SHORT_LENGTHS, strict=True))
    prompts, contexts, copies = lengths
    asked = Asked(
        prompts=prompts,
        contexts=contexts,
        copies=copies,
        variants=args.variants,
        span_unit=args.span_unit,
        compiled=args.compile,
    )
    if args.run is not None:
        # The vectors of `model.copy_embedding` are no part of the weights that variants share; to
        # add them is all that they cost.
        model = replace(config_of(args.directory).model, copy_embedding=False)
        return bench_model(model, grid_of_model(model, device, asked), args.turns, device)
    model = _model_of_inference(args, device)
    grid, keep = grid_of(device, asked), _keeper(args)
    return bench_inference(model, grid, args.turns, device, charts=args.directory, keep=keep)


def _bench_throughput(args: BenchArguments, device: torch.device) -> Result:
    _need_packages(args.name)
    from train.benchmarks.throughput import bench_throughput, load_of

    given: tuple[tuple[int, ...], ...] = args.batches, args.contexts, args.copies
    if args.short:
        given = tuple(a or b for a, b in zip(given, SHORT_BATCHES, strict=True))
    load = load_of(device, *given)
    model = _model_of_inference(args, device)
    charts = Path(args.out).expanduser()
    return bench_throughput(model, load, args.turns, device, charts=charts, keep=_keeper(args))


def _bench_decode(args: BenchArguments, device: torch.device) -> Result:
    if not HAS_TRITON:
        raise ConfigError(["name=decode: needs Triton, which CUDA's torch has"], "the arguments")
    from train.benchmarks.token_kernels import bench_decode, shapes_of

    names = [args.size] if args.size else ["550m", "1b2"]
    sizes = [load([f"size={name}", f"engine.device={device.type}"]).model for name in names]
    if device.type == "cpu" and not args.size:
        sizes = [load([f"model.{setting}" for setting in INTERPRETED]).model]
    contexts = args.contexts or ((1024,) if args.short and device.type == "cuda" else ())
    shapes = shapes_of(sizes, device, args.copies, contexts, tune=args.tune)
    return bench_decode(shapes, args.turns, device, keep=_keeper(args))


def _bench_coordinates(args: BenchArguments, device: torch.device) -> Result:
    config = load([f"size={args.size or 'tiny'}", f"engine.device={device.type}"])
    widths = args.widths or (SHORT_WIDTHS if args.short else COORDINATE_WIDTHS)
    check = Check(
        config.model,
        widths,
        replace(config.optim, kind=args.optim),
        steps=args.steps,
        rows=args.rows or 4,
        tokens=args.seq_len or 64,
    )
    if find_spec("matplotlib") is None:
        return bench_coordinates(check, args.directory, device, None)
    from train.benchmarks.coordinates_plot import draw

    return bench_coordinates(check, args.directory, device, draw)


def _bench_scale(args: BenchArguments, _: torch.device) -> Result:
    ranks = args.ranks or (SHORT_RANKS if args.short else RANKS)
    config = load([f"size={args.size or 'tiny'}", *SETTINGS])
    return bench_scale(config, ranks, args.local)


def _bench_overlap(args: BenchArguments, _: torch.device) -> Result:
    tokens = args.seq_len or (512 if args.short else 4096)
    if tokens % 64:
        reason = "expected a multiple of 64: a row has 4 parts, each of whole chunks"
        raise ConfigError([Problem("seq_len", tokens, reason)], "the arguments")
    from train.benchmarks.overlap import bench_overlap

    return bench_overlap(tokens, args.link_mb_per_s * 1e6, args.turns)


def _bench_cluster(args: BenchArguments, device: torch.device) -> Result:
    if device.type != "cpu":
        hint = "choose device=cpu; the files of conf/cluster/ show how that of GPUs is written"
        raise ConfigError(
            [Problem("device", device.type, "cluster measures gloo ranks of the CPU", hint)],
            "the arguments",
        )
    from train.benchmarks.cluster import bench_cluster

    tokens = 64 if args.short else 256
    overrides = [f"size={args.size or 'tiny'}", f"train.seq_len={args.seq_len or tokens}"]
    overrides += [f"train.global_batch={args.rows or 8}", "data.lanes=4", "engine.device=cpu"]
    return bench_cluster(load(overrides), args.turns, args.directory)


def _model_of_inference(args: BenchArguments, device: torch.device) -> ModelConfig:
    """The model of `inference` and `throughput`: the size that is asked for, or a widened tiny."""
    size = args.size or "tiny"
    wider = [f"model.{setting}" for setting in WIDENED] if size == "tiny" else []
    model = load([f"size={size}", f"engine.device={device.type}", *wider]).model
    model = replace(model, window=16, chunk=32, span_unit=args.span_unit or "hidden")
    return replace(model, size="tiny, widened") if wider else model


def _need_packages(name: str) -> None:
    """Say which packages a benchmark lacks that its module imports at its top.

    Raises:
        ConfigError: transformers or matplotlib is missing. Both are optional.
    """
    if missing := [package for package in ("transformers", "matplotlib") if not find_spec(package)]:
        problem = f"name={name}: needs {' and '.join(missing)}"
        add = pip_command("phd-transformer[bench]")
        raise ConfigError([f"{problem}; {add}"], "the arguments")


def _bench_attention(args: BenchArguments, device: torch.device) -> Result:
    return bench_attention(args.turns, device, short=args.short)


WIDENED = ("layers=8", "dim=512", "ffn_dim=1536", "heads=8", "kv_heads=2", "head_dim=64")
"""The shape in place of `tiny` for inference: wide enough that a token's time is its matrices'."""


class StepShape(NamedTuple):
    """What a step is measured with where nothing is asked for: T, and the tokens of all rows."""

    seq_len: int
    tokens: int


STEP = {"cpu": StepShape(1024, 4096), "cuda": StepShape(4096, 16384)}
SHORT_STEP = StepShape(128, 128)

STEP_SIZES = {
    ("cpu", False): ["tiny"],
    ("cpu", True): ["tiny"],
    ("cuda", False): ["151m", "550m", "1b2"],
    ("cuda", True): ["151m"],
}
"""The sizes of `step` by device, and whether its short form is asked for."""

INTERPRETED = (
    *("layers=1", "dim=64", "ffn_dim=96", "heads=4", "kv_heads=2", "head_dim=16"),
    *("size=small", "vocab_size=256"),
)
"""The shape for `decode` in Triton's interpreter, which takes a second for a small product."""

SHORT_LENGTHS = ((512,), (128,), (2,))
"""Prompts, contexts and copies of the short form of inference."""

SHORT_BATCHES = ((1, 4), (128,), (2,))
"""Batches, contexts and copies of the short form of throughput."""

RANKS, SHORT_RANKS = (8, 64, 512, 4096), (8, 64)
"""The numbers of ranks in `scale`, and in its short form."""

COORDINATE_WIDTHS, SHORT_WIDTHS = (64, 128, 256, 512), (32, 64, 128)
"""The values of D in `coordinates`, and in its short form."""

SHORT_GIGABYTES = 0.02
"""The most text that the short form of `resume` writes."""

WIDTH = 144
"""Characters of a line of the table, at least: in a file, rich would wrap lines at 80."""

TEXTS = ("work", "size", "kernel", "by")
"""The columns of words, which begin at the left."""

SPREAD = ("x_low", "x_high")
"""The columns after a ratio: its quartiles over the turns."""

BENCHMARKS: dict[str, Callable[[BenchArguments, torch.device], Result]] = {
    "attention": _bench_attention,
    "head": lambda args, device: bench_head(args.turns, device, short=args.short),
    "step": _bench_step,
    "data": lambda args, _: bench_loading(args.turns, short=args.short),
    "resume": _bench_resume,
    "checkpoint": _bench_checkpoint,
    "inference": _bench_inference,
    "throughput": _bench_throughput,
    "decode": _bench_decode,
    "coordinates": _bench_coordinates,
    "scale": _bench_scale,
    "cluster": _bench_cluster,
    "overlap": _bench_overlap,
}


def main(args: BenchArguments) -> int:
    """Run one benchmark, print its table and write it as JSON and as CSV."""
    if args.run is not None and not is_run(args.directory):
        problem = f"run={args.run}: no config.yaml there; give the directory of a run"
        raise ConfigError([problem], "the arguments")
    # Before minutes of measurements that could not be written.
    _make_directory(str(args.directory))
    engine = EngineConfig(device=args.device)  # type: ignore[arg-type]
    device = choose_device(engine)
    configure_process(engine, device)
    console = Console(soft_wrap=True, highlight=False)
    console.width = max(console.width, WIDTH)
    result = BENCHMARKS[args.name](args, device)
    columns = _columns(result)
    method = result.method or f"medians of {args.turns} turns (the middle half of them)"
    title = f"{args.name} on {device}: {method}"
    title = f"{title}\n{result.subject}".rstrip()
    _print_result(result, columns, title, console)
    path = _path(args)
    _write_result(result, path, environment(read_revision()), complete=True)
    charts = _draw(result, title, path.with_suffix(".png"), console)
    results = [update(args.directory)] if args.run is not None else []
    for written in (path, path.with_suffix(".csv"), *result.files, *charts, *results):
        console.print(f"written: {written}", markup=False)
    return 0


def _make_directory(out: str) -> None:
    """Make sure that the results can be written.

    Raises:
        ConfigError: `out` cannot be a directory that this process writes to.
    """
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=out):
            pass
    except OSError as error:
        expected = f"not a directory that can be written to ({reason_of(error)})"
        raise ConfigError(
            [Problem("out", out, expected, "choose another")], "the arguments"
        ) from None


def _print_result(result: Result, columns: list[str], title: str, console: Console) -> None:
    """The table, in which a ratio's quartiles stand beside it, and the ratios."""
    table = Table(title=title)
    shown = [column for column in columns if column not in SPREAD]
    for column in shown:
        table.add_column(column, justify="left" if column in TEXTS else "right")
    digits = {column: _digits([row[column] for row in result.rows]) for column in columns}
    for row in result.rows:
        cells = {name: _cell(row[name], digits[name]) for name in columns}
        table.add_row(*(cells[name] + _spread(row, columns, digits, name) for name in shown))
    console.print(table)
    longest = max(map(len, result.ratios), default=0)
    for name, value in result.ratios.items():
        console.print(f"{name:{longest}} {value:10,.3f}")
    for note in result.notes:
        console.print(note, markup=False)


def _path(args: BenchArguments) -> Path:
    """The file of the results."""
    return args.directory / f"{args.name}.json"


def _columns(result: Result) -> list[str]:
    """Those of the table and the CSV file, which have the medians, not the single measurements."""
    return [key for key in result.rows[0] if not key.endswith("seconds")]


def _keeper(args: BenchArguments) -> Keep:
    """What writes the results so far, so that they are there if the rest is never measured."""
    path, machine = _path(args), environment(read_revision())
    return lambda result: _write_result(result, path, machine, complete=False)


def _write_result(result: Result, path: Path, machine: dict[str, Any], *, complete: bool) -> None:
    """Write the JSON and the CSV file; not `complete`: more may follow, in their place."""
    report = {
        "machine": machine,
        "complete": complete,
        "subject": result.subject,
        "ratios": result.ratios,
        "rows": result.rows,
    }
    written = path.with_suffix(".part")  # so that a kill leaves the file as it was, or whole
    written.write_text(json.dumps(report, indent=1), encoding="utf-8")
    written.replace(path)
    with path.with_suffix(".csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, _columns(result), extrasaction="ignore")
        writer.writeheader()
        writer.writerows(result.rows)


def _draw(result: Result, title: str, path: Path, console: Console) -> list[Path]:
    """Draw the result's panels; returns what was written, which may be nothing."""
    if not result.panels:
        return []
    if find_spec("matplotlib") is None:
        add = pip_command("phd-transformer[bench]")
        console.print(f"no chart: it needs matplotlib; {add}", markup=False)
        return []
    from train.benchmarks.charts import draw

    draw(result.panels, title, path)
    return [path]


def _spread(row: dict[str, Any], columns: list[str], digits: dict[str, int], name: str) -> str:
    """The quartiles of a ratio, whose columns follow it; "" for any other column."""
    place = columns.index(name) + 1
    if tuple(columns[place : place + 2]) != SPREAD or row[name] is None:
        return ""
    low, high = (_cell(row[column], digits[name]) for column in SPREAD)
    return f" ({low}-{high})"


def _digits(values: list[Any]) -> int:
    """The decimals of a column, which are those of its smallest number.

    >>> _digits([0.45, 25.5]), _digits([12.5, None]), _digits([744.2, 0.0])
    (3, 1, 0)
    """
    least = min((abs(x) for x in values if isinstance(x, float) and x), default=100.0)
    return 3 if least < 10 else int(least < 100)


def _cell(value: Any, digits: int) -> str:
    if value is None:
        return ""
    return f"{value:,.{digits}f}" if isinstance(value, float) else str(value)
