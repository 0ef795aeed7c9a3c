"""Plan a run: its parameters, FLOPs, memory and length, and warnings, before it is started.

python train/plan.py model=phd_cswa size=550m train.max_tokens=10e9
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # first of all: the imports below take seconds
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # see conf/checkout.py
    from train import compose

    compose.run("train.plan")

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from conf.errors import USER_ERRORS, ConfigError, reason_of, spelled
from conf.validation import flatten_keys
from data.config import FilesSource
from data.sources.files import file_corpus
from data.storage.shard_cache import ShardCache
from data.storage.transport import is_local
from phd.config import ModelConfig
from phd.flops import training_flops_per_token
from phd.inference.cache import kv_bytes
from phd.model import count_parameters
from train import compose
from train.config import Config
from train.engines.device import precision
from train.engines.memory import Memory, predict_memory

CHINCHILLA = 20
"""Tokens per parameter that are optimal for a compute budget (arXiv 2203.15556)."""


@dataclass(frozen=True)
class Plan:
    """The costs of a run.

    Attributes:
        config: of the run.
        world_size: number of ranks.
        parameters: numbers of parameters by group. A tied LM head counts as the embedding.
        flops_per_token: training FLOPs per token of this variant.
        vanilla_flops_per_token: the same for the vanilla transformer of this size.
        memory: predicted bytes on one device.
        available_memory: bytes of memory that the device has.
        warnings: settings that are probably not intended.
    """

    config: Config
    world_size: int
    parameters: dict[str, int]
    flops_per_token: float
    vanilla_flops_per_token: float
    memory: Memory
    available_memory: int
    warnings: tuple[str, ...]

    @property
    def tokens(self) -> int | None:
        """Tokens of the whole run; None if only `train.max_time` ends it."""
        steps = self.config.total_steps
        return None if steps is None else steps * self.config.train.tokens_per_step

    @property
    def flops_are_a_bound(self) -> bool:
        """Whether isolated documents or padding will take fewer FLOPs than full rows do."""
        data = self.config.data
        return data.documents == "isolate" or data.packing == "best_fit"


def make_plan(config: Config, world_size: int = 1) -> Plan:
    """Make the plan of a run on `world_size` ranks, without allocating the model.

    Raises:
        ConfigError: the batch cannot be divided among the ranks.
    """
    if problems := config.problems_on(world_size):
        raise ConfigError(problems)
    # Not `choose_device`: a machine without a GPU may plan a run for one.
    device = torch.device(
        "cuda" if torch.cuda.is_available() and config.engine.device != "cpu" else "cpu"
    )
    parameters = count_parameters(config.model)
    dtype = precision(config.engine, device)
    plan = Plan(
        config=config,
        world_size=world_size,
        parameters=parameters,
        flops_per_token=training_flops_per_token(config.model, config.train.seq_len),
        vanilla_flops_per_token=training_flops_per_token(
            config.model.vanilla_twin, config.train.seq_len
        ),
        memory=predict_memory(config, sum(parameters.values()), dtype, world_size),
        available_memory=_available_memory(device),
        warnings=(),
    )
    return replace(plan, warnings=tuple(_warnings(plan)))


def _available_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _warnings(plan: Plan) -> list[str]:
    config, model, train = plan.config, plan.config.model, plan.config.train
    found = []
    # Memory without the scratch space of kernels: where this is too much, the run certainly is.
    if plan.memory.total > plan.available_memory:
        found.append(
            f"needs about {_size(plan.memory.total)}, the device has "
            f"{_size(plan.available_memory)}: lower train.micro_batch or train.seq_len, or choose "
            "a smaller size"
        )
    parameters = sum(plan.parameters.values())
    # A tenth of a token per parameter is 200 times less than optimal; probably a setting is wrong.
    if plan.tokens is not None and plan.tokens < 0.1 * parameters:
        found.append(
            f"{plan.tokens / parameters:.2f} tokens per parameter: the model will hardly have "
            f"begun to learn; about {CHINCHILLA} are compute-optimal"
        )
    if model.variant == "phd_cswa" and model.window > model.chunk:
        found.append(
            f"model.window={model.window} reaches past model.chunk={model.chunk}: "
            "the chunk limits it"
        )
    if model.chunk_tokens is not None and model.chunk_tokens >= train.seq_len:
        found.append(f"model.chunk={model.chunk} covers the whole row: this is the same as phd_swa")
    if model.K == 1 and model.variant != "vanilla":
        found.append(f"model.K=1: {model.variant} with one copy is vanilla")
    found += [
        f"data.phases.{name}.after_tokens={phase.after_tokens}: begins after the run's "
        f"{plan.tokens} tokens"
        for name, phase in config.data.phases.items()
        if plan.tokens is not None and phase.after_tokens >= plan.tokens
    ]
    # The default run of the tiny size trains at 0.005; common peak rates are below 0.003.
    if config.optim.lr > 0.02:
        found.append(f"optim.lr={config.optim.lr}: AdamW diverges at such rates")
    if config.checkpoint.every == 0:
        found.append("checkpoint.every=0: a crash loses everything; only the end is saved")
    return found


def print_plan(plan: Plan, console: Console) -> None:
    """Print the plan as a table, and its warnings."""
    config, train = plan.config, plan.config.train
    parameters = sum(plan.parameters.values())
    groups = ", ".join(f"{name} {_count(n)}" for name, n in plan.parameters.items() if n)
    ratio = plan.flops_per_token / plan.vanilla_flops_per_token
    passes = train.accumulation(plan.world_size)
    table = Table(title=f"the plan: {config.name}", title_justify="left", show_header=False)
    table.add_row("parameters", f"{_count(parameters)}: {groups}")
    table.add_row(
        "a step",
        f"{train.tokens_per_step:,} tokens = {train.global_batch} rows x {train.seq_len}, "
        f"{config.model.K} {'slot' if config.model.K == 1 else 'slots'} each, in {passes} "
        f"forward pass{'' if passes == 1 else 'es'}"
        + (f" on each of {plan.world_size} ranks" if plan.world_size > 1 else ""),
    )
    if recipe := describe_recipe(config):
        table.add_row("recipe", recipe)
    if plan.tokens is None:
        table.add_row("length", f"{train.max_time:.0f} s")
    else:
        table.add_row(
            "length",
            f"{config.total_steps:,} steps = {_count(plan.tokens)} tokens, "
            f"{plan.tokens / parameters:.2f} per parameter" + _which_limit(config),
        )
        compute = f"{plan.tokens * plan.flops_per_token:.2e} FLOPs"
        table.add_row("compute", f"at most {compute}" if plan.flops_are_a_bound else compute)
    table.add_row(
        "FLOPs per token",
        f"{_count(plan.flops_per_token)}, {ratio:.2f} x vanilla's "
        f"{_count(plan.vanilla_flops_per_token)}",
    )
    memory = ", ".join(f"{name} {_size(n)}" for name, n in plan.memory._asdict().items())
    each = "about" if plan.world_size == 1 else "on each rank about"
    table.add_row("memory", f"{each} {_size(plan.memory.total)}: {memory}")
    table.add_row("text", "; ".join(_shares(start, w) for start, w in config.data.mixture))
    table.add_row("run directory", str(config.run_dir))
    console.print(table)
    for warning in plan.warnings:
        console.print(f"[yellow]warning: {warning}[/]", highlight=False)


def _which_limit(config: Config) -> str:
    """Which of several limits ends the run, if there are several."""
    limits, first = config.step_limits, config.shortest_limits
    others = [f"{key} allows {steps:,}" for key, steps in limits.items() if key not in first]
    if config.train.max_time is not None:
        others.append(f"each start ends after train.max_time={config.train.max_time:g} s")
    return "; ".join([f"; {' and '.join(first)} ends it", *others]) if first and others else ""


def describe_recipe(config: Config) -> str:
    """What the run's size sets besides the model; empty if nothing.

    A size from 151m on chooses a recipe, and with it the learning rate, the batch, the length and
    more. Of these settings, the run may have replaced some.
    """
    recipe = compose.recipe_of(config.model.size)
    if recipe is None:
        return ""
    now = flatten_keys(config.to_dict())
    kept = [key for key, value in recipe.settings.items() if now[key] == value]
    replaced = [
        f"{key}={_short(now[key])} (recipe: {_short(value)})"
        for key, value in recipe.settings.items()
        if now[key] != value
    ]
    chosen = f"size={config.model.size} chose recipe={recipe.name}"
    text = f"{chosen}; they set {', '.join(f'{key}={_short(now[key])}' for key in kept)}"
    return text + (f"; this run replaces: {', '.join(replaced)}" if replaced else "")


def _short(value: Any) -> str:
    """A value as it could be typed; large integers with an exponent.

    >>> _short(300_000_000_000), _short(1024), _short(3e-4), _short(None)
    ('3e11', '1024', '0.0003', 'null')
    """
    if isinstance(value, int) and value >= 1_000_000:
        return f"{float(value):g}".replace("e+0", "e").replace("e+", "e")
    return spelled(value)


def _shares(start: int, weights: dict[str, float]) -> str:
    """The fractions of the tokens that come from each source.

    >>> _shares(1_000_000, {"web": 3, "books": 1})
    'from 1M tokens on web 75%, books 25%'
    """
    shares = (f"{name} {weight / sum(weights.values()):.0%}" for name, weight in weights.items())
    return (f"from {_count(start)} tokens on " if start else "") + ", ".join(shares)


class KVRow(NamedTuple):
    """The bytes of one sequence in the KV cache of a variant."""

    name: str
    total: int
    hidden: int
    ratio: float


def kv_rows(model: ModelConfig, context: int, dtype: torch.dtype) -> list[KVRow]:
    """The KV bytes of this variant, vanilla and naive repetition, at `context` tokens.

    A variant is shown once. With one copy nothing is repeated, and that is vanilla.
    """
    vanilla = model.vanilla_twin
    variants = [model, vanilla]
    if model.K > 1:
        variants.append(replace(model, variant="naive_repeat"))
    base = kv_bytes(vanilla, context, dtype).total
    rows = []
    for variant in dict.fromkeys(variants):
        cost = kv_bytes(variant, context, dtype)
        rows.append(KVRow(variant.name, cost.total, cost.hidden, cost.total / base))
    return rows


def _count(number: float) -> str:
    """A number with three digits and a letter for its magnitude.

    >>> _count(2_621_440)
    '2.62M'
    """
    for magnitude, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= magnitude:
            return f"{number / magnitude:.3g}{letter}"
    return f"{number:.3g}"


def _size(size: float) -> str:
    """A number of bytes with three digits and a unit.

    >>> _size(90_000_000)
    '85.8 MiB'
    """
    unit, letter = (2**30, "G") if size >= 2**30 else (2**20, "M")
    return f"{size / unit:.3g} {letter}iB"


def main(config: Config) -> int:
    """Print the plan, and what there is to say of files on this machine."""
    console = Console(soft_wrap=True)
    print_plan(make_plan(config), console)
    for remark in _file_remarks(config):
        console.print(remark, markup=False, highlight=False)
    return 0


def _file_remarks(config: Config) -> Iterator[str]:
    """What the user should know of the files of each source whose paths are on this machine."""
    for name, source in config.data.sources.items():
        if not isinstance(source, FilesSource) or not all(map(is_local, source.patterns)):
            continue
        cache = ShardCache(config.data.cache, config.data.remote)
        try:
            yield from file_corpus(name, source, cache, config.data.max_document_bytes).remarks
        except USER_ERRORS as error:
            # A run may be planned on another machine than the one that has its text.
            yield f"the files of data.sources.{name} cannot be looked at here: {reason_of(error)}"
