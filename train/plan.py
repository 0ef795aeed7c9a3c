"""Plan a run: its parameters, FLOPs, memory and length, and warnings, before it is started.

python train/plan.py model=phd_cswa size=550m device=H100 processes=64 data=fineweb_edu
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # first of all: the imports below take seconds
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # see conf/checkout.py
    from train import compose
    from train.arguments import PlanArguments

    compose.run_with(PlanArguments, "train.plan", sweeps=True)

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from conf.cache_dirs import COMPILED
from conf.errors import USER_ERRORS, ConfigError, Problem, reason_of, spelled
from conf.validation import flatten_keys
from conf.wording import byte_size, duration, plural, short_count
from data.config import FilesSource
from data.sources.files import file_corpus
from data.storage.shard_cache import ShardCache
from data.storage.transport import is_local
from phd.attention.causal_kernels import FIRST_CUDNN, Platform
from phd.config import ModelConfig
from phd.flops import training_flops
from phd.inference.cache import kv_bytes
from phd.model import count_parameters
from train import compose
from train.arguments import PlanArguments
from train.conf_files import recipe_of
from train.config import Config
from train.console import warn
from train.costs.disk import Disk, checkpoint_disk
from train.costs.duration import Speed, find_speed
from train.costs.text import Text, look_at_text
from train.engines.accelerators import ACCELERATORS, accelerator, accelerator_of_device
from train.engines.attention import planned_attention
from train.engines.device import machine_memory, precision
from train.engines.memory import FITS, Memory, fit, predict_memory

CHINCHILLA = 20
"""Tokens per parameter that are optimal for a compute budget (arXiv 2203.15556)."""

MOST_EPOCHS = 4
"""Text that is read more often teaches ever less than new text would (arXiv 2305.16264)."""


FIRST_STEP = (
    "each block by torch.compile; the first step takes up to a minute longer, and seconds where "
    "an earlier start has filled "
)
"""What the plan says of compiling, before the directory of the cache."""


class Target(NamedTuple):
    """The device that each rank trains on.

    Attributes:
        name: for people.
        kind: `cuda` or `cpu`.
        memory: its bytes; None if they are not known.
        peak_flops: its dense bf16 peak in FLOP/s; None if it is not known.
        is_here: whether it is this machine's.
    """

    name: str
    kind: Literal["cuda", "cpu"]
    memory: int | None
    peak_flops: float | None
    is_here: bool


class Compute(NamedTuple):
    """Training FLOPs per token of the rows, padding included.

    Attributes:
        flops: of this variant; where K is switched within the run, the mean over its steps.
        vanilla: of the vanilla transformer of this size.
        basis: `exact`; `sampled`: from documents of the text; `at most`: as if each row were one
            whole document, which isolated documents and padding stay below.
    """

    flops: float
    vanilla: float
    basis: Literal["exact", "sampled", "at most"]


@dataclass(frozen=True)
class Plan:
    """The costs of a run.

    Attributes:
        config: of the run.
        world_size: number of ranks.
        target: the device that each rank trains on.
        dtype: of the matrix products there.
        attention: the kernels that compute it there, by name; None: the device is not known.
        parameters: numbers of parameters by group. A tied LM head counts as the embedding.
        compute: FLOPs per token.
        memory: predicted bytes on one device.
        chosen: the settings that are `auto`, and what they are on this device.
        disk: bytes of checkpoints.
        text: what is known of the text; None if nobody has looked.
        speed: of one device; None if it is not known.
        warnings: settings that are probably not intended.
    """

    config: Config
    world_size: int
    target: Target
    dtype: torch.dtype
    attention: str | None
    parameters: dict[str, int]
    compute: Compute
    memory: Memory
    chosen: dict[str, int | str]
    disk: Disk
    text: Text | None
    speed: Speed | None
    warnings: tuple[str, ...]

    @property
    def compiled(self) -> bool:
        """Whether blocks are compiled there."""
        return self.config.engine.compiles_on(self.target.kind)

    @property
    def tokens(self) -> int | None:
        """Tokens of the whole run; None if only `train.max_time` ends it."""
        steps = self.config.total_steps
        return None if steps is None else steps * self.config.train.tokens_per_step

    @property
    def flops(self) -> float | None:
        """Training FLOPs of the whole run."""
        return None if self.tokens is None else self.tokens * self.compute.flops

    @property
    def time_s(self) -> float | None:
        """Seconds of training, without evaluations and whatever else is between the steps."""
        if self.flops is None or self.speed is None:
            return None
        return self.flops / (self.speed.flops_per_s * self.world_size)

    @property
    def drawn(self) -> dict[str, float]:
        """The tokens that the run reads of each source; empty if its length is not known."""
        if self.tokens is None:
            return {}
        mixture = self.config.data.mixture
        starts = [*(min(start, self.tokens) for start, _ in mixture), self.tokens]
        drawn = dict.fromkeys(self.config.data.sources, 0.0)
        for (_, weights), start, end in zip(mixture, starts, starts[1:], strict=False):
            for name, weight in weights.items():
                drawn[name] += (end - start) * weight / sum(weights.values())
        return drawn

    @property
    def epochs(self) -> dict[str, float]:
        """How often the run reads each source whose size is known."""
        sizes = {n: s.tokens for n, s in self.text.sources.items()} if self.text else {}
        return {n: drawn / size for n, drawn in self.drawn.items() if (size := sizes.get(n))}

    def to_json(self) -> dict[str, Any]:
        """The plan as plain values; null where something is not known."""
        config, sources = self.config, self.text.sources if self.text else {}
        hours = None if self.time_s is None else self.time_s * self.world_size / 3600
        return {
            "name": config.name,
            "parameters": {"total": sum(self.parameters.values()), **self.parameters},
            "device": {**self.target._asdict(), "dtype": str(self.dtype).removeprefix("torch.")},
            "compiled": self.compiled,
            "attention": self.attention,
            "processes": self.world_size,
            "tokens_per_step": config.train.tokens_per_step,
            "steps": config.total_steps,
            "copies": [stage._asdict() for stage in config.copy_stages],
            "tokens": self.tokens,
            "ends_by": config.shortest_limits,
            "flops": self.flops,
            "flops_per_token": self.compute.flops,
            "vanilla_flops_per_token": self.compute.vanilla,
            "flops_basis": self.compute.basis,
            "micro_batch": config.train.micro_batch_on(self.world_size),
            "activation_checkpointing": config.engine.activation_checkpointing,
            "chosen": self.chosen,
            "memory": {"total": self.memory.total, **self.memory._asdict()},
            "disk": {**self.disk._asdict(), "total": self.disk.total},
            "sources": {
                name: {
                    "tokens_read": self.drawn.get(name),
                    "epochs": self.epochs.get(name),
                    **(sources[name]._asdict() if name in sources else {}),
                }
                for name in config.data.sources
            },
            "speed": None if self.speed is None else self.speed._asdict(),
            "time_s": self.time_s,
            "device_hours": hours,
            "run_directory": str(config.run_dir),
            "warnings": list(self.warnings),
        }


def make_plan(
    config: Config,
    world_size: int = 1,
    *,
    text: Text | None = None,
    arguments: PlanArguments | None = None,
    memory: int | None = None,
) -> Plan:
    """Make the plan of a run on `world_size` ranks, without allocating the model.

    Args:
        text: what is known of the run's text; None: nothing is.
        arguments: the device to plan for, and its speed; None: this machine's device.
        memory: bytes of the smallest device of the ranks, where they are known.

    Raises:
        ConfigError: the batch cannot be divided among the ranks, or the arguments do not fit.
    """
    if problems := config.problems_on(world_size):
        raise ConfigError(problems)
    arguments = arguments or PlanArguments()
    target = _target(config, arguments.device)
    if memory is not None:
        target = target._replace(memory=memory)
    parameters = count_parameters(config.model)
    dtype = precision(config.engine, torch.device(target.kind))
    fitted = fit(config, dtype, world_size=world_size, device=target.kind, available=target.memory)
    config = fitted.config
    plan = Plan(
        config=config,
        world_size=world_size,
        target=target,
        dtype=dtype,
        attention=_attention(config, target, dtype),
        parameters=parameters,
        compute=_compute(config, text),
        memory=predict_memory(config, dtype, world_size, target.kind),
        chosen=fitted.chosen,
        disk=checkpoint_disk(config, sum(parameters.values())),
        text=text,
        speed=find_speed(
            peak=target.peak_flops,
            mfu=arguments.mfu,
            run=arguments.measured,
            own=config.run_dir,
            compiled=config.engine.compiles_on(target.kind),
        ),
        warnings=(),
    )
    return replace(plan, warnings=(*_size_warnings(plan), *_text_warnings(plan), *_odd(plan)))


def _target(config: Config, device: str | None) -> Target:
    """The device that a user names, or this machine's."""
    wanted = config.engine.device
    if device is not None:
        if wanted == "cpu":
            reason = "engine.device=cpu trains on the CPU"
            hint, others = "leave one of the two out", ("engine.device",)
            raise ConfigError([Problem("device", device, reason, hint, others)])
        name = accelerator(device)
        assert name is not None, "PlanArguments has checked it"
        known = ACCELERATORS[name]
        return Target(name, "cuda", int(known.memory_gib * 2**30), known.peak_flops, False)
    # Not `choose_device`: a machine without a GPU may plan a run for one.
    if torch.cuda.is_available() and wanted != "cpu":
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        model = accelerator_of_device(properties.name)
        peak = None if model is None else ACCELERATORS[model].peak_flops
        return Target(properties.name, "cuda", properties.total_memory, peak, True)
    if wanted == "cuda":
        return Target("a CUDA device", "cuda", None, None, False)
    return Target("this machine", "cpu", machine_memory(), None, True)


