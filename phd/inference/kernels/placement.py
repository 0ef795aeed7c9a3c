"""From the product of queries, keys and values to attention's input, in one kernel.

qkv (B*K, (N+2G)*H)     q1 q2 q3 q4 | k1 k2 | v1 v2        row b*K + s: copy s of row b
program (row, 0)        norm, RoPE  |       |              -> q
program (row, 1)                    | norm, RoPE           -> the cache, or `new`
program (row, 2)                            | norm         -> the cache, or `new`
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from phd.attention.blocks import Launch
from phd.block import Attention
from phd.inference.kernels.token_cache import TokenCache, copies_of
from phd.pattern import Pattern
from phd.rope import Rope

VALUES_PER_WARP = 512  # 16 for each thread


class QkvNorms(NamedTuple):
    """The norms of queries, keys and values; `phd.block.Attention` draws them.

    Attributes:
        q, k, v: weights; None: no norm.
        eps: what is added to the mean square.
        per_head: each head is normalised, by weights of length H; else a whole projection.
        query_gain: what queries are multiplied by then.
    """

    q: Tensor | None
    k: Tensor | None
    v: Tensor | None
    eps: float
    per_head: bool
    query_gain: float = 1.0

    @classmethod
    def of(cls, attention: Attention) -> "QkvNorms":
        """Those of a layer."""
        norms = attention.q_norm, attention.k_norm, attention.v_norm
        eps = 0.0 if norms[0] is None else norms[0].eps
        q, k, v = (None if norm is None else norm.weight for norm in norms)
        return cls(q, k, v, eps, attention.norm_per_head, attention.query_gain)


def place_token(
    qkv: Tensor,
    norms: QkvNorms,
    rope: Rope,
    cache: TokenCache,
    pattern: Pattern,
    *,
    last_copy_only: bool = False,
) -> Tensor:
    """Normalise and rotate one new token of each row, and write its keys and values.

    Everything is computed in float32 and rounded once. A row that has no room left writes nothing.

    Args:
        qkv: (parts, B*K, (N+2G)*H), of which the projections are the sum; the copies of a row one
            after another.
        norms: of `qkv`.
        rope: its tables; the positions are `cache.lengths`.
        cache: gets cached copies in `originals`, from slot `lengths` on, and the others in `new`.
        last_copy_only: the last layer's, which has queries of the last copy alone.

    Returns:
        q (B*Q, N*H) as the cache, with Q = K or 1.
    """
    cache.check(pattern)
    B, G, _, H = cache.shape
    N = qkv.shape[2] // H - 2 * G
    assert qkv.is_contiguous(), qkv.stride()
    assert qkv.shape[1:] == (B * pattern.K, (N + 2 * G) * H), (qkv.shape, cache.shape, pattern)
    q = cache.originals.new_empty(B * (1 if last_copy_only else pattern.K), N * H)
    launch = placement_launch(qkv, norms, rope, cache, pattern, q)
    placement_kernel[launch.grid](*launch.arguments, **launch.constants, **launch.options)
    return q


def placement_launch(
    qkv: Tensor, norms: QkvNorms, rope: Rope, cache: TokenCache, pattern: Pattern, q: Tensor
) -> Launch:
    """How `placement_kernel` is called; arguments as in `place_token`, which returns q."""
    B, G, slots, H = cache.shape
    N, rows = q.shape[1] // H, qkv.shape[1]
    flattened = rope.config.copy_positions == "flattened"
    constants = copies_of(pattern) | {
        "PARTS": len(qkv),
        "HEADS": N,
        "GROUPS": G,
        # Filled up to powers of 2, which blocks have to be.
        "HEADS_2": triton.next_power_of_2(N),
        "GROUPS_2": triton.next_power_of_2(G),
        "H": H,
        "HALF": triton.next_power_of_2(H // 2),
        "PER_HEAD": norms.per_head,
        "EVERY_COPY": len(q) == rows,
        "FLATTENED": flattened,
    }
    # Without hidden copies there is no `new`, and the kernel has no use for its address.
    new = cache.new if cache.new.numel() else cache.originals
    tensors = (qkv, norms.q, norms.k, norms.v, rope.cos, rope.sin, cache.lengths, q)
    values = constants["HEADS_2"] * constants["HALF"] * 2
    warps = min(8, max(1, triton.next_power_of_2(values // VALUES_PER_WARP)))
    return Launch(
        (rows, 3),
        (*tensors, cache.originals, new, B, slots, len(rope.cos), norms.eps, norms.query_gain),
        constants,
        {"num_warps": warps, "num_stages": 1},
    )


@triton.jit
def _two_halves(  # type: ignore[no-untyped-def]
    x, part_stride, weight, eps,
    PARTS: tl.constexpr, HEADS: tl.constexpr, FILLED: tl.constexpr,
    H: tl.constexpr, HALF: tl.constexpr, PER_HEAD: tl.constexpr,
):  # fmt: skip
    """The halves of HEADS heads of a projection, normalised: two (FILLED, HALF)."""
    column = tl.arange(0, HALF)
    head = tl.arange(0, FILLED)[:, None]
    there = (head < HEADS) & (column < H // 2)[None, :]
    at = x + head * H + column[None, :]
    first = tl.load(at, mask=there, other=0.0).to(tl.float32)
    second = tl.load(at + H // 2, mask=there, other=0.0).to(tl.float32)
    for _ in tl.static_range(1, PARTS):
        at += part_stride
        first += tl.load(at, mask=there, other=0.0).to(tl.float32)
        second += tl.load(at + H // 2, mask=there, other=0.0).to(tl.float32)
    if weight is not None:
        square = tl.sum(first * first + second * second, 1, keep_dims=True)
        if PER_HEAD:
            scale = tl.rsqrt(square / H + eps)
            at = weight + column[None, :]
            is_weight = (column < H // 2)[None, :]
        else:
            scale = tl.rsqrt(tl.sum(square, 0, keep_dims=True) / (HEADS * H) + eps)
            at = weight + head * H + column[None, :]
            is_weight = there
        first *= scale * tl.load(at, mask=is_weight, other=0.0).to(tl.float32)
        second *= scale * tl.load(at + H // 2, mask=is_weight, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def _rotated(first, second, cos, sin, H: tl.constexpr, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    """Both halves rotated by rows of RoPE's tables, which hold the sign of the sine."""
    column = tl.arange(0, HALF)
    there = column < H // 2
    cos_1 = tl.load(cos + column, mask=there, other=0.0)[None, :]
    cos_2 = tl.load(cos + H // 2 + column, mask=there, other=0.0)[None, :]
    sin_1 = tl.load(sin + column, mask=there, other=0.0)[None, :]
    sin_2 = tl.load(sin + H // 2 + column, mask=there, other=0.0)[None, :]
    return first * cos_1 + second * sin_1, second * cos_2 + first * sin_2


@triton.jit
def _store(  # type: ignore[no-untyped-def]
    base, head_stride, first, second, writes,
    HEADS: tl.constexpr, FILLED: tl.constexpr, H: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, HALF)
    head = tl.arange(0, FILLED)[:, None]
    there = (head < HEADS) & (column < H // 2)[None, :] & writes
    at = base + head * head_stride + column[None, :]
    tl.store(at, first.to(base.dtype.element_ty), mask=there)
    tl.store(at + H // 2, second.to(base.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["batch", "slots", "positions"])
def placement_kernel(  # type: ignore[no-untyped-def]
    qkv, q_weight, k_weight, v_weight, cos, sin, lengths, q, originals, new,
    batch, slots, positions, eps, query_gain,
    K: tl.constexpr, CACHED: tl.constexpr, HIDDEN: tl.constexpr, PARTS: tl.constexpr,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, HEADS_2: tl.constexpr, GROUPS_2: tl.constexpr,
    H: tl.constexpr, HALF: tl.constexpr, PER_HEAD: tl.constexpr,
    EVERY_COPY: tl.constexpr, FLATTENED: tl.constexpr,
):  # fmt: skip
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, copy = row // K, row % K
    length = tl.load(lengths + b)
    position = length * K + copy if FLATTENED else length
    # A full row's position may be past the tables. Nothing comes of what it gets here.
    position = tl.minimum(position, positions - 1)
    cos += position * H
    sin += position * H
    x = qkv + row * ((HEADS + 2 * GROUPS) * H)
    part_stride = tl.num_programs(0).to(tl.int64) * ((HEADS + 2 * GROUPS) * H)
    if part == 0:
        if EVERY_COPY | (copy == K - 1):
            first, second = _two_halves(
                x, part_stride, q_weight, eps, PARTS, HEADS, HEADS_2, H, HALF, PER_HEAD
            )  # fmt: skip
            first, second = _rotated(first, second, cos, sin, H, HALF)
            at = q + (row if EVERY_COPY else b) * (HEADS * H)
            first, second = first * query_gain, second * query_gain
            _store(at, H, first, second, True, HEADS, HEADS_2, H, HALF)
    else:
        x += (HEADS + (part - 1) * GROUPS) * H
        if part == 1:
            first, second = _two_halves(
                x, part_stride, k_weight, eps, PARTS, GROUPS, GROUPS_2, H, HALF, PER_HEAD
            )  # fmt: skip
            first, second = _rotated(first, second, cos, sin, H, HALF)
        else:
            first, second = _two_halves(
                x, part_stride, v_weight, eps, PARTS, GROUPS, GROUPS_2, H, HALF, PER_HEAD
            )  # fmt: skip
        group = ((part - 1) * batch + b) * GROUPS
        if copy < CACHED:
            slot = length * CACHED + copy
            at = originals + (group * slots + slot) * H
            stride = slots.to(tl.int64) * H
            _store(at, stride, first, second, slot < slots, GROUPS, GROUPS_2, H, HALF)
        else:
            at = new + (group * HIDDEN + copy - CACHED) * H
            _store(at, HIDDEN * H, first, second, True, GROUPS, GROUPS_2, H, HALF)
