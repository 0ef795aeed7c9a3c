"""The interface of engines: how a model is trained on one or many devices.

The model itself knows nothing of ranks and devices.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from conf.errors import ConfigError
from data.batch import Batch
from data.prefetch import never
from phd.loss import IGNORED, Loss
from phd.model import ModelWithLoss, Transformer
from phd.segments import Segments
from train.checkpoint.reader import Checkpoint, TensorTree
from train.config import Config
from train.distributed.process_groups import ProcessGroups
from train.engines.compilation import compile_blocks
from train.engines.context_parallel import ContextPart, ContextRank
from train.engines.device import autocast, choose_device, precision
from train.engines.limits import Limits
from train.engines.mesh import ParallelDims
from train.torch_private import mark_dynamic


class StepResult(NamedTuple):
    """The results of an optimizer step, as scalars on the device. All ranks have the same values.

    Reading one waits for the device.

    Attributes:
        loss: cross-entropy per target in nats, over all rows of the step.
        grad_norm: L2 norm of the gradient before clipping.
        applied: bool; false if the step was bad (see `Limits`) and its update was skipped.
    """

    loss: Tensor
    grad_norm: Tensor
    applied: Tensor


class Engine(ABC):
    """One model on all ranks, with the verbs of a training step (see `train.loop.train_step`).

        forward(micro_batch)            sums the loss                      in this class
        backward(loss)                  accumulates gradients              }
        optimizer_step(lr, ...)         reduces gradients over ranks,      } in a subclass
                                        clips, updates weights and moments }

    This class makes `self.model` on the meta device. A subclass wraps it as `self.model_with_loss`,
    and implements gradients, updates and checkpoints.

    Attributes:
        model: its parameters have their canonical names, also where they are sharded.
        device: of this rank.
        dtype: of the matrix products.
        model_with_loss: the model and its loss, wrapped by the engine.
        dims: how the ranks are laid out.
        micro_batch: rows of a micro-batch on one rank.
        compiled: whether blocks are compiled.
        place: this rank's among those over which the tokens of its rows are dealt; None: it has
            whole rows.
    """

    model_with_loss: nn.Module

    def __init__(self, config: Config, groups: ProcessGroups) -> None:
        self.config, self.groups = config, groups
        self.device = choose_device(config.engine)
        self.dtype = precision(config.engine, self.device)
        # Only the engine knows which part of the weights this rank will hold.
        with torch.device("meta"):
            self.model = Transformer(config.model)
        self.model_with_loss = ModelWithLoss(self.model, config.optim.z_loss)
        if problems := config.batch_problems_on(groups.world_size):
            raise ConfigError(problems)
        self.dims = ParallelDims.of(config.engine, groups.world_size)
        self.micro_batch = config.train.micro_batch_on(self.dims.data_ranks)
        self.compiled = config.engine.compiles_on(self.device.type)
        self.place: ContextRank | None = None  # a subclass that deals the tokens of rows sets it
        # An evaluation runs without gradients, and so has graphs of its own.
        self._evaluation_to_compile = self.compiled and config.data.holdout > 0

    @torch.no_grad()
    def evaluate(
        self,
        batch: Batch,
        stop_requested: Callable[[], bool] = never,
        document_nats: Tensor | None = None,
    ) -> tuple[Tensor, Tensor] | None:
        """Compute the loss of a batch of held-out rows, which are divided among the ranks.

        Args:
            batch: the same on all ranks.
            stop_requested: is called between micro-batches; true ends the evaluation.
            document_nats: zeros, float64 (documents,) on the device. If given, it becomes the
                summed cross-entropy of each of `batch.documents`, on all ranks. The other results
                are the same with it and without it.

        Returns:
            (summed cross-entropy in nats, number of targets), or None if it was ended.
        """
        shard = batch.shard(self.dims.data_rank(self.groups.rank), self.dims.data_ranks)
        if self.compiled:  # else the last micro-batch could need graphs for fewer rows
            shard = shard.filled_up(self.micro_batch)
        # A sum in float32 would lose the small terms of long evaluations.
        total = torch.zeros((), device=self.device, dtype=torch.float64)
        for number, micro_batch in enumerate(shard.split(self.micro_batch)):
            # `stop_requested` is collective. The ranks have equally many micro-batches, so all of
            # them call it equally often.
            if number and stop_requested():
                return None
            loss = self.forward(micro_batch, per_target=document_nats is not None)
            total += loss.cross_entropy
            if document_nats is not None:
                assert micro_batch.documents is not None
                assert loss.per_target is not None
                numbers = self._to_device(self._dealt(micro_batch.documents)).flatten()
                document_nats.index_add_(0, numbers, loss.per_target.flatten().double())
        if document_nats is not None:
            self.sum_loss(document_nats)
        return self.sum_loss(total), self.count_targets(shard)

    def set_copies(self, K: int) -> None:
        """Feed each token K times from the next step on. Every rank calls this.

        Weights, moments and sharding stay as they are, because copies have no weights of their own.
        """
        if K == self.model.config.K:
            return
        self.model.set_copies(K)
        if self.compiled:
            # Graphs of the K before would be kept with a K that may vary, which are slower.
            compile_blocks(self.model)
            self._evaluation_to_compile = self.config.data.holdout > 0

    def count_targets(self, batch: Batch) -> Tensor:
        """Targets on all ranks; 1 if there are none, because it is only used to divide.

        Args:
            batch: this rank's rows, all tokens of them.
        """
        is_reader = self.dims.is_reader(self.groups.rank)
        count = torch.tensor((batch.targets != IGNORED).sum() if is_reader else 0)
        return self.groups.sum(self._to_device(count)).clamp(min=1)

    def sum_loss(self, x: Tensor) -> Tensor:
        """The sum over all ranks of a loss, or of a loss per document, in place.

        Ranks that cut matrices among themselves have all computed the same loss: it counts once.
        """
        if self.dims.tensor_rank(self.groups.rank):
            x.zero_()
        return self.groups.sum(x)

    def forward(self, micro_batch: Batch, *, per_target: bool = False) -> Loss:
        """The loss of one micro-batch on this rank, in the precision of the products."""
        if self._evaluation_to_compile:
            # Now, as part of the first step, and not when a run has long begun.
            self._evaluation_to_compile = False
            self.evaluate(micro_batch)
        return self.loss_of(micro_batch, per_target=per_target)

    def loss_of(self, micro_batch: Batch, *, per_target: bool = False) -> Loss:
        """`forward` alone, also where it is not the first step's."""
        segments = part = None
        starts = micro_batch.document_starts
        if self.place is not None:
            length = micro_batch.inputs.shape[1]
            part = ContextPart.of(self.place, length, starts, self.device)
        elif starts is not None:
            segments = Segments.of(torch.from_numpy(starts)).to(self.device)
        if self.compiled:  # the number of documents differs from batch to batch
            for lengths in _document_lengths(segments, part):
                mark_dynamic(lengths)
        tokens, targets = (
            self._to_device(self._dealt(x)) for x in (micro_batch.inputs, micro_batch.targets)
        )
        with autocast(self.device, self.dtype):
            if per_target:
                return self.model_with_loss(tokens, targets, segments, part, per_target=True)
            return self.model_with_loss(tokens, targets, segments, part)

    def _dealt(self, x: np.ndarray) -> Tensor:
        """What this rank has of values (B, T), one for each token of its rows."""
        index = slice(None) if self.place is None else self.place.token_index(x.shape[1])
        return torch.from_numpy(x[:, index])

    def _to_device(self, x: Tensor) -> Tensor:
        if self.device.type == "cuda":
            # A copy from pageable memory would block the host; an expanded tensor cannot be pinned.
            x = x.contiguous().pin_memory()
        return x.to(self.device, non_blocking=True)

    def synchronize(self) -> None:
        """Wait until the device has finished all queued work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def random_state(self) -> dict[str, Tensor]:
        """Copies of the states of the random number generators, by device type."""
        random = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.device)
        return random

    def set_random_state(self, random: dict[str, Tensor]) -> None:
        """Set the states of the random number generators."""
        torch.set_rng_state(random["cpu"])
        if "cuda" in random:
            torch.cuda.set_rng_state(random["cuda"], self.device)

    @abstractmethod
    def grad_sync(self, last: bool) -> AbstractContextManager[object]:
        """The context of a micro-batch's forward and backward pass.

        Gradients are accumulated over micro-batches. They are reduced over ranks with the last one.
        """

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a scalar to the accumulated gradients."""

    @abstractmethod
    def optimizer_step(self, lr: float, loss: Tensor, limits: Limits) -> tuple[Tensor, Tensor]:
        """Clip the gradient, update the weights unless the step is bad, and drop the gradient.

        Args:
            lr: learning rate of this step.
            loss: of this step, the same on all ranks.
            limits: decide, from the loss and the gradient's norm, whether the step is bad.

        Returns:
            (gradient norm before clipping, whether the update was applied), scalars on the device.
        """

    @abstractmethod
    def drop_gradients(self) -> None:
        """Drop the accumulated gradients of a step that is abandoned."""

    @abstractmethod
    def state(self) -> TensorTree:
        """This rank's part of a checkpoint, under the names that every engine uses.

            model.<parameter>                                       float32 weights
            optimizer.<parameter>.exp_avg, .exp_avg_sq, .step       where AdamW updates it
            optimizer.<parameter>.momentum_buffer                   where Muon does
            random.<device>                                         generators of rank 0

        Each is a plain tensor, which one rank returns, or a DTensor, which all ranks return. Every
        rank calls this.
        """

    @abstractmethod
    def restore(self, checkpoint: Checkpoint) -> None:
        """Load a checkpoint of any engine. Every rank calls this.

        Raises:
            ConfigError: its tensors do not fit this model.
        """

    @abstractmethod
    def load(
        self,
        weights: Mapping[str, Tensor],
        optimizer: Callable[[str], Mapping[str, Tensor]] | None = None,
    ) -> None:
        """Load whole weights by parameter name. Every rank calls this.

        Args:
            optimizer: gives the optimizer's state of a parameter, whole, by the names of its rule
                (`train.engines.state_rules`). None: it stays zero.
        """

    @abstractmethod
    def summon_full_params(self) -> AbstractContextManager[Transformer]:
        """The model with usable weights, for calls other than the loss.

        Every rank makes the same calls, because each call may gather weights.
        """

    def close(self) -> None:  # noqa: B027  # optional to override
        """Release what would outlive the engine."""


def _document_lengths(segments: Segments | None, part: ContextPart | None) -> Iterator[Tensor]:
    """The tensors that are as long as a micro-batch has documents."""
    parts = part.documents if part is not None else None
    for documents in [segments] if segments is not None else [x for x, _ in parts or ()]:
        yield documents.cu_seqlens
        yield documents.cu_seqlens_cpu
