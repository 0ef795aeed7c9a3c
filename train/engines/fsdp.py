"""PyTorch's own parallelism: one process, DDP, FSDP2 (arXiv 2304.11277) or HSDP."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from math import prod

import torch
from torch import Tensor, nn
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
from train.engines.context_parallel import ContextRank
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
from train.engines.parallelize import drop_unreduced_gradients, parallelize, sharded_modules
from train.engines.rounded_weights import RoundedWeights
from train.engines.state_rules import STEP, matrix_shapes
from train.settings.engine import FsdpConfig


class FsdpEngine(Engine):
    """An engine whose ranks hold the whole model, or a shard of each of its parameters.

        engine.shard   engine.replicate   on n ranks
        true           1                  FSDP2: n shards of weights, gradients and moments
        true           m                  HSDP: m replicas, each of n / m shards
        false          1                  DDP: n replicas

    With `engine.tensor=t`, n / t in place of n: each of these ranks is t ranks, and the shards are
    of the parts of matrices that each of the t has (`train.engines.tensor_parallel`).

    In a lone process each of these is a plain model. AdamW treats each element alone, so the
    optimizer works on this rank's shards as plain tensors: DTensors would dispatch each operation
    in Python. Muon exchanges shards of matrices itself.
    """

    def __init__(self, config: Config, groups: ProcessGroups) -> None:
        super().__init__(config, groups)
        assert isinstance(config.engine, FsdpConfig)
        assert isinstance(self.model_with_loss, ModelWithLoss)
        if self.dims.context > 1:
            self.place = ContextRank.of(self.dims.row_mesh(self.device).get_group("context"))
        self.keeps_gathered = config.engine.reshard_after_forward == "never"
        self.model_with_loss = parallelize(
            self.model_with_loss,
            config.engine,
            groups=groups,
            device=self.device,
            dtype=self.dtype,
        )
        self.parameters = dict(self.model.named_parameters())
        # These share their memory with the parameters: an update of the one is one of the other.
        self.shards = {name: _local(p.detach()) for name, p in self.parameters.items()}
        self.optimizer = optimizer_of(
            self.shards, config.optim, self.dtype, config.model.width_ratio
        )
        add_state(self.optimizer)
        shapes = matrix_shapes(config.model, config.optim)
        places = [Place(i, 0, self.shards[name].numel()) for i, name in enumerate(shapes)]
        sharded = isinstance(self.model_with_loss, FSDPModule)
        shards = self.dims.shards if sharded else 1
        share_matrices(self.optimizer, shapes, places, groups, shards)
        # Where weights are sharded, FSDP2 rounds the shards that it gathers.
        self.rounded = RoundedWeights(self.model, torch.float32 if sharded else self.dtype)
        self._fill(initial_weights(self.model, config.seed))

    def grad_sync(self, last: bool) -> AbstractContextManager[object]:
        """Reduce gradients over ranks with the last micro-batch only."""
        # One reduction per step costs memory: until then each rank has whole gradients, up to 4
        # bytes per parameter. ZeRO-2 and ZeRO-3 reduce with every micro-batch instead.
        if isinstance(self.model_with_loss, FSDPModule):
            self.model_with_loss.set_requires_gradient_sync(last)
            # Weights that stay gathered from forward to backward stay so until the step's end: no
            # micro-batch but the first gathers and rounds them.
            if self.keeps_gathered:
                self.model_with_loss.set_reshard_after_backward(last)
        if isinstance(self.model_with_loss, DistributedDataParallel) and not last:
            return self.model_with_loss.no_sync()
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of the loss to the parameters' gradients."""
        loss.backward()

    @torch.no_grad()
    def optimizer_step(self, lr: float, loss: Tensor, limits: Limits) -> tuple[Tensor, Tensor]:
        """Clip by the norm of the whole gradient, and update the weights unless the step is bad."""
        gradients = []
        for shard, parameter in zip(self.shards.values(), self.parameters.values(), strict=True):
            assert parameter.grad is not None
            gradients.append(parameter.grad)
            shard.grad = _local(parameter.grad)
        grad_norm = self._total_norm(gradients)
        applied = limits.allow(loss, grad_norm)
        set_lr(self.optimizer, lr)
        set_clip_and_skip(self.optimizer, grad_norm, self.config.optim.grad_clip, applied)
        self.optimizer.step()
        self.rounded.refresh()
        # Both: the shards' gradients are references to those of the parameters.
        self.optimizer.zero_grad()
        self.model_with_loss.zero_grad()
        return grad_norm, applied

    def _total_norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """The L2 norm of the whole gradient, a scalar that is the same on all ranks."""
        if self.dims.tensor == 1:
            # On DTensors this reduces the squared norms of the shards over the ranks.
            return _full(get_total_norm(gradients))
        # Torch would reduce over one axis of the mesh after the other, and parameter by parameter
        # where some are cut over an axis and some are not. Here a shard that r ranks have counts
        # 1 / r on each of them.
        parts: defaultdict[int, list[Tensor]] = defaultdict(list)
        for gradient in gradients:
            parts[_replicas(gradient)].append(_local(gradient))
        squares = [get_total_norm(group).square() / r for r, group in parts.items()]
        return self.groups.sum(torch.stack(squares).sum()).sqrt()

    def drop_gradients(self) -> None:
        """Drop the gradients of the micro-batches so far, reduced or not."""
        self.model_with_loss.zero_grad()
        drop_unreduced_gradients(self.model_with_loss)
        self._reshard()

    def evaluate(
        self,
        batch: Batch,
        stop_requested: Callable[[], bool] = never,
        document_nats: Tensor | None = None,
    ) -> tuple[Tensor, Tensor] | None:
        """As in `Engine`; then free the gathered weights, as a backward pass would."""
        found = super().evaluate(batch, stop_requested, document_nats)
        self._reshard()
        return found

    @contextmanager
    def summon_full_params(self) -> Iterator[Transformer]:
        """The model. Its blocks gather their weights when called; this gathers the others.

        Where matrices are cut over tensor ranks it is another model, of whole matrices.
        """
        if isinstance(self.model_with_loss, FSDPModule):
            self.model_with_loss.unshard()
        try:
            model = self.model if self.dims.tensor == 1 else self._whole_copy()
            # Compiled blocks would be compiled again for each length of the text.
            with autocast(self.device, self.dtype), torch.compiler.set_stance("force_eager"):
                yield model
        finally:
            self._reshard()

    @torch.no_grad()
    def _whole_copy(self) -> Transformer:
        """A plain model whose blocks take whole weights when called, in the products' dtype."""
        with torch.device("meta"):
            copy = Transformer(self.config.model)
        for whole, cut in zip(copy.blocks, self.model.blocks, strict=True):
            whole.register_forward_pre_hook(partial(_gather_block, cut))
            whole.register_forward_hook(_drop_block)
        outside = ((n, x) for n, x in self.model.named_parameters() if not n.startswith("blocks."))
        others = copy.load_state_dict(dict(map(_gathered, outside)), strict=False, assign=True)
        assert not others.unexpected_keys, others
        self._reshard()
        copy.rope.build(self.device)
        return copy.set_copies(self.model.config.K)

    def state(self) -> TensorTree:
        """Shards as DTensors. Whole tensors are dealt to the ranks, parameter by parameter."""
        written = {
            name: tensor
            for number, tensors in enumerate(self._checkpoint_tensors())
            for name, tensor in tensors.items()
            if isinstance(tensor, DTensor) or number % self.groups.world_size == self.groups.rank
        }
        return {**written, "random": self.random_state()} if self.groups.is_rank_zero else written

    def restore(self, checkpoint: Checkpoint) -> None:
        """Load weights, moments and rank 0's random number generators."""
        # A checkpoint that was written on the CPU has no state of the CUDA generator. Such a state
        # keeps the value that it has now.
        random = self.random_state()
        tensors = {name: x for group in self._checkpoint_tensors() for name, x in group.items()}
        checkpoint.load({**tensors, "random": random})
        self.rounded.refresh()
        self.set_random_state(random)

    @torch.no_grad()
    def load(
        self,
        weights: Mapping[str, Tensor],
        optimizer: Callable[[str], Mapping[str, Tensor]] | None = None,
    ) -> None:
        """Load whole weights, and whole moments if they are given; each rank copies its shards."""
        assert weights.keys() == self.parameters.keys(), weights.keys() ^ self.parameters.keys()
        self._fill(weights.items())
        if optimizer is None:
            return
        for name, parameter in self.parameters.items():
            given = optimizer(name)
            for key, own in self.optimizer.state[self.shards[name]].items():
                whole = given[key]
                own.copy_(whole if key == STEP else _local(_sharded_like(parameter, whole)))

    @torch.no_grad()
    def _fill(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Copy whole weights into this rank's shards, and compute RoPE's tables."""
        for name, weight in weights:
            self.shards[name].copy_(_local(_sharded_like(self.parameters[name], weight)))
        self.model.rope.build(self.device)
        self.rounded.refresh()

    def _checkpoint_tensors(self) -> Iterator[dict[str, Tensor]]:
        """For each parameter the tensors of a checkpoint, by canonical name."""
        for name, parameter in self.parameters.items():
            state = {
                f"optimizer.{name}.{key}": own if key == STEP else _as_dtensor(parameter, own)
                for key, own in self.optimizer.state[self.shards[name]].items()
            }
            yield {f"model.{name}": parameter.detach(), **state}

    def _reshard(self) -> None:
        """Free the gathered weights; each rank keeps its shards."""
        for module in sharded_modules(self.model_with_loss):
            module.reshard()


def _local(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor; a plain tensor is returned as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _gathered(named: tuple[str, Tensor]) -> tuple[str, Tensor]:
    """A weight's name, and all of it in memory of its own."""
    name, parameter = named
    whole = _full(parameter.detach())
    # What each rank has whole already is FSDP2's own memory, which it frees.
    return name, whole.clone() if _replicas(parameter) > 1 else whole


@torch.no_grad()
def _gather_block(cut: nn.Module, whole: nn.Module, _: object) -> None:
    """Before a plain block is called: give it the weights of one that is cut over ranks."""
    assert isinstance(cut, FSDPModule)
    cut.unshard()
    whole.load_state_dict(dict(map(_gathered, cut.named_parameters())), assign=True)
    cut.reshard()


def _drop_block(whole: nn.Module, *_: object) -> None:
    """After a plain block was called: free its weights."""
    whole.to_empty(device="meta")


def _replicas(tensor: Tensor) -> int:
    """How many ranks have this rank's shard of a DTensor."""
    assert isinstance(tensor, DTensor)
    axes = zip(tensor.placements, tensor.device_mesh.shape, strict=True)
    return prod(size for placement, size in axes if placement.is_replicate())


def _full(tensor: Tensor) -> Tensor:
    """The whole value of a DTensor, on every rank; a plain tensor is returned as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _sharded_like(parameter: Tensor, whole: Tensor) -> Tensor:
    """A whole tensor, sharded as a parameter is. Every rank has it, so nothing is sent."""
    if not isinstance(parameter, DTensor):
        return whole
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(whole, mesh, placements, src_data_rank=None)


def _as_dtensor(parameter: Tensor, shard: Tensor) -> Tensor:
    """A DTensor made of this rank's shard, placed as a parameter is."""
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
