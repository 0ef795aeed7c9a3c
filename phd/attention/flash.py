"""Causal attention with its log-sum-exp by a fused kernel, forward and backward as plain functions.

`scaled_dot_product_attention` hides the log-sum-exp, and its backward accepts only the one that its
own forward made. Merging partial attentions needs both: every partial backward runs with the
*merged* output and log-sum-exp, as in ring attention (arXiv 2310.01889).
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from phd.torch_private import (
    cpu_flash_backward,
    cpu_flash_forward,
    cuda_efficient_backward,
    cuda_efficient_forward,
    cuda_flash_backward,
    cuda_flash_forward,
    cuda_varlen_backward,
    cuda_varlen_forward,
)

# CUDA's kernels read heads in vectors of 16 bytes, which are 8 numbers in half precision.
HEAD_ALIGNMENT = 8

HALF_PRECISION = (torch.float16, torch.bfloat16)


def causal_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Causal attention: q (B, N, T, H) over k, v (B, G, T, H) -> out (B, N, T, H), lse (B, N, T).

    `lse` is the natural log of the sum of exponentials of the scaled scores, in float32 or wider.
    Query head i reads key/value head `i // (N // G)`. The kernel is chosen by device and dtype:
    the CPU's flash kernel, FlashAttention-2 for half precision on CUDA, cutlass for float32.
    """
    if q.device.type == "cpu":
        return cpu_flash_forward(q, k, v, scale, causal=True)
    H = q.shape[3]
    q, k, v = (_with_aligned_heads(x) for x in (q, k, v))
    if q.dtype in HALF_PRECISION:
        out, lse = cuda_flash_forward(q, k, v, scale)
    else:
        # Cutlass knows no grouped heads.
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        out, lse = cuda_efficient_forward(q, k, v, scale)
    return out[..., :H], lse


def causal_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv) of this part of an attention whose merged result is (out, lse).

    Shapes as in `causal_forward`. With the forward's own `out` and `lse` these are the ordinary
    gradients; with merged ones, the exact share of this part's keys.
    """
    if q.device.type == "cpu":
        return cpu_flash_backward(dout, q, k, v, out, lse, scale)
    H, G = q.shape[3], k.shape[1]
    dout, q, k, v, out = (_with_aligned_heads(x) for x in (dout, q, k, v, out))
    if q.dtype in HALF_PRECISION:
        dq, dk, dv = cuda_flash_backward(dout, q, k, v, out, lse, scale)
    else:
        k, v = (x.repeat_interleave(q.shape[1] // G, 1) for x in (k, v))
        dq, dk, dv = cuda_efficient_backward(dout, q, k, v, out, lse, scale)
        dk, dv = (x.unflatten(1, (G, -1)).sum(2) for x in (dk, dv))
    return dq[..., :H], dk[..., :H], dv[..., :H]


def merge(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The attention to two sets of keys together: out (..., H) and lse (...) from those of each.

    lse = log(exp(lse_1) + exp(lse_2))
    out = exp(lse_1 - lse) out_1 + exp(lse_2 - lse) out_2
    """
    return merge_outputs(one, other), torch.logaddexp(one[1], other[1])


def merge_outputs(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> Tensor:
    """The output of `merge` alone."""
    (out, lse), (more, more_lse) = one, other
    share = torch.sigmoid(more_lse - lse).unsqueeze(-1)
    return torch.lerp(out.to(share.dtype), more.to(share.dtype), share).to(out.dtype)


def varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, cu_seqlens: Tensor, longest: int
) -> tuple[Tensor, Tensor]:
    """`causal_forward` within each document, by FlashAttention-2: half precision on CUDA only.

    Document i is tokens `cu_seqlens[i]` to `cu_seqlens[i + 1]` of the B*T of all rows, on the
    device; `longest` is the most tokens that one has. Shapes as in `causal_forward`.
    """
    B, N, T, H = q.shape
    q, k, v = (_pack_rows(x) for x in (q, k, v))
    out, lse = cuda_varlen_forward(q, k, v, scale, cu_seqlens, longest)
    return _unpack_rows(out, B, H), lse.view(N, B, T).transpose(0, 1).contiguous()


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
    dout, q, k, v, out = (_pack_rows(x) for x in (dout, q, k, v, out))
    lse = lse.transpose(0, 1).flatten(1).contiguous()
    gradients = cuda_varlen_backward(dout, q, k, v, out, lse, scale, cu_seqlens, longest)
    dq, dk, dv = (_unpack_rows(gradient, B, H) for gradient in gradients)
    return dq, dk, dv


def _pack_rows(x: Tensor) -> Tensor:
    """(B, heads, T, H) -> (B*T, heads, H), the head dimension aligned."""
    return _with_aligned_heads(x.transpose(1, 2).flatten(0, 1))


def _unpack_rows(x: Tensor, batch: int, head_dim: int) -> Tensor:
    """The inverse of `_pack_rows`."""
    return x[..., :head_dim].contiguous().unflatten(0, (batch, -1)).transpose(1, 2)


def _with_aligned_heads(x: Tensor) -> Tensor:
    """Pad the head dimension to what CUDA's kernels accept; zeros change no score."""
    excess = -x.shape[-1] % HEAD_ALIGNMENT
    return pad(x, (0, excess)) if excess else x
