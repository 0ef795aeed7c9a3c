"""DeepSpeed's ZeRO (arXiv 1910.02054), stages 0 to 3, as one of the engines.

    stage     cut over the ranks         gradients are summed over ranks
    0         nothing                    once a step
    1         moments                    once a step
    2         ... and gradients          with every micro-batch
    3         ... and weights            with every micro-batch

DeepSpeed moves weights and gradients between ranks, and between device and host. Clipping, and the
verdict whether a step is applied, are given to AdamW itself just before it runs, the same at every
stage. As in every engine weights are float32, and `engine.precision` is that of matrix products.
"""

import importlib
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils import get_total_norm

from phd.initialization import initial_weights
from phd.model import Transformer
from train.checkpoint.store import Checkpoint, TensorTree
from train.config import Config
from train.distributed.process_groups import ProcessGroups
from train.engines.activation_checkpointing import checkpoint_activations
from train.engines.config import DeepSpeedConfig
from train.engines.device import autocast
from train.engines.engine import Engine, Limits, Rows
from train.engines.optimizer import MOMENTS, adamw, add_moments, is_embedding, set_clip_and_skip


class DeepSpeedEngine(Engine):
    """ZeRO over all ranks; `engine.stage` says what is cut."""

    def __init__(self, config: Config, groups: ProcessGroups) -> None:
        super().__init__(config, groups)
        settings = config.engine
        assert isinstance(settings, DeepSpeedConfig)
        self.stage = settings.stage
        if self.stage == 3 and settings.compile:
            raise ValueError(
                "engine.compile=true: at engine.stage=3 weights come and go within a block, which "
                "torch.compile cannot follow; choose engine.stage=2 or less, or engine=fsdp"
            )
        self.linear = nn.functional.linear  # stage 3 replaces it, for the whole process
        self.deepspeed = import_deepspeed(self.device)
        self.alone = _join(groups, self.device)
        self.shapes = list(self.model.named_parameters())  # on `meta`: DeepSpeed hides them
        json = deepspeed_json(config, groups.world_size, self.dtype)
        check_json(json)
        self._make_weights(json)
        checkpoint_activations(self.model, settings)
        if settings.compile:
            for block in self.model.blocks:
                block.compile()
        # Its moments come later: DeepSpeed updates other tensors than these.
        self.adamw = adamw(dict(self.model.named_parameters()), config.optim)
        self.adamw.register_step_pre_hook(self._before_adamw)
        self.engine, *_ = self.deepspeed.initialize(
            model=self.model_with_loss, optimizer=self.adamw, config=json
        )
        self.model_with_loss = self.engine
        self._make_moments()

    def _make_weights(self, json: dict[str, Any]) -> None:
        """Draw one weight after the other; at stage 3 a rank keeps its part of each, no more."""
        for name, value in initial_weights(self.model, self.config.seed):
            module = self.model.get_submodule(name.rpartition(".")[0])
            module.to_empty(device=self.device, recurse=False)
            self.model.get_parameter(name).data.copy_(value)
            if self.stage == 3:
                self.deepspeed.zero.Init(module=module, config_dict_or_path=json)
        self.model.rope.build(self.device)

    def _make_moments(self) -> None:
        """Have moments from the start, so that a checkpoint can be loaded into them.

        At stages 1 and 2, DeepSpeed would find only those of the first group after the first step;
        at stage 3 it shows AdamW what it updates only in a step, where AdamW makes them itself.
        """
        add_moments(self.adamw)
        self._idle_step()

    def grad_sync(self, last: bool) -> AbstractContextManager[object]:
        self.engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        # DeepSpeed takes the mean over ranks, at stage 3 with no choice.
        self.engine.backward(loss * self.groups.world_size, scale_wrt_gas=False)

    def update(self, lr: float, loss: Tensor, limits: Limits) -> tuple[Tensor, Tensor]:
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.step_loss, self.limits = loss, limits
        # Stages 1 to 3 do not call AdamW for a gradient that is not finite.
        self.grad_norm = torch.tensor(torch.inf, device=self.device)
        self.engine.step()
        return self.grad_norm, self._applied

    def _before_adamw(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        """Tell AdamW's kernel to clip the gradient, and to do nothing in a bad step.

        Stages 1 to 3 call AdamW once for each group of parameters.
        """
        if self.stage == 0:
            norm = get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        else:
            norm = self.engine.optimizer._global_grad_norm  # public only after the step
        self.grad_norm = torch.as_tensor(norm, dtype=torch.float32, device=self.device)
        set_clip_and_skip(optimizer, self.grad_norm, self.config.optim.grad_clip, self._applied)

    @property
    def _applied(self) -> Tensor:
        return self.limits.allow(self.step_loss, self.grad_norm)

    def drop_gradients(self) -> None:
        self._idle_step()

    def _idle_step(self) -> None:
        """Take a step that is not applied.

        With it DeepSpeed drops the gradients of earlier micro-batches, and fills the weights that
        the model computes with from those that AdamW updates.
        """
        row = Rows(torch.zeros(1, 2, dtype=torch.int64))
        with torch.compiler.set_stance("force_eager"), self.grad_sync(last=True):
            self.backward(self.forward(row).total * 0)
        self.update(0.0, torch.zeros((), device=self.device), Limits(loss=-torch.inf))

    def state(self) -> TensorTree:
        """What this rank is dealt of weights and moments, on the CPU if they are cut."""
        weights, optimizer = {}, {}
        step = next(iter(self.adamw.state.values()))["step"]
        for number, (name, parameter) in enumerate(self.model.named_parameters()):
            whole = [self._gathered(parameter, key) for key in (None, *MOMENTS)]
            if number % self.groups.world_size == self.groups.rank:
                weights[name], *moments = whole if self.stage == 0 else (x.cpu() for x in whole)
                optimizer[name] = {"step": step, **dict(zip(MOMENTS, moments, strict=True))}
        random = self.random_state() if self.groups.first else {}
        return {"model": weights, "optimizer": optimizer, "random": random}

    def restore(self, checkpoint: Checkpoint) -> None:
        step = torch.empty((), device="meta")
        moments = {name: {**dict.fromkeys(MOMENTS, x), "step": step} for name, x in self.shapes}
        checkpoint.check({"model": dict(self.shapes), "optimizer": moments})
        for name, parameter in self.model.named_parameters():
            keys = [f"model.{name}", *(f"optimizer.{name}.{key}" for key in (*MOMENTS, "step"))]
            *values, step = checkpoint.read(keys).values()
            for key, value in zip((None, *MOMENTS), values, strict=True):
                self._put(parameter, key, value)
        self._idle_step()
        for state in self.adamw.state.values():
            state["step"].copy_(step)
        random = self.random_state()
        saved = checkpoint.read(f"random.{x}" for x in random if f"random.{x}" in checkpoint.specs)
        self.set_random_state(random | {name.partition(".")[2]: x for name, x in saved.items()})

    def load(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self.model.named_parameters():
            self._put(parameter, None, weights[name])
        self._idle_step()

    def _gathered(self, parameter: nn.Parameter, key: str | None) -> Tensor:
        """A whole float32 weight, or a moment of it; every rank calls this."""
        if self.stage == 0:
            return parameter.detach() if key is None else self.adamw.state[parameter][key]
        if key is None:
            return self.deepspeed.utils.safe_get_full_fp32_param(parameter)
        return self.deepspeed.utils.safe_get_full_optimizer_state(parameter, key)

    def _put(self, parameter: nn.Parameter, key: str | None, value: Tensor) -> None:
        """Take this rank's part of a whole weight or moment; `_idle_step` is to follow."""
        if self.stage == 0:
            self._gathered(parameter, key).copy_(value)
            return
        scope = "full"
        if self.stage == 3:  # whose own setter takes no weight that the ranks cannot divide
            scope, size = "local", parameter.ds_tensor.numel()  # type: ignore[attr-defined]
            value = pad(value.flatten(), (0, size * self.groups.world_size - value.numel()))
            value = value.narrow(0, size * self.groups.rank, size)
        if key is None:
            getattr(self.deepspeed.utils, f"safe_set_{scope}_fp32_param")(parameter, value)
        else:
            setter = getattr(self.deepspeed.utils, f"safe_set_{scope}_optimizer_state")
            setter(parameter, value, key)

    @contextmanager
    def summon_full_params(self) -> Iterator[Transformer]:
        if self.stage < 3:
            # Every length would be compiled anew.
            with autocast(self.device, self.dtype), torch.compiler.set_stance("force_eager"):
                yield self.model
            return
        # A module gathers its weights when it is called; these are also read without a call, so
        # they must not be released with the module whose they are.
        read = [
            p for n, p in self.model.named_parameters() if is_embedding(n) or n == "head.weight"
        ]
        with self.deepspeed.zero.GatheredParameters(read):
            for parameter in read:
                parameter.ds_active_sub_modules.add(id(self))  # type: ignore[attr-defined]
            try:
                yield self.model
            finally:
                for parameter in read:
                    parameter.ds_active_sub_modules.discard(id(self))  # type: ignore[attr-defined]

    def close(self) -> None:
        """Leave no process group, hook or replaced function behind."""
        self.engine.destroy()
        self.deepspeed.comm.destroy_process_group(self.engine.data_parallel_group)
        nn.functional.linear = self.linear
        if self.alone:
            dist.destroy_process_group()


def import_deepspeed(device: torch.device) -> ModuleType:
    """The package, which takes its time to import, made quiet.

    Raises:
        ValueError: it is not installed, or works on another device in this process.
    """
    os.environ["DS_ACCELERATOR"] = device.type  # else it guesses, and prints what
    try:
        deepspeed = importlib.import_module("deepspeed")
    except ModuleNotFoundError as error:
        if error.name != "deepspeed":
            raise
        raise ValueError(
            "engine.kind=deepspeed: the package deepspeed is not installed; `pip install "
            "deepspeed`, or choose engine=fsdp"
        ) from None
    at_work = deepspeed.get_accelerator().device_name()
    if at_work != device.type:
        raise ValueError(
            f"engine.device={device.type}: in this process DeepSpeed already works on {at_work}, "
            "and cannot change; start one process for each device"
        )
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # On the CPU it would compile C++ at its first use, for sums over ranks of one machine.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    for category, old in (
        (FutureWarning, r"`torch\.distributed\.\w+` is deprecated"),
        (DeprecationWarning, r"`torch\.jit\.script_method` is deprecated"),  # it imports inductor
    ):
        warnings.filterwarnings("ignore", old, category)
    return deepspeed


def deepspeed_json(config: Config, world_size: int, dtype: torch.dtype) -> dict[str, Any]:
    """DeepSpeed's own configuration; the user's `engine.deepspeed` goes over it."""
    settings, accumulation = config.engine, config.train.accumulation(world_size)
    assert isinstance(settings, DeepSpeedConfig)
    zero: dict[str, Any] = {"stage": settings.stage}
    if settings.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if settings.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    json = {
        "train_micro_batch_size_per_gpu": config.train.global_batch // (world_size * accumulation),
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,  # its default is 1; AdamW clips, see `_before_adamw`
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW is as fast, and knows `found_inf`
        # Without `bf16`, which makes weights bfloat16: as in other engines only products are.
        "torch_autocast": {
            "enabled": dtype != torch.float32,
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],  # whose gradients would be summed in it, too
        },
    }
    return merged(json, settings.deepspeed)


def merged(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Both, and of what is in both that of `above`, however deep.

    >>> merged({"zero": {"stage": 2, "size": 5}}, {"zero": {"size": 7}, "log": True})
    {'zero': {'stage': 2, 'size': 7}, 'log': True}
    """
    both = {**below, **above}
    for key in below.keys() & above.keys():
        if isinstance(below[key], dict) and isinstance(above[key], Mapping):
            both[key] = merged(below[key], above[key])
    return both


def check_json(json: dict[str, Any]) -> None:
    """Raise what DeepSpeed finds wrong with its configuration as one ValueError."""
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

    try:
        DeepSpeedConfig(json)
    except ValidationError as error:
        found = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise ValueError(f"engine.deepspeed: {'; '.join(found)}") from None
    except (AssertionError, ValueError, TypeError, DeepSpeedConfigError) as error:
        raise ValueError(f"engine.deepspeed: {error}") from None


def _join(groups: ProcessGroups, device: torch.device) -> bool:
    """Make the process group that DeepSpeed wants even of a lone process; return whether."""
    os.environ["LOCAL_RANK"] = str(groups.place.local_rank)
    if dist.is_initialized():
        return False
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return True
