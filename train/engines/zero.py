"""DeepSpeed's ZeRO (arXiv 1910.02054), stages 0 to 3.

    stage     sharded                          gradients are reduced over ranks
    0         nothing                          once per step
    1         moments                          once per step
    2         moments, gradients               with every micro-batch
    3         moments, gradients, weights      with every micro-batch

DeepSpeed moves weights and gradients between ranks, and between device and host. The optimizer is
that of the other engine, torch's AdamW or Muon with it, and never DeepSpeed's own. At every stage
it clips the gradient and skips bad steps itself. Weights are float32, and `engine.precision` is
that of matrix products.
"""

import importlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils import get_total_norm

from conf.errors import ConfigError, Problem
from conf.extras import pip_command
from data.batch import Batch
from phd.initialization import initial_weights
from phd.model import Transformer
from train.checkpoint.reader import Checkpoint, TensorTree
from train.config import Config
from train.distributed.process_groups import ProcessGroups
from train.engines.activation_checkpointing import checkpoint_activations
from train.engines.compilation import compile_blocks
from train.engines.deepspeed_private import (
    check_json,
    disable_shared_memory_comm,
    fragment,
    global_grad_norm,
    kept_gathered,
    shard_size,
)
from train.engines.device import autocast
from train.engines.engine import Engine
from train.engines.limits import Limits
from train.engines.muon import Place
from train.engines.optimizer import (
    add_state,
    optimizer_of,
    set_clip_and_skip,
    set_lr,
    share_matrices,
)
from train.engines.state_rules import STEP, is_embedding, matrix_shapes, rules_of
from train.settings.engine import DeepSpeedConfig


