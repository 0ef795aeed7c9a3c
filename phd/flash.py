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
    if q.dtype in (torch.float16, torch.bfloat16):
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
    # Dropout's generator state: unused at rate 0, but the kernels' signatures want it.
    unused = torch.zeros(2, dtype=torch.uint64, device=q.device)
    if q.dtype in (torch.float16, torch.bfloat16):
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


def _aligned(x: Tensor) -> Tensor:
    """Pad the head dimension with zeros, which change no score, to what CUDA's kernels accept."""
    excess = -x.shape[-1] % _HEAD_ALIGNMENT
    return pad(x, (0, excess)) if excess else x
