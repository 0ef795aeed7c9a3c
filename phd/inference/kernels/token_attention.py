"""Attention of one new token of each row: all copies' queries in one kernel, and its merge.

    keys of a head    originals 0 .. n           hidden copies: ring | new
    in blocks         | 0 | 1 | 2 | 3 | 4 | 5 |  | 6 | 7 |
    programs            split 0     split 1        split 2           times tiles of rows
    rows of a tile    copy 0: query heads of the key head, copy 1: query heads, ...

Copies and query heads that share a key head are rows of the same products, so keys are read once
for all of them. What a row sees follows from the row's length, which is read on the device, and
from the pattern. The grid follows from shapes alone, so one CUDA graph serves all lengths. Splits
share the blocks that there are, and those that get none end at once.

The merge adds up the splits' results by their log-sum-exps (flash decoding, arXiv 2311.01282,
section 3). Then nobody needs the ring's old hidden copies any more, and it writes the new ones.
"""

from math import ceil
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from phd.attention.blocks import Launch, padded_head, table_width
from phd.attention.fused import first_seen
from phd.inference.kernels.online_softmax import LOG2_E, mean_and_lse, nothing_seen, see_keys
from phd.inference.kernels.split_kv import multiprocessors
from phd.inference.kernels.token_cache import TokenCache, copies_of, rule_of
from phd.pattern import Pattern

COPIES_AT_ONCE = 16  # hidden copies that a program of the merge writes into the ring


def attend_token(
    q: Tensor, cache: TokenCache, pattern: Pattern, splits: int | None = None
) -> Tensor:
    """Attention of the new token's copies, which `place_token` has placed; fills the ring.

    A row that has no room left gets numbers without a meaning, and changes no other row.

    Args:
        q: (B*Q, N*H), all copies of a row one after another (Q = K), or the last one (Q = 1).
        cache: with the new token's keys and values in `originals` and `new`. `lengths` does not
            count the token yet.
        splits: into how many parts the keys are cut; None: into as many as fill the device.

    Returns:
        (B*Q, N*H), as q.
    """
    cache.check(pattern)
    assert q.is_contiguous(), q.stride()
    assert q.dtype == cache.originals.dtype, (q.dtype, cache.originals.dtype)
    attention, merge, out = attention_launches(q, cache, pattern, splits)
    attention_kernel[attention.grid](
        *attention.arguments, **attention.constants, **attention.options
    )
    merge_kernel[merge.grid](*merge.arguments, **merge.constants, **merge.options)
    return out