def _attention(config: Config, target: Target, dtype: torch.dtype) -> str | None:
    """The kernels that compute the run's attention on a device; None if it is not known."""
    if target.is_here:
        platform = Platform.of(torch.device(target.kind))
    else:
        known = ACCELERATORS.get(target.name)
        if known is None or known.capability is None:
            return None
        platform = Platform("cuda", known.capability, cudnn=FIRST_CUDNN)
    return planned_attention(config, platform, dtype, target.is_here)


def _compute(config: Config, text: Text | None) -> Compute:
    T, data = config.train.seq_len, config.data
    documents: tuple[int, ...] = (T,)
    rows = 1
    basis: Literal["exact", "sampled", "at most"] = "exact"
    if data.documents == "isolate" or data.packing == "best_fit":
        basis = "at most"
        if text is not None and text.rows:
            documents, rows, basis = text.documents, text.rows, "sampled"

    def flops(model: ModelConfig) -> float:
        return training_flops(model, *documents) / (rows * T)

    total = config.total_steps
    if total is None:
        mean = flops(config.model)
    else:
        costs = (
            s.steps(0, total) * flops(replace(config.model, K=s.K)) for s in config.copy_stages
        )
        mean = sum(costs) / total
    return Compute(mean, flops(config.model.vanilla_twin), basis)


