"""PyTorch's own parallelism: one process, DDP, FSDP2 (arXiv 2304.11277) and HSDP."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm

from data.batch import Batch
from data.prefetch import never
from phd.initialization import initial_weights
from phd.model import ModelWithLoss, Transformer
from train.checkpoint.reader import Checkpoint, TensorTree
from train.config import Config
from train.distributed.process_groups import ProcessGroups
from train.engine_config import FsdpConfig
from train.engines.device import autocast
from train.engines.engine import Engine
from train.engines.limits import Limits
from train.engines.optimizer import adamw, add_moments, set_clip_and_skip
from train.engines.parallelize import drop_unreduced_gradients, parallelize, sharded_modules


class FsdpEngine(Engine):
    """Every rank holds the whole model, or a shard of each of its parameters.

        engine.shard   engine.replicate   on n ranks
        true           1                  FSDP2: weights, gradients and moments are cut over all
        true           m                  HSDP: cut over n / m ranks, and that m times
        false          1                  DDP: every rank has all of them
                                          on one rank, each of these is a plain model

    The optimizer works on what this rank holds, as on tensors that have nothing to do with others:
    AdamW treats each element alone.
    """

    def __init__(self, config: Config, groups: ProcessGroups) -> None:
        super().__init__(config, groups)
        assert isinstance(config.engine, FsdpConfig)
        assert isinstance(self.model_with_loss, ModelWithLoss)
        self.model_with_loss = parallelize(
            self.model_with_loss,
            config.engine,
            world_size=groups.world_size,
            device=self.device,
            dtype=self.dtype,
        )
        self.parameters = dict(self.model.named_parameters())
        self.shards = {name: _local(p.detach()) for name, p in self.parameters.items()}
        self.optimizer = adamw(self.shards, config.optim)
        add_moments(self.optimizer)
        self._take(initial_weights(self.model, config.seed))

    def grad_sync(self, last: bool) -> AbstractContextManager[object]:
        """Gradients stay on their rank until the last micro-batch."""
        if isinstance(self.model_with_loss, FSDPModule):
            self.model_with_loss.set_requires_gradient_sync(last)
        if isinstance(self.model_with_loss, DistributedDataParallel) and not last:
            return self.model_with_loss.no_sync()
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add the gradient to the parameters'."""
        loss.backward()

    @torch.no_grad()
    def optimizer_step(self, lr: float, loss: Tensor, limits: Limits) -> tuple[Tensor, Tensor]:
        """Clip by the norm over all shards, and step unless the step is bad."""
        gradients = []
        for shard, parameter in zip(self.shards.values(), self.parameters.values(), strict=True):
            assert parameter.grad is not None
            gradients.append(parameter.grad)
            shard.grad = _local(parameter.grad)
        grad_norm = _whole(get_total_norm(gradients))
        applied = limits.allow(loss, grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        set_clip_and_skip(self.optimizer, grad_norm, self.config.optim.grad_clip, applied)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.model_with_loss.zero_grad()
        return grad_norm, applied

    def drop_gradients(self) -> None:
        """Drop the gradients of the micro-batches so far."""
        self.model_with_loss.zero_grad()
        drop_unreduced_gradients(self.model_with_loss)

    def evaluate(
        self, batch: Batch, stop_requested: Callable[[], bool] = never
    ) -> tuple[Tensor, Tensor] | None:
        """As for all engines; then gathered weights are freed, which a backward pass would do."""
        found = super().evaluate(batch, stop_requested)
        self._reshard()
        return found

    @contextmanager
    def summon_full_params(self) -> Iterator[Transformer]:
        """The model; where it is cut, blocks gather when called, and the rest is gathered here."""
        if isinstance(self.model_with_loss, FSDPModule):
            self.model_with_loss.unshard()
        try:
            # Every length would be compiled anew.
            with autocast(self.device, self.dtype), torch.compiler.set_stance("force_eager"):
                yield self.model
        finally:
            self._reshard()

    def state(self) -> TensorTree:
        """Shards as DTensors of all ranks; what every rank has is dealt out among them."""
        mine = {
            name: tensor
            for number, tensors in enumerate(self._tensors())
            for name, tensor in tensors.items()
            if isinstance(tensor, DTensor) or number % self.groups.world_size == self.groups.rank
        }
        return {**mine, "random": self.random_state()} if self.groups.is_rank_zero else mine

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take over weights, moments and the first rank's random numbers."""
        random = self.random_state()
        tensors = {name: x for group in self._tensors() for name, x in group.items()}
        checkpoint.load({**tensors, "random": random})
        self.set_random_state(random)

    def load(self, weights: dict[str, Tensor]) -> None:
        """Take whole weights, each rank its shards."""
        assert weights.keys() == self.parameters.keys(), weights.keys() ^ self.parameters.keys()
        self._take(weights.items())

    @torch.no_grad()
    def _take(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        for name, weight in weights:
            self.shards[name].copy_(_local(_cut_like(self.parameters[name], weight)))
        self.model.rope.build(self.device)

    def _tensors(self) -> Iterator[dict[str, Tensor]]:
        """Of each parameter, what a checkpoint keeps, under canonical names."""
        for name, parameter in self.parameters.items():
            moments = self.optimizer.state[self.shards[name]]
            yield {
                f"model.{name}": parameter.detach(),
                f"optimizer.{name}.exp_avg": _as_cut(parameter, moments["exp_avg"]),
                f"optimizer.{name}.exp_avg_sq": _as_cut(parameter, moments["exp_avg_sq"]),
                f"optimizer.{name}.step": moments["step"],
            }

    def _reshard(self) -> None:
        for module in sharded_modules(self.model_with_loss):
            module.reshard()


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that is cut; any other as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _cut_like(parameter: Tensor, whole: Tensor) -> Tensor:
    """A tensor that every rank has, cut as a parameter is; nothing is sent."""
    if not isinstance(parameter, DTensor):
        return whole
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(whole, mesh, placements, src_data_rank=None)


def _as_cut(parameter: Tensor, shard: Tensor) -> Tensor:
    """This rank's part of a tensor that is cut as a parameter is, as one of all ranks."""
    if not isinstance(parameter, DTensor):
        return shard
    return DTensor.from_local(
        shard,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
