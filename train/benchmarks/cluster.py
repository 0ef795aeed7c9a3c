"""Calibrate the model of costs on this machine, and say what it predicts beside what is measured.

Ranks share the cores of one machine, so a step takes the CPU time of all of them over the cores
that they have. That is what is measured: other programs on the machine do not count.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import yaml

from conf.validation import as_dict
from conf.wording import plural
from data.batch import Batch
from phd.pattern import patterns_of
from train.benchmarks.gloo_ranks import on_gloo_ranks
from train.benchmarks.timing import Result, Work
from train.config import Config
from train.costs.cluster import ClusterConfig, LinkConfig, RatesConfig, StorageConfig
from train.costs.cluster_plan import mesh_name, step_of
from train.costs.kernels import (
    OPTIMIZER_BYTES,
    MicroBatch,
    attention_flops,
    block_products,
    copies_of,
    head_stage,
    local_bytes,
    other_bytes,
)
from train.costs.step import StepTime, step_time
from train.distributed.process_groups import ProcessGroups
from train.engines.device import machine_memory
from train.engines.fsdp import FsdpEngine
from train.engines.mesh import ParallelDims
from train.loop import train_step
from train.settings.engine import FsdpConfig

RANKS = (1, 2, 4)
CALIBRATED = ("vanilla, one process", "vanilla, FSDP2 on 2 ranks")
EXCHANGED = (1 << 20, 1 << 24)
"""Bytes of the collectives from which a link's start and speed follow."""

ASSUMED_STORAGE = StorageConfig(
    host_gb_per_s=5,
    node_write_gb_per_s=0.5,
    write_gb_per_s=0.5,
    node_read_gb_per_s=1,
    read_gb_per_s=1,
)


class Case(NamedTuple):
    """A step that is predicted and measured.

    Attributes:
        name: of the model.
        config: of the run on the mesh, whose micro-batch is chosen.
        dims: the mesh.
    """

    name: str
    config: Config
    dims: ParallelDims

    @property
    def ranks(self) -> int:
        return self.dims.replicate * self.dims.shard