def _size_warnings(plan: Plan) -> list[str]:
    """Of memory, disk and length."""
    found = []
    share = FITS[plan.target.kind]
    if plan.target.memory is not None and plan.memory.total > share * plan.target.memory:
        found.append(
            f"needs about {byte_size(plan.memory.total)}, {plan.target.name} has "
            f"{byte_size(plan.target.memory)}, of which a step should take at most {share:.0%}: "
            "lower train.micro_batch or train.seq_len, or choose a smaller size"
        )
    free = _free_disk(plan.config) if plan.target.is_here else None
    if free is not None and plan.disk.total is not None and plan.disk.total > free:
        found.append(
            f"the checkpoints need {byte_size(plan.disk.total)} of disk, {plan.config.run_dir} has "
            f"{byte_size(free)} left: lower checkpoint.keep or raise checkpoint.keep_every, or "
            "choose another run.dir"
        )
    parameters = sum(plan.parameters.values())
    # A tenth of a token per parameter is 200 times less than optimal; probably a setting is wrong.
    if plan.tokens is not None and plan.tokens < 0.1 * parameters:
        found.append(
            f"{plan.tokens / parameters:.2f} tokens per parameter: the model will hardly have "
            f"begun to learn; about {CHINCHILLA} are compute-optimal"
        )
    return found


