"""The plan for a cluster as tables for people."""

from collections.abc import Iterator, Mapping

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from conf.wording import byte_size, duration, plural, short_count, two_digits
from train.costs.cluster_plan import ClusterPlan, Layout, reasons

GIB, MS = 2**30, 1000.0

COMPUTED = ("products", "attention", "other", "optimizer", "host")
SENT = {
    "gather": "AG",
    "scatter": "RS",
    "reduce": "AR",
    "context": "CP",
    "tensor": "TP",
    "hidden": "hidden",
    "exposed": "exposed",
}
"""The parts of a step; of what is sent, with the titles of their columns."""


def print_cluster_plan(plan: ClusterPlan, console: Console, most: int) -> None:
    """Print the meshes by their speed, their memory and their step by part, and the advice.

    Args:
        most: how many of the fastest meshes are shown; beside them the fastest of each kind is.
    """
    fitting = plan.layouts.fitting
    kinds = plan.of_each_kind
    shown = [x for number, x in enumerate(fitting) if number < most or x in kinds]
    computed = dict(zip(COMPUTED, COMPUTED, strict=True))
    tables = [
        _meshes(plan, shown),
        _memory(plan, shown),
        _step("step by part, ms: what is computed", computed, shown),
        _step(
            "what is sent, ms: all-gather, reduce-scatter and all-reduce of weights and gradients; "
            "context and tensor parallelism; how much of it is hidden and exposed",
            SENT,
            shown,
        ),
    ]
    for table in tables:
        if len(table.columns) > 1:
            console.print(table)
    advice = Table(title="the advice", title_justify="left", show_header=False)
    advice.add_column()
    advice.add_column(overflow="fold")
    for name, text in _advice(plan):
        advice.add_row(name, escape(text))
    console.print(advice)


def _table(title: str, *columns: str) -> Table:
    """A table whose first column says which mesh a row is of; it fits into 80 characters."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0, show_edge=False)
    table.add_column("mesh", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _meshes(plan: ClusterPlan, shown: list[Layout]) -> Table:
    """How fast each is."""
    ranks = plan.cluster.ranks
    title = (
        f"{plural(len(plan.layouts.fitting), 'mesh', 'meshes')} of {plan.name} "
        f"({ranks:,} x {plan.cluster.device}) fit: replicate x shard x context x tensor"
    )
    columns = ("kind", "GiB", "step ms", "exposed", "tokens/s", "MFU", "days", "device h")
    table = _table(title, *columns)
    for layout in shown:
        days, time = plan.days(layout), layout.time
        table.add_row(
            layout.shape,
            layout.name,
            f"{layout.memory.total / GIB:.1f}",
            f"{MS * time.total:,.0f}",
            f"{time.exposed / time.total:.1%}",
            short_count(layout.tokens_per_s),
            "-" if layout.mfu is None else f"{layout.mfu:.1%}",
            "-" if days is None else f"{days:,.2f}",
            "-" if days is None else f"{days * 24 * ranks:,.0f}",
        )
    return table


def _memory(plan: ClusterPlan, shown: list[Layout]) -> Table:
    """What each takes of a device's memory, and the micro-batch that was chosen for it."""
    names = shown[0].memory._fields
    title = f"memory by part, GiB, of {plan.cluster.memory / GIB:.1f} GiB of each device"
    table = _table(title, "rows", "recomputed", *names)
    for layout in shown:
        table.add_row(
            layout.shape,
            str(layout.config.micro_batch_on(plan.cluster.ranks)),
            str(layout.config.engine.activation_checkpointing),
            *(f"{n / GIB:.2f}" for n in layout.memory),
        )
    return table


def _step(title: str, parts: Mapping[str, str], shown: list[Layout]) -> Table:
    """How long the parts of a step take that any of the meshes has; `parts` are their titles."""
    present = [name for name in parts if any(getattr(x.time, name) for x in shown)]
    table = _table(title, *(parts[name] for name in present))
    for layout in shown:
        table.add_row(layout.shape, *(_ms(getattr(layout.time, name)) for name in present))
    return table


def _ms(seconds: float) -> str:
    """Milliseconds with at least three digits.

    >>> _ms(0.8305), _ms(0.0153)
    ('830', '15.3')
    """
    return f"{MS * seconds:,.0f}" if seconds >= 0.1 else f"{MS * seconds:.1f}"


def _advice(plan: ClusterPlan) -> Iterator[tuple[str, str]]:
    """What to do, each with its title."""
    best = plan.best
    yield "recommended", " ".join(best.settings)
    first, *others = reasons(plan)
    yield "why", first
    for other in others:
        yield "", other
    if plan.layouts.too_large or plan.layouts.uneven:
        rows = plural(best.config.train.global_batch, "row")
        large = f"{plan.layouts.too_large} meshes that do not fit into memory"
        uneven = f"{plan.layouts.uneven} that do not divide the {rows} of a batch, or the model"
        yield "left out", f"{large}, {uneven}"
    yield "checkpoint", _checkpoint(plan)
    yield "failures", _failures(plan)
    if plan.daly_steps:
        yield "better", _better(plan)


def _checkpoint(plan: ClusterPlan) -> str:
    saving = plan.saving
    return (
        f"{byte_size(saving.size)}; training stands still for {two_digits(saving.stall_s)} s, and "
        f"{two_digits(saving.write_s)} s later it is written, read back and hashed"
    )


def _failures(plan: ClusterPlan) -> str:
    failures, every = plan.failures, plan.best.config.checkpoint.every
    if not failures.per_day:
        return "none are expected of this cluster (failures_per_device_hour is 0)"
    expected = f"{two_digits(failures.per_day)} a day expected"
    if not every:
        return f"{expected}; with checkpoint.every=0 each loses the whole run"
    days = plan.days(plan.best)
    whole = "" if days is None else f": {two_digits(days * (1 + failures.cost))} days in all"
    return (
        f"{expected}; with checkpoint.every={every} (every {duration(failures.interval_s)}) each "
        f"costs {duration(failures.lost_s)}, which with saving makes the run "
        f"{failures.cost:.2%} longer{whole}"
    )


def _better(plan: ClusterPlan) -> str:
    return (
        f"checkpoint.every={plan.daly_steps} by Daly's optimum, {duration(plan.daly_s)} (Young's: "
        f"{duration(plan.young_s)}), makes it {plan.at_daly.cost:.2%} longer"
    )
