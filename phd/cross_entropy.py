"""The loss of hidden states under an LM head, a chunk of rows at a time, with Triton on CUDA.

cuBLAS multiplies, and one kernel makes of a chunk's logits its losses and d_logits, in place. A
program of it takes one row, which it reads twice and writes once:

    pass 1 ->   |--- block 0 ---|--- block 1 ---|--- block 2 ---|   peak and sum of exponentials
    pass 2 <-   |--- block 0 ---|--- block 1 ---|--- block 2 ---|   gradient, over the logits

The second pass goes backwards: it first reads what the first has read last, which is still in the
cache. All arithmetic is in float32, whatever the dtype of the logits is.
"""

from math import ceil

import torch
import triton
import triton.language as tl
from torch import Tensor

from phd.loss_memory import fused_rows_at_once
from phd.torch_private import add_product

# Rows of logits begin at multiples of 128 bytes in half precision: cuBLAS has its fast kernels for
# aligned rows alone, and Triton reads them in pieces of 16 bytes.
ROW_ALIGNMENT = 64
# A row of 100,352 logits in bfloat16 is 200 KB. Programs of 16 warps with up to 64 registers a
# thread are two on a multiprocessor, so the rows that are read at the same time just fill the L2
# cache of an H100 (50 MB, 132 multiprocessors).
BLOCK_BYTES, WARPS = 16_384, 16
STAGES = 3  # one block is computed while two are on their way
# Each lane's peak starts from here: -inf - (-inf) would be NaN.
LOWEST = tl.constexpr(-1.0e38)
# exp(x) = 2^(x log2 e): the hardware has an instruction for powers of 2.
LOG2_E = tl.constexpr(1.4426950408889634)


