"""`optim.`: the optimizer."""

from dataclasses import dataclass
from typing import Literal

from conf.errors import Problem
from conf.settings import Settings, above, at_least, without_effect

MUON_ALONE = ("muon_lr", "adjust_lr", "momentum", "nesterov", "ns_steps")
"""The settings that only `kind: muon` has."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Settings):
    """The optimizer.

    Attributes:
        kind: `adamw`: AdamW (arXiv 1711.05101). `muon`: Muon for the matrices of the blocks, as in
            `torch.optim.Muon` (https://kellerjordan.github.io/posts/muon/), and AdamW for all else:
            embeddings, head, norms.
        lr: the peak learning rate, which the schedule scales; with muP that of a model as wide as
            `model.mup_base_dim`.
        betas: the decay rates of AdamW's running means of the gradient and of its square.
        eps: is added to the root of AdamW's mean square, so that nothing is divided by 0.
        weight_decay: each step multiplies all parameters but the embedding by
            1 - lr * weight_decay.
        grad_clip: the largest L2 norm of the gradient of all parameters; a longer gradient is
            scaled down to it. null: no clipping.
        z_loss: the weight in the loss of the mean squared log of the softmax's denominator.
        muon_lr: the peak learning rate of Muon's matrices, which the schedule scales alike; null:
            that of `lr`, which is right for `match_rms_adamw`.
        adjust_lr: what a matrix of m x n multiplies its learning rate by. `match_rms_adamw`: 0.2
            sqrt(max(m, n)), with which an update is as large as AdamW's (arXiv 2502.16982), so that
            both share `lr` and `weight_decay`. `original`: sqrt(max(1, m / n)), which takes a
            `muon_lr` of its own, such as 0.02.
        momentum: the decay rate of Muon's running mean of the gradient.
        nesterov: orthogonalise the mean of that mean and the gradient, not the first alone.
        ns_steps: the Newton-Schulz iterations of an orthogonalisation.
    """

    kind: Literal["adamw", "muon"] = "adamw"
    lr: float = 3e-3  # for the size tiny; arXiv 2504.14992 and recipe=olmo2 have 3e-4
    betas: tuple[float, float] = (0.9, 0.95)  # this and what follows as in the paper
    eps: float = 1e-8
    weight_decay: float = 0.1
    grad_clip: float | None = 1.0
    z_loss: float = 0.0
    muon_lr: float | None = None
    adjust_lr: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    momentum: float = 0.95  # this and what follows as in torch.optim.Muon
    nesterov: bool = True
    ns_steps: int = 5

    def problems(self) -> list[Problem]:
        found = above(self, "optim", 0, "lr", "eps", "grad_clip", "muon_lr")
        found += at_least(self, "optim", 0.0, "weight_decay", "z_loss")
        found += at_least(self, "optim", 1, "ns_steps")
        if not all(0 <= beta < 1 for beta in self.betas):
            expected = "expected two numbers from 0 to below 1"
            found.append(Problem("optim.betas", self.betas, expected))
        if not 0 <= self.momentum < 1:
            expected = "expected a number from 0 to below 1"
            found.append(Problem("optim.momentum", self.momentum, expected))
        return found

    def unused(self) -> list[Problem]:
        """The settings of Muon, where it is not used."""
        if self.kind == "muon":
            return []
        reason = f"optim.kind={self.kind} orthogonalises nothing"
        return without_effect(self, "optim", reason, "choose optim=muon for it", *MUON_ALONE)
