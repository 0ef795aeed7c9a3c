"""What each variant costs: in training, in the memory of a sequence, and in time of inference."""

from functools import partial
from statistics import fmean

from conf.wording import duration, short_count
from train.experiments import drawings
from train.experiments.charts import Chart, Panel
from train.experiments.comparison import base_of, kv_setting
from train.experiments.document import Block, Section, missing
from train.experiments.drawings import TIMES, Axis, Point, Row, power
from train.experiments.experiment import Experiment
from train.experiments.groups import Group, at_shared_seeds, legend, source_of_groups
from train.experiments.result import Latency
from train.experiments.tables import Cell, Column, Table, number, text, without_empty_columns

MEBIBYTE = 2**20

COLUMNS = (
    Column("group", "runs", numeric=False),
    Column("parameters", "parameters"),
    Column("train_flops", "training", "FLOPs"),
    Column("flops_per_token_ratio", "per token", f"{TIMES} vanilla"),
    Column("train_s", "training", "time"),
    Column("tokens_per_s", "tokens/s"),
    Column("mfu", "MFU", "%"),
    Column("kv_bytes", "KV cache", "MiB"),
    Column("kv_hidden_bytes", "hidden copies", "MiB"),
    Column("kv_bytes_ratio", "KV cache", f"{TIMES} vanilla"),
)

LATENCY = (
    Column("group", "runs", numeric=False),
    Column("device", "device", numeric=False),
    Column("dtype", "numbers", numeric=False),
    Column("context", "context", "tokens"),
    Column("batch", "batch"),
    Column("prefill_ms", "prefill", "ms"),
    Column("prefill_ratio", "prefill", f"{TIMES} vanilla"),
    Column("decode_ms", "decode", "ms per token"),
    Column("decode_ratio", "decode", f"{TIMES} vanilla"),
)

NOT_MEASURED = (
    "The time of prefill and decode was not measured for these models. `python train/bench.py "
    "inference run=<directory>` measures that of a run."
)


def costs(experiment: Experiment) -> Section | None:
    """Tables of what is paid, and the loss over each price."""
    if not experiment.groups:
        return None
    blocks: list[Block] = [_training(experiment), _latency(experiment) or missing(NOT_MEASURED)]
    if chart := _prices(experiment):
        blocks.insert(0, chart)
    return Section("costs", "What it costs", tuple(blocks))


# Training and memory


def _training(experiment: Experiment) -> Table:
    rows = tuple(
        _row(group, base_of(experiment, group) or experiment.vanilla_of(group))
        for group in experiment.groups
    )
    devices = sorted({f"{r.devices} x {r.device}" for g in experiment.groups for r in g.runs})
    contexts = sorted({run.kv_context for group in experiment.groups for run in group.runs})
    note = (
        f"Means over the seeds. Trained on {', '.join(devices)}. The KV cache is that of one "
        f"sequence of {' or '.join(f'{context:,}' for context in contexts)} tokens. Vanilla is "
        "the group that others are compared with at their end."
    )
    note = f"{note} {experiment.not_of_one_length}".strip()
    title = "Training and the KV cache"
    source = source_of_groups(experiment.groups)
    return without_empty_columns(Table("costs", title, COLUMNS, rows, source, note))


def _row(group: Group, vanilla: Group | None) -> tuple[Cell, ...]:
    run, runs = group.runs[0], group.runs
    base = vanilla and vanilla.runs[0]
    same_kv = vanilla and kv_setting([group]) == kv_setting([vanilla])
    seconds = fmean(run.train_s for run in runs)
    return (
        text(group.label, group.style),
        Cell(short_count(run.parameters), run.parameters),
        Cell(power(fmean(run.train_flops for run in runs)), fmean(run.train_flops for run in runs)),
        number(run.flops_per_token / base.flops_per_token if base else None, "{:.2f}"),
        Cell(duration(seconds), seconds),
        number(mean_of([run.tokens_per_s for run in runs]), "{:,.0f}"),
        number(_percent(mean_of([run.mfu for run in runs])), "{:.1f}"),
        Cell(f"{run.kv_bytes / MEBIBYTE:.3f}", run.kv_bytes),
        Cell(f"{run.kv_hidden_bytes / MEBIBYTE:.3f}", run.kv_hidden_bytes),
        number(run.kv_bytes / base.kv_bytes if base and same_kv else None, "{:.3f}"),
    )


