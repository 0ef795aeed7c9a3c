"""Products of a few rows with a weight, which is read once at the speed of memory.

    weight (outs, D)                                rows (R, D), R = batch * copies
    |---- OUTS x DEPTH ----|---- ... ----|  x       |---- R x DEPTH ----|---- ... ----|
      a program has OUTS outputs of all rows, and walks along D with STAGES tiles under way

A decoded token has few rows, so its time is that of reading the weights. The weight is the left
operand of the tensor cores' product, and rows are filled up to 16 or more on its right. With
`gated`, a program has the same outputs of the gate and of the up projection, and their SwiGLU
never reaches memory unmultiplied. More rows than `MOST_ROWS` are cuBLAS's.
"""

from math import ceil
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import linear

MOST_ROWS = 64
"""Beyond it a tile of rows no longer fits beside the weight's, and the product is not bound by
memory alone."""

# Programs that a weight is cut into at least, where it has the outputs for it: a processor such as
# the H100 has 132 multiprocessors.
PROGRAMS = 128
GATE_WIDTH = 1024  # values of SwiGLU that a program has at a time


class ProductBlocks(NamedTuple):
    """What a program works on, and how Triton compiles it.

    Attributes:
        outs: outputs, of the gate and of the up projection each.
        depth: values of D at a time.
        warps: warps of 32 threads.
        stages: tiles of the weight whose loads are under way at a time.
    """

    outs: int
    depth: int
    warps: int
    stages: int


def product_blocks(outs: int, itemsize: int, *, gated: bool) -> ProductBlocks:
    """The blocks of a product with `outs` outputs of `itemsize` bytes.

    Outputs are cut so finely that there are `PROGRAMS`, down to the 16 that a product takes. The
    loads under way, `outs * depth * itemsize * stages`, are 32 KiB or more for each program: by
    Little's law 4 TB/s at a latency of 0.7 us need 21 KB for each of 132 multiprocessors.

    >>> product_blocks(2048, 2, gated=False)
    ProductBlocks(outs=16, depth=256, warps=4, stages=4)
    >>> product_blocks(100352, 2, gated=False)
    ProductBlocks(outs=64, depth=128, warps=4, stages=4)
    """
    tile = 16
    while tile < 64 and outs >= 4 * tile * PROGRAMS:
        tile *= 2
    tile = min(tile, 32) if gated else tile
    depth = (256 if tile == 16 and not gated else 128) * 2 // itemsize
    return ProductBlocks(tile, depth, warps=4, stages=4)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x (rows, D) times the transpose of weight (outs, D) -> (rows, outs), as x."""
    if len(x) > MOST_ROWS:
        return linear(x, weight)
    return _few_rows(x, weight, gated=False)


def gated_product(x: Tensor, weight: Tensor) -> Tensor:
    """silu(x gate^T) * (x up^T), where weight (2F, D) is gate and then up -> (rows, F), as x."""
    if len(x) > MOST_ROWS:
        return silu_and_multiply(linear(x, weight))
    return _few_rows(x, weight, gated=True)


def _few_rows(x: Tensor, weight: Tensor, *, gated: bool) -> Tensor:
    rows, D = x.shape
    outs = len(weight) // (2 if gated else 1)
    assert weight.shape[1] == D, (weight.shape, x.shape)
    assert x.stride(1) == weight.stride(1) == 1, (x.stride(), weight.stride())
    out = x.new_empty(rows, outs)
    launch = product_launch(x, weight, out, gated=gated)
    few_rows_kernel[launch.grid](*launch.arguments, **launch.constants, **launch.options)
    return out


class Launch(NamedTuple):
    """A kernel's grid, its arguments, its `tl.constexpr` ones, and how Triton compiles it."""

    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    options: dict[str, int]


def product_launch(x: Tensor, weight: Tensor, out: Tensor, *, gated: bool) -> Launch:
    """How `few_rows_kernel` is called for x (rows, D)."""
    rows, D = x.shape
    outs = out.shape[1]
    blocks = product_blocks(outs, x.element_size(), gated=gated)
    constants = {
        "D": D,
        "ROWS": max(16, triton.next_power_of_2(rows)),
        "OUTS": blocks.outs,
        "DEPTH": min(blocks.depth, max(16, triton.next_power_of_2(D))),
        "GATED": gated,
        "PRECISION": "tf32x3" if x.dtype == torch.float32 else "tf32",
    }
    return Launch(
        (ceil(outs / blocks.outs),),
        (x, weight, out, rows, outs, x.stride(0), weight.stride(0)),
        constants,
        {"num_warps": blocks.warps, "num_stages": blocks.stages},
    )


@triton.jit(do_not_specialize=["rows", "outs"])
def few_rows_kernel(  # type: ignore[no-untyped-def]
    x, weight, result, rows, outs, x_row, weight_row,
    D: tl.constexpr, ROWS: tl.constexpr, OUTS: tl.constexpr, DEPTH: tl.constexpr,
    GATED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    out = tl.program_id(0) * OUTS + tl.arange(0, OUTS)
    row = tl.arange(0, ROWS)
    depth = tl.arange(0, DEPTH)
    is_out, is_row = out < outs, row < rows
    # In 64 bits: a head of 100,352 outputs at D = 32,768 has more than 2^31 values.
    weights = weight + out[:, None].to(tl.int64) * weight_row + depth[None, :]
    inputs = x + row[None, :] * x_row + depth[:, None]
    total = tl.zeros([OUTS, ROWS], tl.float32)
    other = tl.zeros([OUTS, ROWS], tl.float32)
    for first in range(0, D, DEPTH):
        there = depth < D - first
        values = tl.load(inputs + first, mask=there[:, None] & is_row[None, :], other=0.0)
        tile = tl.load(
            weights + first,
            mask=is_out[:, None] & there[None, :],
            other=0.0,
            eviction_policy="evict_first",
        )
        total = tl.dot(tile, values, total, input_precision=PRECISION)
        if GATED:
            # Outputs of the up projection follow those of the gate.
            up = tl.load(
                weights + outs.to(tl.int64) * weight_row + first,
                mask=is_out[:, None] & there[None, :],
                other=0.0,
                eviction_policy="evict_first",
            )
            other = tl.dot(up, values, other, input_precision=PRECISION)
    if GATED:
        total = total * tl.sigmoid(total) * other
    at = result + row[None, :].to(tl.int64) * outs + out[:, None]
    tl.store(at, total.to(result.dtype.element_ty), mask=is_out[:, None] & is_row[None, :])


def silu_and_multiply(both: Tensor) -> Tensor:
    """silu(gate) * up of (rows, 2F), the gate first -> (rows, F)."""
    rows, F = len(both), both.shape[1] // 2
    out = both.new_empty(rows, F)
    silu_kernel[(rows, ceil(F / GATE_WIDTH))](both, out, F, WIDTH=GATE_WIDTH)
    return out


@triton.jit
def silu_kernel(both, result, F, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    there = column < F
    gate = tl.load(both + row * 2 * F + column, mask=there, other=0.0).to(tl.float32)
    up = tl.load(both + row * 2 * F + F + column, mask=there, other=0.0).to(tl.float32)
    value = gate * tl.sigmoid(gate) * up
    tl.store(result + row * F + column, value.to(result.dtype.element_ty), mask=there)
