"""Bad steps: how a loss spike, or a gradient that is not finite, is told from an ordinary step."""

from collections import deque
from collections.abc import Mapping
from math import isfinite
from statistics import median
from typing import Any, NamedTuple

from train.engines.limits import NO_LIMITS, Limits
from train.settings.faults import FaultsConfig

MAD_TO_STD = 1.4826
"""The standard deviation of a normal distribution over its median absolute deviation."""

MIN_DEVIATION = 0.01
"""The smallest standard deviation, over the median: a loss that hardly varies has no spikes."""

LAG = 2
"""Step n is compared with steps up to n - 2. Whether the outcome of n - 1 has been read back when n
is queued depends on whether a hook was due between them, and the limits must not."""


class _Finite(NamedTuple):
    """A step with a finite loss and gradient norm."""

    step: int
    loss: float
    grad_norm: float
    applied: bool


class SpikeDetector:
    """Limits of the loss and the gradient norm, from the steps before; the same on all ranks.

        step n is a spike above    median + spike * max(1.4826 MAD, 1 % of the median)

    Medians are over the applied steps among the last `window` finite ones up to n - 2 (MAD: the
    median absolute deviation, which a few spikes do not move, as they would a variance). There are
    no limits while fewer than half a window of steps are known.

    A spike is left out of the medians, so one spike moves no limit. But after `most_in_a_row` / 2
    refused steps in a row it is the data that have changed, not the model, whose weights none of
    these steps has touched. Then all earlier steps are forgotten, and there are no limits until
    half a window is known again. So a new level of the loss cannot stop a run for ever.

    Args:
        saved: what `to_json` gave; None: no steps are known yet.

    Attributes:
        count: bad steps of the run so far.
        in_a_row: how many of the last steps were bad, without a good one between them.
    """

    def __init__(self, config: FaultsConfig, saved: Mapping[str, Any] | None = None) -> None:
        self.config = config
        saved = saved or {"known": [], "count": 0, "in_a_row": 0}
        self.finite = deque((_Finite(*k) for k in saved["known"]), maxlen=config.window + LAG)
        self.count: int = saved["count"]
        self.in_a_row: int = saved["in_a_row"]

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        known = [list(step) for step in self.finite]
        return {"known": known, "count": self.count, "in_a_row": self.in_a_row}

    def limits(self, step: int, since: int = 1) -> Limits:
        """The limits of this step; steps up to n - 2 have been observed.

        Args:
            since: the first step to compare with. Where copies are switched on, the loss may jump,
                and that is no spike.
        """
        if self.config.spike is None:
            return NO_LIMITS
        applied = self._applied(step, since)
        if len(applied) < self.config.window / 2:
            return NO_LIMITS
        return Limits(
            _limit([finite.loss for finite in applied], self.config.spike),
            _limit([finite.grad_norm for finite in applied], self.config.spike),
        )

    def observe(self, step: int, loss: float, grad_norm: float, applied: bool) -> None:
        """Remember a step; steps come in their order."""
        self.in_a_row = 0 if applied else self.in_a_row + 1
        self.count += not applied
        if isfinite(loss) and isfinite(grad_norm):
            self.finite.append(_Finite(step, loss, grad_norm, applied))

    @property
    def too_many(self) -> bool:
        """Whether so many steps in a row were bad that the run has to end."""
        return self.in_a_row >= self.config.most_in_a_row

    def _applied(self, step: int, since: int) -> list[_Finite]:
        """The steps with which this one is compared."""
        tolerated = max(1, self.config.most_in_a_row // 2)
        past = [finite for finite in self.finite if since <= finite.step <= step - LAG]
        applied: list[_Finite] = []
        refused = 0
        for finite in past[-self.config.window :]:
            refused = 0 if finite.applied else refused + 1
            if finite.applied:
                applied.append(finite)
            elif refused >= tolerated:
                applied.clear()
        return applied


def _limit(values: list[float], spike: float) -> float:
    middle = median(values)
    deviation = MAD_TO_STD * median(abs(value - middle) for value in values)
    return middle + spike * max(deviation, MIN_DEVIATION * abs(middle))
