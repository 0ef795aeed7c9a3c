"""Attention over some keys at a time, for the kernels whose programs share a row's keys.

    keys         | block 0 | block 1 | block 2 |
    peak         the highest score so far, in base 2
    total, out   the sums of 2^(score - peak), and of the same times the values

(Online softmax: FlashAttention, arXiv 2205.14135, section 3.1.)
"""

import triton
import triton.language as tl

# exp(x) = 2^(x log2 e): the hardware has an instruction for powers of 2.
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def nothing_seen(ROWS: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """(peak, total, out) of rows that have seen no key yet."""
    peak = tl.full([ROWS], -float("inf"), tl.float32)
    return peak, tl.zeros([ROWS], tl.float32), tl.zeros([ROWS, WIDTH], tl.float32)


@triton.jit
def see_keys(  # type: ignore[no-untyped-def]
    peak, total, out, queries, k, v, loaded, seen, scale, PRECISION: tl.constexpr
):  # fmt: skip
    """(peak, total, out) after one more block of keys.

    `k` and `v` are pointers (KEYS, WIDTH), of which `loaded` are read; `seen` (ROWS, KEYS) says
    which row sees which key; `scale` makes scores of base 2.
    """
    keys = tl.load(k, mask=loaded, other=0.0)
    values = tl.load(v, mask=loaded, other=0.0)
    scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
    scores = tl.where(seen, scores, -float("inf"))
    higher = tl.maximum(peak, tl.max(scores, 1))
    # The peak of a row that has seen no key yet is -inf, and -inf - (-inf) would be NaN.
    safe = tl.where(higher == -float("inf"), 0.0, higher)
    weights = tl.exp2(scores - safe[:, None])
    kept = tl.exp2(peak - safe)
    out = tl.dot(weights.to(values.dtype), values, out * kept[:, None], input_precision=PRECISION)
    return higher, total * kept + tl.sum(weights, 1), out


@triton.jit
def mean_and_lse(peak, total, out):  # type: ignore[no-untyped-def]
    """The output of what was seen, and its log-sum-exp in base 2: 0 and -inf if it was nothing."""
    filled = tl.where(total == 0, 1.0, total)
    lse = tl.where(total == 0, -float("inf"), peak + tl.log2(filled))
    return out / filled[:, None], lse
