"""How a model is trained on the hardware at hand; the model itself knows nothing of it."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

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
from train.engines.device import autocast, choose_device, precision
from train.engines.limits import Limits


class StepResult(NamedTuple):
    """What an optimizer step computed, still on the device: reading it waits for the device.

    All ranks have the same values.

    Attributes:
        loss: cross-entropy per target, nats, over all rows of the step.
        grad_norm: L2 norm of the gradient before clipping.
        applied: bool; false if the step was bad (see `Limits`), and then changed nothing.
    """

    loss: Tensor
    grad_norm: Tensor
    applied: Tensor


class Engine(ABC):
    """One model on all ranks, with the verbs of a training step (see `train.loop.train_step`).

        forward(micro_batch)            loss sums                          here, for all engines
        backward(loss)                  gradients, added up                }
        optimizer_step(lr, ...)         summed over ranks, clipped,        } in a subclass
                                        weights and moments updated        }

    A subclass prepares `self.model_with_loss` around `self.model`, which the base makes on the meta
    device, and says how gradients are made, how weights are updated, and what a checkpoint holds.

    Attributes:
        model: its parameters have their canonical names, whatever they are cut into.
        device: of this rank.
        dtype: of the matrix products.
        model_with_loss: the model and its loss, as an engine has wrapped it.
    """

    model_with_loss: nn.Module

    def __init__(self, config: Config, groups: ProcessGroups) -> None:
        self.config, self.groups = config, groups
        self.device = choose_device(config.engine)
        self.dtype = precision(config.engine, self.device)
        with torch.device("meta"):
            self.model = Transformer(config.model)
        self.model_with_loss = ModelWithLoss(self.model, config.optim.z_loss)
        world_size = groups.world_size
        if problems := [
            *config.train.problems_on(world_size),
            *config.engine.problems_on(world_size),
        ]:
            raise ConfigError(problems)
        self.micro_batch = config.train.micro_batch_on(world_size)

    @torch.no_grad()
    def evaluate(
        self, batch: Batch, stop_requested: Callable[[], bool] = never
    ) -> tuple[Tensor, Tensor] | None:
        """(summed cross-entropy in nats, number of targets) of a batch that all ranks have alike.

        Each rank computes its share. None if `stop_requested`, asked between micro-batches, says
        so.
        """
        shard = batch.shard(self.groups.rank, self.groups.world_size)
        total = torch.zeros((), device=self.device, dtype=torch.float64)
        for number, micro_batch in enumerate(shard.split(self.micro_batch)):
            if number and stop_requested():
                return None
            total += self.forward(micro_batch).cross_entropy
        return self.groups.sum(total), self.count_targets(shard)

    def count_targets(self, batch: Batch) -> Tensor:
        """Targets on all ranks; 1 if there are none, because it is only used to divide."""
        count = torch.tensor((batch.targets != IGNORED).sum())
        return self.groups.sum(self._to_device(count)).clamp(min=1)

    def forward(self, micro_batch: Batch) -> Loss:
        """The loss of one micro-batch on this rank, in the precision of the products."""
        segments = None
        if micro_batch.document_starts is not None:
            segments = Segments.of(torch.from_numpy(micro_batch.document_starts)).to(self.device)
        tokens, targets = (
            self._to_device(torch.from_numpy(x)) for x in (micro_batch.inputs, micro_batch.targets)
        )
        with autocast(self.device, self.dtype):
            return self.model_with_loss(tokens, targets, segments)

    def _to_device(self, x: Tensor) -> Tensor:
        if self.device.type == "cuda":
            x = x.pin_memory()  # or the copy would wait for the device
        return x.to(self.device, non_blocking=True)

    def synchronize(self) -> None:
        """Wait until the device has done everything that is queued."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def random_state(self) -> dict[str, Tensor]:
        """The states of the random number generators, by device; copies."""
        random = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.device)
        return random

    def set_random_state(self, random: dict[str, Tensor]) -> None:
        """Put the generators back into these states."""
        torch.set_rng_state(random["cpu"])
        if "cuda" in random:
            torch.cuda.set_rng_state(random["cuda"], self.device)

    @abstractmethod
    def grad_sync(self, last: bool) -> AbstractContextManager[object]:
        """The context of a micro-batch's forward and backward pass.

        Gradients add up over micro-batches; with the last one they are summed over ranks.
        """

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a scalar to what is there."""

    @abstractmethod
    def optimizer_step(self, lr: float, loss: Tensor, limits: Limits) -> tuple[Tensor, Tensor]:
        """Clip the gradient, update the weights unless the step is bad, and drop the gradient.

        Args:
            loss: the step's, the same on all ranks.

        Returns:
            (gradient norm before clipping, whether the update was applied), scalars on the device.
        """

    @abstractmethod
    def drop_gradients(self) -> None:
        """Drop the gradients of a step that is given up."""

    @abstractmethod
    def state(self) -> TensorTree:
        """What this rank writes of a checkpoint, under the names that every engine uses.

        The union over ranks is everything: `model.<parameter>`, `optimizer.<parameter>.exp_avg`,
        `.exp_avg_sq` and `.step`, `random.<device>`. Each is a whole Tensor, of one rank alone, or
        a DTensor of all. Every rank calls it.
        """

    @abstractmethod
    def restore(self, checkpoint: Checkpoint) -> None:
        """Take over a checkpoint of any engine; raises ValueError where it does not fit.

        Every rank calls it.
        """

    @abstractmethod
    def load(self, weights: dict[str, Tensor]) -> None:
        """Take whole weights by parameter name; the optimizer stays as new. Every rank calls it."""

    @abstractmethod
    def summon_full_params(self) -> AbstractContextManager[Transformer]:
        """The model, for calls other than the loss; every rank makes the same ones."""

    def close(self) -> None:  # noqa: B027  # most have nothing
        """Let go of what would outlive the engine."""
