"""Steps that must not count: how they are told from others, and what is written of them."""

from collections import deque
from collections.abc import Mapping
from math import isfinite
from statistics import median
from typing import Any, NamedTuple

from train.config import FaultsConfig
from train.engines.engine import NO_LIMITS, Limits

NORMAL = 1.4826
"""The standard deviation of a normal distribution over its median absolute deviation."""

LEAST_DEVIATION = 0.01
"""The least standard deviation, over the median: a loss that hardly varies has no spikes."""

LAG = 2
"""A step's limits come from steps up to the last but one before it. The step right before may not
have been looked at when this one is queued, and has been after a save; limits must not tell."""


class _Known(NamedTuple):
    """A step with a finite loss and gradient norm."""

    step: int
    loss: float
    grad_norm: float
    applied: bool


class SpikeDetector:
    """What is remembered of steps in order to know a spike; the same on all ranks.

        step n may have at most    median + spike * max(1.4826 MAD, 1 % of the median)

    of the loss and of the gradient norm, each over the applied steps among the last `window` finite
    ones up to n - 2. Nothing is a spike while fewer than half a window of them are known. (MAD: the
    median absolute deviation.)

    A spike stays out of the medians, so one moves no limit. But half of `most_in_a_row` spikes in a
    row are no longer about the model, whose weights none of them has changed: the data have. All
    that was known before is forgotten, and nothing is a spike until half a window is known again.
    So only steps that are not finite can be bad for ever.

    Args:
        saved: what `to_json` gave; None: nothing is remembered.

    Attributes:
        count: bad steps of the run so far.
        in_a_row: how many of them are the last steps.
    """

    def __init__(self, config: FaultsConfig, saved: Mapping[str, Any] | None = None) -> None:
        self.config = config
        saved = saved or {"known": [], "count": 0, "in_a_row": 0}
        self.known = deque((_Known(*k) for k in saved["known"]), maxlen=config.window + LAG)
        self.count: int = saved["count"]
        self.in_a_row: int = saved["in_a_row"]

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        known = [list(step) for step in self.known]
        return {"known": known, "count": self.count, "in_a_row": self.in_a_row}

    def limits(self, step: int) -> Limits:
        """What this step may have at most. Steps up to the last but one before it are taken."""
        if self.config.spike is None:
            return NO_LIMITS
        applied = self._applied(step)
        if len(applied) < self.config.window / 2:
            return NO_LIMITS
        return Limits(
            _limit([known.loss for known in applied], self.config.spike),
            _limit([known.grad_norm for known in applied], self.config.spike),
        )

    def take(self, step: int, loss: float, grad_norm: float, applied: bool) -> None:
        """Remember a step; they are taken in their order."""
        self.in_a_row = 0 if applied else self.in_a_row + 1
        self.count += not applied
        if isfinite(loss) and isfinite(grad_norm):
            self.known.append(_Known(step, loss, grad_norm, applied))

    @property
    def too_many(self) -> bool:
        """Whether the last steps were bad so often that the run is to end."""
        return self.in_a_row >= self.config.most_in_a_row

    def _applied(self, step: int) -> list[_Known]:
        """The steps to which this one is compared."""
        backoff = max(1, self.config.most_in_a_row // 2)
        past = [known for known in self.known if known.step <= step - LAG]
        found: list[_Known] = []
        refused = 0
        for known in past[-self.config.window :]:
            refused = 0 if known.applied else refused + 1
            if known.applied:
                found.append(known)
            elif refused >= backoff:
                found.clear()
        return found


def _limit(values: list[float], spike: float) -> float:
    middle = median(values)
    deviation = NORMAL * median(abs(value - middle) for value in values)
    return middle + spike * max(deviation, LEAST_DEVIATION * abs(middle))
