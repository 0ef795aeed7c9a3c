"""`engine.`: how the work is spread over devices and ranks, a frozen dataclass for each engine."""

from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal, get_args

from conf.errors import Problem
from conf.settings import Settings, at_least, without_effect
from phd.config import ModelConfig

DeviceName = Literal["auto", "cpu", "cuda"]
Float8Scaling = Literal["tensorwise", "rowwise"]

LEAST_CAPABILITY: dict[Float8Scaling, tuple[int, int]] = {"tensorwise": (8, 9), "rowwise": (9, 0)}
"""CUDA's compute capability that multiplies in float8: 8.9 is Ada, 9.0 Hopper."""

# Keys of DeepSpeed's configuration that our own settings decide.
DECIDED_ELSEWHERE = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.micro_batch",
    "gradient_clipping": "optim.grad_clip",
    "optimizer": "optim",
    "zero_allow_untested_optimizer": "optim",
    "scheduler": "schedule",
    "fp16": "engine.precision",
    "bf16": "engine.precision",
    "torch_autocast": "engine.precision",
    "activation_checkpointing": "engine.activation_checkpointing",
    "zero_optimization.stage": "engine.stage",
}

# Keys with which DeepSpeed would take another optimizer step than the other engines do. The loss is
# already divided by the number of targets on all ranks, so gradients must be summed, not averaged;
# and bad steps are skipped in an optimizer that these features bypass. With the last key, training
# is the same, but `safe_get_full_fp32_param` and the like reorder parameters only in part.
ANOTHER_SUM = "gradients are summed over ranks; the loss is already a mean over all targets"
ANOTHER_ADAMW = "it updates weights without the optimizer that skips bad steps"
NO_NORM = "the optimizer clips and skips bad steps by the norm of the gradient"
ANOTHER_PLACE = "DeepSpeed would save the weights of one parameter as those of another"
IMPOSSIBLE = {
    "gradient_allreduce_op": ANOTHER_SUM,
    "gradient_predivide_factor": ANOTHER_SUM,
    "prescale_gradients": ANOTHER_SUM,
    "zero_optimization.compute_grad_norm": NO_NORM,
    "zero_optimization.zenflow": ANOTHER_ADAMW,
    "zero_optimization.super_offload": ANOTHER_ADAMW,
    "zero_optimization.round_robin_gradients": ANOTHER_PLACE,
}

# Keys with which DeepSpeed says nothing and does otherwise than `optim.kind: muon` means. Its own
# Muon is refused as `optimizer`: it goes by "embed" and "lm_head" in names, so that it would take
# `head` for a matrix of a block, and it orthogonalises before it clips.
ON_THE_HOST = "optim.kind=muon would make its matrix products on the host"
SHARD_INSTEAD = "choose engine=fsdp, which shards weights, gradients and moments"
ANOTHER_MUON = {
    "offload_optimizer": (ON_THE_HOST, SHARD_INSTEAD),
    "cpu_offload": (ON_THE_HOST, SHARD_INSTEAD),  # its old name
    "save_muon_momentum_buffer_in_memory": (
        "it is of DeepSpeed's own Muon, and here it would change nothing",
        "leave it out",
    ),
}


