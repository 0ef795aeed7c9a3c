"""Rules 2 and 3 on CUDA: attention among hidden copies as one Triton kernel each way.

    forward:   a program has a tile of hidden copies of some query heads of one key head
               rows: head 0: h0 h1 h2 ...   head 1: h0 h1 h2 ...   keys: first_seen(h0) ... last h
    backward:  a program has a tile of hidden keys of one key head, and all of its query heads

    keys      [ before the tile | tile ]             what the tile's queries see gives dq
    queries                     [ tile | after it ]  those that see the tile's keys give dk and dv

Hidden copy h(n, s) = n*(K-1) + s-1 sees an interval of hidden copies that ends with itself, and the
interval's first one never falls as h grows, over documents too. So consecutive queries see one
interval. The forward's online softmax (FlashAttention, arXiv 2205.14135) starts from rule 1's
result, with its log-sum-exp as the peak, 1 as the sum and its output, so the merge is free. The
backward works on the merged result and writes every number once, so it has no atomic additions and
gives the same bits every time.
"""

from collections.abc import Callable
from math import ceil
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from phd.attention.blocks import (
    ENDLESS,
    Launch,
    LocalRule,
    backward_blocks,
    forward_blocks,
    has_kernels,
    padded_head,
)
from phd.pattern import Pattern
from phd.segments import Segments

# exp(x) = 2^(x log2 e): the hardware has an instruction for powers of 2.
LOG2_E = tl.constexpr(1.4426950408889634)


def merge_hidden(
    inputs: tuple[Tensor, Tensor, Tensor],
    result: tuple[Tensor, Tensor],
    pattern: Pattern,
    segments: Segments | None,
) -> None:
    """Add rules 2 and 3 to rule 1's result: updates (out, lse) of the hidden queries in place.

    Args:
        inputs: q (B, N, Q, T, H) with Q = K or 1, and k, v (B, G, K, T, H).
        result: out as q, and lse float32 (B, N, Q, T).
        pattern: one whose rule is `hidden`.
        segments: the documents of each row.
    """
    rule = LocalRule.of(pattern)
    starts = None if segments is None else segments.starts
    _merge(*inputs, *result, starts, rule.window, rule.chunk, rule.in_tokens)


class Suffix(NamedTuple):
    """The tokens at the end of a row that queries and hidden keys belong to.

    row       0  1  2  3  4  5  6  7
    keys                  4  5  6  7        first_key = 4
    queries                     6  7        first_query = 6
    """

    first_query: int
    first_key: int


def merge_suffix(
    inputs: tuple[Tensor, Tensor, Tensor],
    result: tuple[Tensor, Tensor],
    pattern: Pattern,
    suffix: Suffix,
) -> None:
    """Add rules 2 and 3 to rule 1's result of a row's last tokens: updates (out, lse) in place.

    Args:
        inputs: q (B, N, Q, queries, H) with Q = K - 1, or 1: the last copy, and k, v
            (B, G, K - 1, keys, H). Both are of hidden copies alone.
        result: out as q, and lse float32 (B, N, Q, queries).
        pattern: one whose rule is `hidden`.
        suffix: where they begin. The keys are all that the queries see, at least.
    """
    assert suffix.first_key <= pattern.first_influential_token(suffix.first_query, layers=1)
    launch = forward_launch(inputs, result, None, LocalRule.of(pattern), suffix)
    forward_kernel[launch.grid](*launch.arguments, **launch.constants, **launch.options)


def add_hidden_gradients(
    gradients: tuple[Tensor, Tensor, Tensor],
    inputs: tuple[Tensor, Tensor, Tensor],
    result: tuple[Tensor, Tensor, Tensor],
    pattern: Pattern,
    segments: Segments | None,
) -> None:
    """Rules 2 and 3's share of the gradients.

    Args:
        gradients: dq, dk, dv, which hold rule 1's share. This adds to the dq of hidden queries,
            and sets dk and dv of hidden copies, which only hidden queries see.
        inputs, pattern, segments: as in `merge_hidden`.
        result: the merged out and lse, and dout.
    """
    rule = LocalRule.of(pattern)
    starts = None if segments is None else segments.starts
    _add_gradients(
        *gradients, *inputs, *result, starts, rule.window, rule.chunk, rule.in_tokens
    )  # fmt: skip


