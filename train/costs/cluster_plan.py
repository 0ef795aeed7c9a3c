"""The plan of a run for a cluster: the meshes that fit, the one to take, and what failures cost."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import inf, lcm
from typing import Any, NamedTuple

import torch

from conf.errors import ConfigError, Problem
from conf.validation import as_dict
from conf.wording import two_digits
from phd.flops import training_flops_per_token
from phd.model import count_parameters
from train.config import Config
from train.costs.cluster import ClusterConfig
from train.costs.disk import checkpoint_disk
from train.costs.failures import DAY_S, Failures, Saving, best_interval_s, failures_of, saving_of
from train.costs.kernels import MicroBatch
from train.costs.optimizer import optimizer_cost
from train.costs.step import Step, StepTime, Weights, step_time
from train.engines.device import precision
from train.engines.memory import FITS, Memory, divisors, fit, predict_memory
from train.engines.mesh import ParallelDims
from train.settings.engine import FsdpConfig

CONTEXTS = TENSORS = (1, 2, 4, 8)
"""Sizes of these axes that are tried."""

CUT_ROWS = ("vanilla", "naive_repeat", "phd", "phd_swa", "phd_cswa")
"""Variants whose rows context parallelism can deal to ranks."""


@dataclass(frozen=True)
class Layout:
    """A run on a mesh.

    Attributes:
        dims: the mesh.
        config: of the run on it, whose micro-batch, checkpointing of activations and lanes fit.
        memory: predicted bytes on one device.
        time: of a step.
        flops_per_token: of training.
        cluster: the machines.
    """

    dims: ParallelDims
    config: Config
    memory: Memory
    time: StepTime
    flops_per_token: float
    cluster: ClusterConfig

    @property
    def name(self) -> str:
        """What the mesh is called."""
        return mesh_name(self.dims)

    @property
    def shape(self) -> str:
        """Replicate x shard x context x tensor."""
        d = self.dims
        return f"{d.replicate}x{d.shard}x{d.context}x{d.tensor}"

    @property
    def tokens_per_s(self) -> float:
        """Of all devices."""
        return self.config.train.tokens_per_step / self.time.total

    @property
    def mfu(self) -> float | None:
        """The FLOPs of the pattern over the devices' bf16 peak; None if that is not known."""
        peak = self.cluster.peak_flops
        if peak is None:
            return None
        return self.tokens_per_s * self.flops_per_token / (self.cluster.ranks * peak)

    @property
    def settings(self) -> list[str]:
        """What to type for it."""
        engine = self.config.engine
        assert isinstance(engine, FsdpConfig)
        given = {
            "engine": "fsdp" if engine.shard or self.cluster.ranks == 1 else "ddp",
            "engine.replicate": engine.replicate,
            "engine.context": engine.context,
            "engine.tensor": engine.tensor,
        }
        shown = {key: value for key, value in given.items() if value != 1}
        shown["train.micro_batch"] = self.config.micro_batch_on(self.cluster.ranks)
        shown["engine.activation_checkpointing"] = engine.activation_checkpointing
        shown["data.lanes"] = self.config.data.lanes
        return [f"{key}={value}" for key, value in shown.items()]


class Layouts(NamedTuple):
    """What was tried.

    Attributes:
        fitting: the meshes on which the run fits, the fastest first.
        too_large: how many others do not fit into the devices' memory.
        uneven: how many do not divide the rows of a batch, or the model.
    """

    fitting: list[Layout]
    too_large: int
    uneven: int


def mesh_name(dims: ParallelDims) -> str:
    """What a mesh is called.

    >>> [mesh_name(ParallelDims(*d)) for d in ((1, 8), (2, 2, 1, 2), (8, 1), (1, 1, 1, 8), (1, 1))]
    ['FSDP2', 'HSDP x TP', 'DDP', 'TP', 'one process']
    """
    base = "HSDP" if dims.replicate > 1 else "FSDP2"
    if dims.shards == 1:
        base = "DDP" if dims.replicate > 1 else ""
    parts = [base, "CP" if dims.context > 1 else "", "TP" if dims.tensor > 1 else ""]
    return " x ".join(filter(None, parts)) or "one process"


