"""The parts of a model that compute with a part of their weight.

All of them are put in place of the model's own by `train.engines.tensor_parallel.plan`. Their
weights are DTensors over the tensor ranks, so that FSDP2 and checkpoints know what part of which
matrix a rank has; all else is plain tensors of this rank.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor.placement_types import Partial, Placement
from torch.nn import functional as F

from phd.block import Attention, AttentionContext, FeedForward
from phd.linear import Linear
from phd.norm import RMSNorm
from train.engines.tensor_parallel.ranks import TensorRanks


class TensorParallel(nn.Module):
    """A module that knows the tensor ranks. Such a class is set on a module that exists already."""

    ranks: TensorRanks


class LocalWeight(TensorParallel):
    """A module that computes with this rank's part of its weight.

    Attributes:
        placement: how the weight is cut over the tensor ranks, or that each of them has all of it.
    """

    placement: Placement

    def _part(self) -> Tensor:
        """This rank's part, whose gradient finds its way back to the DTensor.

        A weight that all ranks have is used by each of them for other tokens or other heads, so its
        gradient is the sum of theirs. FSDP2 asks for that sum once a step. Where FSDP2 holds a
        shard of the part, this is the shard: it looks the parameter up by this name.
        """
        weight: Any = self._parameters["weight"]
        if weight.device_mesh.ndim > 1:
            return weight
        whole = self.placement.is_replicate()
        return weight.to_local(grad_placements=[Partial() if whole else self.placement])

    weight: Any = property(_part)


class LocalLinear(LocalWeight, Linear):
    """Columnwise: of all tokens, this rank's outputs. The weight is cut by rows (out / t, in)."""


class RowwiseLinear(LocalWeight, Linear):
    """Of this rank's inputs, this rank's tokens of all outputs. The weight is (out, in / t)."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., T, in / t) -> (..., T / t, out)."""
        return self.ranks.scatter_sum(super().forward(x))


class LocalEmbedding(LocalWeight, nn.Embedding):
    """A table that every rank has."""


class VocabularyEmbedding(LocalWeight, nn.Embedding):
    """A table whose rows are cut over the ranks; the result is of this rank's tokens."""

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens, int (..., T), the same on all ranks -> (..., T / t, D)."""
        weight: Tensor = self.weight
        index = tokens - self.ranks.rank * len(weight)
        mine = (index >= 0) & (index < len(weight))
        # One rank adds the row and the others add 0, so this sum is exact in any precision.
        rows = F.embedding(index.clamp(0, len(weight) - 1), weight) * mine[..., None]
        return self.ranks.scatter_sum(rows)


class LocalNorm(LocalWeight, RMSNorm):
    """RMSNorm of this rank's tokens, or of its heads one by one."""


class CutNorm(LocalWeight, RMSNorm):
    """RMSNorm over features that are cut over the ranks."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., F / t) -> (..., F / t) in float32 or wider."""
        weight = self.scaled_weight
        (features,) = self.normalized_shape
        return _CutNorm.apply(x.to(weight.dtype), weight, self.eps, features, self.ranks)


class _CutNorm(torch.autograd.Function):
    """weight * x^ with x^ = x / sqrt(sum(x^2) / F + eps), where the sum is over all ranks.

    With g = weight * dy, dx = (g - x^ sum(g x^) / F) / sqrt(...): that sum is over all ranks, too.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, eps: float, features: int, ranks: TensorRanks
    ) -> Tensor:
        squares = ranks.sum(x.square().sum(-1, keepdim=True))
        scale = torch.rsqrt(squares / features + eps)
        ctx.features, ctx.ranks = features, ranks
        ctx.save_for_backward(x, weight, scale)
        return x * scale * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        x, weight, scale = ctx.saved_tensors
        normed, dy = x * scale, grads[0]
        dweight = (dy * normed).flatten(0, -2).sum(0)
        g = dy * weight
        common = ctx.ranks.sum((g * normed).sum(-1, keepdim=True)) / ctx.features
        return (g - normed * common) * scale, dweight, None, None, None


class TensorAttention(TensorParallel, Attention):
    """Attention of this rank's heads, which see all tokens."""

    def forward(self, x: Tensor, keys: Tensor, context: AttentionContext) -> Tensor:
        """As in `Attention`, for this rank's tokens of x and keys, (B, K or 1, T / t, D) each."""
        whole = self.ranks.gather_for_product(x)
        same = keys is x
        return super().forward(
            whole, whole if same else self.ranks.gather_for_product(keys), context
        )


class TensorFeedForward(TensorParallel, FeedForward):
    """This rank's part of the inner width, for all tokens."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., T / t, D) -> (..., T / t, D)."""
        return super().forward(self.ranks.gather_for_product(x))