class DeepSpeedEngine(Engine):
    """ZeRO over all ranks. `engine.stage` says what is sharded."""

    def __init__(self, config: Config, groups: ProcessGroups) -> None:
        super().__init__(config, groups)
        settings = config.engine
        assert isinstance(settings, DeepSpeedConfig)
        self.stage = settings.stage
        settings = replace(settings, compile=settings.compiles_on(self.device.type))
        if self.stage == 3 and settings.compile:
            why = (
                "not possible at engine.stage=3, which gathers and releases weights within a block"
            )
            hint = "choose engine.stage=2 or less, or engine=fsdp"
            raise ConfigError([Problem("engine.compile", True, why, hint)])
        with ExitStack() as undo:
            # Stage 3 replaces this function.
            undo.callback(setattr, nn.functional, "linear", nn.functional.linear)
            self.deepspeed = import_deepspeed(self.device)
            undo.enter_context(_process_group(groups, self.device))
            self._initialize(config, settings, groups.world_size)
            self.undo = undo.pop_all()

    def _initialize(self, config: Config, settings: DeepSpeedConfig, world_size: int) -> None:
        # Meta tensors keep the shapes, which DeepSpeed's parameters do not show at stage 3.
        self.shapes = dict(self.model.named_parameters())
        self.rules = rules_of(self.shapes, config.optim)
        json = deepspeed_json(config, world_size, self.dtype)
        check_json(json)
        self._make_weights(json)
        checkpoint_activations(self.model, settings)
        if settings.compile:
            compile_blocks(self.model)
        # Its moments are made later, because DeepSpeed replaces the tensors that it updates.
        parameters = dict(self.model.named_parameters())
        ratio = config.model.width_ratio
        self.optimizer = optimizer_of(parameters, config.optim, self.dtype, ratio)
        self.optimizer.register_step_pre_hook(self._before_step)
        self.engine, *_ = self.deepspeed.initialize(
            model=self.model_with_loss, optimizer=self.optimizer, config=json
        )
        self.model_with_loss = self.engine
        self._share_matrices()
        self._make_moments()

    def _make_weights(self, json: dict[str, Any]) -> None:
        """Draw the weights one by one. At stage 3 each is sharded before the next is drawn."""
        for name, value in initial_weights(self.model, self.config.seed):
            module = self.model.get_submodule(name.rpartition(".")[0])
            module.to_empty(device=self.device, recurse=False)
            self.model.get_parameter(name).data.copy_(value)
            if self.stage == 3:
                self.deepspeed.zero.Init(module=module, config_dict_or_path=json)
        self.model.rope.build(self.device)

    def _make_moments(self) -> None:
        """Allocate the moments before the first step, so that a checkpoint can be loaded into them.

        At stages 1 and 2 DeepSpeed would link only the moments of the first parameter group after
        the first step. At stage 3 AdamW sees the tensors that it updates only within a step, and
        allocates the moments itself then.
        """
        add_state(self.optimizer)
        self._skipped_step()

    def _share_matrices(self) -> None:
        """Tell Muon which part of each matrix is on this rank.

        At stages 1 and 2 all parameters of a group lie one after another in one tensor, of which
        each rank has a part. At stage 0 each rank has all of them.
        """
        shapes = matrix_shapes(self.config.model, self.config.optim)
        parameters = [self.model.get_parameter(name) for name in shapes]
        if self.stage == 0:
            places = [Place(i, 0, parameter.numel()) for i, parameter in enumerate(parameters)]
        else:
            places = [Place(0, *fragment(parameter)) for parameter in parameters]
        shards = self.groups.world_size if self.stage else 1
        share_matrices(self.optimizer, shapes, places, self.groups, shards)

    def grad_sync(self, last: bool) -> AbstractContextManager[object]:
        self.engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        # DeepSpeed averages over ranks, and stage 3 has no setting against it. The factor makes the
        # average a sum.
        self.engine.backward(loss * self.groups.world_size, scale_wrt_gas=False)

    def optimizer_step(self, lr: float, loss: Tensor, limits: Limits) -> tuple[Tensor, Tensor]:
        set_lr(self.optimizer, lr)
        self.step_loss, self.limits = loss, limits
        # Stages 1 to 3 make no update if the gradient is not finite. Then this value remains.
        self.grad_norm = torch.tensor(torch.inf, device=self.device)
        self.engine.step()
        return self.grad_norm, self._applied

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        """Have the optimizer clip the gradient, and skip a bad step.

        Stages 1 to 3 call it, and so this, once for each parameter group.
        """
        if self.stage == 0:
            norm = get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        else:
            norm = global_grad_norm(self.engine.optimizer)
        self.grad_norm = torch.as_tensor(norm, dtype=torch.float32, device=self.device)
        set_clip_and_skip(optimizer, self.grad_norm, self.config.optim.grad_clip, self._applied)

    @property
    def _applied(self) -> Tensor:
        return self.limits.allow(self.step_loss, self.grad_norm)

    def drop_gradients(self) -> None:
        self._skipped_step()

    def _skipped_step(self) -> None:
        """Take a step whose update is skipped.

        Two effects are wanted: DeepSpeed drops the gradients of earlier micro-batches, and copies
        the weights that AdamW updates into those that the model computes with.
        """
        row = Batch(np.zeros((1, 2), dtype=np.int64))
        with torch.compiler.set_stance("force_eager"), self.grad_sync(last=True):
            self.backward(self.loss_of(row).total * 0)
        self.optimizer_step(0.0, torch.zeros((), device=self.device), Limits(loss=-torch.inf))

    def state(self) -> TensorTree:
        """This rank's part of the weights and moments: whole tensors, dealt parameter by parameter.

        Where they are sharded, they are gathered one by one and moved to the CPU, so that the
        device holds one of them at a time.
        """
        weights, optimizer = {}, {}
        step = next(state[STEP] for state in self.optimizer.state.values() if STEP in state)
        for number, (name, parameter) in enumerate(self.model.named_parameters()):
            rule = self.rules[name]
            whole = [self._full_tensor(parameter, key) for key in (None, *rule.moments)]
            if number % self.groups.world_size == self.groups.rank:
                weights[name], *moments = whole if self.stage == 0 else (x.cpu() for x in whole)
                optimizer[name] = dict(zip(rule.moments, moments, strict=True))
                if rule.counts:
                    optimizer[name][STEP] = step
        random = self.random_state() if self.groups.is_rank_zero else {}
        return {"model": weights, "optimizer": optimizer, "random": random}

    def restore(self, checkpoint: Checkpoint) -> None:
        scalar = torch.empty((), device="meta")
        state = {
            name: {key: scalar if key == STEP else self.shapes[name] for key in rule.state}
            for name, rule in self.rules.items()
        }
        checkpoint.check({"model": self.shapes, "optimizer": state})

        def read(name: str) -> dict[str, Tensor]:
            keys = self.rules[name].state
            tensors = checkpoint.read(f"optimizer.{name}.{key}" for key in keys)
            return dict(zip(keys, tensors.values(), strict=True))

        self._load_each(lambda name: checkpoint.read([f"model.{name}"])[f"model.{name}"], read)
        random = self.random_state()
        saved = checkpoint.read(f"random.{x}" for x in random if f"random.{x}" in checkpoint.specs)
        self.set_random_state(random | {name.partition(".")[2]: x for name, x in saved.items()})

    def load(
        self,
        weights: Mapping[str, Tensor],
        optimizer: Callable[[str], Mapping[str, Tensor]] | None = None,
    ) -> None:
        self._load_each(weights.__getitem__, optimizer)

    def _load_each(
        self,
        weight: Callable[[str], Tensor],
        optimizer: Callable[[str], Mapping[str, Tensor]] | None,
    ) -> None:
        """Load whole weights, and the optimizer's state if it is given, one by one."""
        step = None
        for name, parameter in self.model.named_parameters():
            self._set_tensor(parameter, None, weight(name))
            if optimizer is None:
                continue
            given, rule = optimizer(name), self.rules[name]
            step = given.get(STEP, step)
            for key in rule.moments:
                self._set_tensor(parameter, key, given[key])
        self._skipped_step()
        if step is None:
            return
        # AdamW counts on from `step`, which is the same for all parameters.
        for state in self.optimizer.state.values():
            if STEP in state:
                state[STEP].copy_(step)

    def _full_tensor(self, parameter: nn.Parameter, key: str | None) -> Tensor:
        """All-gather a float32 weight (`key` None) or a moment of it. Every rank calls this."""
        if self.stage == 0:
            return parameter.detach() if key is None else self.optimizer.state[parameter][key]
        if key is None:
            return self.deepspeed.utils.safe_get_full_fp32_param(parameter)
        return self.deepspeed.utils.safe_get_full_optimizer_state(parameter, key)

    def _set_tensor(self, parameter: nn.Parameter, key: str | None, value: Tensor) -> None:
        """Load this rank's shard of a whole weight or moment. `_skipped_step` has to follow."""
        if self.stage == 0:
            self._full_tensor(parameter, key).copy_(value)
            return
        scope = "full"
        # DeepSpeed's setter of whole tensors fails at stage 3 where the number of elements is not
        # divisible by the ranks. So this pads and shards as DeepSpeed does.
        if self.stage == 3:
            scope, size = "local", shard_size(parameter)
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
            # Compiled blocks would be compiled again for each length of the text.
            with autocast(self.device, self.dtype), torch.compiler.set_stance("force_eager"):
                yield self.model
            return
        # A module gathers its weights when it is called, and releases them afterwards. Inference
        # also reads these weights without calling their modules, so they stay gathered.
        kept = [
            p for n, p in self.model.named_parameters() if is_embedding(n) or n == "head.weight"
        ]
        with self.deepspeed.zero.GatheredParameters(kept), kept_gathered(kept, owner=self):
            yield self.model

    def close(self) -> None:
        """Remove the process groups, hooks, replaced functions and variables."""
        with self.undo:
            self.engine.destroy()
            self.deepspeed.comm.destroy_process_group(self.engine.data_parallel_group)


