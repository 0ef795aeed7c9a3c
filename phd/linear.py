"""Matrix products of a few rows, which decoding consists of."""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

FEW = 3
# Values of a weight that fits into a core's cache, where one row gains nothing.
SMALL = 1 << 19


class Linear(nn.Linear):
    """A projection without bias that is also fast for one token."""

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__(fan_in, fan_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return project(x, self.weight)


def project(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., in) times the transpose of weight (out, in).

    Up to three rows on the CPU are taken from the left, weight x^T, and one as if it were two: BLAS
    reads the weight up to 3 times as fast then (MKL on an AMD EPYC).
    """
    rows = x.shape[:-1].numel()
    if torch.is_grad_enabled() or x.device.type != "cpu" or not 1 <= rows <= FEW:
        return linear(x, weight)
    if rows == 1 and weight.numel() < SMALL:
        return linear(x, weight)
    few = x.reshape(rows, -1)
    few = torch.cat([few, few]) if rows == 1 else few.contiguous()
    return (weight @ few.mT).mT[:rows].reshape(*x.shape[:-1], -1).contiguous()