# A custom operator, so that torch.compile does not look into it and its memory stays as planned.
@torch.library.custom_op("phd::linear_cross_entropy", mutates_args=())
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignored: int,
    z_loss: float,
    needs_d_hidden: bool,
    needs_d_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`phd.loss.Sums` of rows (R, D): total, cross-entropy, d_hidden and d_weight."""
    R, V = len(hidden), len(weight)
    step = fused_rows_at_once(R, V, hidden.dtype)
    logits = hidden.new_empty(step, ceil(V / ROW_ALIGNMENT) * ROW_ALIGNMENT)[:, :V]
    d_hidden, d_weight = _gradients(hidden, weight, needs_d_hidden, needs_d_weight)
    head = weight.to(hidden.dtype)
    losses = []
    for start in range(0, R, step):
        h, y = hidden[start : start + step], targets[start : start + step]
        p = torch.mm(h, head.T, out=logits[: len(h)])
        gradient = needs_d_hidden or needs_d_weight
        losses.append(cross_entropy_rows(p, y, ignored, z_loss, gradient=gradient))
        if needs_d_hidden:
            torch.mm(p, head, out=d_hidden[start : start + step])
        if needs_d_weight:
            add_product(d_weight, p.T, h, first=start == 0)
    both = torch.cat(losses, 1)
    return both.sum(), both[0].sum(), d_hidden, d_weight


@linear_cross_entropy.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    _targets: Tensor,
    _ignored: int,
    _z_loss: float,
    needs_d_hidden: bool,
    needs_d_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total, cross_entropy = (hidden.new_empty((), dtype=torch.float32) for _ in range(2))
    return total, cross_entropy, *_gradients(hidden, weight, needs_d_hidden, needs_d_weight)


def _gradients(
    hidden: Tensor, weight: Tensor, needs_d_hidden: bool, needs_d_weight: bool
) -> tuple[Tensor, Tensor]:
    """Memory for d_hidden and d_weight; without rows where one is not needed."""
    return (
        torch.empty_like(hidden if needs_d_hidden else hidden[:0]),
        torch.empty_like(weight if needs_d_weight else weight[:0], dtype=torch.float32),
    )


def cross_entropy_rows(
    logits: Tensor, targets: Tensor, ignored: int, z_loss: float, *, gradient: bool
) -> Tensor:
    """Each row's -log softmax(logits)[target] and z_loss * logsumexp(logits)^2.

    With `gradient`, that of their sum takes the place of the logits, in their dtype:

        p (1 + 2 z_loss lse) - one_hot(target)        p = softmax(logits), lse = logsumexp(logits)

    Rows whose target is `ignored` have losses and gradients of 0, whatever their logits are. A
    target outside of the vocabulary makes its loss NaN.

    Args:
        logits: (R, V) in bfloat16, float16 or float32. Rows may be padded: what is between them is
            read and overwritten, and changes nothing.
        targets: int64 (R,).

    Returns:
        float32 (2, R).
    """
    R, V = logits.shape
    assert logits.stride(1) == 1, logits.stride()
    losses = torch.empty(2, R, dtype=torch.float32, device=logits.device)
    columns = block_columns(V, logits.dtype)
    _kernel[(R,)](
        logits, targets.contiguous(), losses, R, V, logits.stride(0), z_loss,
        IGNORED=ignored, GRADIENT=gradient, COLUMNS=columns, STAGES=STAGES, num_warps=WARPS,
    )  # fmt: skip
    return losses


def block_columns(vocab_size: int, dtype: torch.dtype) -> int:
    """How many logits a program has at a time, a power of 2: at least one for each thread."""
    return max(32 * WARPS, min(BLOCK_BYTES // dtype.itemsize, triton.next_power_of_2(vocab_size)))


@triton.jit
def _load(logits, column, vocabulary, width):  # type: ignore[no-untyped-def]
    """Logits in float32; those between the rows have no probability."""
    # To the end of the padded row, a multiple of 16 bytes: so it is read in pieces of as many.
    x = tl.load(logits + column, mask=column < width, other=0.0).to(tl.float32)
    return tl.where(column < vocabulary, x, -float("inf"))


@triton.jit
def _kernel(  # type: ignore[no-untyped-def]
    logits, targets, losses, rows, vocabulary, width, z_loss,
    IGNORED: tl.constexpr, GRADIENT: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    logits += row.to(tl.int64) * width
    target = tl.load(targets + row)
    blocks = tl.cdiv(vocabulary, COLUMNS)
    if target == IGNORED:
        tl.store(losses + row, 0.0)
        tl.store(losses + rows + row, 0.0)
        if GRADIENT:
            for block in range(blocks):
                column = block * COLUMNS + tl.arange(0, COLUMNS)
                nothing = tl.zeros([COLUMNS], logits.dtype.element_ty)
                tl.store(logits + column, nothing, mask=column < width)
    else:
        inside = (target >= 0) & (target < vocabulary)
        place = target.to(tl.int32)  # a logit is compared with it in one instruction
        chosen = tl.load(logits + place, mask=inside, other=float("nan")).to(tl.float32)
        # Each lane has a peak and a sum of its own until the end, so that threads need not meet.
        peaks = tl.full([COLUMNS], LOWEST, tl.float32)
        sums = tl.zeros([COLUMNS], tl.float32)
        for block in tl.range(0, blocks, num_stages=STAGES):
            column = block * COLUMNS + tl.arange(0, COLUMNS)
            x = _load(logits, column, vocabulary, width)
            # One power of 2 for both cases: it shrinks the sum of a new peak, or is what x adds.
            power = tl.exp2(-tl.abs(x - peaks) * LOG2_E)
            sums = tl.where(x > peaks, sums * power + 1.0, sums + power)
            peaks = tl.maximum(peaks, x)
        peak = tl.max(peaks, 0)
        total = tl.sum(sums * tl.exp2((peaks - peak) * LOG2_E), 0)
        log_total = tl.log2(total) / LOG2_E
        lse = peak + log_total
        tl.store(losses + row, log_total + (peak - chosen))
        tl.store(losses + rows + row, z_loss * lse * lse)
        if GRADIENT:
            scale = (1.0 + 2.0 * z_loss * lse) / total
            for step in tl.range(0, blocks, num_stages=STAGES):
                column = (blocks - 1 - step) * COLUMNS + tl.arange(0, COLUMNS)
                x = _load(logits, column, vocabulary, width)
                # From the peak and not from lse, which has fewer digits where logits are large.
                gradient = tl.exp2((x - peak) * LOG2_E) * scale
                gradient = tl.where(column == place, gradient - 1.0, gradient)
                gradient = gradient.to(logits.dtype.element_ty)
                tl.store(logits + column, gradient, mask=column < width)