def import_deepspeed(device: torch.device) -> ModuleType:
    """Import DeepSpeed, which takes seconds, and silence it.

    Raises:
        ConfigError: it is not installed, or it uses another device in this process already.
    """
    # Without this variable DeepSpeed guesses the device and prints its guess.
    os.environ["DS_ACCELERATOR"] = device.type
    try:
        deepspeed = importlib.import_module("deepspeed")
    except ModuleNotFoundError as error:
        if error.name != "deepspeed":
            raise
        missing = "the package deepspeed is not installed"
        add = pip_command("phd-transformer[deepspeed]")
        hint = f"{add}, or choose engine=fsdp"
        raise ConfigError([Problem("engine.kind", "deepspeed", missing, hint)]) from None
    chosen = deepspeed.get_accelerator().device_name()
    if chosen != device.type:
        fixed = f"in this process DeepSpeed already works on {chosen}, and cannot change"
        hint = "start one process for each device"
        raise ConfigError([Problem("engine.device", device.type, fixed, hint)])
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    disable_shared_memory_comm(deepspeed)
    for category, old in (
        (FutureWarning, r"`torch\.distributed\.\w+` is deprecated"),
        (DeprecationWarning, r"`torch\.jit\.script_method` is deprecated"),  # by torch's inductor
    ):
        warnings.filterwarnings("ignore", old, category)
    return deepspeed


