"""What tells the device whether a step is good, so that the host need not wait to decide it."""

from math import inf
from typing import NamedTuple

from torch import Tensor


class Limits(NamedTuple):
    """The largest loss and gradient norm of a good step; what is not finite is always bad."""

    loss: float = inf
    grad_norm: float = inf

    def allow(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Whether a step is good: a bool on the device, which the host does not wait for."""
        within = (loss <= self.loss) & (grad_norm <= self.grad_norm)
        return within & loss.isfinite() & grad_norm.isfinite()


NO_LIMITS = Limits()
