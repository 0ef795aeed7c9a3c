"""How many rows of logits the fused loss holds at a time, and how much memory it takes."""

from math import ceil

import torch

# 8192 rows keep a GPU busy. Each chunk of rows reads and writes d_weight once, which is 1.6 GB at
# V = 100,352 and D = 2048, so that smaller chunks are slower.
LOGITS_BYTES = 1 << 31
ROWS = 8192
ROW_TILE = 256  # chunks are whole tiles of a matrix product


def fused_rows_at_once(rows: int, vocab_size: int, dtype: torch.dtype) -> int:
    """How many of `rows` rows' logits, in `dtype`, are held at a time: chunks of about one size."""
    most = max(1, min(ROWS, LOGITS_BYTES // (vocab_size * dtype.itemsize)))
    if most >= ROW_TILE:
        most -= most % ROW_TILE
    share = ceil(rows / ceil(rows / most))
    return min(most, rows, ceil(share / ROW_TILE) * ROW_TILE)


def fused_loss_bytes(
    rows: int, dim: int, vocab_size: int, dtype: torch.dtype, weight_dtype: torch.dtype
) -> int:
    """The most bytes that the loss holds at a time beside its inputs, on CUDA.

    The forward pass holds the logits of a chunk in `dtype`, d_weight in float32, d_hidden in
    `dtype`, and a copy of the weight where it has another dtype. For size 1b2, four rows of 4096
    tokens and float32 weights:

        8192 * 100352 * 2  +  100352 * 2048 * 4  +  16384 * 2048 * 2  +  100352 * 2048 * 2

    >>> fused_loss_bytes(4 * 4096, 2048, 100_352, torch.bfloat16, torch.float32) / 1e9
    2.944401408

    The backward pass holds both gradients before and after they are scaled, but no logits.

    Args:
        rows: hidden states, B * T.
        dim, vocab_size: D and V.
        dtype: of the hidden states, autocast's if it is on.
        weight_dtype: of the LM head.
    """
    weights, states = vocab_size * dim, rows * dim
    logits = fused_rows_at_once(rows, vocab_size, dtype) * vocab_size * dtype.itemsize
    copy = weights * dtype.itemsize if dtype != weight_dtype else 0
    forward = logits + 4 * weights + states * dtype.itemsize + copy
    rounded = weights * weight_dtype.itemsize if weight_dtype != torch.float32 else 0
    backward = 8 * weights + rounded + states * (2 * dtype.itemsize + 4)
    return max(forward, backward)
