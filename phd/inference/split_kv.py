"""Attention of a few queries to many keys on CUDA: the keys are dealt to programs, in one kernel.

    keys of a head   |--- split 0 ---|--- split 1 ---|--- split 2 ---|   each a program of its own,
    queries          every row       every row       every row           a tile of rows at a time

The splits' results merge by their log-sum-exps (flash decoding, arXiv 2311.01282, section 3). How
many keys a row sees lies on the device, and the grid follows from shapes alone, so that a CUDA
graph of it serves any length.
"""

from functools import cache
from math import ceil

import torch
import triton
import triton.language as tl
from torch import Tensor

KEYS_AT_ONCE, ROWS_AT_ONCE = 64, 64
# Programs for each multiprocessor: enough to hide that some of them have nothing to do.
PROGRAMS_PER_PROCESSOR = 4
LOG2_E = tl.constexpr(1.4426950408889634)


@torch.library.custom_op("phd::split_attention", mutates_args=())  # whole to torch.compile
def split_attention(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, splits: int | None = None
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(H)) v of each row over the first `seen` keys.

    Args:
        q: (B, G, rows, H).
        k, v: (B, G, keys, H), the last dimension contiguous.
        seen: int64 (B, rows), at least 1 each; None: all keys.
        splits: into how many parts the keys are cut; None: as many as fill the device.

    Returns:
        out (B, G, rows, H) as q, and lse float32 (B, G, rows).
    """
    B, G, R, H = q.shape
    keys = k.shape[2]
    assert k.stride() == v.stride(), (k.stride(), v.stride())
    assert k.stride(3) == 1, k.stride()
    q = q.contiguous()
    if seen is None:
        seen = torch.full((B, R), keys, device=q.device)
    tile = min(ROWS_AT_ONCE, max(16, triton.next_power_of_2(R)))
    tiles = ceil(R / tile)
    if splits is None:
        splits = max(1, _programs(q.device) // (B * G * tiles))
    splits = max(1, min(splits, ceil(keys / KEYS_AT_ONCE)))
    parts = q.new_empty((B, G, splits, R, H), dtype=torch.float32)
    lses = q.new_empty((B, G, splits, R), dtype=torch.float32)
    _kernel[(B * G, splits, tiles)](
        q, k, v, seen.contiguous(), parts, lses,
        G, R, H, splits, *k.stride()[:3], H**-0.5 * LOG2_E.value,
        ROWS=tile, KEYS=KEYS_AT_ONCE, WIDTH=max(16, triton.next_power_of_2(H)),
        PRECISION="tf32" if q.dtype != torch.float32 else "ieee",
    )  # fmt: skip
    lse = lses.logsumexp(2)
    out = (parts * (lses - lse.unsqueeze(2)).exp().unsqueeze(-1)).sum(2)
    return out.to(q.dtype), lse


@split_attention.register_fake
def _(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@cache
def _programs(device: torch.device) -> int:
    if device.type != "cuda":  # Triton's interpreter
        return PROGRAMS_PER_PROCESSOR
    return PROGRAMS_PER_PROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def _kernel(  # type: ignore[no-untyped-def]
    q, k, v, seen, parts, lses,
    groups, rows, width, splits, stride_b, stride_g, stride_k, scale,
    ROWS: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)  # so that no offset overflows
    split, tile = tl.program_id(1), tl.program_id(2)
    b, g = head // groups, head % groups
    row = tile * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    is_row = row < rows
    visible = tl.load(seen + b * rows + row, mask=is_row, other=1)
    most = tl.max(visible, 0)
    # Each split takes as many whole blocks of what is seen, not of what there is room for.
    per_split = tl.cdiv(tl.cdiv(most, KEYS), splits) * KEYS
    start = split * per_split
    stop = tl.minimum(start + per_split, most)
    at = (head * rows + row[:, None]) * width + column[None, :]
    queries = tl.load(q + at, mask=is_row[:, None] & (column < width)[None, :], other=0.0)
    base = b * stride_b + g * stride_g
    peak = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, WIDTH], tl.float32)
    for first in range(start, stop, KEYS):
        key = first + tl.arange(0, KEYS)
        place = base + key[:, None] * stride_k + column[None, :]
        held = (key < stop)[:, None] & (column < width)[None, :]
        block = tl.load(k + place, mask=held, other=0.0)
        scores = tl.dot(queries, tl.trans(block), input_precision=PRECISION) * scale
        allowed = (key[None, :] < visible[:, None]) & (key < stop)[None, :]
        scores = tl.where(allowed, scores, -float("inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        # A row that has seen nothing yet: -inf less -inf would be no number.
        safe = tl.where(higher == -float("inf"), 0.0, higher)
        weights = tl.exp2(scores - safe[:, None])
        kept = tl.exp2(peak - safe)
        block = tl.load(v + place, mask=held, other=0.0)
        out = out * kept[:, None] + tl.dot(
            weights.to(block.dtype), block, input_precision=PRECISION
        )
        total = total * kept + tl.sum(weights, 1)
        peak = higher
    part = (head * splits + split) * rows + row
    empty = total == 0
    out = out / tl.where(empty, 1.0, total)[:, None]
    lse = tl.where(empty, -float("inf"), (peak + tl.log2(tl.where(empty, 1.0, total))) / LOG2_E)
    tl.store(lses + part, lse, mask=is_row)
    tl.store(
        parts + part[:, None] * width + column[None, :],
        out,
        mask=is_row[:, None] & (column < width)[None, :],
    )
