"""Plan a run: its parameters, FLOPs, memory and length, and warnings, before it is started.

python train/plan.py model=phd_cswa size=550m device=H100 processes=64 data=fineweb_edu
python train/plan.py model=phd_cswa size=1b2 cluster=h100_64 data=fineweb_edu
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # first of all: the imports below take seconds
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # see conf/checkout.py
    from train import compose
    from train.arguments import PlanArguments

    compose.run_with(PlanArguments, "train.plan", sweeps=True)

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import torch
from rich.console import Console

from conf.errors import USER_ERRORS, ConfigError, Problem, reason_of
from data.config import FilesSource
from data.sources.files import file_corpus
from data.storage.shard_cache import ShardCache
from data.storage.transport import is_local
from phd.attention.causal_kernels import FIRST_CUDNN, Platform
from phd.config import ModelConfig
from phd.flops import training_flops
from phd.model import count_parameters
from train import compose
from train.arguments import PlanArguments
from train.config import Config
from train.costs.cluster import ClusterConfig, load_cluster
from train.costs.cluster_plan import Layout, plan_cluster
from train.costs.cluster_table import print_cluster_plan
from train.costs.disk import checkpoint_disk
from train.costs.duration import Speed, find_speed
from train.costs.optimizer import optimizer_cost
from train.costs.plan import Compute, Plan, Target
from train.costs.plan_table import print_plan
from train.costs.plan_warnings import warnings_of
from train.costs.text import Text, look_at_text
from train.engines.accelerators import ACCELERATORS, accelerator, accelerator_of_device
from train.engines.attention import planned_attention
from train.engines.device import machine_memory, precision
from train.engines.memory import fit, predict_memory, shard_counts
from train.run_dir.prepare import METRICS
from train.start.trunk import trunk_of


def make_plan(
    config: Config,
    world_size: int = 1,
    *,
    text: Text | None = None,
    arguments: PlanArguments | None = None,
    memory: int | None = None,
    layout: Layout | None = None,
) -> Plan:
    """Make the plan of a run on `world_size` ranks, without allocating the model.

    Args:
        text: what is known of the run's text; None: nothing is.
        arguments: the device to plan for, and its speed; None: this machine's device.
        memory: bytes of the smallest device of the ranks, where they are known.
        layout: the mesh of a cluster that the run is planned for, in place of a device.

    Raises:
        ConfigError: the batch cannot be divided among the ranks, or the arguments do not fit.
    """
    if problems := config.problems_on(world_size):
        raise ConfigError(problems)
    arguments = arguments or PlanArguments()
    target = _target(config, arguments.device) if layout is None else _target_of(layout.cluster)
    if memory is not None:
        target = target._replace(memory=memory)
    parameters = count_parameters(config.model)
    dtype = precision(config.engine, torch.device(target.kind))
    fitted = fit(config, dtype, world_size=world_size, device=target.kind, available=target.memory)
    config = fitted.config
    compute = _compute(config, text)
    step_flops = config.train.tokens_per_step * compute.flops
    optimizer = optimizer_cost(config, dtype, world_size, shard_counts(config, world_size)[-1])
    plan = Plan(
        config=config,
        world_size=world_size,
        target=target,
        dtype=dtype,
        attention=_attention(config, target, dtype),
        parameters=parameters,
        compute=compute,
        optimizer=optimizer,
        memory=predict_memory(config, dtype, world_size, target.kind),
        chosen=fitted.chosen,
        disk=checkpoint_disk(config, sum(parameters.values())),
        text=text,
        speed=find_speed(
            peak=target.peak_flops,
            mfu=arguments.mfu,
            run=arguments.measured,
            own=_measured_in(config),
            compiled=config.engine.compiles_on(target.kind),
            uncounted=optimizer.busiest * world_size / step_flops if optimizer else 0.0,
        )
        if layout is None
        else _speed_on(layout),
        warnings=(),
    )
    return replace(plan, warnings=warnings_of(plan))


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


def _target_of(cluster: ClusterConfig) -> Target:
    """A device of a cluster."""
    name = cluster.device if cluster.accelerator is None else accelerator(cluster.device)
    assert name is not None
    return Target(name, cluster.kind, cluster.memory, cluster.peak_flops, False)


def _speed_on(layout: Layout) -> Speed:
    """That of a device on a mesh of a cluster, as the model of costs has it."""
    flops_per_s = layout.tokens_per_s * layout.flops_per_token / layout.cluster.ranks
    speed = f"{flops_per_s:.2e} FLOP/s" if layout.mfu is None else f"an MFU of {layout.mfu:.1%}"
    basis = f"{speed}, predicted for {layout.name} {layout.shape}"
    return Speed(flops_per_s, layout.mfu, basis)


def _measured_in(config: Config) -> Path:
    """The directory whose speed is the run's: its own, or that of its trunk before it begins."""
    begun = config.run.decay_of is None or (config.run_dir / METRICS).exists()
    return config.run_dir if begun else trunk_of(config)


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
    """The FLOPs of a token, from the documents of the text where they make a difference."""
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


def main(arguments: PlanArguments, config: Config) -> int:
    """Print the plan, and what there is to say of files on this machine."""
    text, laid_out = look_at_text(config), None
    if arguments.cluster is None:
        plan = make_plan(config, arguments.processes, text=text, arguments=arguments)
    else:
        laid_out = plan_cluster(arguments.cluster, load_cluster(arguments.cluster), config)
        best = laid_out.best
        plan = make_plan(best.config, best.cluster.ranks, text=text, layout=best)
    remarks = list(_file_remarks(config))
    if arguments.json:
        whole = {**plan.to_json(), "remarks": remarks}
        if laid_out is not None:
            whole["cluster"] = laid_out.to_json()
        print(json.dumps(whole, indent=1))
        return 0
    console = Console(soft_wrap=True)
    print_plan(plan, console)
    if laid_out is not None:
        print_cluster_plan(laid_out, console, arguments.meshes)
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