# The kernels


@triton.jit
def _start_of(starts, h, valid, HIDDEN: tl.constexpr, DOCUMENTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first hidden copy of the document that hidden copy h belongs to."""
    if DOCUMENTS:
        start = tl.load(starts + h // HIDDEN, mask=valid, other=0).to(tl.int32) * HIDDEN
    else:
        start = h * 0
    return start


@triton.jit
def first_seen(  # type: ignore[no-untyped-def]
    starts, h, valid,
    HIDDEN: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr, IN_TOKENS: tl.constexpr,
    DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """The first hidden copy that h sees."""
    start = _start_of(starts, h, valid, HIDDEN, DOCUMENTS)
    token = (h - start) // HIDDEN
    if IN_TOKENS:
        low = (token - (WINDOW - 1)) * HIDDEN
    else:
        low = tl.minimum(h - start - (WINDOW - 1), token * HIDDEN)
    if CHUNK > 0:
        low = tl.maximum(low, token // CHUNK * CHUNK * HIDDEN)
    return start + tl.maximum(low, 0)


@triton.jit
def _last_seeing(  # type: ignore[no-untyped-def]
    starts, h,
    HIDDEN: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr, IN_TOKENS: tl.constexpr,
    DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """The last hidden copy that would see h, if its document had no end."""
    start = _start_of(starts, h, True, HIDDEN, DOCUMENTS)
    token = (h - start) // HIDDEN
    if IN_TOKENS:
        last = (token + WINDOW) * HIDDEN - 1
    else:
        last = tl.maximum(h - start + (WINDOW - 1), (token + 1) * HIDDEN - 1)
    if CHUNK > 0:
        last = tl.minimum(last, (token // CHUNK + 1) * CHUNK * HIDDEN - 1)
    return start + last


@triton.jit
def _hidden_copy(query, HIDDEN: tl.constexpr, ASKING: tl.constexpr):  # type: ignore[no-untyped-def]
    """The hidden copy that a query is: every one is, or the last one of each token."""
    return query if ASKING == HIDDEN else query * HIDDEN + (HIDDEN - 1)


@triton.jit
def _offsets(h, stride_copy, stride_token, HIDDEN: tl.constexpr, COPIES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where hidden copy h lies in one head, whose tensor has `COPIES` copies of each token."""
    # In 64 bits: a tensor may have more than 2^31 numbers.
    at = (h // HIDDEN).to(tl.int64) * stride_token
    if COPIES > 1:
        at += (h % HIDDEN + (COPIES - HIDDEN)).to(tl.int64) * stride_copy
    return at


@triton.jit
def _load(base, at, valid, H: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Vectors of length H, filled up to WIDTH with zeros."""
    column = tl.arange(0, WIDTH)
    mask = valid[:, None]
    if H < WIDTH:
        mask = mask & (column < H)[None, :]
    return tl.load(base + at[:, None] + column[None, :], mask=mask, other=0.0)


@triton.jit
def _store(base, at, x, valid, H: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    column = tl.arange(0, WIDTH)
    mask = valid[:, None]
    if H < WIDTH:
        mask = mask & (column < H)[None, :]
    tl.store(base + at[:, None] + column[None, :], x.to(base.dtype.element_ty), mask=mask)


# One compiled kernel serves all places in a row.
@triton.jit(do_not_specialize=["first_query", "first_key"])
def forward_kernel(  # type: ignore[no-untyped-def]
    q, k, v, out, lse, starts,
    q_b, q_n, q_c, q_t, k_b, k_g, k_c, k_t, v_b, v_g, v_c, v_t,
    o_b, o_n, o_c, o_t, l_b, l_n, l_c, l_t,
    groups, tokens, scale, first_query, first_key,
    SHARING: tl.constexpr, HIDDEN: tl.constexpr, ASKING: tl.constexpr, COPIES: tl.constexpr,
    WINDOW: tl.constexpr, CHUNK: tl.constexpr, IN_TOKENS: tl.constexpr, DOCUMENTS: tl.constexpr,
    H: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, QUERIES: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr,
    SUFFIX: tl.constexpr,
):  # fmt: skip
    # With SUFFIX h, low and key are numbers in the row, of which q and k have the end.
    key_copies: tl.constexpr = HIDDEN if SUFFIX else HIDDEN + 1
    blocks: tl.constexpr = (SHARING + HEADS - 1) // HEADS
    program = tl.program_id(1)
    b, g = (program // blocks // groups).to(tl.int64), (program // blocks % groups).to(tl.int64)
    total = tokens * ASKING
    begin = tl.program_id(0) * QUERIES
    stop = tl.minimum(begin + QUERIES, total)
    row = tl.arange(0, ROWS)
    query = begin + row % QUERIES
    head = program % blocks * HEADS + row // QUERIES
    valid = (query < stop) & (row // QUERIES < HEADS) & (head < SHARING)
    starts += b * tokens

    own = _hidden_copy(query, HIDDEN, ASKING)
    h = own + first_query if SUFFIX else own
    low = first_seen(starts, h, valid, HIDDEN, WINDOW, CHUNK, IN_TOKENS, DOCUMENTS)
    head = g * SHARING + head  # of all N
    q_at = head * q_n + _offsets(own, q_c, q_t, HIDDEN, COPIES)
    out_at = head * o_n + _offsets(own, o_c, o_t, HIDDEN, COPIES)
    lse_at = head * l_n + _offsets(own, l_c, l_t, HIDDEN, COPIES)
    queries = _load(q + b * q_b, q_at, valid, H, WIDTH)
    mixed = _load(out + b * o_b, out_at, valid, H, WIDTH).to(tl.float32)
    peak = tl.load(lse + b * l_b + lse_at, mask=valid, other=0.0) * LOG2_E
    share = tl.full([ROWS], 1.0, tl.float32)

    first = _hidden_copy(begin, HIDDEN, ASKING)
    end = _hidden_copy(stop - 1, HIDDEN, ASKING) + 1
    if SUFFIX:
        first += first_query
        end += first_query
    first = first_seen(starts, first, True, HIDDEN, WINDOW, CHUNK, IN_TOKENS, DOCUMENTS)
    k += b * k_b + g * k_g
    v += b * v_b + g * v_g
    for near in range(first, end, KEYS):
        key = near + tl.arange(0, KEYS)
        there = key < end
        at = key - first_key if SUFFIX else key
        keys = _load(k, _offsets(at, k_c, k_t, HIDDEN, key_copies), there, H, WIDTH)
        values = _load(v, _offsets(at, v_c, v_t, HIDDEN, key_copies), there, H, WIDTH)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * (scale * LOG2_E)
        seen = (key[None, :] <= h[:, None]) & (key[None, :] >= low[:, None])
        scores = tl.where(seen, scores, -float("inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        kept = tl.exp2(peak - higher)
        weights = tl.exp2(scores - higher[:, None])
        share = share * kept + tl.sum(weights, 1)
        mixed = tl.dot(
            weights.to(values.dtype), values, mixed * kept[:, None], input_precision=PRECISION
        )
        peak = higher
    _store(out + b * o_b, out_at, mixed / share[:, None], valid, H, WIDTH)
    tl.store(lse + b * l_b + lse_at, (peak + tl.log2(share)) / LOG2_E, mask=valid)


@triton.jit
def _query_rows(  # type: ignore[no-untyped-def]
    q, out, lse, dout, q_at, out_at, lse_at, dout_at, valid, H: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """q, dout, the log-sum-exp in base 2, and dout . out, the mean of dp over all that is seen."""
    queries = _load(q, q_at, valid, H, WIDTH)
    douts = _load(dout, dout_at, valid, H, WIDTH)
    outs = _load(out, out_at, valid, H, WIDTH)
    base_2 = tl.load(lse + lse_at, mask=valid, other=0.0) * LOG2_E
    return queries, douts, base_2, tl.sum(douts.to(tl.float32) * outs.to(tl.float32), 1)


@triton.jit
def _weights(  # type: ignore[no-untyped-def]
    queries, douts, base_2, delta, h, low, valid, keys, values, key, there, scale,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """p and ds/scale of queries by keys, in the dtype of the queries."""
    scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * (scale * LOG2_E)
    seen = (key[None, :] <= h[:, None]) & (key[None, :] >= low[:, None])
    seen = seen & valid[:, None] & there[None, :]
    p = tl.exp2(tl.where(seen, scores - base_2[:, None], -float("inf")))
    dp = tl.dot(douts, tl.trans(values), input_precision=PRECISION)
    ds = p * (dp - delta[:, None])
    return p.to(queries.dtype), ds.to(queries.dtype)


@triton.jit
def backward_kernel(  # type: ignore[no-untyped-def]
    dq, dk, dv, q, k, v, out, lse, dout, starts,
    dq_b, dq_n, dq_c, dq_t, dk_b, dk_g, dk_c, dk_t, dv_b, dv_g, dv_c, dv_t,
    q_b, q_n, q_c, q_t, k_b, k_g, k_c, k_t, v_b, v_g, v_c, v_t,
    o_b, o_n, o_c, o_t, l_b, l_n, l_c, l_t, do_b, do_n, do_c, do_t,
    groups, tokens, scale,
    SHARING: tl.constexpr, HIDDEN: tl.constexpr, ASKING: tl.constexpr, COPIES: tl.constexpr,
    WINDOW: tl.constexpr, CHUNK: tl.constexpr, IN_TOKENS: tl.constexpr, DOCUMENTS: tl.constexpr,
    H: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, QUERIES: tl.constexpr, TILE: tl.constexpr, KEYS: tl.constexpr,
    HALO: tl.constexpr,
):  # fmt: skip
    b, g = (tl.program_id(1) // groups).to(tl.int64), (tl.program_id(1) % groups).to(tl.int64)
    begin = tl.program_id(0) * TILE
    stop = tl.minimum(begin + TILE, tokens * HIDDEN)
    starts += b * tokens
    dq += b * dq_b + g * SHARING * dq_n
    q += b * q_b + g * SHARING * q_n
    out += b * o_b + g * SHARING * o_n
    lse += b * l_b + g * SHARING * l_n
    dout += b * do_b + g * SHARING * do_n
    k += b * k_b + g * k_g
    v += b * v_b + g * v_g
    key = begin + tl.arange(0, KEYS)
    there = key < stop
    keys = _load(k, _offsets(key, k_c, k_t, HIDDEN, HIDDEN + 1), there, H, WIDTH)
    values = _load(v, _offsets(key, v_c, v_t, HIDDEN, HIDDEN + 1), there, H, WIDTH)
    key_gradient = tl.zeros([KEYS, WIDTH], tl.float32)
    value_gradient = tl.zeros([KEYS, WIDTH], tl.float32)
    # The tile's queries are those that are hidden copies of the tile.
    first_query, past_query = begin, stop
    if ASKING < HIDDEN:
        first_query, past_query = begin // HIDDEN, stop // HIDDEN
    first = begin
    if (HALO > 0) & (first_query < past_query):
        first = _hidden_copy(first_query, HIDDEN, ASKING)
        first = first_seen(starts, first, True, HIDDEN, WINDOW, CHUNK, IN_TOKENS, DOCUMENTS)

    for block in range((SHARING * QUERIES + ROWS - 1) // ROWS):
        row = block * ROWS + tl.arange(0, ROWS)
        query, head = first_query + row % QUERIES, (row // QUERIES).to(tl.int64)
        valid = (query < past_query) & (head < SHARING)
        h = _hidden_copy(query, HIDDEN, ASKING)
        low = first_seen(starts, h, valid, HIDDEN, WINDOW, CHUNK, IN_TOKENS, DOCUMENTS)
        queries, douts, base_2, delta = _query_rows(
            q, out, lse, dout,
            head * q_n + _offsets(h, q_c, q_t, HIDDEN, COPIES),
            head * o_n + _offsets(h, o_c, o_t, HIDDEN, COPIES),
            head * l_n + _offsets(h, l_c, l_t, HIDDEN, COPIES),
            head * do_n + _offsets(h, do_c, do_t, HIDDEN, COPIES),
            valid, H, WIDTH,
        )  # fmt: skip
        p, ds = _weights(
            queries, douts, base_2, delta, h, low, valid, keys, values, key, there, scale, PRECISION
        )
        value_gradient = tl.dot(tl.trans(p), douts, value_gradient, input_precision=PRECISION)
        key_gradient = tl.dot(tl.trans(ds), queries, key_gradient, input_precision=PRECISION)
        query_gradient = tl.dot(ds, keys, input_precision=PRECISION)
        if HALO > 0:  # keys before the tile
            for near in range(first, begin, HALO):
                earlier = near + tl.arange(0, HALO)
                before = earlier < begin
                k_at = _offsets(earlier, k_c, k_t, HIDDEN, HIDDEN + 1)
                v_at = _offsets(earlier, v_c, v_t, HIDDEN, HIDDEN + 1)
                earlier_keys = _load(k, k_at, before, H, WIDTH)
                earlier_values = _load(v, v_at, before, H, WIDTH)
                _, earlier_ds = _weights(
                    queries, douts, base_2, delta, h, low, valid,
                    earlier_keys, earlier_values, earlier, before, scale, PRECISION,
                )  # fmt: skip
                query_gradient = tl.dot(
                    earlier_ds, earlier_keys, query_gradient, input_precision=PRECISION
                )
        dq_at = head * dq_n + _offsets(h, dq_c, dq_t, HIDDEN, COPIES)
        rule_1 = _load(dq, dq_at, valid, H, WIDTH).to(tl.float32)
        _store(dq, dq_at, rule_1 + query_gradient * scale, valid, H, WIDTH)

    if HALO > 0:  # queries after the tile
        end = _last_seeing(starts, stop - 1, HIDDEN, WINDOW, CHUNK, IN_TOKENS, DOCUMENTS) + 1
        if ASKING < HIDDEN:
            end = end // HIDDEN
        end = tl.minimum(end, tokens * ASKING)
        for later in range(past_query, end, HALO):
            for block in range((SHARING * HALO + ROWS - 1) // ROWS):
                row = block * ROWS + tl.arange(0, ROWS)
                query, head = later + row % HALO, (row // HALO).to(tl.int64)
                valid = (query < end) & (head < SHARING)
                h = _hidden_copy(query, HIDDEN, ASKING)
                low = first_seen(starts, h, valid, HIDDEN, WINDOW, CHUNK, IN_TOKENS, DOCUMENTS)
                valid = valid & (low < stop)  # those of the next document are not read
                queries, douts, base_2, delta = _query_rows(
                    q, out, lse, dout,
                    head * q_n + _offsets(h, q_c, q_t, HIDDEN, COPIES),
                    head * o_n + _offsets(h, o_c, o_t, HIDDEN, COPIES),
                    head * l_n + _offsets(h, l_c, l_t, HIDDEN, COPIES),
                    head * do_n + _offsets(h, do_c, do_t, HIDDEN, COPIES),
                    valid, H, WIDTH,
                )  # fmt: skip
                p, ds = _weights(
                    queries, douts, base_2, delta, h, low, valid, keys, values, key, there, scale,
                    PRECISION,
                )  # fmt: skip
                value_gradient = tl.dot(
                    tl.trans(p), douts, value_gradient, input_precision=PRECISION
                )
                key_gradient = tl.dot(
                    tl.trans(ds), queries, key_gradient, input_precision=PRECISION
                )
    dk_at = b * dk_b + g * dk_g + _offsets(key, dk_c, dk_t, HIDDEN, HIDDEN + 1)
    dv_at = b * dv_b + g * dv_g + _offsets(key, dv_c, dv_t, HIDDEN, HIDDEN + 1)
    _store(dk, dk_at, key_gradient * scale, there, H, WIDTH)
    _store(dv, dv_at, value_gradient, there, H, WIDTH)


# Launches


def forward_launch(
    inputs: tuple[Tensor, ...],
    result: tuple[Tensor, ...],
    starts: Tensor | None,
    rule: LocalRule,
    suffix: Suffix | None = None,
) -> Launch:
    """How `forward_kernel` is called; arguments as in `merge_hidden` or `merge_suffix`."""
    q, k, _ = inputs
    B, N, Q, T, H = q.shape
    G, asking = k.shape[1], min(Q, rule.hidden)
    blocks = forward_blocks(rule, H, q.element_size(), asking, N // G)
    constants = _constants(q, k, starts, rule) | blocks.constants
    first_query, first_key = (rule.hidden * token for token in suffix or (0, 0))
    sizes = G, T, H**-0.5, first_query, first_key
    return Launch(
        (ceil(T * asking / blocks.queries), B * G * ceil(N // G / blocks.heads)),
        _arguments((*inputs, *result), q if starts is None else starts, sizes),
        constants | {"SUFFIX": suffix is not None},
        blocks.options,
    )


def backward_launch(
    gradients: tuple[Tensor, ...],
    inputs: tuple[Tensor, ...],
    result: tuple[Tensor, ...],
    starts: Tensor | None,
    rule: LocalRule,
) -> Launch:
    """How `backward_kernel` is called; arguments as in `add_hidden_gradients`."""
    q, k, _ = inputs
    B, N, Q, T, H = q.shape
    G, asking = k.shape[1], min(Q, rule.hidden)
    blocks = backward_blocks(rule, H, q.element_size(), asking, N // G, starts is not None)
    tensors = (*gradients, *inputs, *result)
    return Launch(
        (ceil(T * rule.hidden / blocks.tile), B * G),
        _arguments(tensors, q if starts is None else starts, (G, T, H**-0.5)),
        _constants(q, k, starts, rule) | blocks.constants,
        blocks.options,
    )


def _arguments(
    tensors: tuple[Tensor, ...], starts: Tensor, sizes: tuple[int | float, ...]
) -> tuple[Any, ...]:
    strides: list[int] = []
    for x in tensors:
        assert x.dim() == 4 or x.stride(4) == 1, x.stride()
        strides += x.stride()[:4]
    return *tensors, starts, *strides, *sizes


def _constants(q: Tensor, k: Tensor, starts: Tensor | None, rule: LocalRule) -> dict[str, Any]:
    _, N, Q, T, H = q.shape
    assert has_kernels(q.dtype, H), (q.dtype, H)
    assert rule.hidden * T < ENDLESS, (rule, T)
    return {
        "SHARING": N // k.shape[1],
        "HIDDEN": rule.hidden,
        "ASKING": min(Q, rule.hidden),
        "COPIES": Q,
        "WINDOW": rule.window,
        "CHUNK": rule.chunk,
        "IN_TOKENS": rule.in_tokens,
        "DOCUMENTS": starts is not None,
        "H": H,
        "WIDTH": padded_head(H),
        # A product in float32 as three in TF32: as exact to 1e-6, and on tensor cores. Without them
        # a kernel takes 20 s to compile and spills 50 kB.
        "PRECISION": "tf32x3" if q.dtype == torch.float32 else "tf32",
    }


# Triton's interpreter needs the numbers in tensors, so nothing may trace into it.
IS_INTERPRETED = not isinstance(forward_kernel, triton.JITFunction)


def _operator(name: str, mutates: tuple[str, ...]) -> Callable[[Callable[..., None]], Any]:
    """An operator whose kernel torch.compile sees, or a closed one in the interpreter."""
    if not IS_INTERPRETED:
        return torch.library.triton_op(name, mutates_args=mutates)

    def closed(function: Callable[..., None]) -> Any:
        operator = torch.library.custom_op(name, function, mutates_args=mutates)
        operator.register_fake(lambda *_: None)
        return operator

    return closed


@_operator("phd::merge_hidden", ("out", "lse"))
def _merge(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    starts: Tensor | None,
    window: int,
    chunk: int,
    in_tokens: bool,
) -> None:
    rule = LocalRule(k.shape[2] - 1, window, chunk, in_tokens)
    launch = forward_launch((q, k, v), (out, lse), starts, rule)
    kernel = forward_kernel if IS_INTERPRETED else wrap_triton(forward_kernel)
    kernel[launch.grid](*launch.arguments, **launch.constants, **launch.options)


@_operator("phd::add_hidden_gradients", ("dq", "dk", "dv"))
def _add_gradients(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    starts: Tensor | None,
    window: int,
    chunk: int,
    in_tokens: bool,
) -> None:
    rule = LocalRule(k.shape[2] - 1, window, chunk, in_tokens)
    launch = backward_launch((dq, dk, dv), (q, k, v), (out, lse, dout), starts, rule)
    kernel = backward_kernel if IS_INTERPRETED else wrap_triton(backward_kernel)
    kernel[launch.grid](*launch.arguments, **launch.constants, **launch.options)
