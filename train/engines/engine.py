"""The interface of engines: how a model is trained on one or many devices.

The model itself knows nothing of ranks and devices.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor, nn

from conf.errors import ConfigError
from data.heldout import HeldOut
from data.prefetch import never
from data.stream import Batch
from phd.loss import IGNORED, Loss
from phd.model import ModelWithLoss, Transformer
from phd.segments import Segments
from train.anomalies.detection import Limits
from train.checkpoint.reader import Checkpoint, TensorTree
from train.config import Config
from train.distributed.process_groups import ProcessGroups
from train.engines.device import autocast, choose_device, precision


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


class Rows(NamedTuple):
    """Rows of text as tensors on the CPU.

    Attributes:
        tokens: int64 (R, T+1).
        mask: bool (R, T), false for targets that do not count; None: all do.
        starts: int64 (R, T), where in its row each input's document begins; None: documents are
            not told apart.
    """

    tokens: Tensor
    mask: Tensor | None = None
    starts: Tensor | None = None

    @classmethod
    def of(cls, text: Batch | HeldOut) -> "Rows":
        """The rows of a batch, sharing its memory."""
        mask, starts = (
            None if x is None else torch.from_numpy(x) for x in (text.mask, text.starts)
        )
        return cls(torch.from_numpy(text.rows), mask, starts)

    @property
    def targets(self) -> Tensor:
        """int64 (R, T), `IGNORED` where a target does not count."""
        targets = self.tokens[:, 1:]
        return targets if self.mask is None else targets.where(self.mask, IGNORED)

    def share(self, rank: int, world_size: int) -> "Rows":
        """This rank's equal share of the rows: every `world_size`th, and rows that do not count."""
        R, T = self.targets.shape
        mask = torch.ones(R, T, dtype=torch.bool) if self.mask is None else self.mask
        place = torch.arange(rank, ceil(R / world_size) * world_size, world_size)
        real, place = (place < R)[:, None], place.clamp(max=R - 1)
        starts = None if self.starts is None else self.starts[place]
        return Rows(self.tokens[place], mask[place] & real, starts)

    def split(self, size: int) -> Iterator["Rows"]:
        """Parts of `size` rows, the last one maybe of less."""
        for start in range(0, len(self.tokens), size):
            part = slice(start, start + size)
            yield Rows(*(None if x is None else x[part] for x in self))  # type: ignore[arg-type]


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
        micro_batch: rows of a micro-batch on one rank.
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
        config.train.accumulation(groups.world_size)  # raises if the batch is not divisible
        if problems := config.engine.problems_on(groups.world_size):
            raise ConfigError(problems)
        self.micro_batch = (
            config.train.micro_batch or config.train.global_batch // groups.world_size
        )

    @torch.no_grad()
    def evaluate(
        self, rows: Rows, stop_requested: Callable[[], bool] = never
    ) -> tuple[Tensor, Tensor] | None:
        """Compute the loss of held-out rows, which are divided among the ranks.

        Args:
            rows: the same on all ranks.
            stop_requested: is called between micro-batches; true ends the evaluation.

        Returns:
            (summed cross-entropy in nats, number of targets), or None if it was ended.
        """
        share = rows.share(self.groups.rank, self.groups.world_size)
        # A sum in float32 would lose the small terms of long evaluations.
        total = torch.zeros((), device=self.device, dtype=torch.float64)
        for number, part in enumerate(share.split(self.micro_batch)):
            # `stop_requested` is collective. The ranks have equally many micro-batches, so all of
            # them call it equally often.
            if number and stop_requested():
                return None
            total += self.forward(part).cross_entropy
        return self.groups.sum(total), self.count_targets(share)

    def count_targets(self, rows: Rows) -> Tensor:
        """The number of targets on all ranks; at least 1, because the loss is divided by it."""
        # Ranks may have different numbers of targets. A mean of the ranks' means would be wrong.
        count = self._to_device((rows.targets != IGNORED).sum())
        return self.groups.sum(count).clamp(min=1)

    def forward(self, rows: Rows) -> Loss:
        """The loss of one micro-batch on this rank, with matrix products in `self.dtype`."""
        segments = None if rows.starts is None else Segments.of(rows.starts).to(self.device)
        tokens, targets = self._to_device(rows.tokens[:, :-1]), self._to_device(rows.targets)
        with autocast(self.device, self.dtype):
            return self.model_with_loss(tokens, targets, segments)

    def _to_device(self, x: Tensor) -> Tensor:
        if self.device.type == "cuda":
            x = x.pin_memory()  # a copy from pageable memory would block the host
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
            optimizer.<parameter>.exp_avg, .exp_avg_sq, .step       AdamW's state
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
    def load(self, weights: dict[str, Tensor]) -> None:
        """Load whole weights by parameter name; moments stay zero. Every rank calls this."""

    @abstractmethod
    def summon_full_params(self) -> AbstractContextManager[Transformer]:
        """The model with usable weights, for calls other than the loss.

        Every rank makes the same calls, because each call may gather weights.
        """

    def close(self) -> None:  # noqa: B027  # optional to override
        """Release what would outlive the engine."""
