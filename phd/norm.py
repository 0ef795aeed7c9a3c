"""RMSNorm, with a kernel for the CPU, where PyTorch has none."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import rms_norm

from phd.torch_private import layer_norm_backward


class RMSNorm(nn.RMSNorm):
    """gain * weight * x / sqrt(mean(x^2) + eps) over the last dim (arXiv 1910.07467).

    Computed in float32 or wider, also where autocast has made x narrower, or sharding the weight.

    Attributes:
        gain: a constant, which is 1 but for muP's final norm.
    """

    eps: float

    def __init__(
        self, dim: int, eps: float, gain: float = 1.0, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(dim, eps, dtype=dtype)
        self.gain = gain

    @property
    def scaled_weight(self) -> Tensor:
        """gain * weight, in float32 or wider; the weight itself where it is both already."""
        weight = self.weight if self.weight.dtype.itemsize >= 4 else self.weight.float()
        # A product of D values: to multiply x would take a pass over all rows.
        return weight if self.gain == 1 else weight * self.gain

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D) in float32 or wider."""
        weight = self.scaled_weight
        x = x.to(weight.dtype)
        if x.device.type != "cpu":
            return rms_norm(x, self.normalized_shape, weight, self.eps)
        if torch.is_grad_enabled():
            return _RMSNorm.apply(x, weight, self.eps)
        return (x * _scale(x, self.eps)).mul_(weight)


def _scale(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last dim.

    In three kernels: for a single token, the time of a kernel is that of starting it.
    """
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.addcmul(x.new_full((), eps), norm, norm, value=1 / x.shape[-1]).rsqrt_()


class _RMSNorm(torch.autograd.Function):
    """RMSNorm in 5 passes over x.

    On the CPU torch's `rms_norm` takes a dozen passes, a third of a small model's step. With
    g = weight * dy and x^ = x / rms, the backward of LayerNorm (for a mean of 0) and of RMSNorm are

        dx_layer = (g - mean(g) - x^ mean(g x^)) / rms        dx_rms = (g - x^ mean(g x^)) / rms

    so LayerNorm's fused backward computes all of it, and mean(g) / rms has to be added back.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = _scale(x, eps)
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        dy, D = grads[0].contiguous(), x.shape[-1]
        dx, dweight = layer_norm_backward(dy, x, torch.zeros_like(scale), scale, weight)
        mean = torch.mv(dy.reshape(-1, D), weight).view_as(scale).div_(D)
        return dx.add_(mean.mul_(scale)), dweight, None
