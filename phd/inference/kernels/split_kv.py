"""Attention of a few queries to many keys on CUDA: several programs share the keys of a head.

    keys of a head   |--- split 0 ---|--- split 1 ---|--- split 2 ---|   one program each, with
    queries          every row       every row       every row           a tile of rows at a time

The splits' results merge by their log-sum-exps (flash decoding, arXiv 2311.01282, section 3). How
many keys a row sees is read on the device, and the grid follows from shapes alone, so one CUDA
graph serves all lengths.
"""

from functools import cache
from math import ceil

import torch
import triton
import triton.language as tl
from torch import Tensor

from phd.inference.kernels.online_softmax import LOG2_E, mean_and_lse, nothing_seen, see_keys

KEYS_AT_ONCE, ROWS_AT_ONCE = 64, 64
# Programs for each multiprocessor. Some have no keys, where rows are shorter than the cache, and
# more programs than one keep the processor busy then.
PROGRAMS_PER_PROCESSOR = 4
SPLITS_AT_ONCE = 32  # of a row, which the merge reads together
# More rows than these take several calls, whose parts in float32 are then 128 MiB at the most, with
# heads of 128. The third axis of a grid ends at 65,535 tiles.
ROWS_PER_CALL = 1 << 18


# A custom operator, which torch.compile does not look into.
@torch.library.custom_op("phd::split_attention", mutates_args=())
def split_attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, splits: int | None = None
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(H)) v of each row over the first `visible` keys.

    Args:
        q: (B, G, rows, H).
        k, v: (B, G, keys, H), the last dimension contiguous.
        visible: int64 (B, rows), how many keys each row sees, at least 1; None: all.
        splits: into how many parts the keys are cut; None: into as many as fill the device.

    Returns:
        out (B, G, rows, H) as q, and lse float32 (B, G, rows).
    """
    B, G, R, _ = q.shape
    assert k.stride() == v.stride(), (k.stride(), v.stride())
    assert k.stride(3) == 1, k.stride()
    at_once = max(1, ROWS_PER_CALL // (B * G))
    if at_once >= R:
        return _attend(q, k, v, visible, splits)
    out, lse = torch.empty_like(q), q.new_empty((B, G, R), dtype=torch.float32)
    for first in range(0, R, at_once):
        part = slice(first, first + at_once)
        counts = None if visible is None else visible[:, part]
        out[:, :, part], lse[:, :, part] = _attend(q[:, :, part], k, v, counts, splits)
    return out, lse


def _attend(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, splits: int | None
) -> tuple[Tensor, Tensor]:
    """`split_attention` of rows that are few enough for one grid."""
    B, G, R, H = q.shape
    keys = k.shape[2]
    q = q.contiguous()
    if visible is None:
        visible = torch.full((B, R), keys, device=q.device)
    tile = min(ROWS_AT_ONCE, max(16, triton.next_power_of_2(R)))
    tiles = ceil(R / tile)
    if splits is None:
        splits = PROGRAMS_PER_PROCESSOR * multiprocessors(q.device) // (B * G * tiles)
    splits = max(1, min(splits, ceil(keys / KEYS_AT_ONCE)))
    parts = q.new_empty((B, G, splits, R, H), dtype=torch.float32)
    lses = q.new_empty((B, G, splits, R), dtype=torch.float32)
    _kernel[(B * G, splits, tiles)](
        q, k, v, visible.contiguous(), parts, lses,
        G, R, H, splits, *k.stride()[:3], H**-0.5 * LOG2_E.value,
        ROWS=tile, KEYS=KEYS_AT_ONCE, WIDTH=max(16, triton.next_power_of_2(H)),
        PRECISION="tf32" if q.dtype != torch.float32 else "ieee",
    )  # fmt: skip
    if splits == 1:
        return parts[:, :, 0].to(q.dtype), lses[:, :, 0].clone()
    out, lse = torch.empty_like(q), lses.new_empty((B, G, R))
    merge_kernel[(R, B * G)](
        parts, lses, out, lse, R, H, splits,
        WIDTH=max(16, triton.next_power_of_2(H)), SPLITS=SPLITS_AT_ONCE,
    )  # fmt: skip
    return out, lse


@split_attention.register_fake
def _(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@cache
def multiprocessors(device: torch.device) -> int:
    """How many a device has; 1 for the CPU, where Triton's interpreter runs."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def _kernel(  # type: ignore[no-untyped-def]
    q, k, v, visible_counts, parts, lses,
    groups, rows, width, splits, stride_b, stride_g, stride_k, scale,
    ROWS: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)  # so that no offset overflows
    split, tile = tl.program_id(1), tl.program_id(2)
    b, g = head // groups, head % groups
    row = tile * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    is_row = row < rows
    visible = tl.load(visible_counts + b * rows + row, mask=is_row, other=1)
    most = tl.max(visible, 0)
    # Splits share the keys that are visible, in whole steps of the loop, not the cache's capacity.
    per_split = tl.cdiv(tl.cdiv(most, KEYS), splits) * KEYS
    start = split * per_split
    stop = tl.minimum(start + per_split, most)
    at = (head * rows + row[:, None]) * width + column[None, :]
    queries = tl.load(q + at, mask=is_row[:, None] & (column < width)[None, :], other=0.0)
    base = b * stride_b + g * stride_g
    peak, total, out = nothing_seen(ROWS, WIDTH)
    for first in range(start, stop, KEYS):
        key = first + tl.arange(0, KEYS)
        address = base + key[:, None] * stride_k + column[None, :]
        in_range = (key < stop)[:, None] & (column < width)[None, :]
        seen = (key[None, :] < visible[:, None]) & (key < stop)[None, :]
        peak, total, out = see_keys(
            peak, total, out, queries, k + address, v + address, in_range, seen, scale, PRECISION
        )
    out, lse = mean_and_lse(peak, total, out)
    part = (head * splits + split) * rows + row
    tl.store(lses + part, lse / LOG2_E, mask=is_row)
    tl.store(
        parts + part[:, None] * width + column[None, :],
        out,
        mask=is_row[:, None] & (column < width)[None, :],
    )


@triton.jit(do_not_specialize=["rows", "splits"])
def merge_kernel(  # type: ignore[no-untyped-def]
    parts, lses, out, lse, rows, width, splits, WIDTH: tl.constexpr, SPLITS: tl.constexpr
):  # fmt: skip
    """The splits' results of one row together."""
    row, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    column = tl.arange(0, WIDTH)
    in_head = column < width
    peak = -float("inf")
    total = 0.0
    mixed = tl.zeros([WIDTH], tl.float32)
    # The first split has keys for every row that sees any, so no peak stays -inf.
    for first in range(0, splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        part = (head * splits + split) * rows + row
        there = split < splits
        scores = tl.load(lses + part, mask=there, other=-float("inf"))
        address = parts + part[:, None] * width + column[None, :]
        values = tl.load(address, mask=there[:, None] & in_head[None, :], other=0.0)
        higher = tl.maximum(peak, tl.max(scores, 0))
        weights = tl.exp(scores - higher)
        kept = tl.exp(peak - higher)
        mixed = mixed * kept + tl.sum(values * weights[:, None], 0)
        total = total * kept + tl.sum(weights, 0)
        peak = higher
    at = head * rows + row
    tl.store(out + at * width + column, mixed / total, mask=in_head)
    tl.store(lse + at, peak + tl.log(total))
