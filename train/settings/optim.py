"""`optim.`: the optimizer."""

from dataclasses import dataclass
from typing import Literal

from conf.errors import Problem
from conf.settings import Settings, above, at_least


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Settings):
    """The optimizer.

    Attributes:
        kind: AdamW (arXiv 1711.05101).
        lr: the peak learning rate, which the schedule scales.
        betas: the decay rates of the running means of the gradient and of its square.
        eps: is added to the root of the mean square, so that nothing is divided by 0.
        weight_decay: each step multiplies all parameters but the embedding by
            1 - lr * weight_decay.
        grad_clip: the largest L2 norm of the gradient of all parameters; a longer gradient is
            scaled down to it. null: no clipping.
        z_loss: the weight in the loss of the mean squared log of the softmax's denominator.
    """

    kind: Literal["adamw"] = "adamw"
    lr: float = 3e-3  # for the size tiny; arXiv 2504.14992 and recipe=olmo2 have 3e-4
    betas: tuple[float, float] = (0.9, 0.95)  # this and what follows as in the paper
    eps: float = 1e-8
    weight_decay: float = 0.1
    grad_clip: float | None = 1.0
    z_loss: float = 0.0

    def problems(self) -> list[Problem]:
        found = above(self, "optim", 0, "lr", "eps", "grad_clip")
        found += at_least(self, "optim", 0.0, "weight_decay", "z_loss")
        if not all(0 <= beta < 1 for beta in self.betas):
            expected = "expected two numbers from 0 to below 1"
            found.append(Problem("optim.betas", self.betas, expected))
        return found