def _free_disk(config: Config) -> int | None:
    """Bytes that are left where the run's directory is, or will be."""
    path = config.run_dir.absolute()
    try:
        return shutil.disk_usage(next(p for p in (path, *path.parents) if p.is_dir())).free
    except OSError:
        return None


def _text_warnings(plan: Plan) -> list[str]:
    """Of sources that are read too often, or end before the run does."""
    found = []
    for name, epochs in plan.epochs.items():
        limit, drawn = plan.config.data.sources[name].epochs, short_count(plan.drawn[name])
        if limit is not None and epochs > limit:
            found.append(
                f"data.sources.{name}.epochs={limit}: its text ends after about "
                f"{short_count(plan.drawn[name] * limit / epochs)} tokens of the {drawn} that the "
                "run would read of it"
            )
        elif epochs > MOST_EPOCHS:
            found.append(
                f"data.sources.{name}: the run reads {drawn} tokens of it, which is all of it "
                f"{_times(epochs)} times; what is read more than {MOST_EPOCHS} times teaches "
                "little: add text, or make the run shorter"
            )
    return found


def _odd(plan: Plan) -> list[str]:
    """Of settings that make no difference, or a bad one."""
    config, model, train = plan.config, plan.config.model, plan.config.train
    found = []
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
    # The default run of the tiny size trains at 0.003; common peak rates are below 0.003. The
    # smallest rung of the ladder has 0.0242, at which 120 steps of it went as at 0.006.
    if config.optim.lr > 0.025:
        found.append(f"optim.lr={config.optim.lr}: AdamW diverges at such rates")
    if config.checkpoint.every == 0:
        found.append("checkpoint.every=0: a crash loses everything; only the end is saved")
    return found


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
    if plan.flops is not None:
        yield "compute", _compute_row(plan)
    ratio = plan.compute.flops / plan.compute.vanilla
    this, vanilla = short_count(plan.compute.flops), short_count(plan.compute.vanilla)
    yield "FLOPs per token", f"{this}, {ratio:.2f} x vanilla's {vanilla}"
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
    passes = plural(train.accumulation(plan.world_size), "forward pass", "forward passes")
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


def _time_row(plan: Plan) -> str:
    if plan.time_s is None or plan.speed is None:
        return "not known: no run has been measured here"
    hours = _times(plan.time_s * plan.world_size / 3600)
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
        f"{name} {_times(epochs[name])} of about {short_count(source.tokens or 0)} tokens"
        for name, source in known.items()
    ]
    bases = [source.basis for source in known.values()]
    if len(set(bases)) == 1:  # told once
        told[-1] += f" ({bases[0]})"
    else:
        told = [f"{line} ({basis})" for line, basis in zip(told, bases, strict=True)]
    unknown = [f"{name} {s.basis}" for name, s in text.sources.items() if not s.tokens]
    return "; ".join([*told, *unknown])


def _times(number: float) -> str:
    """A number of times or hours, with two digits or whole.

    >>> _times(0.2484), _times(7.36), _times(81_081.4)
    ('0.25', '7.4', '81,081')
    """
    return f"{number:,.0f}" if number >= 100 else f"{number:.2g}"


def describe_recipe(config: Config) -> str:
    """What the run's size sets besides the model; empty if nothing.

    A size from 151m on chooses a recipe, and with it the learning rate, the batch, the length and
    more. Of these settings, the run may have replaced some.
    """
    recipe = recipe_of(config.model.size)
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
    return (f"from {short_count(start)} tokens on " if start else "") + ", ".join(shares)


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


def main(arguments: PlanArguments, config: Config) -> int:
    """Print the plan, and what there is to say of files on this machine."""
    plan = make_plan(config, arguments.processes, text=look_at_text(config), arguments=arguments)
    remarks = list(_file_remarks(config))
    if arguments.json:
        print(json.dumps({**plan.to_json(), "remarks": remarks}, indent=1))
        return 0
    console = Console(soft_wrap=True)
    print_plan(plan, console)
    for remark in remarks:
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
