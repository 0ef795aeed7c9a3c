"""The meshes on which a run fits a cluster, each with its memory and the time of a step."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import lcm
from typing import NamedTuple

import torch

from conf.errors import ConfigError
from phd.flops import training_flops_per_token
from phd.model import count_parameters
from train.config import Config
from train.costs.cluster import ClusterConfig
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
            "engine": "fsdp" if engine.shard else "ddp",
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
    shard = dims.shards > 1 or dims.tensor > 1
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
