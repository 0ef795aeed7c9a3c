"""Projections, with faster matrix products for the few rows of a decoded token."""

import platform
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from phd.torch_private import has_hooks

# A weight of fewer values stays in a core's cache (2^19 in float32 are 2 MiB): reading it again
# costs little, so other numbers of rows gain from the transposed product.
LARGE_WEIGHT = 1 << 19


class RowRange(NamedTuple):
    """For how many rows of x the product (W x^T)^T is faster than x W^T.

    Attributes:
        first: the fewest rows, with any weight.
        first_large: the fewest rows, with a weight of at least `LARGE_WEIGHT` values.
        last: the most rows.
    """

    first: int
    first_large: int
    last: int


# In float32, MKL 2024.2 has different kernels for different processors. On an EPYC, two or three
# rows of x W^T take up to 3 times as long as of W x^T; on a Cascade Lake Xeon, 16 to 32 rows take
# twice as long.
TRANSPOSED_ROWS = {"AuthenticAMD": RowRange(2, 1, 3), "GenuineIntel": RowRange(16, 12, 48)}


class Linear(nn.Linear):
    """A projection without bias that is also fast for one token.

    Attributes:
        fused: `fuse_weights` has moved the weight.
        rounded: a copy of the weight in half precision that its owner keeps up to date. Under
            autocast the product takes it, and the gradient goes to the weight, as if autocast had
            rounded the weight at this call.
    """

    fused = False
    rounded: Tensor | None = None

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__(fan_in, fan_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return project(x, self.operand(x.device.type))

    def operand(self, device: str) -> Tensor:
        """The weight as a product on such a device takes it."""
        if self.rounded is None or not torch.is_autocast_enabled(device):
            return self.weight
        return _Rounded.apply(self.weight, self.rounded)


class _Rounded(torch.autograd.Function):
    """The copy of a weight in place of the weight; its gradient is the weight's."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, rounded: Tensor) -> Tensor:
        ctx.dtype = weight.dtype
        return rounded.view_as(rounded)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].to(ctx.dtype), None


def fuse_weights(layers: Sequence[Linear]) -> None:
    """Move the weights into one tensor, one after another, for `project_all` to use.

    They stay separate parameters, as with `torch.nn.RNN.flatten_parameters`. Weights that are fused
    already stay where they are.
    """
    if all(layer.fused for layer in layers) and are_adjacent(layers):
        return
    whole = torch.cat([layer.weight.detach() for layer in layers])
    parts = whole.split([layer.out_features for layer in layers])
    for layer, part in zip(layers, parts, strict=True):
        layer.weight.data, layer.fused = part, True


def project_all(x: Tensor, layers: Sequence[Linear]) -> Sequence[Tensor]:
    """The output (..., out of that layer) of each layer for x (..., in).

    Fused weights are multiplied by one larger product, which is faster for a few rows.
    """
    if not _are_fused(x, layers):
        return [layer(x) for layer in layers]
    return project(x, fused_weight(layers)).split([layer.out_features for layer in layers], -1)


def fused_weight(layers: Sequence[Linear]) -> Tensor:
    """The weights that `fuse_weights` has moved, as one tensor (outs of all layers, in)."""
    outs, fan_in = sum(layer.out_features for layer in layers), layers[0].in_features
    return layers[0].weight.as_strided((outs, fan_in), (fan_in, 1))


def _are_fused(x: Tensor, layers: Sequence[Linear]) -> bool:
    """Whether the layers' weights are still one after another, so that one product is enough.

    Looks at weights only where `fuse_weights` has been called: an engine that shards a layer
    gathers its weight when the layer itself is called, and not before.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if not all(type(layer) is Linear and layer.fused for layer in layers):
        return False
    if any(map(has_hooks, layers)):
        return False
    first, kind = layers[0].weight, x.device.type
    if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != first.dtype:
        return False  # autocast keeps converted parameters, but converts a view at every call
    return are_adjacent(layers)


def are_adjacent(layers: Sequence[Linear]) -> bool:
    """Whether the layers' weights lie one after another in one tensor."""
    first = layers[0].weight
    storage, end = first.untyped_storage().data_ptr(), first.data_ptr()
    for weight in (layer.weight for layer in layers):
        if weight.data_ptr() != end or weight.untyped_storage().data_ptr() != storage:
            return False
        end += weight.nbytes
    return True


def project(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., in) times the transpose of weight (out, in) -> (..., out).

    Takes the transposed product for a few rows on the CPU, where that is faster.
    """
    plain = torch.is_grad_enabled() or x.device.type != "cpu" or torch.compiler.is_compiling()
    single = x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if plain or not single:
        return linear(x, weight)
    rows = transposed_rows()
    if rows is not None and is_faster_transposed(rows, x.shape[:-1].numel(), weight.numel()):
        return transposed_product(x, weight)
    return linear(x, weight)


def is_faster_transposed(rows: RowRange, count: int, values: int) -> bool:
    """Whether `count` rows are in the range, for a weight of `values` values."""
    return (rows.first if values < LARGE_WEIGHT else rows.first_large) <= count <= rows.last


def transposed_product(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T, computed as (weight x^T)^T.

    A single row is computed twice: BLAS has a faster kernel for two columns than for one.
    """
    count = x.shape[:-1].numel()
    rows = x.reshape(count, -1)
    rows = torch.cat([rows, rows]) if count == 1 else rows.contiguous()
    return (weight @ rows.mT).mT[:count].reshape(*x.shape[:-1], -1).contiguous()


@cache
def transposed_rows() -> RowRange | None:
    """The entry of `TRANSPOSED_ROWS` for this processor; None: it has not been measured."""
    try:
        known = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        known = platform.processor()
    return next((rows for vendor, rows in TRANSPOSED_ROWS.items() if vendor in known), None)
