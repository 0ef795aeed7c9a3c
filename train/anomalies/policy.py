"""What is done about a bad step: see `FaultsConfig` for the policies.

The devices decide by themselves whether a step is applied (`Limits.allow`). The host reads the
outcome back one step later, when the next step has been queued, so that no device waits for it:

    queue        step 5   step 6   step 7        no exchange between ranks is needed:
    read back             step 5   step 6        they all have the same loss and norm
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from math import sqrt
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from conf.errors import reason_of
from data.batch import Batch
from data.tokenizer import Tokenizer
from phd.loss import IGNORED
from train.anomalies.detection import SpikeDetector
from train.anomalies.report import BadStep, Layers, write_bad_step
from train.console import warn
from train.engines.device import AsyncScalars
from train.engines.engine import Engine, StepResult
from train.engines.limits import NO_LIMITS, Limits


class BadStepError(Exception):
    """A bad step ends the run; nothing was saved since the last checkpoint."""


class RollBackError(Exception):
    """The run has to be opened again from its last checkpoint.

    Attributes:
        batch: the number of the batch that is skipped then.
    """

    def __init__(self, message: str, batch: int) -> None:
        super().__init__(message)
        self.batch = batch


class _Pending(NamedTuple):
    """A step whose outcome has not been read back yet."""

    step: int
    number: int  # of its batch
    batch: Batch
    lr: float
    limits: Limits
    outcome: AsyncScalars


class BadStepPolicy:
    """Reads every step's outcome back, one step late, and does what the policy says.

    Args:
        detector: knows the steps before, and from them the limits.
        directory: the run's; the batches of bad steps are written there.
        console: of rank 0.
    """

    def __init__(
        self,
        detector: SpikeDetector,
        engine: Engine,
        tokenizer: Tokenizer,
        directory: Path,
        console: Console,
    ) -> None:
        self.detector = detector
        self.policy = detector.config.policy
        self.engine = engine
        self.tokenizer = tokenizer
        self.directory = directory
        self.console = console
        self._limits = NO_LIMITS
        self._pending: _Pending | None = None

    def limits(self, step: int, since: int = 1) -> Limits:
        """The limits of a step, by those since another; see `SpikeDetector.limits`."""
        self._limits = self.detector.limits(step, since)
        return self._limits

    def observe(self, step: int, number: int, batch: Batch, lr: float, result: StepResult) -> None:
        """Read the outcome of the step before this one back, and keep this one for later.

        Raises:
            RollBackError, BadStepError: the step before was bad, and that is the policy.
        """
        self.flush()
        outcome = AsyncScalars(result.loss, result.grad_norm, result.applied)
        self._pending = _Pending(step, number, batch, lr, self._limits, outcome)

    def flush(self) -> None:
        """Read the last step's outcome back, too: it is needed now. Raises as `observe` does."""
        last, self._pending = self._pending, None
        if last is None:
            return
        loss, grad_norm, applied = last.outcome.values()
        self.detector.observe(last.step, loss, grad_norm, bool(applied))
        if not applied:
            self._handle(last, loss, grad_norm)

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return self.detector.to_json()

    def _handle(self, last: _Pending, loss: float, grad_norm: float) -> None:
        bad = BadStep(
            step=last.step,
            batch=last.number,
            loss=loss,
            grad_norm=grad_norm,
            limits=last.limits,
            lr=last.lr,
        )
        layers = layer_report(self.engine, last.batch)
        try:
            path = write_bad_step(
                self.directory,
                bad,
                last.batch,
                self.tokenizer,
                layers,
                self.engine.groups,
                self.engine.dims,
            )
            report = f"{bad}; its batch is in {path.parent}"
        except OSError as error:
            report = f"{bad}; its batch could not be written ({reason_of(error)})"
        if self.policy == "rollback":
            raise RollBackError(report, last.number)
        if self.policy == "abort":
            raise BadStepError(f"{report}. faults.policy=abort ends the run")
        warn(self.console, f"{report}; it was not applied")
        if self.detector.too_many:
            raise BadStepError(
                f"faults.most_in_a_row={self.detector.config.most_in_a_row}: so many steps in a "
                "row were bad; the run ends. Lower optim.lr, or look at the batches"
            )


class _Size:
    """Norm and maximum of some tensors; values that are not finite are counted and left out."""

    def __init__(self) -> None:
        self.squares = self.largest = 0.0
        self.not_finite = 0

    def add(self, x: Tensor) -> None:
        x = x.detach().float()
        finite = x.isfinite()
        self.not_finite += int((~finite).sum())
        x = x.where(finite, 0)
        self.squares += x.square().sum(dtype=torch.float64).item()
        self.largest = max(self.largest, x.abs().amax().item())

    def to_json(self) -> dict[str, float]:
        norm = sqrt(self.squares)
        return {"norm": norm, "largest": self.largest, "not_finite": self.not_finite}


def layer_report(engine: Engine, batch: Batch) -> Layers:
    """Norm and maximum of each layer's weights, outputs and output gradients, on a rank's rows.

    They come from a forward and a backward pass of the present weights, with the mean loss of
    these rows; no weight changes. Every rank calls it with as many rows, and gets its own report.
    """
    sizes: defaultdict[str, defaultdict[str, _Size]]
    sizes = defaultdict(lambda: defaultdict(_Size))
    targets = max(int((batch.targets != IGNORED).sum()), 1)
    for number, part in enumerate(batch.split(engine.micro_batch)):
        # Hooks on compiled modules are not seen.
        with torch.compiler.set_stance("force_eager"), engine.grad_sync(last=False):
            with _watched(engine, sizes, weights=number == 0):
                loss = engine.forward(part)
            engine.backward(loss.total / targets)
    engine.drop_gradients()
    return {
        layer: {kind: size.to_json() for kind, size in kinds.items()}
        for layer, kinds in sizes.items()
    }


@contextmanager
def _watched(
    engine: Engine, sizes: defaultdict[str, defaultdict[str, _Size]], weights: bool
) -> Iterator[None]:
    """Within this context, measure what the forward pass computes, and later its backward pass.

    Weights are measured right before they are used, because only then a sharded one is whole.
    """
    model = engine.model
    layers: dict[str, nn.Module] = {"embed": model.embed}
    layers |= {f"blocks.{number}": block for number, block in enumerate(model.blocks)}
    layers["norm"] = model.norm

    def watch(name: str, layer: nn.Module) -> Iterator[Any]:
        def on_weights(module: nn.Module, _: object) -> None:
            for parameter in module.parameters(recurse=False):
                weight: Tensor = parameter
                if isinstance(weight, DTensor):  # cut over tensor ranks
                    weight = weight.full_tensor()
                sizes[name]["weight"].add(weight)

        def on_output(module: nn.Module, _: object, output: Tensor) -> None:  # noqa: ARG001
            sizes[name]["output"].add(output)
            output.register_hook(sizes[name]["gradient"].add)

        if weights:
            for module in layer.modules():
                yield module.register_forward_pre_hook(on_weights)
        yield layer.register_forward_hook(on_output)

    handles = [handle for name, layer in layers.items() for handle in watch(name, layer)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