def cases_of(config: Config, ranks: int) -> list[Case]:
    """Vanilla with FSDP2 and DDP, and PHD-CSWA with FSDP2, on so many ranks."""
    vanilla, phd = config.model.vanilla_twin, replace(config.model, variant="phd_cswa", K=2)
    shapes = [("vanilla", vanilla, True), ("phd_cswa-2", phd, True)]
    shapes += [("vanilla", vanilla, False)] if ranks > 1 else []
    train = replace(config.train, micro_batch=config.train.global_batch // ranks)
    return [
        Case(
            name,
            replace(config, model=model, train=train, engine=_engine(config, shard)),
            ParallelDims(shard=ranks) if shard else ParallelDims(replicate=ranks),
        )
        for name, model, shard in shapes
    ]


def _engine(config: Config, shard: bool) -> FsdpConfig:
    assert isinstance(config.engine, FsdpConfig)
    return replace(config.engine, shard=shard, activation_checkpointing="none", compile=False)


def bench_cluster(config: Config, repeat: int, out: Path) -> Result:
    """Calibrate on two steps; predict the others, and measure them.

    Vanilla's in one process gives the rates, and with FSDP2 on two ranks what FSDP2 does beside the
    collectives, which are measured alone.

    Args:
        config: of a run on the CPU, whose batch 4 ranks can share.
        repeat: how often each is measured.
        out: the directory of `cluster.yaml`, from which `train/plan.py` plans.
    """
    cores = len(os.sched_getaffinity(0))
    measured: dict[int, list[float]] = {}
    for ranks in RANKS:
        found = on_gloo_ranks(ranks, _measured, cases_of(config, ranks), repeat)
        measured[ranks] = [sum(each) / min(ranks, cores) for each in zip(*found, strict=True)]
    *_, small, large = measured[2]
    first = cases_of(config, 1)[0]
    rates = _rates(first, measured[1][0], repeat)
    cluster = ClusterConfig(
        nodes=1,
        devices=max(RANKS),
        device="cpu",
        memory_gib=round(machine_memory() / 2**30, 1) / max(RANKS),
        cores=cores,
        rates=rates,
        within=LinkConfig(gb_per_s=_bandwidth(small, large, cores)),
        start_us=_start_us(small, large, cores),
        storage=ASSUMED_STORAGE,
    )
    cluster = with_fsdp_of(cases_of(config, 2)[0], measured[2][0], cluster)
    rows = [
        _row(case, cluster, seconds)
        for ranks in RANKS
        for case, seconds in zip(cases_of(config, ranks), measured[ranks], strict=False)
    ]
    path = out / "cluster.yaml"
    path.write_text(
        "# Written by `python train/bench.py cluster`; storage is an assumption.\n"
        + yaml.safe_dump(as_dict(cluster), sort_keys=False)
    )
    calibrated = [number for number, row in enumerate(rows) if row["work"] in CALIBRATED]
    others = [row["ratio"] for number, row in enumerate(rows) if number not in calibrated]
    return Result(
        rows,
        {"lowest_ratio": min(others), "highest_ratio": max(others)},
        f"{plural(cores, 'core')}; {' and '.join(CALIBRATED)} calibrate, the others are predicted",
        files=[path],
        method=f"CPU time of all ranks over the cores that they share, medians of {repeat}",
    )


def with_fsdp_of(case: Case, seconds: float, cluster: ClusterConfig) -> ClusterConfig:
    """The cluster with the factor of FSDP2 with which a step takes as long as it was measured.

    Where it was as fast as the collectives alone, the factor is 1.
    """
    alone = predicted(case, replace(cluster, fsdp_factor=1.0))
    of_fsdp = alone.gather + alone.scatter
    return replace(cluster, fsdp_factor=max(1.0, 1 + (seconds - alone.total) / of_fsdp))


def predicted(case: Case, cluster: ClusterConfig) -> StepTime:
    """What the model of costs says of a step."""
    step = step_of(case.config, case.dims, replace(cluster, devices=case.ranks), torch.float32)
    return step_time(step)


def _row(case: Case, cluster: ClusterConfig, seconds: float) -> dict[str, Any]:
    """What is predicted of a step beside what was measured."""
    time = predicted(case, cluster)
    ranks = f" on {case.ranks} ranks" if case.ranks > 1 else ""
    name = f"{case.name}, {mesh_name(case.dims)}{ranks}"
    return {
        "work": name,
        "ranks": case.ranks,
        "predicted_s": time.total,
        "measured_s": seconds,
        "ratio": time.total / seconds,
        "sent_s": time.sent,
    }


# Rates


def _rates(case: Case, step_s: float, repeat: int) -> RatesConfig:
    """The rates of a core: of products and attention alone, and of all else what a step leaves."""
    model, train = case.config.model, case.config.train
    tokens = train.global_batch * train.seq_len
    x, w = torch.randn(tokens, model.dim), torch.randn(model.dim, model.ffn_dim)
    product = 2 * tokens * model.dim * model.ffn_dim / _cpu_s(lambda: x @ w, repeat)
    shape = (train.global_batch, model.heads, train.seq_len, model.head_dim)
    q, k, v = (torch.randn(shape, requires_grad=True) for _ in range(3))

    def attend() -> None:
        torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()

    batch = MicroBatch(model, train.global_batch, train.seq_len, itemsize=4, compiled=False)
    flops = 3 * attention_flops(batch, patterns_of(model)[0], 1)
    attention = flops / _cpu_s(attend, repeat)
    linear = scores = moved = 0
    for layer, pattern in enumerate(patterns_of(model)):
        copies = copies_of(model, layer, pattern)
        linear += 3 * sum(each.flops for each in block_products(batch, copies))
        scores += 3 * attention_flops(batch, pattern, copies.queries)
        moved += sum(other_bytes(batch, copies)) + 3 * local_bytes(batch, pattern)
    linear += 6 * tokens * model.dim * model.vocab_size
    unit = RatesConfig(product_tflops=1e9, attention_tflops=1e9, memory_gb_per_s=1e-9)
    head = head_stage(batch, unit)
    moved += round(head.forward.other + head.backward.other)
    moved += OPTIMIZER_BYTES * case.config.parameters
    left = max(0.05 * step_s, step_s - linear / product - scores / attention)
    return RatesConfig(
        product_tflops=product / 1e12,
        attention_tflops=attention / 1e12,
        memory_gb_per_s=moved / left / 1e9,
    )


def _cpu_s(work: Work, repeat: int) -> float:
    """The median of the CPU seconds of a piece of work, after a first time."""
    work()
    found = []
    for _ in range(repeat):
        start = process_time()
        work()
        found.append(process_time() - start)
    return median(found)


def _slope(small: float, large: float) -> float:
    """Seconds for each byte of a collective of two ranks."""
    return max(1e-15, (large - small) / (EXCHANGED[1] - EXCHANGED[0]))


def _bandwidth(small: float, large: float, cores: int) -> float:
    """GB/s of a rank, of which `train.costs.links` makes these times again."""
    return max(1.0, 2 / cores) / 2 / _slope(small, large) / 1e9


def _start_us(small: float, large: float, cores: int) -> float:
    """Microseconds before the first byte."""
    start = small - EXCHANGED[0] * _slope(small, large)
    return max(0.0, start) / max(1.0, 2 / cores) * 1e6


# Ranks


def _measured(groups: ProcessGroups, cases: list[Case], repeat: int) -> list[float]:
    """CPU seconds of a step of each case, then of a small and a large collective, on one rank."""
    seconds = [_cpu_s(_step(case, groups), repeat) for case in cases]
    if groups.world_size > 1:
        seconds += [_cpu_s(_exchange(size, groups.world_size), repeat) / 2 for size in EXCHANGED]
    return seconds


def _step(case: Case, groups: ProcessGroups) -> Callable[[], object]:
    """A step of the engine on this rank."""
    config = case.config
    engine = FsdpEngine(config, groups)
    generator = np.random.default_rng(groups.rank)
    shape = (config.train.global_batch // groups.world_size, config.train.seq_len + 1)
    batch = Batch(generator.integers(0, config.model.vocab_size, shape))
    return lambda: train_step(engine, batch, config.optim.lr)


def _exchange(size: int, ranks: int) -> Work:
    """An all-gather to so many bytes on each rank, and a reduce-scatter of them, which also adds.

    FSDP2's weights and gradients go by these.
    """
    part, whole = torch.zeros(size // 4 // ranks), torch.zeros(size // 4)
    # Their names before torch 2.13, which says that the old ones are deprecated.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

    def work() -> None:
        gather(whole, part)
        scatter(part, whole)

    return work
