"""A plan as a table for people."""

import os
from collections.abc import Iterator

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from conf.cache_dirs import COMPILED
from conf.wording import byte_size, duration, plural, short_count, two_digits
from train.config import Config
from train.console import warn
from train.costs.disk import Disk
from train.costs.optimizer import OptimizerCost
from train.costs.plan import Plan
from train.costs.recipe import describe_recipe
from train.costs.text import Text
from train.engines.memory import FITS

FIRST_STEP = (
    "each block by torch.compile; the first step takes up to a minute longer, and seconds where "
    "an earlier start has filled "
)
"""What the plan says of compiling, before the directory of the cache."""


def print_plan(plan: Plan, console: Console) -> None:
    """Print the plan as a table, and its warnings."""
    config = plan.config
    table = Table(title=f"the plan: {config.name}", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")  # a path that is cut could not be copied
    for name, text in _rows(plan):
        table.add_row(name, escape(text))
    console.print(table)
    for warning in plan.warnings:
        warn(console, f"warning: {warning}")


def _rows(plan: Plan) -> Iterator[tuple[str, str]]:
    """What the plan says, each with its title."""
    config = plan.config
    groups = ", ".join(f"{name} {short_count(n)}" for name, n in plan.parameters.items() if n)
    yield "parameters", f"{short_count(sum(plan.parameters.values()))}: {groups}"
    yield "a step", _step_row(plan)
    if recipe := describe_recipe(config):
        yield "recipe", recipe
    yield "length", _length_row(plan)
    if plan.config.branch is not None:
        yield "trunk", _trunk_row(plan)
    if plan.flops is not None:
        yield "compute", _compute_row(plan)
    if plan.decays:
        yield "decays", _decays_row(plan)
    ratio = plan.compute.flops / plan.compute.vanilla
    this, vanilla = short_count(plan.compute.flops), short_count(plan.compute.vanilla)
    yield "FLOPs per token", f"{this}, {ratio:.2f} x vanilla's {vanilla}"
    if plan.optimizer is not None:
        yield "optimizer", _optimizer_row(plan, plan.optimizer)
    if plan.flops is not None:
        yield "time", _time_row(plan)
    yield "memory", _memory_row(plan)
    if plan.attention is not None:
        yield "attention", plan.attention
    if plan.compiled:
        yield "compiling", f"{FIRST_STEP}{os.environ.get(COMPILED) or 'its cache'}"
    if row := _chosen_row(plan):
        yield "chosen for it", row
    yield "checkpoints", _disk_row(plan.disk)
    yield "text", "; ".join(_shares(start, w) for start, w in config.data.mixture)
    if plan.text is not None and plan.drawn:
        yield "epochs", _epochs_row(plan.text, plan.epochs)
    yield "run directory", str(config.run_dir)


def _step_row(plan: Plan) -> str:
    train = plan.config.train
    passes = plural(plan.config.accumulation(plan.world_size), "forward pass", "forward passes")
    ranks = f" on each of {plan.world_size} ranks" if plan.world_size > 1 else ""
    return (
        f"{train.tokens_per_step:,} tokens = {plural(train.global_batch, 'row')} x "
        f"{train.seq_len}, {_slots(plan.config)}, in {passes}{ranks}"
    )


def _slots(config: Config) -> str:
    """The slots of a token, of each stage of the run."""
    first, *later = config.copy_stages
    switched = (f", from step {s.first + 1} on {plural(s.K, 'slot')}" for s in later)
    return f"{plural(first.K, 'slot')} each{''.join(switched)}"


def _length_row(plan: Plan) -> str:
    config = plan.config
    if plan.tokens is None or config.total_steps is None:
        return duration(config.train.max_time or 0)
    return (
        f"{plural(config.total_steps, 'step')} = {short_count(plan.tokens)} tokens, "
        f"{plan.tokens / sum(plan.parameters.values()):.2f} per parameter{_which_limit(config)}"
    )


def _trunk_row(plan: Plan) -> str:
    """What of a decay is its trunk's."""
    config = plan.config
    total, branch = config.total_steps, config.branch
    assert total is not None
    assert branch is not None
    return (
        f"{config.run.decay_of} has the first {plural(branch, 'step')}; the last {total - branch} "
        f"are this run's own, {plan.own_flops:.2e} FLOPs"
    )


def _decays_row(plan: Plan) -> str:
    """What the decays of a trunk cost beside it, and what as many whole runs would."""
    decays, trunk = plan.decays, plan.config.total_steps
    assert trunk is not None
    assert plan.flops is not None
    lengths, own = [d.steps for d in decays], [d.steps - d.begins_after for d in decays]
    flops = sum(decay.flops for decay in decays)
    seconds = plan.seconds_of(plan.flops + flops)
    time = "" if seconds is None else f", about {duration(seconds)}"
    by = "" if plan.config.run.decays else ", each by a command of its own"
    told, theirs = (", ".join(f"{n:,}" for n in steps) for steps in (lengths, own))
    return (
        f"{len(decays)}, of {told} steps, of which {theirs} are not the trunk's{by}: "
        f"{flops:.2e} FLOPs; with the trunk {plural(trunk + sum(own), 'step')}{time}, where whole "
        f"runs would take {sum(lengths):,}"
    )


def _which_limit(config: Config) -> str:
    """Which of several limits ends the run, if there are several."""
    limits, first = config.step_limits, config.shortest_limits
    others = [f"{key} allows {steps:,}" for key, steps in limits.items() if key not in first]
    if config.train.max_time is not None:
        others.append(f"each start ends after train.max_time={config.train.max_time:g} s")
    return "; ".join([f"; {' and '.join(first)} ends it", *others]) if first and others else ""


def _compute_row(plan: Plan) -> str:
    flops = f"{plan.flops:.2e} FLOPs"
    if plan.compute.basis == "at most":
        return f"at most {flops}: isolated documents and padding need fewer"
    if plan.compute.basis == "sampled" and plan.text is not None:
        return f"about {flops}, by the documents in {plural(plan.text.rows, 'row')} of the text"
    return flops


def _optimizer_row(plan: Plan, cost: OptimizerCost) -> str:
    step = plan.config.train.tokens_per_step * plan.compute.flops
    told = (
        f"Muon for {short_count(cost.parameters)} parameters: {cost.flops:.2e} FLOPs a step of "
        f"Newton-Schulz, {two_digits(100 * cost.flops / step)} % of the training FLOPs, which "
        "count without them"
    )
    if plan.world_size == 1:
        return told
    return (
        f"{told}; the busiest of {plan.world_size} ranks has "
        f"{two_digits(100 * cost.busiest / cost.flops)} % of them, and each receives "
        f"{byte_size(cost.received)}"
    )


def _time_row(plan: Plan) -> str:
    if plan.time_s is None or plan.speed is None:
        return "not known: no run has been measured here"
    hours = two_digits(plan.time_s * plan.world_size / 3600)
    about = "at most" if plan.compute.basis == "at most" else "about"
    return f"{about} {duration(plan.time_s)}, {hours} device hours, at {plan.speed.basis}"


def _memory_row(plan: Plan) -> str:
    parts = ", ".join(f"{name} {byte_size(n)}" for name, n in plan.memory._asdict().items())
    each = "about" if plan.world_size == 1 else "on each rank about"
    dtype = {torch.bfloat16: "bf16", torch.float32: "fp32"}[plan.dtype]
    of = "" if plan.target.memory is None else f" of {byte_size(plan.target.memory)}"
    where = f"{plan.target.name}, {dtype}"
    return f"{each} {byte_size(plan.memory.total)}{of} ({where}): {parts}"


def _chosen_row(plan: Plan) -> str:
    """What was `auto` and depends on the memory; empty where nothing had to be computed again."""
    checkpointing = plan.config.engine.activation_checkpointing
    if "train.micro_batch" not in plan.chosen and checkpointing == "none":
        return ""
    chosen = ", ".join(f"{key}={value}" for key, value in plan.chosen.items())
    limit = f"at most {FITS[plan.target.kind]:.0%} of the device" if plan.target.memory else ""
    return f"{chosen}: {limit or 'the memory of the device is not known'}" if chosen else ""


def _disk_row(disk: Disk) -> str:
    each = f"{byte_size(disk.checkpoint)} each"
    if disk.most is None or disk.total is None:
        return f"{each}, as many as the run's time allows"
    return f"{each}, at most {disk.most} at a time, {byte_size(disk.total)} of disk"


def _epochs_row(text: Text, epochs: dict[str, float]) -> str:
    known = {name: source for name, source in text.sources.items() if source.tokens}
    told = [
        f"{name} {two_digits(epochs[name])} of about {short_count(source.tokens or 0)} tokens"
        for name, source in known.items()
    ]
    bases = [source.basis for source in known.values()]
    if len(set(bases)) == 1:  # told once
        told[-1] += f" ({bases[0]})"
    else:
        told = [f"{line} ({basis})" for line, basis in zip(told, bases, strict=True)]
    unknown = [f"{name} {s.basis}" for name, s in text.sources.items() if not s.tokens]
    return "; ".join([*told, *unknown])


def _shares(start: int, weights: dict[str, float]) -> str:
    """The fractions of the tokens that come from each source.

    >>> _shares(1_000_000, {"web": 3, "books": 1})
    'from 1M tokens on web 75%, books 25%'
    """
    shares = (f"{name} {weight / sum(weights.values()):.0%}" for name, weight in weights.items())
    return (f"from {short_count(start)} tokens on " if start else "") + ", ".join(shares)
