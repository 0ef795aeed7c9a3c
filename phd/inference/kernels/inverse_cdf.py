"""Drawing a token of each row from all of its logits, in three kernels for any vocabulary.

block      a thousand logits or so, one program each
1          each block's largest logit
2          the sum of each block's weights, which are relative to the row's largest
3          the block that the row's number falls into, and the token in it
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# A row's blocks are read by one program in the end, so they are about as many as a block is long.
BLOCK = 1024


def draw_by_inverse_cdf(
    logits: Tensor, temperature: Tensor, uniforms: Tensor, fixed_point: float, not_finite: int
) -> Tensor:
    """The token of each row that a uniform number falls into, int64 (rows,).

    Args:
        logits: (rows, V).
        temperature: float32 (rows,); 0: the most likely token.
        uniforms: float64 (rows,), of [0, 1).
        fixed_point: weights are integers in units of one over this.
        not_finite: the result where a row's largest logit is not finite.
    """
    rows, V = logits.shape
    logits = logits.contiguous()
    blocks = triton.cdiv(V, BLOCK)
    peaks = logits.new_empty(rows, blocks, dtype=torch.float32)
    places = logits.new_empty(rows, blocks, dtype=torch.int32)
    sums = logits.new_empty(rows, blocks, dtype=torch.int64)
    tokens = logits.new_empty(rows, dtype=torch.int64)
    width = triton.next_power_of_2(blocks)
    peak_kernel[(rows, blocks)](logits, peaks, places, V, BLOCK=BLOCK)
    sum_kernel[(rows, blocks)](
        logits, peaks, temperature, sums, V, fixed_point, BLOCK=BLOCK, WIDTH=width
    )
    draw_kernel[(rows,)](
        logits, peaks, places, sums, temperature, uniforms, tokens, V, blocks, fixed_point,
        not_finite, BLOCK=BLOCK, WIDTH=width,
    )  # fmt: skip
    return tokens


@triton.jit
def _read(logits, row, block, V, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    column = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row * V + column, mask=column < V, other=-float("inf")).to(tl.float32)
    # A maximum would pass over NaN, and infinity is as little a logit.
    return tl.where(x == x, x, float("inf"))


@triton.jit
def _peak(peaks, row, blocks, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """The row's largest logit, and the first block that has it."""
    block = tl.arange(0, WIDTH)
    x = tl.load(peaks + row * blocks + block, mask=block < blocks, other=-float("inf"))
    peak = tl.max(x, 0)
    return peak, tl.min(tl.where(x == peak, block, WIDTH), 0)


@triton.jit
def _weights(x, peak, temperature, fixed_point):  # type: ignore[no-untyped-def]
    return (tl.exp((x - peak) / temperature) * fixed_point).to(tl.int64)


@triton.jit
def peak_kernel(logits, peaks, places, V, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row, block, blocks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    x = _read(logits, row, block, V, BLOCK)
    peak = tl.max(x, 0)
    place = tl.min(tl.where(x == peak, tl.arange(0, BLOCK), BLOCK), 0)
    tl.store(peaks + row * blocks + block, peak)
    tl.store(places + row * blocks + block, place)


@triton.jit
def sum_kernel(  # type: ignore[no-untyped-def]
    logits, peaks, temperatures, sums, V, fixed_point, BLOCK: tl.constexpr, WIDTH: tl.constexpr
):
    row, block, blocks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    temperature = tl.load(temperatures + row)
    peak, _ = _peak(peaks, row, blocks, WIDTH)
    if (temperature > 0) & (tl.abs(peak) < float("inf")):
        x = _read(logits, row, block, V, BLOCK)
        total = tl.sum(_weights(x, peak, temperature, fixed_point), 0)
        tl.store(sums + row * blocks + block, total)


@triton.jit
def draw_kernel(  # type: ignore[no-untyped-def]
    logits, peaks, places, sums, temperatures, uniforms, tokens, V, blocks, fixed_point, not_finite,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperatures + row)
    peak, first = _peak(peaks, row, blocks, WIDTH)
    if tl.abs(peak) == float("inf"):
        tl.store(tokens + row, not_finite)
    elif temperature == 0:
        place = tl.load(places + row * blocks + first)
        tl.store(tokens + row, (first * BLOCK + place).to(tl.int64))
    else:
        block = tl.arange(0, WIDTH)
        own = tl.load(sums + row * blocks + block, mask=block < blocks, other=0)
        reached = tl.cumsum(own, 0)
        total = tl.sum(own, 0)
        level = (tl.load(uniforms + row) * total.to(tl.float64)).to(tl.int64)
        # Less than the sum, whatever u: else the place would be beyond the last token.
        level = tl.minimum(level, total - 1)
        chosen = tl.sum((reached <= level).to(tl.int32), 0)
        level -= tl.sum(tl.where(block < chosen, own, 0), 0)
        x = _read(logits, row, chosen, V, BLOCK)
        reached = tl.cumsum(_weights(x, peak, temperature, fixed_point), 0)
        place = tl.sum((reached <= level).to(tl.int32), 0)
        # Where two kernels rounded a weight differently, too, it is a token of the vocabulary.
        tl.store(tokens + row, tl.minimum(chosen * BLOCK + place, V - 1).to(tl.int64))