def mean_of(values: list[float | None]) -> float | None:
    """The mean of what was measured; None if nothing was.

    >>> mean_of([1.0, None, 3.0]), mean_of([None])
    (2.0, None)
    """
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


# Inference


def _latency(experiment: Experiment) -> Table | None:
    rows = [
        _latency_row(group, found, _same(experiment.vanilla_of(group), found))
        for group in experiment.groups
        for found in measured(group)
    ]
    groups = [group for group in experiment.groups if measured(group)]
    if not rows:
        return None
    note = (
        "As `bench.py inference` measured it. Prefill reads the context; decode adds a token to it."
    )
    if left := [group.label for group in experiment.groups if group not in groups]:
        note += f" Not measured: {', '.join(left)}."
    title = "The time of inference"
    table = Table("latency", title, LATENCY, tuple(rows), source_of_groups(groups), note)
    return without_empty_columns(table)


def measured(group: Group) -> list[Latency]:
    """What was measured of a group's model, once for each device, precision, context and batch."""
    found = {_setting(latency): latency for run in group.runs for latency in run.latency}
    return [found[key] for key in sorted(found)]


def _setting(latency: Latency) -> tuple[str, str, int, int]:
    return latency.device, latency.dtype, latency.context, latency.batch


def _same(vanilla: Group | None, latency: Latency) -> Latency | None:
    """Vanilla's latency in the same setting."""
    found = measured(vanilla) if vanilla else []
    return next((other for other in found if _setting(other) == _setting(latency)), None)


def _latency_row(group: Group, found: Latency, vanilla: Latency | None) -> tuple[Cell, ...]:
    def ratio(name: str) -> float | None:
        ours, base = getattr(found, name), vanilla and getattr(vanilla, name)
        return ours / base if ours is not None and base else None

    return (
        text(group.label, group.style),
        text(found.device),
        text(found.dtype),
        number(found.context, "{:,}"),
        number(found.batch, "{}"),
        number(found.prefill_ms, "{:,.1f}"),
        number(ratio("prefill_ms"), "{:.2f}"),
        number(found.decode_ms, "{:,.3g}"),
        number(ratio("decode_ms"), "{:.2f}"),
    )


# The loss over its price


def _prices(experiment: Experiment) -> Chart | None:
    measure = experiment.measure
    with_values = [group for group in experiment.comparable if measure.spread(group)]
    if len(with_values) < 2:
        return None
    shown, _, left_out = at_shared_seeds(with_values)
    spreads = {group.key: measure.spread(group) for group in shown}
    prices = {
        "training FLOPs": {g.key: fmean(run.train_flops for run in g.runs) for g in shown},
        "time of training (s)": {g.key: fmean(run.train_s for run in g.runs) for g in shown},
        "KV cache (MiB)": {g.key: g.runs[0].kv_bytes / MEBIBYTE for g in shown},
    }
    panels = []
    for label, price in prices.items():
        rows = []
        for group in shown:
            found = spreads[group.key]
            assert found is not None
            point = Point(price[group.key], found.mean, found.least, found.greatest)
            rows.append(Row(group.style, [point]))
        x = Axis(label, power if "FLOPs" in label else None)
        draw = partial(drawings.draw_points, rows=rows, x=x, y=Axis(measure.unit))
        alt = f"The {measure.words} of {len(rows)} groups of runs over their {label}."
        panels.append(Panel(label.split()[0].lower(), alt, draw))
    note = "Down and to the left is better. Bars reach from the lowest to the highest seed."
    if experiment.not_alike:
        note += f" {experiment.not_alike} They are not shown."
    if left_out:
        note += f" {left_out}"
    title = f"The {measure.words} at the end, over what it cost"
    return Chart("prices", title, tuple(panels), source_of_groups(shown), legend(shown), note)
