"""The end of a sublayer in one kernel: residual connection and RMSNorm, for every wiring.

x' = x + n(y) or x + y        h = x' or n(x'), rounded to the next product's dtype
reordered    n(y)             x'                  the stream goes on as x'
pre          y                n(x')               as x'
hybrid       y                n(x') of attention, the stream goes on as n(x')
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class SublayerEnd(NamedTuple):
    """What happens after a sublayer; `phd.block.Block` draws the wirings.

    Attributes:
        of_output: the weight (D,) of the norm over the sublayer's output; None: no norm.
        of_sum: the weight (D,) of the norm over the sum, which the next product reads.
        normed_stream: the residual stream goes on from the normed sum as well.
    """

    of_output: Tensor | None = None
    of_sum: Tensor | None = None
    normed_stream: bool = False


def end_sublayer(
    stream: Tensor, output: Tensor | None, end: SublayerEnd, eps: float, dtype: torch.dtype
) -> Tensor:
    """Add a sublayer's output to the residual stream (rows, D), float32, in place.

    Args:
        stream: the residual stream.
        output: (parts, rows, D), of which the output is the sum; None, before the first sublayer.
        end: what else happens.
        eps: of the norms.
        dtype: of the result.

    Returns:
        What the next product reads, (rows, D).
    """
    rows, D = stream.shape
    assert stream.is_contiguous(), stream.stride()
    assert output is None or output.is_contiguous(), output.stride()
    assert output is None or output.shape[1:] == stream.shape, (output.shape, stream.shape)
    h = stream.new_empty(rows, D, dtype=dtype)
    width = triton.next_power_of_2(D)
    end_kernel[(rows,)](
        stream, output, end.of_output, end.of_sum, h, eps,
        D=D, WIDTH=width, PARTS=0 if output is None else len(output),
        NORMS_OUTPUT=end.of_output is not None, NORMS_SUM=end.of_sum is not None,
        NORMED_STREAM=end.normed_stream, num_warps=warps_of(width),
    )  # fmt: skip
    return h


def warps_of(width: int) -> int:
    """Each of a row's threads has 8 values, within 2 to 16 warps.

    >>> [warps_of(width) for width in (16, 512, 2048, 8192)]
    [2, 2, 8, 16]
    """
    return min(16, max(2, width // 256))


@triton.jit
def _normed(x, weight, column, there, eps, D: tl.constexpr):  # type: ignore[no-untyped-def]
    scale = tl.rsqrt(tl.sum(x * x, 0) / D + eps)
    return x * scale * tl.load(weight + column, mask=there, other=0.0).to(tl.float32)


@triton.jit
def end_kernel(  # type: ignore[no-untyped-def]
    stream, output, of_output, of_sum, h, eps,
    D: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr, NORMS_OUTPUT: tl.constexpr,
    NORMS_SUM: tl.constexpr, NORMED_STREAM: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, WIDTH)
    there = column < D
    at = tl.program_id(0).to(tl.int64) * D + column
    x = tl.load(stream + at, mask=there, other=0.0)
    if PARTS > 0:
        y = tl.load(output + at, mask=there, other=0.0).to(tl.float32)
        for part in tl.static_range(1, PARTS):
            more = output + part * tl.num_programs(0).to(tl.int64) * D
            y += tl.load(more + at, mask=there, other=0.0).to(tl.float32)
        if NORMS_OUTPUT:
            y = _normed(y, of_output, column, there, eps, D)
        x += y
    z = x
    if NORMS_SUM:
        z = _normed(x, of_sum, column, there, eps, D)
    if NORMED_STREAM:
        x = z
    if PARTS > 0:
        tl.store(stream + at, x, mask=there)
    tl.store(h + at, z.to(h.dtype.element_ty), mask=there)
