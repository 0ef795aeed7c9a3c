"""How a model is trained on the hardware at hand; the model itself knows nothing of it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from math import ceil, inf
from typing import NamedTuple

import torch
from torch import Tensor, nn

from data.batch import Batch
from data.prefetch import never
from phd.loss import IGNORED, Loss
from phd.model import Transformer
from phd.segments import Segments
from train.checkpoint.store import Checkpoint, TensorTree
from train.config import Config
from train.distributed.process_groups import ProcessGroups
from train.engines.device import autocast, choose_device, precision


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


class Limits(NamedTuple):
    """What a step's loss and gradient norm may be at most; what is not finite is always bad."""

    loss: float = inf
    grad_norm: float = inf

    def allow(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Whether a step is good; a bool on the device, where nobody waits for it."""
        within = (loss <= self.loss) & (grad_norm <= self.grad_norm)
        return within & loss.isfinite() & grad_norm.isfinite()


NO_LIMITS = Limits()


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
    def of(cls, text: Batch) -> "Rows":
        """The rows of a batch, sharing its memory."""
        mask, starts = (
            None if x is None else torch.from_numpy(x) for x in (text.mask, text.document_starts)
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


class ModelWithLoss(nn.Module):
    """A model and its loss in one forward pass: what engines shard, wrap and compile around."""

    def __init__(self, model: Transformer, z_loss: float) -> None:
        super().__init__()
        self.model = model
        self.z_loss = z_loss

    def forward(self, tokens: Tensor, targets: Tensor, segments: Segments | None = None) -> Loss:
        """tokens, targets (B, T) -> sums over the targets; see `phd.loss`."""
        return self.model.loss(tokens, targets, self.z_loss, segments)


class Engine(ABC):
    """One model on all ranks: the same steps, whatever is cut over them.

        step(rows, lr)      rows -> micro-batches -> losses -> gradients    here, for all engines
                            gradients summed over ranks -> clipped -> weights        in a subclass

    The loss is a sum over targets, divided by the number of targets of the whole step, over all
    micro-batches and ranks. So gradients are to be summed, never averaged.

    A subclass prepares `self.model_with_loss` around `self.model`, which the base makes on the meta
    device, and says how gradients are made, how weights are updated, and what a checkpoint holds.

    Attributes:
        model: its parameters have their canonical names, whatever they are cut into.
        device: of this rank.
        dtype: of the matrix products.
        model_with_loss: the model's loss; maybe wrapped.
    """

    model_with_loss: nn.Module

    def __init__(self, config: Config, groups: ProcessGroups) -> None:
        self.config, self.groups = config, groups
        self.device = choose_device(config.engine)
        self.dtype = precision(config.engine, self.device)
        with torch.device("meta"):
            self.model = Transformer(config.model)
        self.model_with_loss = ModelWithLoss(self.model, config.optim.z_loss)
        config.train.accumulation(groups.world_size)  # or it says why not
        if problems := config.engine.problems_on(groups.world_size):
            raise ValueError("; ".join(problems))
        self.micro_batch = (
            config.train.micro_batch or config.train.global_batch // groups.world_size
        )

    def step(
        self, rows: Rows, lr: float, limits: Limits = NO_LIMITS, stop: Callable[[], bool] = never
    ) -> StepResult | None:
        """Take one optimizer step on this rank's rows of the global batch.

        Args:
            rows: as many on every rank.
            lr: learning rate.
            limits: beyond them the step is not applied.
            stop: asked between two micro-batches, of all ranks at once; if it says so, the step is
                given up, with weights and moments as before, and the result is None.
        """
        parts = list(rows.split(self.micro_batch))
        count = self._count(rows)
        cross_entropy = torch.zeros((), device=self.device)
        for number, part in enumerate(parts, 1):
            if number > 1 and stop():
                self.drop_gradients()
                return None
            with self.grad_sync(last=number == len(parts)):
                loss = self.forward(part)
                self.backward(loss.total / count)
            cross_entropy += loss.cross_entropy
        mean = self.groups.sum(cross_entropy) / count
        grad_norm, applied = self.update(lr, mean, limits)
        return StepResult(mean, grad_norm, applied)

    @torch.no_grad()
    def loss(self, rows: Rows, stop: Callable[[], bool] = never) -> tuple[Tensor, Tensor] | None:
        """(summed cross-entropy in nats, number of targets) of rows that all ranks have alike.

        Each rank computes its share. None if `stop`, asked between micro-batches, says so.
        """
        share = rows.share(self.groups.rank, self.groups.world_size)
        total = torch.zeros((), device=self.device, dtype=torch.float64)
        for number, part in enumerate(share.split(self.micro_batch)):
            if number and stop():
                return None
            total += self.forward(part).cross_entropy
        return self.groups.sum(total), self._count(share)

    def _count(self, rows: Rows) -> Tensor:
        """Targets on all ranks; 1 if there are none, for it is only divided by."""
        count = self._moved((rows.targets != IGNORED).sum())
        return self.groups.sum(count).clamp(min=1)

    def forward(self, rows: Rows) -> Loss:
        """The loss of one micro-batch on this rank, in the precision of the products."""
        segments = None if rows.starts is None else Segments.of(rows.starts).to(self.device)
        tokens, targets = self._moved(rows.tokens[:, :-1]), self._moved(rows.targets)
        with autocast(self.device, self.dtype):
            return self.model_with_loss(tokens, targets, segments)

    def _moved(self, x: Tensor) -> Tensor:
        if self.device.type == "cuda":
            x = x.pin_memory()  # or the copy would wait for the device
        return x.to(self.device, non_blocking=True)

    def synchronize(self) -> None:
        """Wait until everything asked of the device is done."""
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
    def update(self, lr: float, loss: Tensor, limits: Limits) -> tuple[Tensor, Tensor]:
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
