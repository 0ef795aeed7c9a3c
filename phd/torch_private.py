"""What this package uses of PyTorch beyond its documented interface, and what it assumes of it.

Nothing else in `phd` names a private operator or module of torch. `tests/phd/test_torch_private.py`
checks each assumption, so that a new version of torch which breaks one fails there first.

The attention operators are those behind `scaled_dot_product_attention`, which does not return the
log-sum-exp. Shapes: q (B, N, T, H), k and v (B, G, T, H), or of another number of tokens where
`causal` is false, and each query sees every key; out as q; lse (B, N, T), the natural log
of the sum of exponentials of the scaled scores. All of them are called without dropout, and all
backwards accept an (out, lse) that their own forward did not make.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

aten = torch.ops.aten

OutLse = tuple[Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor]

# The memory-efficient kernel pads the rows of its log-sum-exp to a multiple of this.
EFFICIENT_LSE_ALIGNMENT = 32


def cpu_flash_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    *,
    causal: bool = True,
    bias: Tensor | None = None,
) -> OutLse:
    """(out, lse) of the CPU's flash kernel, in float64, float32 or half precision.

    Query head i reads key/value head `i // (N // G)`. `bias` is added to the scores; it broadcasts
    to (B, N, T, keys) and has the dtype of q. lse is float32, or float64 with q.
    """
    return aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, attn_mask=bias, scale=scale
    )


def cpu_flash_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    *,
    causal: bool = True,
) -> Gradients:
    """(dq, dk, dv) of `cpu_flash_forward`."""
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, k, v, out, lse, 0.0, causal, scale=scale
    )


def cuda_cudnn_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool = True
) -> OutLse:
    """(out, lse) of cuDNN's attention: half precision on CUDA, H a multiple of 8.

    Query head i reads key/value head `i // (N // G)`. T is 2 or more. `out` has the memory layout
    of q; lse is float32.
    """
    out, lse = aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, causal, scale=scale
    )[:2]
    return out, lse.view(q.shape[:3])


def cuda_cudnn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    *,
    causal: bool = True,
) -> Gradients:
    """(dq, dk, dv) of `cuda_cudnn_forward`.

    `out` and `dout` have the layout that `torch.empty_like(q)` has, and lse is contiguous. PyTorch
    keeps cuDNN's plan by the strides of q, k and v alone: with other strides of `out` or `dout` a
    plan of an earlier call would read them wrongly. cuDNN before 9.26 ignores the strides of lse.
    """
    T, keys, unused = q.shape[2], k.shape[2], q.new_zeros((), dtype=torch.int64)
    return aten._scaled_dot_product_cudnn_attention_backward(
        dout, q, k, v, out, lse[..., None], unused, unused, None, None, None, T, keys, 0.0, causal,
        scale=scale,
    )  # fmt: skip


def cuda_flash_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool = True
) -> OutLse:
    """(out, lse) of FlashAttention: half precision on CUDA, H a multiple of 8.

    Query head i reads key/value head `i // (N // G)`. lse is float32. It is FlashAttention-2, or
    the version that `torch.nn.attention.activate_flash_attention_impl` has put in its place.
    """
    out, lse = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)[:2]
    return out, lse


def cuda_flash_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    *,
    causal: bool = True,
) -> Gradients:
    """(dq, dk, dv) of `cuda_flash_forward`."""
    T, keys, unused = q.shape[2], k.shape[2], _generator_state(q)
    return aten._scaled_dot_product_flash_attention_backward(
        dout, q, k, v, out, lse, None, None, T, keys, 0.0, causal, unused, unused, scale=scale
    )


def cuda_efficient_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool = True
) -> OutLse:
    """(out, lse) of the memory-efficient (cutlass) kernel: any dtype but float64 on CUDA.

    The kernel wants as many key/value heads as query heads, so these are repeated: query head i
    reads key/value head `i // (N // G)`. lse (B, N, T) is float32.
    """
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    out, lse = aten._scaled_dot_product_efficient_attention(
        q, k, v, None, compute_log_sumexp=True, is_causal=causal, scale=scale
    )[:2]
    return out, lse[..., : q.shape[2]]


def cuda_efficient_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    *,
    causal: bool = True,
) -> Gradients:
    """(dq, dk, dv) of `cuda_efficient_forward`.

    The kernel reads rows of lse that are padded to `EFFICIENT_LSE_ALIGNMENT` queries. The padding
    is infinite, which makes the probabilities of queries that do not exist 0, and their gradients.
    """
    G = k.shape[1]
    k, v = (x.repeat_interleave(q.shape[1] // G, 1) for x in (k, v))
    lse = F.pad(lse, (0, -q.shape[2] % EFFICIENT_LSE_ALIGNMENT), value=torch.inf)
    seed, offset = q.new_zeros(2, dtype=torch.int64).unbind()
    dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
        dout, q, k, v, None, out, lse, seed, offset, 0.0, [True, True, True, False], causal,
        scale=scale,
    )  # fmt: skip
    dk, dv = (x.unflatten(1, (G, -1)).sum(2) for x in (dk, dv))
    return dq, dk, dv


def cuda_varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, cu_seqlens: Tensor, longest: int
) -> OutLse:
    """(out, lse) of `cuda_flash_forward` within documents that lie one after another.

    q (tokens, N, H), k and v (tokens, G, H), in half precision on CUDA; document i is the tokens
    from `cu_seqlens[i]` to `cu_seqlens[i + 1]`, at most `longest` of them. lse is (N, tokens).
    """
    out, lse = aten._flash_attention_forward(
        q, k, v, cu_seqlens, cu_seqlens, *_varlen_limits(longest), 0.0, True, False, scale=scale
    )[:2]
    return out, lse


def cuda_varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    cu_seqlens: Tensor,
    longest: int,
) -> Gradients:
    """(dq, dk, dv) of `cuda_varlen_forward`."""
    unused = _generator_state(q)
    return aten._flash_attention_backward(
        dout, q, k, v, out, lse, cu_seqlens, cu_seqlens, *_varlen_limits(longest), 0.0, True,
        unused, unused, scale=scale,
    )  # fmt: skip


def _varlen_limits(longest: int) -> tuple[int, int]:
    """Upper bounds of the lengths of queries and keys.

    At 1 the kernel would take its path for decoding, which regroups the heads.
    """
    return (max(longest, 2),) * 2


def _generator_state(x: Tensor) -> Tensor:
    """The state of dropout's generator: the kernels ask for it, and do not use it at rate 0."""
    return torch.zeros(2, dtype=torch.uint64, device=x.device)


