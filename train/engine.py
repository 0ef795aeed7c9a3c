"""How a model is trained on the hardware at hand; the model itself knows nothing of it."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from data.heldout import HeldOut
from data.stream import Batch
from phd.loss import IGNORED, Loss
from phd.model import Transformer
from phd.segments import Segments
from train.checkpoint import Checkpoint, TensorTree
from train.config import Config
from train.device import autocast, choose_device, precision
from train.optimizer import build_optimizer, optimizer_state


class StepResult(NamedTuple):
    """What an optimizer step computed, still on the device: reading it waits for the device.

    Attributes:
        loss: cross-entropy per target, nats, over all rows of the step.
        grad_norm: L2 norm of the gradient before clipping.
    """

    loss: Tensor
    grad_norm: Tensor


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


class Engine(Protocol):
    """What the training loop needs; every engine sums losses and counts targets alike."""

    model: Transformer
    device: torch.device
    dtype: torch.dtype  # of the matrix products

    def step(self, rows: Rows, lr: float) -> StepResult:
        """Take one optimizer step on this rank's rows."""

    def loss(self, rows: Rows) -> tuple[Tensor, int]:
        """(summed cross-entropy, targets) of rows without training."""

    def synchronize(self) -> None:
        """Wait until everything asked of the device is done."""

    def state(self) -> TensorTree:
        """The tensors of a checkpoint, under names that every engine uses."""

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take over the tensors of a checkpoint; raises ValueError where they do not fit."""


class SingleEngine:
    """One process, one device."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.device = choose_device(config.engine)
        self.dtype = precision(config.engine, self.device)
        with torch.device("meta"):
            self.model = Transformer(config.model)
        self.model.to_empty(device=self.device).reset(config.seed)
        if config.engine.compile:
            for block in self.model.blocks:
                block.compile()
        self.optimizer = build_optimizer(self.model, config.optim)

    def step(self, rows: Rows, lr: float) -> StepResult:
        """Accumulate the gradients of all micro-batches, clip them, update the weights."""
        targets = rows.targets
        count = (targets != IGNORED).sum()
        cross_entropy = torch.zeros((), device=self.device)
        for loss in self._losses(rows, targets, self.config.train.micro_batch or len(targets)):
            (loss.total / count).backward()
            cross_entropy += loss.cross_entropy
        grad_norm = clip_grad_norm_(
            self.model.parameters(), self.config.optim.grad_clip or torch.inf
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        return StepResult(cross_entropy / count, grad_norm)

    @torch.no_grad()
    def loss(self, rows: Rows) -> tuple[Tensor, int]:
        """(summed cross-entropy in nats, number of targets), micro-batch by micro-batch."""
        targets = rows.targets
        total = torch.zeros((), device=self.device, dtype=torch.float64)
        micro = self.config.train.micro_batch or self.config.train.global_batch
        for loss in self._losses(rows, targets, micro):
            total += loss.cross_entropy
        return total, int((targets != IGNORED).sum())

    def _losses(self, rows: Rows, targets: Tensor, micro: int) -> Iterator[Loss]:
        """The loss of each `micro` rows, one after the other."""
        parts = zip(rows.tokens[:, :-1].split(micro), targets.split(micro), strict=True)
        segments = None
        for number, (tokens, wanted) in enumerate(parts):
            if rows.starts is not None:
                starts = rows.starts[number * micro :][:micro]
                segments = Segments.of(starts).to(self.device)
            tokens, wanted = self._moved(tokens), self._moved(wanted)
            with autocast(self.device, self.dtype):
                loss = self.model.loss(tokens, wanted, self.config.optim.z_loss, segments)
            yield loss

    def _moved(self, x: Tensor) -> Tensor:
        if self.device.type == "cuda":
            x = x.pin_memory()  # or the copy would wait for the device
        return x.to(self.device, non_blocking=True)

    def synchronize(self) -> None:
        """Wait until everything asked of the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def state(self) -> TensorTree:
        """Weights and moments by parameter name, and the random number generators."""
        random = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.device)
        return {
            "model": {name: p.detach() for name, p in self.model.named_parameters()},
            "optimizer": optimizer_state(self.model, self.optimizer),
            "random": random,
        }

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take over the tensors of a checkpoint; raises ValueError where they do not fit."""
        state = self.state()
        checkpoint.load(state)
        random = cast(dict[str, Tensor], state["random"])
        torch.set_rng_state(random["cpu"])
        if "cuda" in random:
            torch.cuda.set_rng_state(random["cuda"], self.device)
