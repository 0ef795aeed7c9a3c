"""Products of a few rows with a weight, which is read once.

    weight (outs, D)                                rows (R, D), R = batch * copies
    |-- OUTS x DEPTH --|-- ... --|| split 1 --|  x  |-- R x DEPTH --|-- ... --|| split 1 --|
      a program has OUTS outputs of all rows, and walks along its part of D with several tiles
      under way

A decoded token has few rows, so its time is that of reading the weights. The weight is the left
operand of the tensor cores' product, and rows are filled up to 16 or more on its right. Each
program reads all rows, so with more rows a program has more outputs, and D is cut so that there are
still programs enough. Their partial sums are added by the kernel that reads them next.

With a gate, a program has the same outputs of the gate and of the up projection, and their SwiGLU
never reaches memory unmultiplied. More rows than `MOST_ROWS` are cuBLAS's.
"""

from functools import cache
from math import ceil
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import linear

from phd.attention.blocks import Launch

MOST_ROWS = 64
"""Beyond it a tile of rows no longer fits beside the weight's, and the product is not bound by
memory alone."""

# Programs that a product is cut into, if it can be: the H100 and H200 have 132 multiprocessors.
PROGRAMS = 128
SHARED_BYTES = 227 * 1024
"""Shared memory of a block of threads on an H100 or H200. Other devices have 99 KiB to 227 KiB."""
GATE_WIDTH = 1024  # values of SwiGLU that a program has at a time


class ProductBlocks(NamedTuple):
    """What a program works on, and how Triton compiles it.

    Attributes:
        outs: outputs, of the gate and of the up projection each.
        depth: values of D at a time.
        warps: warps of 32 threads.
        stages: tiles that have room in shared memory, whose loads are under way.
        splits: parts of D.
    """

    outs: int
    depth: int
    warps: int = 4
    stages: int = 4
    splits: int = 1