class TokenBlocks(NamedTuple):
    """What the programs of both kernels work on; follows from the model alone.

    Attributes:
        rows: queries of a tile, of any copies and query heads of a key head.
        keys: keys that are multiplied at a time.
        programs: programs for each multiprocessor, where the keys can be cut into so many.
        warps, stages: of the attention kernel.
    """

    rows: int
    keys: int
    programs: int
    warps: int
    stages: int

    @property
    def merged_rows(self) -> int:
        """Rows that a program of the merge has."""
        return max(1, self.rows // 32)

    @property
    def merged_splits(self) -> int:
        """Splits that it adds up at a time."""
        return 32 // self.merged_rows


# Chosen by what Triton 3.7 and ptxas report for sm_90 and by arithmetic, not yet by time. A few
# rows are bound by memory: a step's keys and values are 16 KiB, with two steps under way, and four
# programs have 64 K registers and 160 KiB of a multiprocessor between them. Many rows are bound by
# products, and each more split writes `rows` outputs in float32: two programs.
BLOCKS = {
    # (bytes of a number, padded H): TokenBlocks, of which the first that has all rows is taken
    (2, 64): (
        TokenBlocks(16, 64, 4, 4, 3),  # 84 registers
        TokenBlocks(32, 64, 4, 4, 3),
        TokenBlocks(64, 64, 2, 4, 3),  # 167
        TokenBlocks(128, 64, 2, 8, 2),  # 127; with three stages 135, for which there is no room
    ),
    (2, 128): (
        TokenBlocks(16, 32, 4, 4, 3),  # 92
        TokenBlocks(32, 32, 4, 4, 3),
        TokenBlocks(64, 32, 2, 4, 3),  # 164
    ),
    (2, 256): (TokenBlocks(16, 32, 2, 4, 2), TokenBlocks(32, 32, 2, 4, 2)),
    (4, 64): (TokenBlocks(16, 32, 2, 4, 2), TokenBlocks(32, 32, 2, 4, 2)),
    (4, 128): (TokenBlocks(16, 16, 2, 4, 2),),
    (4, 256): (TokenBlocks(16, 16, 1, 8, 2),),
}


def token_blocks(rows: int, head_dim: int, itemsize: int) -> TokenBlocks:
    """The blocks for `rows` queries of each key head, from `BLOCKS`."""
    choices = BLOCKS[itemsize, table_width(head_dim)]
    return next((blocks for blocks in choices if blocks.rows >= rows), choices[-1])


def splits_of(blocks: TokenBlocks, processors: int, tiles: int, most: int) -> int:
    """Into how many parts the keys of a head are cut.

    Args:
        processors: multiprocessors of the device.
        tiles: tiles of rows, over all heads and the batch.
        most: blocks of keys that there may be.

    >>> splits_of(token_blocks(8, 64, 2), processors=132, tiles=8, most=17 + 1)
    18
    >>> splits_of(token_blocks(8, 64, 2), processors=132, tiles=8 * 64, most=17 + 1)
    1
    """
    return max(1, min(blocks.programs * processors // tiles, most))


def attention_launches(
    q: Tensor, cache: TokenCache, pattern: Pattern, splits: int | None = None
) -> tuple[Launch, Launch, Tensor]:
    """How `attention_kernel` and `merge_kernel` are called, and what the latter writes."""
    B, G, slots, H = cache.shape
    Q, N, ring_size = len(q) // B, q.shape[1] // H, cache.ring.shape[3]
    assert q.shape == (B * Q, N * H), (q.shape, cache.shape)
    assert Q in (1, pattern.K), (Q, pattern)
    rows, hidden = Q * N // G, cache.new.shape[3]
    blocks = token_blocks(rows, H, q.element_size())
    tiles = ceil(rows / blocks.rows)
    most = ceil(slots / blocks.keys) + ceil((ring_size + hidden) / blocks.keys)
    if splits is None:
        splits = splits_of(blocks, multiprocessors(q.device), B * G * tiles, most)
    parts = q.new_empty((B * G, splits, rows, H), dtype=torch.float32)
    lses = q.new_empty((B * G, splits, rows), dtype=torch.float32)
    out = torch.empty_like(q)
    # A kernel has no use for the address of what is empty.
    new = cache.new if hidden else cache.originals
    ring = cache.ring if ring_size else new
    constants = copies_of(pattern) | rule_of(pattern)
    constants |= {
        "FIRST": pattern.K - Q,
        "GROUPS": G,
        "SHARING": N // G,
        "H": H,
        "WIDTH": padded_head(H),
        "TOTAL": rows,
        "ROWS": blocks.rows,
        "KEYS": blocks.keys,
    }
    sizes = (B, slots, max(1, ring_size), splits)
    attention = Launch(
        (B * G, splits, tiles),
        (q, cache.originals, ring, new, cache.lengths, parts, lses, *sizes, H**-0.5 * LOG2_E.value),
        constants | {"PRECISION": "tf32" if q.element_size() == 2 else "ieee"},
        {"num_warps": blocks.warps, "num_stages": blocks.stages},
    )
    written = min(ring_size, hidden)
    merge = Launch(
        (B * G, ceil(rows / blocks.merged_rows) + ceil(written / COPIES_AT_ONCE)),
        (parts, lses, cache.lengths, out, new, ring, *sizes),
        constants
        | {
            "MERGED_ROWS": blocks.merged_rows,
            "MERGED_SPLITS": blocks.merged_splits,
            "COPIES": COPIES_AT_ONCE,
        },
        {"num_warps": 4, "num_stages": 1},
    )
    return attention, merge, out


@triton.jit
def _keys_of_tile(  # type: ignore[no-untyped-def]
    length, tile, slots,
    CACHED: tl.constexpr, HIDDEN: tl.constexpr, FIRST: tl.constexpr,
    SHARING: tl.constexpr, TOTAL: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    WINDOW: tl.constexpr, CHUNK: tl.constexpr, IN_TOKENS: tl.constexpr,
):  # fmt: skip
    """What a tile's rows see: slots of originals, and hidden copies from `low` to before `end`.

    With them, the number of blocks of originals, and of both.
    """
    last_row = tl.minimum(tile * ROWS + ROWS, TOTAL) - 1
    first, last = FIRST + tile * ROWS // SHARING, FIRST + last_row // SHARING
    cached = tl.minimum(length * CACHED + tl.minimum(last, CACHED - 1) + 1, slots)
    cached_blocks = tl.cdiv(cached, KEYS)
    low, end = length * HIDDEN, length * HIDDEN
    if HIDDEN > 0:
        end += last
        h = low + tl.maximum(first, 1) - 1
        # A tile of originals alone sees no hidden copy.
        first_hidden = first_seen(h, h, True, HIDDEN, WINDOW, CHUNK, IN_TOKENS, False)
        low = tl.where(last > 0, first_hidden, low)
    return cached, low, end, cached_blocks, cached_blocks + tl.cdiv(end - low, KEYS)


@triton.jit
def _row_offset(  # type: ignore[no-untyped-def]
    b, g, row, K: tl.constexpr, FIRST: tl.constexpr, GROUPS: tl.constexpr,
    SHARING: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    """Where a row of a key head lies in queries and in the output, (B*Q, N*H)."""
    query = b * ((K - FIRST) * GROUPS) + row // SHARING * GROUPS + g
    return (query * SHARING + row % SHARING) * H


@triton.jit
def _see_originals(  # type: ignore[no-untyped-def]
    peak, total, out, queries, originals, first_k, first_v, start, stop, cached, visible, scale,
    H: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Blocks `start` to before `stop` of a head's slots, of which there are `cached`.

    Its keys begin with vector `first_k` of `originals`, its values with `first_v`.
    """
    offset, column = tl.arange(0, KEYS), tl.arange(0, WIDTH)
    at = offset[:, None] * H + column[None, :]
    for block in range(start, stop):
        key = block * KEYS + offset
        loaded = (key < cached)[:, None] & (column < H)[None, :]
        k = originals + (first_k + block * KEYS) * H + at
        v = originals + (first_v + block * KEYS) * H + at
        seen = key[None, :] < visible[:, None]
        peak, total, out = see_keys(peak, total, out, queries, k, v, loaded, seen, scale, PRECISION)
    return peak, total, out


@triton.jit
def _see_hidden(  # type: ignore[no-untyped-def]
    peak, total, out, queries, ring_k, ring_v, new_k, new_v, start, stop, low, end, written,
    ring_size, copy, scale,
    HIDDEN: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr, IN_TOKENS: tl.constexpr,
    H: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Blocks `start` to before `stop` of hidden copies `low` to before `end`.

    Those from `written` on are the token's own.
    """
    offset, column = tl.arange(0, KEYS), tl.arange(0, WIDTH)
    h = written + copy - 1
    h_low = first_seen(h, h, True, HIDDEN, WINDOW, CHUNK, IN_TOKENS, False)
    for block in range(start, stop):
        key = low + block * KEYS + offset
        is_new = (key >= written)[:, None]
        at_new = (key - written)[:, None] * H + column[None, :]
        at_ring = (key % ring_size)[:, None] * H + column[None, :]
        k = tl.where(is_new, new_k + at_new, ring_k + at_ring)
        v = tl.where(is_new, new_v + at_new, ring_v + at_ring)
        loaded = (key < end)[:, None] & (column < H)[None, :]
        seen = (key[None, :] <= h[:, None]) & (key[None, :] >= h_low[:, None])
        seen = seen & (copy > 0)[:, None]
        peak, total, out = see_keys(peak, total, out, queries, k, v, loaded, seen, scale, PRECISION)
    return peak, total, out


@triton.jit(do_not_specialize=["batch", "slots", "ring_size", "splits"])
def attention_kernel(  # type: ignore[no-untyped-def]
    q, originals, ring, new, lengths, parts, lses, batch, slots, ring_size, splits, scale,
    K: tl.constexpr, CACHED: tl.constexpr, HIDDEN: tl.constexpr,
    WINDOW: tl.constexpr, CHUNK: tl.constexpr, IN_TOKENS: tl.constexpr,
    FIRST: tl.constexpr, GROUPS: tl.constexpr, SHARING: tl.constexpr,
    H: tl.constexpr, WIDTH: tl.constexpr, TOTAL: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)  # so that no offset overflows
    split, tile = tl.program_id(1), tl.program_id(2)
    b, g = head // GROUPS, head % GROUPS
    length = tl.load(lengths + b).to(tl.int32)
    cached, low, end, cached_blocks, blocks = _keys_of_tile(
        length, tile, slots, CACHED, HIDDEN, FIRST, SHARING, TOTAL, ROWS, KEYS, WINDOW, CHUNK,
        IN_TOKENS,
    )  # fmt: skip
    each = tl.cdiv(blocks, splits)
    start = split * each
    stop = tl.minimum(start + each, blocks)
    if start < stop:
        row = tile * ROWS + tl.arange(0, ROWS)
        column = tl.arange(0, WIDTH)
        is_row = row < TOTAL
        copy = FIRST + row // SHARING
        at = _row_offset(b, g, row, K, FIRST, GROUPS, SHARING, H)[:, None] + column[None, :]
        there = is_row[:, None] & (column < H)[None, :]
        queries = tl.load(q + at, mask=there, other=0.0)
        peak, total, out = nothing_seen(ROWS, WIDTH)
        value_head = head + batch * GROUPS
        peak, total, out = _see_originals(
            peak, total, out, queries, originals, head * slots, value_head * slots,
            start, tl.minimum(stop, cached_blocks), cached,
            length * CACHED + tl.minimum(copy, CACHED - 1) + 1, scale,
            H, WIDTH, KEYS, PRECISION,
        )  # fmt: skip
        if HIDDEN > 0:
            peak, total, out = _see_hidden(
                peak, total, out, queries,
                ring + head * ring_size * H, ring + value_head * ring_size * H,
                new + head * HIDDEN * H, new + value_head * HIDDEN * H,
                tl.maximum(start - cached_blocks, 0), stop - cached_blocks, low, end,
                length * HIDDEN, ring_size, copy, scale,
                HIDDEN, WINDOW, CHUNK, IN_TOKENS, H, WIDTH, KEYS, PRECISION,
            )  # fmt: skip
        out, lse = mean_and_lse(peak, total, out)
        part = (head * splits + split) * TOTAL + row
        tl.store(lses + part, lse, mask=is_row)
        tl.store(parts + part[:, None] * H + column[None, :], out, mask=there)


@triton.jit
def _merge_splits(  # type: ignore[no-untyped-def]
    parts, lses, head, splits, used, row, is_row, H: tl.constexpr, WIDTH: tl.constexpr,
    TOTAL: tl.constexpr, MERGED_ROWS: tl.constexpr, MERGED_SPLITS: tl.constexpr,
):  # fmt: skip
    """The output (MERGED_ROWS, WIDTH) of the first `used` splits together."""
    column = tl.arange(0, WIDTH)
    peak, total, out = nothing_seen(MERGED_ROWS, WIDTH)
    for first in range(0, used, MERGED_SPLITS):
        split = first + tl.arange(0, MERGED_SPLITS)
        there = (split < used)[:, None] & is_row[None, :]
        part = (head * splits + split)[:, None] * TOTAL + row[None, :]
        lse = tl.load(lses + part, mask=there, other=-float("inf"))
        outs = tl.load(
            parts + part[:, :, None] * H + column[None, None, :],
            mask=there[:, :, None] & (column < H)[None, None, :],
            other=0.0,
        )
        higher = tl.maximum(peak, tl.max(lse, 0))
        safe = tl.where(higher == -float("inf"), 0.0, higher)
        weights, kept = tl.exp2(lse - safe[None, :]), tl.exp2(peak - safe)
        out = out * kept[:, None] + tl.sum(weights[:, :, None] * outs, 0)
        total = total * kept + tl.sum(weights, 0)
        peak = higher
    out, _ = mean_and_lse(peak, total, out)
    return out


@triton.jit
def _write_ring(  # type: ignore[no-untyped-def]
    new, ring, head, length, value_heads, ring_size, program,
    HIDDEN: tl.constexpr, H: tl.constexpr, WIDTH: tl.constexpr, COPIES: tl.constexpr,
):  # fmt: skip
    """Write hidden copy number h into slot h % R; of more than R new ones, the last ones stay."""
    copy = tl.maximum(HIDDEN - ring_size, 0) + program * COPIES + tl.arange(0, COPIES)
    column = tl.arange(0, WIDTH)
    there = (copy < HIDDEN)[:, None] & (column < H)[None, :]
    slot = (length * HIDDEN + copy) % ring_size
    for part in tl.static_range(2):
        kept = head + part * value_heads
        source = (kept * HIDDEN + copy[:, None]) * H + column[None, :]
        target = (kept * ring_size + slot[:, None]) * H + column[None, :]
        tl.store(ring + target, tl.load(new + source, mask=there, other=0.0), mask=there)


@triton.jit(do_not_specialize=["batch", "slots", "ring_size", "splits"])
def merge_kernel(  # type: ignore[no-untyped-def]
    parts, lses, lengths, result, new, ring, batch, slots, ring_size, splits,
    K: tl.constexpr, CACHED: tl.constexpr, HIDDEN: tl.constexpr,
    WINDOW: tl.constexpr, CHUNK: tl.constexpr, IN_TOKENS: tl.constexpr,
    FIRST: tl.constexpr, GROUPS: tl.constexpr, SHARING: tl.constexpr,
    H: tl.constexpr, WIDTH: tl.constexpr, TOTAL: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, MERGED_ROWS: tl.constexpr, MERGED_SPLITS: tl.constexpr,
    COPIES: tl.constexpr,
):  # fmt: skip
    head, program = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, g = head // GROUPS, head % GROUPS
    length = tl.load(lengths + b).to(tl.int32)
    merging: tl.constexpr = (TOTAL + MERGED_ROWS - 1) // MERGED_ROWS
    if program < merging:
        # How many splits had something to do, as the attention kernel found.
        _, _, _, _, blocks = _keys_of_tile(
            length, program * MERGED_ROWS // ROWS, slots, CACHED, HIDDEN, FIRST, SHARING, TOTAL,
            ROWS, KEYS, WINDOW, CHUNK, IN_TOKENS,
        )  # fmt: skip
        used = tl.cdiv(blocks, tl.cdiv(blocks, splits))
        row = program * MERGED_ROWS + tl.arange(0, MERGED_ROWS)
        column = tl.arange(0, WIDTH)
        is_row = row < TOTAL
        out = _merge_splits(
            parts, lses, head, splits, used, row, is_row, H, WIDTH, TOTAL, MERGED_ROWS,
            MERGED_SPLITS,
        )  # fmt: skip
        at = _row_offset(b, g, row, K, FIRST, GROUPS, SHARING, H)[:, None] + column[None, :]
        mask = is_row[:, None] & (column < H)[None, :]
        tl.store(result + at, out.to(result.dtype.element_ty), mask=mask)
    elif HIDDEN > 0:
        _write_ring(
            new, ring, head, length, batch * GROUPS, ring_size, program - merging,
            HIDDEN, H, WIDTH, COPIES,
        )  # fmt: skip
