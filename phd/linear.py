"""Matrix products of a few rows, which decoding consists of."""

import platform
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

# Values of a weight that fits into a core's cache, where reading it costs little.
SMALL = 1 << 19


class Rows(NamedTuple):
    """For how many rows weight x^T is faster than x weight^T.

    Attributes:
        from_: from so many on, with any weight.
        large_from: from so many on, with a weight of at least `SMALL` values.
        to: up to so many.
    """

    from_: int
    large_from: int
    to: int


# In float32 MKL 2024.2 takes other kernels for other processors: two or three rows of x weight^T
# take up to 3 times as long as of weight x^T on an EPYC, 16 to 32 rows twice as long on a Cascade
# Lake Xeon.
LEFT = {"AuthenticAMD": Rows(2, 1, 3), "GenuineIntel": Rows(16, 12, 48)}


class Linear(nn.Linear):
    """A projection without bias that is also fast for one token.

    Attributes:
        flat: `fuse_weights` has moved the weight.
    """

    flat = False

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__(fan_in, fan_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return project(x, self.weight)


def fuse_weights(layers: Sequence[Linear]) -> None:
    """Move weights into one tensor, one after another, where `project_all` finds them.

    They stay parameters of their own, as `torch.nn.RNN.flatten_parameters` leaves them.
    """
    whole = torch.cat([layer.weight.detach() for layer in layers])
    parts = whole.split([layer.out_features for layer in layers])
    for layer, part in zip(layers, parts, strict=True):
        layer.weight.data, layer.flat = part, True


def project_all(x: Tensor, layers: Sequence[Linear]) -> Sequence[Tensor]:
    """What each of the layers makes of x (..., in): (..., out of that layer).

    Where their weights lie end to end, by one larger product: for a few rows that is faster.
    """
    if not _end_to_end(x, layers):
        return [layer(x) for layer in layers]
    sizes, fan_in = [layer.out_features for layer in layers], layers[0].in_features
    whole = layers[0].weight.as_strided((sum(sizes), fan_in), (fan_in, 1))
    return project(x, whole).split(sizes, -1)


def _end_to_end(x: Tensor, layers: Sequence[Linear]) -> bool:
    """Whether one product will do. Weights are touched only where somebody has laid them so: those
    of an engine may be elsewhere until their layer is called."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if not all(type(layer) is Linear and layer.flat for layer in layers):
        return False
    first, kind = layers[0].weight, x.device.type
    if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != first.dtype:
        return False  # it would convert the whole anew for every call
    storage, end = first.untyped_storage().data_ptr(), first.data_ptr()
    for weight in (layer.weight for layer in layers):
        if weight.data_ptr() != end or weight.untyped_storage().data_ptr() != storage:
            return False
        end += weight.nbytes
    return True


def project(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., in) times the transpose of weight (out, in); a few rows on the CPU from the left."""
    plain = torch.is_grad_enabled() or x.device.type != "cpu" or torch.compiler.is_compiling()
    single = x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if plain or not single:
        return linear(x, weight)
    left = left_on_this_processor()
    if left is not None and favours_left(left, x.shape[:-1].numel(), weight.numel()):
        return from_the_left(x, weight)
    return linear(x, weight)


def favours_left(left: Rows, rows: int, values: int) -> bool:
    """Whether so many rows times a weight of so many values are taken from the left."""
    return (left.from_ if values < SMALL else left.large_from) <= rows <= left.to


def from_the_left(x: Tensor, weight: Tensor) -> Tensor:
    """The same product as weight x^T; one row is taken as if it were two, which BLAS has a faster
    kernel for."""
    rows = x.shape[:-1].numel()
    few = x.reshape(rows, -1)
    few = torch.cat([few, few]) if rows == 1 else few.contiguous()
    return (weight @ few.mT).mT[:rows].reshape(*x.shape[:-1], -1).contiguous()


@cache
def left_on_this_processor() -> Rows | None:
    """The entry of `LEFT` for the processor at hand; None: nothing is known of it."""
    try:
        known = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        known = platform.processor()
    return next((rows for vendor, rows in LEFT.items() if vendor in known), None)
