"""PyTorch's fused causal attention with its log-sum-exp, forward and backward as plain functions.

`scaled_dot_product_attention` hides the log-sum-exp and its backward insists on the one that its
own forward made. Merging partial attentions needs both: every partial backward runs with the
*merged* output and log-sum-exp, as in ring attention (arXiv 2310.01889).
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

aten = torch.ops.aten

# The cutlass kernel stores its log-sum-exp in rows padded to this many queries.
_EFFICIENT_LSE_ALIGNMENT = 32

_HEAD_ALIGNMENT = 8

HALF_PRECISION = (torch.float16, torch.bfloat16)


def causal_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Causal attention: q (B, N, T, H) over k, v (B, G, T, H) -> out (B, N, T, H), lse (B, N, T).

    `lse` is the natural log of the sum of exponentials of the scaled scores, in float32 or wider.
    Query head i reads key/value head `i // (N // G)`. The kernel is chosen by device and dtype:
    the CPU's flash kernel, FlashAttention-2 for half precision on CUDA, cutlass for float32.
    """
    if q.device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scale)
        return out, lse
    T, H = q.shape[2:]
    q, k, v = (_aligned(x) for x in (q, k, v))
    if q.dtype in HALF_PRECISION:
        out, lse = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, scale=scale)[:2]
        return out[..., :H], lse
    repeat = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(repeat, 1) for x in (k, v))
    out, lse = aten._scaled_dot_product_efficient_attention(
        q, k, v, None, compute_log_sumexp=True, is_causal=True, scale=scale
    )[:2]
    return out[..., :H], lse[..., :T]


def causal_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv) of this part of an attention whose merged result is (out, lse).

    Shapes as in `causal_forward`. With the forward's own `out` and `lse` these are the ordinary
    gradients; with merged ones, the exact share of this part's keys.
    """
    if q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q, k, v, out, lse, 0.0, True, scale=scale
        )
    T, H = q.shape[2:]
    dout, q, k, v, out = (_aligned(x) for x in (dout, q, k, v, out))
    unused = _generator_state(q)
    if q.dtype in HALF_PRECISION:
        gradients = aten._scaled_dot_product_flash_attention_backward(
            dout, q, k, v, out, lse, None, None, T, T, 0.0, True, unused, unused, scale=scale
        )
        return tuple(gradient[..., :H] for gradient in gradients)
    groups = k.shape[1]
    k, v = (x.repeat_interleave(q.shape[1] // groups, 1) for x in (k, v))
    # Padded queries get an infinite log-sum-exp: their probabilities, and so gradients, are 0.
    lse = pad(lse, (0, -T % _EFFICIENT_LSE_ALIGNMENT), value=torch.inf)
    seed, offset = unused.to(torch.int64).unbind()
    dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
        dout, q, k, v, None, out, lse, seed, offset, 0.0, [True, True, True, False], True,
        scale=scale,
    )  # fmt: skip
    dk, dv = (x.unflatten(1, (groups, -1)).sum(2) for x in (dk, dv))
    return dq[..., :H], dk[..., :H], dv[..., :H]


def merged(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The attention to two sets of keys together: out (..., H) and lse (...) from those of each."""
    return merged_out(one, other), torch.logaddexp(one[1], other[1])


def merged_out(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> Tensor:
    """`merged` where nobody asks for the log-sum-exp."""
    (out, lse), (more, more_lse) = one, other
    share = torch.sigmoid(more_lse - lse).unsqueeze(-1)
    return torch.lerp(out.to(share.dtype), more.to(share.dtype), share).to(out.dtype)


def varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, cu_seqlens: Tensor, longest: int
) -> tuple[Tensor, Tensor]:
    """`causal_forward` within each document, by FlashAttention-2: half precision on CUDA only.

    Document i is tokens `borders[i]` to `borders[i + 1]` of the B*T of all rows, on the device;
    `longest` is the most tokens that one has. Shapes as in `causal_forward`.
    """
    B, heads, T, H = q.shape
    q, k, v = (_rows_end_to_end(x) for x in (q, k, v))
    out, lse = aten._flash_attention_forward(
        q, k, v, cu_seqlens, cu_seqlens, *_varlen_limits(longest), 0.0, True, False, scale=scale
    )[:2]
    # The kernel gives the log-sum-exp as (heads, B*T).
    return _rows_apart(out, B, H), lse.view(heads, B, T).transpose(0, 1).contiguous()


def varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    cu_seqlens: Tensor,
    longest: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`causal_backward` within each document; see `varlen_forward`."""
    B, H = q.shape[0], q.shape[-1]
    dout, q, k, v, out = (_rows_end_to_end(x) for x in (dout, q, k, v, out))
    lse, unused = lse.transpose(0, 1).flatten(1).contiguous(), _generator_state(q)
    gradients = aten._flash_attention_backward(
        dout, q, k, v, out, lse, cu_seqlens, cu_seqlens, *_varlen_limits(longest), 0.0, True,
        unused, unused, scale=scale,
    )  # fmt: skip
    dq, dk, dv = (_rows_apart(gradient, B, H) for gradient in gradients)
    return dq, dk, dv


def _varlen_limits(longest: int) -> tuple[int, int]:
    """The upper bounds of the lengths of queries and keys: at 1, the kernel would take the path
    of decoding, which regroups heads."""
    return (max(longest, 2),) * 2


def _rows_end_to_end(x: Tensor) -> Tensor:
    """(B, heads, T, H) -> (B*T, heads, H), the head dimension aligned."""
    return _aligned(x.transpose(1, 2).flatten(0, 1))


def _rows_apart(x: Tensor, batch: int, head_dim: int) -> Tensor:
    """The inverse of `_rows_end_to_end`."""
    return x[..., :head_dim].contiguous().unflatten(0, (batch, -1)).transpose(1, 2)


def _generator_state(x: Tensor) -> Tensor:
    """Dropout's: unused at rate 0, but the kernels' signatures want it."""
    return torch.zeros(2, dtype=torch.uint64, device=x.device)


def _aligned(x: Tensor) -> Tensor:
    """Pad the head dimension with zeros, which change no score, to what CUDA's kernels accept."""
    excess = -x.shape[-1] % _HEAD_ALIGNMENT
    return pad(x, (0, excess)) if excess else x