def find_layouts(config: Config, cluster: ClusterConfig) -> Layouts:
    """Every mesh of a cluster's ranks, with what fits of the run on it.

    The micro-batch, the checkpointing of activations and the lanes are chosen anew on each mesh.
    """
    fitting, too_large, uneven = [], 0, 0
    for dims in meshes(config, cluster.ranks):
        laid = _laid_out(config, dims)
        if laid is None or laid.problems_on(cluster.ranks):
            uneven += 1
        elif (found := layout_of(laid, dims, cluster)) is None:
            too_large += 1
        else:
            fitting.append(found)
    return Layouts(sorted(fitting, key=lambda layout: layout.time.total), too_large, uneven)


def meshes(config: Config, ranks: int) -> Iterator[ParallelDims]:
    """The meshes of so many ranks that are worth a look: DDP, and all with FSDP2 in them."""
    yield ParallelDims(replicate=ranks)
    contexts = CONTEXTS if config.model.variant in CUT_ROWS else (1,)
    for context in contexts:
        for tensor in TENSORS:
            data, rest = divmod(ranks, context * tensor)
            for replicate in divisors(data) if not rest else ():
                dims = ParallelDims(replicate, data // replicate, context, tensor)
                # Where nothing is cut it is DDP; and replicas of tensor ranks alone are no mesh of
                # FSDP2.
                if dims.shards > 1 or (tensor > 1 and replicate == 1):
                    yield dims


def _laid_out(config: Config, dims: ParallelDims) -> Config | None:
    """The configuration on a mesh, before its micro-batch is chosen; None if it cannot be."""
    shard = dims.shards > 1 or dims.tensor > 1 or dims.replicate == 1
    engine = config.engine
    assert isinstance(engine, FsdpConfig)
    rows, most = dims.data_ranks, config.train.global_batch
    if most % rows:
        return None
    lanes = lcm(config.data.lanes, rows)
    if most % lanes:
        lanes = rows
    try:
        return replace(
            config,
            engine=replace(
                engine,
                shard=shard,
                replicate=dims.replicate if shard else 1,
                context=dims.context,
                tensor=dims.tensor,
                activation_checkpointing="auto",
            ),
            train=replace(config.train, micro_batch="auto"),
            data=replace(config.data, lanes=lanes),
        )
    except ConfigError:
        return None


def layout_of(config: Config, dims: ParallelDims, cluster: ClusterConfig) -> Layout | None:
    """The run on one mesh; None if it does not fit into the devices' memory."""
    dtype = precision(config.engine, torch.device(cluster.kind))
    ranks, kind = cluster.ranks, cluster.kind
    try:
        settled = fit(config, dtype, world_size=ranks, device=kind, available=cluster.memory).config
    except ConfigError:
        return None
    memory = predict_memory(settled, dtype, ranks, kind)
    if memory.total > FITS[cluster.kind] * cluster.memory:
        return None
    step = step_of(settled, dims, cluster, dtype)
    flops = training_flops_per_token(settled.model, settled.train.seq_len)
    return Layout(dims, settled, memory, step_time(step), flops, cluster)


def step_of(config: Config, dims: ParallelDims, cluster: ClusterConfig, dtype: torch.dtype) -> Step:
    """The step of a run whose micro-batch and checkpointing are chosen."""
    engine, model, ranks = config.engine, config.model, cluster.ranks
    assert isinstance(engine, FsdpConfig)
    assert engine.activation_checkpointing != "auto"
    batch = MicroBatch(
        model,
        config.micro_batch_on(ranks),
        config.train.seq_len,
        context=dims.context,
        tensor=dims.tensor,
        itemsize=dtype.itemsize,
        compiled=engine.compiles_on(cluster.kind),
        recompute=engine.activation_checkpointing,
    )
    muon = optimizer_cost(config, dtype, ranks, dims.shards)
    return Step(
        batch,
        config.accumulation(ranks),
        _weights(config, dtype),
        dims,
        cluster,
        checkpoint_every=engine.checkpoint_every_block,
        muon_flops=muon.busiest if muon else 0.0,
        muon_bytes=muon.received if muon else 0.0,
    )


def _weights(config: Config, dtype: torch.dtype) -> Weights:
    engine, layers = config.engine, config.model.layers
    assert isinstance(engine, FsdpConfig)
    counts = count_parameters(config.model)
    outside = counts["embedding"] + counts["head"]
    return Weights(
        block=(sum(counts.values()) - outside) // layers,
        outside=outside,
        layers=layers,
        itemsize=dtype.itemsize,
        gradient=4 if engine.reduce == "fp32" else 2,
        reshard=engine.reshard_after_forward,
    )


PARTS = ("gather", "scatter", "reduce", "context", "tensor")
"""The communication of a step, as `StepTime` names it."""


@dataclass(frozen=True)
class ClusterPlan:
    """What a cluster makes of a run.

    Attributes:
        name: of the cluster, as the user gives it.
        cluster: the machines.
        layouts: the meshes, the fastest first.
        tokens: of the run; None if only `train.max_time` ends it.
        saving: a checkpoint on the recommended mesh.
        failures: at the configured interval between checkpoints.
        young_s, daly_s: the intervals that lose the least.
    """

    name: str
    cluster: ClusterConfig
    layouts: Layouts
    tokens: int | None
    saving: Saving
    failures: Failures
    young_s: float
    daly_s: float

    @property
    def best(self) -> Layout:
        """The recommended mesh: of those that fit, the one with the shortest step."""
        return self.layouts.fitting[0]

    @property
    def daly_steps(self) -> int:
        """Daly's interval as `checkpoint.every`; 0 where nothing is expected to fail."""
        return 0 if self.daly_s == inf else max(1, round(self.daly_s / self.best.time.total))

    @property
    def at_daly(self) -> Failures:
        """What is lost with that interval."""
        return failures_of(self.saving, self.cluster, self.daly_s)

    @property
    def of_each_kind(self) -> list[Layout]:
        """The fastest mesh of each kind."""
        kinds: dict[str, Layout] = {}
        for layout in self.layouts.fitting:
            kinds.setdefault(layout.name, layout)
        return list(kinds.values())

    def days(self, layout: Layout) -> float | None:
        """Of training alone; None if the run's length is not known."""
        return None if self.tokens is None else self.tokens / layout.tokens_per_s / DAY_S

    def to_json(self) -> dict[str, Any]:
        """The plan as plain values."""
        best, at_daly, longer = self.best, self.at_daly, 1 + self.failures.cost
        days = self.days(best)
        return {
            "name": self.name,
            "settings": as_dict(self.cluster),
            "meshes": [self._layout(layout) for layout in self.layouts.fitting],
            "too_large": self.layouts.too_large,
            "uneven": self.layouts.uneven,
            "recommended": best.settings,
            "why": reasons(self),
            "checkpoint": self.saving._asdict(),
            "failures": _finite(self.failures._asdict()),
            "days_with_failures": None if days is None else _or_none(days * longer),
            "proposed": {
                "young_s": _or_none(self.young_s),
                "daly_s": _or_none(self.daly_s),
                "checkpoint.every": self.daly_steps,
                "cost": _or_none(at_daly.cost),
            },
        }

    def _layout(self, layout: Layout) -> dict[str, Any]:
        time, days = layout.time, self.days(layout)
        return {
            "kind": layout.name,
            "replicate": layout.dims.replicate,
            "shard": layout.dims.shard,
            "context": layout.dims.context,
            "tensor": layout.dims.tensor,
            "micro_batch": layout.config.micro_batch_on(self.cluster.ranks),
            "activation_checkpointing": layout.config.engine.activation_checkpointing,
            "settings": layout.settings,
            "memory": {"total": layout.memory.total, **layout.memory._asdict()},
            "step_s": {"total": time.total, **time._asdict(), "hidden": time.hidden},
            "tokens_per_s": layout.tokens_per_s,
            "mfu": layout.mfu,
            "days": days,
            "device_hours": None if days is None else days * 24 * self.cluster.ranks,
        }


def plan_cluster(name: str, cluster: ClusterConfig, config: Config) -> ClusterPlan:
    """Lay a run out on a cluster.

    Raises:
        ConfigError: it is not for these devices or this engine, or fits on no mesh.
    """
    if problems := _problems(name, cluster, config):
        raise ConfigError(problems)
    layouts = find_layouts(config, cluster)
    if not layouts.fitting:
        reason = (
            f"none of {layouts.too_large + layouts.uneven} meshes of its {cluster.ranks} ranks "
            f"fits: on {layouts.too_large} a step needs more than a device's memory, and "
            f"{layouts.uneven} do not divide train.global_batch={config.train.global_batch} rows"
        )
        hint = "choose a smaller size, a shorter train.seq_len, or another cluster"
        raise ConfigError([Problem("cluster", name, reason, hint, ("train.seq_len", "model"))])
    best = layouts.fitting[0]
    size = checkpoint_disk(config, config.parameters).checkpoint
    saving = saving_of(size, best.dims.shards * best.dims.tensor, cluster)
    every = config.checkpoint.every
    interval = every * best.time.total if every else inf
    failures = failures_of(saving, cluster, interval)
    return ClusterPlan(
        name, cluster, layouts, _tokens(config), saving, failures, *best_interval_s(saving, cluster)
    )


def _problems(name: str, cluster: ClusterConfig, config: Config) -> list[Problem]:
    """Why a run is not for a cluster."""
    found, engine = [], config.engine
    if not isinstance(engine, FsdpConfig):
        reason, hint = "cluster= lays out PyTorch's own engine", "leave engine=deepspeed out"
        found.append(Problem("engine.kind", engine.kind, reason, hint, ("cluster",)))
    if engine.device not in ("auto", cluster.kind):
        reason = f"the devices of cluster={name} are {cluster.device}"
        found.append(Problem("engine.device", engine.device, reason, "leave it out", ("cluster",)))
    return found


def _tokens(config: Config) -> int | None:
    steps = config.total_steps
    return None if steps is None else steps * config.train.tokens_per_step


def reasons(plan: ClusterPlan) -> list[str]:
    """Why the recommended mesh is that, and what the fastest of each other kind loses by."""
    best, count = plan.best, len(plan.layouts.fitting)
    time = best.time
    share = time.exposed / time.total
    why = f"has the shortest step of the {count} that fit, of which {share:.1%} is exposed"
    found = [f"{best.name} {best.shape} {why} communication"]
    for other in plan.of_each_kind:
        if other is not best:
            slower = other.time.total / time.total - 1
            found.append(f"{other.name} {other.shape} is {slower:.1%} slower: {_loss(other, best)}")
    return found


def _loss(other: Layout, best: Layout) -> str:
    """The part of a step that makes a mesh slower than the best one."""
    mine, its = other.time, best.time
    parts = {
        "products of smaller matrices": mine.products - its.products,
        "computing what is no product": mine.attention + mine.other - its.attention - its.other,
        "the optimizer on fewer shards": mine.optimizer - its.optimizer,
        "communication that nothing hides": mine.exposed - its.exposed,
    }
    name, seconds = max(parts.items(), key=lambda part: part[1])
    if name == "communication that nothing hides":
        most = max(PARTS, key=lambda part: getattr(mine, part) - getattr(its, part))
        words = {
            "gather": "all-gathers of weights",
            "scatter": "reduce-scatters of gradients",
            "reduce": "all-reduces of gradients",
            "context": "keys and values of other ranks",
            "tensor": "activations of tensor ranks",
        }
        name = f"{name}, most of it {words[most]}"
    return f"{two_digits(1000 * seconds)} ms for {name}"


def _or_none(value: float) -> float | None:
    return None if value == inf else value


def _finite(values: dict[str, float]) -> dict[str, float | None]:
    return {name: _or_none(value) for name, value in values.items()}
