"""Muon for the matrices of the blocks, and AdamW for all other parameters, as one optimizer.

    G   the gradient, clipped
    M   <- 0.95 M + 0.05 G            momentum
    O   =  Newton-Schulz(0.95 M + 0.05 G)
    W   <- (1 - lr decay) W - lr c(m, n) O

The mathematics is that of `torch.optim.Muon`, which works on whole matrices of one process. Here
the matrices may be in pieces: all but Newton-Schulz treats each number alone, and that is done by
one rank for each matrix (see `train.engines.matrix_exchange`). The pieces travel in the dtype of
the products, to which they are rounded anyway.

Queries, keys, values, gate and up are matrices of their own here, and each is orthogonalised alone.
"""

from collections.abc import Sequence
from math import sqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor

from train.engines.matrix_exchange import MatrixExchange
from train.engines.newton_schulz import batch_size, newton_schulz, newton_schulz_flops
from train.settings.optim import OptimConfig
from train.torch_private import fuse_clip_and_skip


class Place(NamedTuple):
    """Where this rank's piece of a matrix is.

    Attributes:
        tensor: its number among the parameters of Muon's group.
        start, numel: of the piece in that tensor, which may hold many matrices one after another.
    """

    tensor: int
    start: int
    numel: int

    def view(self, tensors: Sequence[Tensor]) -> Tensor:
        """The piece, flat, in the memory of these tensors, which are shaped as the parameters."""
        return tensors[self.tensor].view(-1).narrow(0, self.start, self.numel)


class MuonAdamW(torch.optim.Optimizer):
    """Muon for one group of parameters, AdamW for the others.

    It clips and skips as the fused AdamW does, by the tensors `grad_scale` and `found_inf`
    (`train.torch_private.fuse_clip_and_skip`), and never waits for the device. `share` has to be
    called before the first step, also in a lone process.

    Args:
        groups: of parameters, each with its `rule`, `weight_decay` and `lr`; the last is Muon's.
        config: of the optimizer.
        dtype: of the products of Newton-Schulz.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def __init__(
        self, groups: Sequence[dict[str, Any]], config: OptimConfig, dtype: torch.dtype
    ) -> None:
        super().__init__(groups, {"lr": config.lr})
        self.config, self.dtype = config, dtype
        *others, self.muon = self.param_groups
        # Both have the same groups, so that DeepSpeed replaces the parameters of both.
        self.adamw = torch.optim.AdamW(
            others, lr=config.lr, betas=config.betas, eps=config.eps, fused=True
        )
        self.adamw.state = self.state

    def share(
        self,
        shapes: Sequence[torch.Size],
        places: Sequence[Place],
        sizes: Sequence[Sequence[int]],
        rank: int,
        shards: int,
    ) -> None:
        """Say where the matrices are. Every rank calls this, and they work together from now on.

        Args:
            shapes: of the whole matrices.
            places: where this rank's pieces of the matrices are, in their order.
            sizes, rank, shards: see `MatrixExchange`.
        """
        self.shapes, self.places = shapes, places
        costs = [newton_schulz_flops(shape, self.config.ns_steps) for shape in shapes]
        most = [batch_size(shape) for shape in shapes]
        self.exchange = MatrixExchange(shapes, costs, most, sizes, rank=rank, shards=shards)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the parameters of `param_groups`, which may be some of the groups alone."""
        assert closure is None
        if others := [g for g in self.param_groups if g["rule"] != self.muon["rule"]]:
            self.adamw.param_groups = others
            if self.grad_scale is not None and self.found_inf is not None:
                fuse_clip_and_skip(self.adamw, self.grad_scale, self.found_inf)
            self.adamw.step()
        if len(others) < len(self.param_groups):
            self._update_matrices()

    def _update_matrices(self) -> None:
        """One step of Muon.

        A bad step, which may have any gradient, is taken with the momentum in place of the
        gradient. That changes the momentum in nothing, and all that follows is finite, so that 0
        times it is 0.
        """
        group, config = self.muon, self.config
        parameters: list[Tensor] = group["params"]
        applied: Tensor | float = 1.0
        if self.found_inf is not None:
            applied = 1 - self.found_inf
        directions = [self._direction(parameter) for parameter in parameters]
        pieces = [place.view(directions) for place in self.places]
        lr, shrink = group["lr"], 1 - group["lr"] * group["weight_decay"] * applied
        for parameter in parameters:
            parameter.mul_(shrink)

        def update_of(matrices: Tensor) -> Tensor:
            return newton_schulz(matrices, config.ns_steps).mul_(applied)

        for number, update in self.exchange(pieces, update_of):
            alpha = -lr * lr_factor(self.shapes[number], config)
            self.places[number].view(parameters).add_(update, alpha=alpha)
            del update  # else it would be held while the next batch is worked on

    def _direction(self, parameter: Tensor) -> Tensor:
        """Advance a parameter's momentum; return what is orthogonalised, in a tensor of its own."""
        momentum, decay = self.state[parameter]["momentum_buffer"], self.config.momentum
        gradient = parameter.grad
        assert gradient is not None
        if self.grad_scale is not None:
            gradient = gradient / self.grad_scale
        if self.found_inf is not None:
            gradient = torch.where(self.found_inf > 0, momentum, gradient)
        momentum.lerp_(gradient, 1 - decay)
        if self.config.nesterov:
            return gradient.lerp(momentum, decay).to(self.dtype)
        return momentum.to(self.dtype, copy=True)


def lr_factor(shape: torch.Size, config: OptimConfig) -> float:
    """What a matrix multiplies its learning rate by, as `adjust_lr` of `OptimConfig` says."""
    rows, columns = shape
    if config.adjust_lr == "original":
        return sqrt(max(1, rows / columns))
    return 0.2 * sqrt(max(rows, columns))
