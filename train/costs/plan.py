"""The plan of a run: what it needs, in one value."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from train.config import Config
from train.costs.disk import Disk
from train.costs.duration import Speed
from train.costs.optimizer import OptimizerCost
from train.costs.text import Text
from train.engines.memory import Memory


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


class Decay(NamedTuple):
    """A decay of a trunk.

    Attributes:
        steps: of its run, those of the trunk included.
        begins_after: the step of the trunk from which it starts.
        flops: training FLOPs of the steps that are its own.
    """

    steps: int
    begins_after: int
    flops: float


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
        optimizer: what Muon computes and sends in a step; None: the optimizer is AdamW alone.
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
    optimizer: OptimizerCost | None
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
    def own_flops(self) -> float | None:
        """The same without the steps that the trunk of a decay has taken."""
        if self.flops is None or self.config.branch is None:
            return self.flops
        return self.flops - self._flops_of(self.config.branch)

    @property
    def decays(self) -> list[Decay]:
        """The decays of a trunk; none of any other run."""
        return [
            Decay(steps, after, self._flops_of(steps - after))
            for steps, after in self.config.branches.items()
        ]

    def _flops_of(self, steps: int) -> float:
        return steps * self.config.train.tokens_per_step * self.compute.flops

    @property
    def time_s(self) -> float | None:
        """Seconds of training, without evaluations and whatever else is between the steps."""
        return None if self.own_flops is None else self.seconds_of(self.own_flops)

    def seconds_of(self, flops: float) -> float | None:
        """Seconds of training that take so many FLOPs; None if no speed is known."""
        return flops / (self.speed.flops_per_s * self.world_size) if self.speed else None

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
            "own_flops": self.own_flops,
            "decays": [decay._asdict() for decay in self.decays],
            "flops_per_token": self.compute.flops,
            "vanilla_flops_per_token": self.compute.vanilla,
            "flops_basis": self.compute.basis,
            "optimizer": None if self.optimizer is None else self.optimizer._asdict(),
            "micro_batch": config.micro_batch_on(self.world_size),
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