def layer_norm_backward(
    dy: Tensor, x: Tensor, mean: Tensor, reciprocal_std: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """(dx, dweight) of LayerNorm over the last dim, from any mean and 1 / standard deviation.

    With g = weight * dy and x^ = (x - mean) * reciprocal_std:

        dx = (g - mean(g) - x^ mean(g x^)) * reciprocal_std        dweight = sum over rows of dy x^

    dy is contiguous.
    """
    dx, dweight, _ = aten.native_layer_norm_backward(
        dy, x, [x.shape[-1]], mean, reciprocal_std, weight, None, [True, True, False]
    )
    return dx, dweight


# A CUDA build of torch brings Triton along on Linux. Other builds do not need it.
HAS_TRITON = find_spec("triton") is not None

# Recent versions of torch have it; with others `phd.loss` uses its own.
HAS_LINEAR_CROSS_ENTROPY = hasattr(torch.nn, "LinearCrossEntropyOptions")


def summed_linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, rows_at_once: int | None
) -> Tensor:
    """The sum of -log softmax(weight h)[target] over rows (R, D), a chunk of rows at a time.

    The sum is in the dtype of `hidden`. With `rows_at_once` None torch chooses how many. Only where
    `HAS_LINEAR_CROSS_ENTROPY`.
    """
    method = "auto" if rows_at_once is None else None
    options = torch.nn.LinearCrossEntropyOptions(
        batch_chunk_size=rows_at_once, chunking_method=method
    )
    return F.linear_cross_entropy(
        hidden, weight, targets, reduction="sum", ignore_index=ignore_index, options=options
    )


def add_product(total: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """Add a b (n, k) to `total` (n, k), in place; `first` overwrites what is there instead.

    `total` has the dtype of a and b or, for those in half precision, float32. On CUDA one product
    then reads half precision and adds float32, without a copy of (n, k): torch documents its
    `out_dtype`, but not that `out` may be what is added to. It is `baddbmm` of one matrix because
    some versions refuse to add to float32 in `addmm`.
    """
    beta = 0 if first else 1
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, beta=beta, out=total)
    elif total.is_cuda:
        one = total[None]
        torch.baddbmm(one, a[None], b[None], out_dtype=total.dtype, beta=beta, out=one)
    else:
        torch.addmm(total, a.to(total.dtype), b.to(total.dtype), beta=beta, out=total)


def with_recompile_limit(function: Callable[..., Any], limit: int) -> Callable[..., Any]:
    """A compiled function that may be compiled for up to `limit` shapes; torch's own limit is 8.

    The limit holds during its calls alone: torch's global setting stays what it is.
    """
    return torch._dynamo.config.patch(recompile_limit=limit)(function)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module runs more, or something else, than its class's `forward`.

    That is: hooks before or after `forward`, or a `forward` set on the instance, as accelerate does
    for weights that are elsewhere.
    """
    hooks = module._forward_pre_hooks or module._forward_hooks
    return bool(hooks) or "forward" in vars(module)


def mark_dynamic(tensor: Tensor, *dims: int) -> None:
    """Have torch.compile make a graph for every size of these dimensions but 0 and 1.

    Where a graph cannot, it is made for the size at hand.
    """
    for dim in dims:
        torch._dynamo.maybe_mark_dynamic(tensor, dim)
