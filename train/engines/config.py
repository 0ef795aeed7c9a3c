"""How the work is laid over devices and ranks: one small frozen value for each engine."""

from dataclasses import dataclass, field
from typing import Any, Literal

from conf.settings import Settings, at_least

# Keys of DeepSpeed's configuration that follow from our own settings.
DECIDED_ELSEWHERE = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.micro_batch",
    "gradient_clipping": "optim.grad_clip",
    "optimizer": "optim",
    "scheduler": "schedule",
    "fp16": "engine.precision",
    "bf16": "engine.precision",
    "torch_autocast": "engine.precision",
    "activation_checkpointing": "engine.activation_checkpointing",
    "zero_optimization.stage": "engine.stage",
}

# Others that would make another step than the one that all engines take.
ANOTHER_SUM = "gradients are sums over ranks, of a loss per target of the whole step"
ANOTHER_ADAMW = "it updates weights past the optimizer that skips bad steps"
IMPOSSIBLE = {
    "gradient_allreduce_op": ANOTHER_SUM,
    "gradient_predivide_factor": ANOTHER_SUM,
    "prescale_gradients": ANOTHER_SUM,
    "zero_optimization.zenflow": ANOTHER_ADAMW,
    "zero_optimization.super_offload": ANOTHER_ADAMW,
}


@dataclass(frozen=True, kw_only=True)
class EngineConfig(Settings):
    """What every engine can be told.

    Attributes:
        device: `auto` is CUDA where there is one.
        precision: `auto` is bf16 matrix products on CUDA and fp32 on the CPU; the optimizer's
            weights are always fp32.
        compile: compile each block with `torch.compile`.
        threads: threads of the CPU's kernels in each process; null: PyTorch's choice.
        activation_checkpointing: what a block keeps for its backward pass: `none` recomputes
            nothing, `full` keeps only the block's input, `selective` the results of matrix products
            and attention.
        checkpoint_every_block: with 2, every second block is checkpointed, and so on.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: bool = False
    threads: int | None = None
    activation_checkpointing: Literal["none", "full", "selective"] = "none"
    checkpoint_every_block: int = 1

    def problems(self) -> list[str]:
        return at_least(self, "engine", 1, "threads", "checkpoint_every_block")

    def problems_on(self, world_size: int) -> list[str]:  # noqa: ARG002
        """Why so many ranks cannot use this engine."""
        return []


@dataclass(frozen=True, kw_only=True)
class FsdpConfig(EngineConfig):
    """PyTorch's own: one process, DDP, FSDP2 or HSDP, by the number of ranks and `shard`.

    Attributes:
        shard: cut weights, gradients and moments over the ranks (FSDP2); false: every rank has all
            of them (DDP).
        replicate: HSDP: this many groups of ranks, each of which holds all shards.
        reshard_after_forward: free a block's gathered weights between its forward and its backward
            pass; `auto` does, but for the last block, which is needed again at once.
        reduce: the precision in which gradients are summed over ranks.
    """

    kind: Literal["fsdp"] = "fsdp"
    shard: bool = True
    replicate: int = 1
    reshard_after_forward: Literal["auto", "always", "never"] = "auto"
    reduce: Literal["fp32", "bf16"] = "fp32"

    def problems(self) -> list[str]:
        found = [*super().problems(), *at_least(self, "engine", 1, "replicate")]
        if self.replicate > 1 and not self.shard:
            found.append(
                f"engine.replicate={self.replicate}: engine.shard=false replicates on all ranks "
                "anyway; leave one of the two out"
            )
        return found

    def problems_on(self, world_size: int) -> list[str]:
        odd = (
            f"engine.replicate={self.replicate}: must divide the number of ranks, {world_size}; "
            "choose another, or start another number of ranks"
        )
        return [odd] if world_size % self.replicate else []


@dataclass(frozen=True, kw_only=True)
class DeepSpeedConfig(EngineConfig):
    """DeepSpeed's ZeRO (arXiv 1910.02054).

    Attributes:
        stage: what is cut over the ranks: 0 nothing, 1 the moments, 2 and the gradients, 3 and the
            weights.
        offload_optimizer: keep the moments in the host's memory and update the weights there;
            stages 1 to 3.
        offload_parameters: keep the weights there, too, and fetch them as they are needed; stage 3.
        deepspeed: keys of DeepSpeed's own configuration, laid over those that follow from the
            other settings: `engine.deepspeed.zero_optimization.overlap_comm=true`.
    """

    kind: Literal["deepspeed"] = "deepspeed"
    stage: Literal[0, 1, 2, 3] = 2
    offload_optimizer: bool = False
    offload_parameters: bool = False
    deepspeed: dict[str, Any] = field(default_factory=dict)

    def problems(self) -> list[str]:
        found = super().problems()
        if self.offload_optimizer and self.stage == 0:
            found.append(
                "engine.offload_optimizer=true: engine.stage=0 cuts no moments, and has none to "
                "offload; choose engine.stage=1, 2 or 3"
            )
        if self.offload_parameters and self.stage != 3:
            found.append(
                f"engine.offload_parameters=true: engine.stage={self.stage} keeps all weights on "
                "every device; choose engine.stage=3"
            )
        zero = self.deepspeed.get("zero_optimization")
        given = {*self.deepspeed, *(f"zero_optimization.{key}" for key in zero or ())}
        found += [
            f"engine.deepspeed.{key}: follows from {setting}; set that instead"
            for key, setting in DECIDED_ELSEWHERE.items()
            if key in given
        ]
        return found + [
            f"engine.deepspeed.{key}: {why}; leave it out"
            for key, why in IMPOSSIBLE.items()
            if key in given
        ]