def deepspeed_json(config: Config, world_size: int, dtype: torch.dtype) -> dict[str, Any]:
    """DeepSpeed's own configuration. The user's `engine.deepspeed` overrides it."""
    settings = config.engine
    assert isinstance(settings, DeepSpeedConfig)
    zero: dict[str, Any] = {"stage": settings.stage}
    if settings.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if settings.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    json = {
        "train_micro_batch_size_per_gpu": config.micro_batch_on(world_size),
        "gradient_accumulation_steps": config.accumulation(world_size),
        "gradient_clipping": 0.0,  # the default is 1.0; the optimizer clips, see `_before_step`
        "zero_optimization": zero,
        # It knows AdamW, and asks whether another optimizer is meant.
        "zero_allow_untested_optimizer": config.optim.kind != "adamw",
        # DeepSpeed's CPU AdamW is no faster than torch's fused one, and has no `found_inf`.
        "zero_force_ds_cpu_optimizer": False,
        # DeepSpeed's `bf16` would store weights in bfloat16. Here only matrix products have it.
        "torch_autocast": {
            "enabled": dtype != torch.float32,
            "dtype": "bfloat16",
            # Gradients of modules in this list would be reduced in bfloat16.
            "lower_precision_safe_modules": [],
        },
    }
    return merged(json, settings.deepspeed)


def merged(base: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Merge two nested dicts; `overrides` wins.

    >>> merged({"zero": {"stage": 2, "size": 5}}, {"zero": {"size": 7}, "log": True})
    {'zero': {'stage': 2, 'size': 7}, 'log': True}
    """
    result = {**base, **overrides}
    for key in base.keys() & overrides.keys():
        if isinstance(base[key], dict) and isinstance(overrides[key], Mapping):
            result[key] = merged(base[key], overrides[key])
    return result


@contextmanager
def _process_group(groups: ProcessGroups, device: torch.device) -> Iterator[None]:
    """Make what DeepSpeed needs also in a single process: LOCAL_RANK, and a process group.

    Neither is left behind. Other libraries would wait for ranks where they find that variable.
    """
    before = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = str(groups.dist_env.local_rank)
    own = not dist.is_initialized()
    try:
        if own:
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        yield
    finally:
        if own and dist.is_initialized():
            dist.destroy_process_group()
        if before is None:
            del os.environ["LOCAL_RANK"]
        else:
            os.environ["LOCAL_RANK"] = before