def product_blocks(
    rows: int, outs: int, D: int, itemsize: int, shared_bytes: int = SHARED_BYTES
) -> ProductBlocks:
    """The blocks of a product of `rows` rows (R, D), whose partial sums may be added later.

    A program reads at most as many values of the rows as of the weight. Loads of 24 KiB of the
    weight are under way in a program: by Little's law, 4 TB/s at a latency of 0.7 us need 21 KB for
    each of 132 multiprocessors.

    >>> product_blocks(1, 2048, 2048, itemsize=2)
    ProductBlocks(outs=16, depth=256, warps=4, stages=4, splits=1)
    >>> product_blocks(16, 2048, 2048, itemsize=2)
    ProductBlocks(outs=32, depth=128, warps=4, stages=4, splits=2)
    """
    tile = 16 if rows <= 8 else 32 if rows <= 16 else 64
    tile = max(tile, _tile_of(outs))
    depth = _depth_of(tile, D, itemsize)
    most = max(1, D // depth // 2)  # two tiles at least
    splits = max(1, min(most, ceil(PROGRAMS / ceil(outs / tile))))
    stages = _stages_of((tile + _filled(rows)) * depth * itemsize, shared_bytes)
    return ProductBlocks(tile, depth, stages=stages, splits=splits)


def whole_blocks(
    rows: int, outs: int, D: int, itemsize: int, shared_bytes: int = SHARED_BYTES, *, gated: bool
) -> ProductBlocks:
    """The blocks of a product that is done in one part, which SwiGLU needs and the LM head's size
    allows.

    >>> whole_blocks(1, 8192, 2048, itemsize=2, gated=True)
    ProductBlocks(outs=32, depth=128, warps=4, stages=4, splits=1)
    >>> whole_blocks(64, 100352, 2048, itemsize=2, gated=False)
    ProductBlocks(outs=64, depth=128, warps=4, stages=4, splits=1)
    >>> whole_blocks(64, 8192, 2048, itemsize=2, shared_bytes=99 * 1024, gated=True)  # an RTX 4090
    ProductBlocks(outs=64, depth=128, warps=4, stages=2, splits=1)
    """
    tile = 32 if gated and rows <= 32 else 64
    while tile > 16 and outs < tile * PROGRAMS:
        tile //= 2
    read = 2 * tile if gated else tile
    depth = _depth_of(read, D, itemsize)
    return ProductBlocks(
        tile, depth, stages=_stages_of((read + _filled(rows)) * depth * itemsize, shared_bytes)
    )


def _filled(rows: int) -> int:
    """Rows of a tile, filled up to what a product takes."""
    return max(16, triton.next_power_of_2(rows))


def _stages_of(tile_bytes: int, shared_bytes: int) -> int:
    """Four, or as many as there is room for."""
    return max(1, min(4, shared_bytes // tile_bytes))


@cache
def shared_bytes_of(device: torch.device) -> int:
    """Shared memory that a block of threads may have; an H100's where Triton's interpreter runs."""
    if device.type != "cuda":
        return SHARED_BYTES
    properties: Any = torch.cuda.get_device_properties(device)  # its stub lacks this one
    return int(properties.shared_memory_per_block_optin)


def _tile_of(outs: int) -> int:
    """Outputs of a program where there are many: four programs for each multiprocessor."""
    tile = 16
    while tile < 64 and outs >= 4 * tile * PROGRAMS:
        tile *= 2
    return tile


def _depth_of(tile: int, D: int, itemsize: int) -> int:
    depth = (256 if tile == 16 else 128) * 2 // itemsize
    return min(depth, max(16, triton.next_power_of_2(D)))


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x (rows, D) times the transpose of weight (outs, D) -> (rows, outs), as x."""
    if len(x) > MOST_ROWS:
        return linear(x, weight)
    sizes = len(x), len(weight), x.shape[1], x.element_size()
    blocks = whole_blocks(*sizes, shared_bytes_of(x.device), gated=False)
    return _few_rows(x, weight, blocks, gated=False)[0]


def partial_products(x: Tensor, weight: Tensor) -> Tensor:
    """The same in parts (parts, rows, outs), float32, of which it is the sum.

    With more than `MOST_ROWS` rows it is one part, as x.
    """
    if len(x) > MOST_ROWS:
        return linear(x, weight)[None]
    sizes = len(x), len(weight), x.shape[1], x.element_size()
    blocks = product_blocks(*sizes, shared_bytes_of(x.device))
    return _few_rows(x, weight, blocks, gated=False, dtype=torch.float32)


def gated_product(x: Tensor, weight: Tensor) -> Tensor:
    """silu(x gate^T) * (x up^T), where weight (2F, D) is gate and then up -> (rows, F), as x."""
    if len(x) > MOST_ROWS:
        return silu_and_multiply(linear(x, weight))
    sizes = len(x), len(weight) // 2, x.shape[1], x.element_size()
    blocks = whole_blocks(*sizes, shared_bytes_of(x.device), gated=True)
    return _few_rows(x, weight, blocks, gated=True)[0]


def _few_rows(
    x: Tensor,
    weight: Tensor,
    blocks: ProductBlocks,
    *,
    gated: bool,
    dtype: torch.dtype | None = None,
) -> Tensor:
    launch, out = product_launch(x, weight, blocks, gated=gated, dtype=dtype)
    few_rows_kernel[launch.grid](*launch.arguments, **launch.constants, **launch.options)
    return out


def product_launch(
    x: Tensor,
    weight: Tensor,
    blocks: ProductBlocks,
    *,
    gated: bool,
    dtype: torch.dtype | None = None,
) -> tuple[Launch, Tensor]:
    """How `few_rows_kernel` is called, and what it writes: (splits, rows, outs) in a dtype.

    `dtype` None: as x.
    """
    rows, D = x.shape
    outs = len(weight) // (2 if gated else 1)
    assert weight.shape[1] == D, (weight.shape, x.shape)
    assert x.stride(1) == weight.stride(1) == 1, (x.stride(), weight.stride())
    assert blocks.splits == 1 or not gated, blocks
    out = x.new_empty(blocks.splits, rows, outs, dtype=dtype)
    constants = {
        "D": D,
        "ROWS": _filled(rows),
        "OUTS": blocks.outs,
        "DEPTH": blocks.depth,
        "SPLITS": blocks.splits,
        "GATED": gated,
        "PRECISION": "tf32x3" if x.dtype == torch.float32 else "tf32",
    }
    launch = Launch(
        (ceil(outs / blocks.outs), blocks.splits),
        (x, weight, out, rows, outs, x.stride(0), weight.stride(0)),
        constants,
        {"num_warps": blocks.warps, "num_stages": blocks.stages},
    )
    return launch, out


@triton.jit(do_not_specialize=["rows", "outs"])
def few_rows_kernel(  # type: ignore[no-untyped-def]
    x, weight, result, rows, outs, x_row, weight_row,
    D: tl.constexpr, ROWS: tl.constexpr, OUTS: tl.constexpr, DEPTH: tl.constexpr,
    SPLITS: tl.constexpr, GATED: tl.constexpr, PRECISION: tl.constexpr,
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
    each: tl.constexpr = ((D + DEPTH - 1) // DEPTH + SPLITS - 1) // SPLITS * DEPTH
    split = tl.program_id(1)
    # With one split, bounds that are known when it is compiled take fewer registers.
    begin = 0 if SPLITS == 1 else split * each
    end = D if SPLITS == 1 else tl.minimum(begin + each, D)
    for first in range(begin, end, DEPTH):
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
    at = result + (split * rows + row[None, :]).to(tl.int64) * outs + out[:, None]
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