@dataclass(frozen=True, kw_only=True)
class EngineConfig(Settings):
    """The settings that all engines have.

    Attributes:
        device: where the model is trained; `auto` is CUDA where there is a usable device, and the
            CPU otherwise.
        precision: the precision of matrix products; `auto` is bf16 on CUDA and fp32 on the CPU.
            `fp8`: the projections of the blocks multiply in float8, and all else as with bf16; it
            needs torchao and an Ada, Hopper or newer GPU. The weights that the optimizer updates
            are always fp32.
        fp8_scaling: how `fp8` scales the operands of a product: by one number for each tensor
            (`tensorwise`, the faster one), or for each row (`rowwise`, the more exact one, on
            Hopper or newer).
        compile: compile each block with `torch.compile`; `auto` does so on CUDA, and not at
            ZeRO-3. The first step then takes up to a minute longer, and seconds once the cache
            (`TORCHINDUCTOR_CACHE_DIR`) is filled.
        flash_attention: which FlashAttention computes causal attention on CUDA in half precision.
            `auto` leaves it to cuDNN where that is faster, and takes the newest version that is
            installed for what cuDNN refuses, such as isolated documents. 2 is part of PyTorch; 3
            and 4 are packages of their own. A number keeps attention from cuDNN.
        threads: how many CPU threads a process uses for its computations; null: PyTorch's choice.
        activation_checkpointing: what a block stores for its backward pass. `none`: everything.
            `selective`: the results of matrix products and attention; what is cheap is computed
            again. `full`: only the block's input; all else is computed again. `auto`: on CUDA the
            first of these whose predicted memory fits the device; on the CPU `none`. Gradients do
            not depend on it.
        checkpoint_every_block: 1 checkpoints the activations of every block, 2 of every second
            block, and so on.
    """

    device: DeviceName = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp8"] = "auto"
    fp8_scaling: Float8Scaling = "tensorwise"
    compile: Literal["auto"] | bool = "auto"
    flash_attention: Literal["auto", 2, 3, 4] = "auto"
    threads: int | None = None
    activation_checkpointing: Literal["auto", "none", "selective", "full"] = "auto"
    checkpoint_every_block: int = 1

    def problems(self) -> list[Problem]:
        found = at_least(self, "engine", 1, "threads", "checkpoint_every_block")
        if self.precision == "fp8" and self.device == "cpu":
            found.append(no_float8(self.fp8_scaling, "the CPU"))
        return found

    def problems_with(self, model: ModelConfig, seq_len: int) -> list[Problem]:
        """Why the blocks' products cannot be float8, whose operands have sides of 16 n numbers."""
        if self.precision != "fp8":
            return []
        context = self.context_ranks
        tokens = "train.seq_len" if context == 1 else "train.seq_len / engine.context"
        sides = {
            "model.dim": model.dim,
            "model.ffn_dim": model.ffn_dim,
            "model.heads x model.head_dim": model.heads * model.head_dim,
            "model.kv_heads x model.head_dim": model.kv_heads * model.head_dim,
            tokens: seq_len // context,  # the rows of a product are tokens of whole rows of text
        }
        reason = "with engine.precision=fp8 it must be divisible by 16"
        return [
            Problem(name, side, reason, "choose another, or engine.precision=bf16")
            for name, side in sides.items()
            if side % 16
        ]

    def compiles_on(self, device: str) -> bool:
        """Whether blocks are compiled on a device of this type, `cpu` or `cuda`."""
        return device == "cuda" if self.compile == "auto" else self.compile

    def unused(self) -> list[Problem]:
        """How float8 is scaled, where there is none."""
        if self.precision == "fp8":
            return []
        reason, hint = f"engine.precision={self.precision} scales nothing", "choose fp8"
        return without_effect(self, "engine", reason, f"{hint} for it", "fp8_scaling")

    def optimizer_problems(self, kind: str) -> list[Problem]:  # noqa: ARG002
        """Why the engine cannot make the steps of an `optim.kind`."""
        return []

    def problems_on(self, world_size: int) -> list[Problem]:  # noqa: ARG002
        """Why the engine cannot spread the work over this many ranks."""
        return []

    @property
    def context_ranks(self) -> int:
        """Over how many ranks the tokens of a row are dealt."""
        return 1

    @property
    def ranks_per_row(self) -> int:
        """How many ranks work on the same rows, each on a part of them or of the model."""
        return 1

    def data_ranks(self, world_size: int) -> int:
        """How many of the ranks read rows of their own."""
        return max(1, world_size // self.ranks_per_row)


@dataclass(frozen=True, kw_only=True)
class FsdpConfig(EngineConfig):
    """PyTorch's own: one process, DDP, FSDP2 or HSDP, by the number of ranks and `shard`.

    Attributes:
        kind: `fsdp`.
        shard: true: weights, gradients and moments are cut over the ranks (FSDP2). false: every
            rank has all of them (DDP).
        replicate: into how many groups the ranks are divided, each of which holds a whole copy of
            the shards (HSDP).
        context: over how many ranks the tokens of each row are dealt (context parallelism). The
            weights are cut over these ranks as well.
        tensor: over how many neighbouring ranks each matrix and its product is cut (tensor
            parallelism); must divide `model.kv_heads`, `ffn_dim`, `vocab_size` and `train.seq_len`.
            `replicate` x `context` x `tensor` must divide the number of ranks.
        reshard_after_forward: whether a block's gathered weights are freed between its forward and
            its backward pass. `auto` frees those of all blocks but the last, whose backward pass
            comes at once. With `never` they are gathered once a step, and not again for each
            micro-batch.
        reduce: the precision in which gradients are summed over ranks.
    """

    kind: Literal["fsdp"] = "fsdp"
    shard: bool = True
    replicate: int = 1
    context: int = 1
    tensor: int = 1
    reshard_after_forward: Literal["auto", "always", "never"] = "auto"
    reduce: Literal["fp32", "bf16"] = "fp32"

    def problems(self) -> list[Problem]:
        found = super().problems()
        found += at_least(self, "engine", 1, "replicate", "context", "tensor")
        if self.shard:
            return found
        others = ("engine.shard",)
        if self.replicate > 1:
            reason = "engine.shard=false replicates on all ranks anyway"
            hint = "leave one of the two out"
            found.append(Problem("engine.replicate", self.replicate, reason, hint, others))
        for name in ("context", "tensor"):
            if (value := getattr(self, name)) > 1:
                reason = "works with FSDP2 around it, and engine.shard=false is DDP"
                hint = "leave engine.shard=false out"
                found.append(Problem(f"engine.{name}", value, reason, hint, others))
        return found

    def problems_with(self, model: ModelConfig, seq_len: int) -> list[Problem]:
        """Why the matrices, or the rows, cannot be cut into `tensor` equal parts."""
        found = super().problems_with(model, seq_len)
        if self.tensor == 1:
            return found
        sides = {
            "model.kv_heads": (model.kv_heads, 1, "each rank has whole key/value heads"),
            "model.ffn_dim": (model.ffn_dim, 1, "each rank has an equal part"),
            "model.vocab_size": (model.vocab_size, 1, "each rank has an equal part"),
            "train.seq_len": (seq_len, self.context, "each rank has an equal part of a row"),
        }
        for name, (side, context, why) in sides.items():
            if side % (context * self.tensor):
                by = f"{name}={side} is not divisible by "
                by += f"engine.context={context} x it" if context > 1 else "it"
                reason = f"{by}, and {why}"
                others = (name, "engine.context") if context > 1 else (name,)
                hint = f"choose another, or another {name}"
                found.append(Problem("engine.tensor", self.tensor, reason, hint, others))
        if self.precision == "fp8":
            reason = f"not possible with engine.tensor={self.tensor}: it would scale parts apart"
            hint = "choose engine.precision=bf16, or engine.tensor=1"
            found.append(Problem("engine.precision", "fp8", reason, hint, ("engine.tensor",)))
        return found

    def optimizer_problems(self, kind: str) -> list[Problem]:
        """Why Muon, which needs whole matrices, cannot be had where they are cut two ways."""
        if kind != "muon" or self.tensor == 1:
            return []
        reason = "optim.kind=muon needs whole matrices, of which each rank has a part of a part"
        hint = "choose engine.tensor=1, where FSDP2 alone cuts them, or optim=adamw"
        return [Problem("engine.tensor", self.tensor, reason, hint, ("optim.kind",))]

    def problems_on(self, world_size: int) -> list[Problem]:
        sizes = {name: getattr(self, name) for name in ("replicate", "context", "tensor")}
        given = {f"engine.{name}": size for name, size in sizes.items() if size > 1}
        if world_size % prod(given.values()) == 0:
            return []
        first, *others = given
        reason = f"must divide the number of ranks, {world_size}"
        if others:
            told = ", ".join(f"{name}={given[name]}" for name in others)
            reason = f"times {told} {reason}"
        hint = "choose another, or start another number of ranks (plan.py: processes=)"
        return [Problem(first, given[first], reason, hint, tuple(others))]

    @property
    def context_ranks(self) -> int:
        return self.context

    @property
    def ranks_per_row(self) -> int:
        return self.context * self.tensor


@dataclass(frozen=True, kw_only=True)
class DeepSpeedConfig(EngineConfig):
    """DeepSpeed's ZeRO (arXiv 1910.02054).

    Attributes:
        kind: `deepspeed`.
        stage: what is cut over the ranks. 0: nothing; 1: the optimizer's moments; 2: moments and
            gradients; 3: moments, gradients and weights.
        offload_optimizer: keep the moments in the host's memory and update the weights there;
            needs stage 1, 2 or 3.
        offload_parameters: keep the weights in the host's memory, too, and fetch them when they
            are needed; needs stage 3.
        deepspeed: keys of DeepSpeed's own configuration, which replace those that follow from the
            other settings: `engine.deepspeed.zero_optimization.overlap_comm=true`.
    """

    kind: Literal["deepspeed"] = "deepspeed"
    stage: Literal[0, 1, 2, 3] = 2
    offload_optimizer: bool = False
    offload_parameters: bool = False
    deepspeed: dict[str, Any] = field(default_factory=dict)

    def compiles_on(self, device: str) -> bool:
        """As in `EngineConfig`; `auto` is false where weights come and go within a block."""
        return super().compiles_on(device) and not (self.stage == 3 and self.compile == "auto")

    def problems(self) -> list[Problem]:
        found = super().problems()
        if self.offload_optimizer and self.stage == 0:
            reason = "engine.stage=0 cuts no moments, and has none to offload"
            hint, others = "choose engine.stage=1, 2 or 3", ("engine.stage",)
            found.append(Problem("engine.offload_optimizer", True, reason, hint, others))
        if self.offload_parameters and self.stage != 3:
            reason = f"engine.stage={self.stage} keeps all weights on every device"
            hint, others = "choose engine.stage=3", ("engine.stage",)
            found.append(Problem("engine.offload_parameters", True, reason, hint, others))
        if self.precision == "fp8":
            reason = "not possible with engine=deepspeed, which replaces or moves the weights"
            hint = "choose engine=fsdp, or engine.precision=bf16"
            found.append(Problem("engine.precision", "fp8", reason, hint, ("engine.kind",)))
        zero = self.deepspeed.get("zero_optimization")
        given = {*self.deepspeed, *(f"zero_optimization.{key}" for key in zero or ())}
        found += [
            Problem(
                f"engine.deepspeed.{key}",
                expected=f"follows from {setting}",
                hint="set that instead",
            )
            for key, setting in DECIDED_ELSEWHERE.items()
            if key in given
        ]
        return found + [
            Problem(f"engine.deepspeed.{key}", expected=why, hint="leave it out")
            for key, why in IMPOSSIBLE.items()
            if key in given
        ]

    def optimizer_problems(self, kind: str) -> list[Problem]:
        """Why Muon, which needs whole matrices on their device, cannot be had at some stages."""
        if kind != "muon":
            return []
        found, others = [], ("optim.kind",)
        if self.stage == 3:
            why = (
                "optim.kind=muon needs whole matrices, and stage 3 gives the optimizer flat and "
                "padded parts of many"
            )
            hint = f"choose 0, 1 or 2; or {SHARD_INSTEAD}"
            found.append(Problem("engine.stage", 3, why, hint, others))
        if self.offload_optimizer:
            key = "engine.offload_optimizer"
            found.append(Problem(key, True, ON_THE_HOST, SHARD_INSTEAD, others))
        zero = self.deepspeed.get("zero_optimization") or {}
        return found + [
            Problem(f"engine.deepspeed.zero_optimization.{key}", zero[key], why, hint, others)
            for key, (why, hint) in ANOTHER_MUON.items()
            if key in zero
        ]


def device_problems(device: str) -> list[Problem]:
    """The problems of a command's argument `device`."""
    if device not in get_args(DeviceName):
        return [Problem("device", device, "expected auto, cpu or cuda")]
    if device != "cuda":
        return []
    import torch  # seconds, and only this value needs it

    return [] if torch.cuda.is_available() else [no_cuda("device")]


def no_cuda(key: str) -> Problem:
    """The problem of a setting that asks for CUDA on a machine without it."""
    hint = f"choose {key}=cpu or {key}=auto"
    return Problem(key, "cuda", "this machine has no usable CUDA device", hint)


def no_float8(scaling: Float8Scaling, device: str) -> Problem:
    """The problem of `engine.precision=fp8` on a device without such products."""
    least = "{}.{}".format(*LEAST_CAPABILITY[scaling])
    reason = f"engine.fp8_scaling={scaling} needs CUDA's compute capability {least}, not {device}"
    hint, others = "choose engine.precision=bf16", ("engine.fp8_scaling", "engine.device")
    return Problem("engine.precision", "fp8", reason, hint, others)
