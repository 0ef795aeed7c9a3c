"""What becomes of a run after a bad step: see `FaultsConfig`.

The devices decide by themselves whether a step is applied. Whether it was is looked at when the
next step has been queued, so that no device waits for it:

    queue   step 5   step 6   step 7             the ranks need not ask each other:
    look             at 5     at 6               they all see the same loss and norm
"""

from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from data.batch import Batch
from data.tokenizer import Tokenizer
from train.anomalies.detection import SpikeDetector
from train.anomalies.report import BadStep, layer_report, write_bad_step
from train.engines.device import AsyncScalars
from train.engines.engine import NO_LIMITS, Engine, Limits, Rows, StepResult
from train.metrics.sinks import warn


class BadStepError(Exception):
    """A bad step ends the run; nothing was saved since the last checkpoint."""


class RollBackError(Exception):
    """The run is to be opened again from its last checkpoint.

    Attributes:
        batch: the number of the batch to pass over then.
    """

    def __init__(self, message: str, batch: int) -> None:
        super().__init__(message)
        self.batch = batch


class _Step(NamedTuple):
    """A step whose outcome has not been looked at."""

    step: int
    number: int  # of its batch
    batch: Batch
    lr: float
    limits: Limits
    outcome: AsyncScalars


class BadStepPolicy:
    """Looks at every step's outcome, one step late, and does what the policy says.

    Args:
        bad_steps: what is remembered of earlier steps.
        directory: the run's; the batches of bad steps are written there.
        console: of the first rank.
    """

    def __init__(
        self,
        bad_steps: SpikeDetector,
        engine: Engine,
        tokenizer: Tokenizer,
        directory: Path,
        console: Console,
    ) -> None:
        self.bad_steps = bad_steps
        self.policy = bad_steps.config.policy
        self.engine = engine
        self.tokenizer = tokenizer
        self.directory = directory
        self.console = console
        self._limits = NO_LIMITS
        self._last: _Step | None = None

    def limits(self, step: int) -> Limits:
        """What a step may be at most."""
        self._limits = self.bad_steps.limits(step)
        return self._limits

    def take(self, step: int, number: int, batch: Batch, lr: float, result: StepResult) -> None:
        """Look at the step before this one, and keep this one's outcome for later.

        Raises:
            RollBackError, BadStepError: the step before was bad, and that is the policy.
        """
        self.flush()
        outcome = AsyncScalars(result.loss, result.grad_norm, result.applied)
        self._last = _Step(step, number, batch, lr, self._limits, outcome)

    def flush(self) -> None:
        """Look at the last step, too: its outcome is needed now. Raises as `take` does."""
        last, self._last = self._last, None
        if last is None:
            return
        loss, grad_norm, applied = last.outcome.values()
        self.bad_steps.take(last.step, loss, grad_norm, bool(applied))
        if not applied:
            self._deal_with(last, loss, grad_norm)

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return self.bad_steps.to_json()

    def _deal_with(self, last: _Step, loss: float, grad_norm: float) -> None:
        bad = BadStep(
            step=last.step,
            batch=last.number,
            loss=loss,
            grad_norm=grad_norm,
            limits=last.limits,
            lr=last.lr,
        )
        layers = layer_report(self.engine, Rows.of(last.batch))
        try:
            path = write_bad_step(
                self.directory, bad, last.batch, self.tokenizer, layers, self.engine.groups
            )
            told = f"{bad}; its batch is in {path.parent}"
        except OSError as error:
            told = f"{bad}; its batch could not be written ({error})"
        if self.policy == "rollback":
            raise RollBackError(told, last.number)
        if self.policy == "abort":
            raise BadStepError(f"{told}. faults.policy=abort ends the run")
        warn(self.console, f"{told}; it was not applied")
        if self.bad_steps.too_many:
            raise BadStepError(
                f"faults.most_in_a_row={self.bad_steps.config.most_in_a_row}: so many steps in a "
                "row were bad; the run ends. Lower optim.lr, or look at the batches"
            )
