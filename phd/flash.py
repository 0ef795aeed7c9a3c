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


def causal_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Causal attention: q (B, N, T, H) over k, v (B, G, T, H) -> out (B, N, T, H), lse (B, N, T).

    `lse` is the natural log of the sum of exponentials of the scaled scores, in float32 or wider.
    Query head i reads key/value head `i // (N // G)`. The kernel is chosen by device and dtype:
    the CPU's flash kernel, FlashAttention-2 for half precision on CUDA, cutlass for float32.
    """
    if q.device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scale)
        return out, lse
    if q.dtype in (torch.float16, torch.bfloat16):
        out, lse = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, scale=scale)[:2]
        return out, lse
    repeat = q.shape[1] // k.shape[1]
    out, lse = aten._scaled_dot_product_efficient_attention(
        q,
        k.repeat_interleave(repeat, 1),
        v.repeat_interleave(repeat, 1),
        None,
        compute_log_sumexp=True,
        is_causal=True,
        scale=scale,
    )[:2]
    return out, lse[..., : q.shape[2]]


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
    # Dropout's generator state: unused at rate 0, but the kernels' signatures want it.
    unused = torch.zeros(2, dtype=torch.uint64, device=q.device)
    if q.dtype in (torch.float16, torch.bfloat16):
        T = q.shape[2]
        return aten._scaled_dot_product_flash_attention_backward(
            dout, q, k, v, out, lse, None, None, T, T, 0.0, True, unused, unused, scale=scale
        )
    B, G, T, H = k.shape
    repeat = q.shape[1] // G
    # Padded queries get an infinite log-sum-exp: their probabilities, and so gradients, are 0.
    padded = pad(lse, (0, -T % _EFFICIENT_LSE_ALIGNMENT), value=torch.inf)
    dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
        dout,
        q,
        k.repeat_interleave(repeat, 1),
        v.repeat_interleave(repeat, 1),
        None,
        out,
        padded,
        *unused.to(torch.int64).unbind(),
        0.0,
        [True, True, True, False],
        True,
        scale=scale,
    )
    return dq, dk.view(B, G, repeat, T, H).sum(2), dv.view(B, G, repeat, T, H).sum(2)
