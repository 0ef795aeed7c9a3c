"""Causal attention with its log-sum-exp by a fused kernel, forward and backward as plain functions.

`scaled_dot_product_attention` hides the log-sum-exp, and its backward accepts only the one that its
own forward made. Merging partial attentions needs both: every partial backward runs with the
*merged* output and log-sum-exp, as in ring attention (arXiv 2310.01889).

`phd.attention.causal_kernels` chooses the kernel. On CUDA each direction is a custom operator:
`torch.compile` hands it the strides that it had while tracing, and it chooses when it runs.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from phd.attention.causal_kernels import CausalKernel, Platform, causal_kernel
from phd.torch_private import cpu_flash_backward, cpu_flash_forward

# From this number of tokens on, a prompt is worth a plan. cuDNN takes some tenths of a second for
# one (0.44 s on a B200 with torch 2.11: modelscope/FunASR issue 3704), once for a shape. It saves
# 30 % of FlashAttention-2's time: with 550m 1 ms of a prompt of 4096 tokens, 4 ms of 8192 and 60 ms
# of 32,768 (estimates from an H200's 1.04 and 0.72 ms at B 4, N 32, T 4096, H 64).
LONG_PROMPT = 4096

EXACT_STRIDES = (torch.Tag.needs_exact_strides,)


def causal_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, varying_length: bool = False
) -> tuple[Tensor, Tensor]:
    """Causal attention: q (B, N, T, H) over k, v (B, G, T, H) -> out (B, N, T, H), lse (B, N, T).

    `lse` is the natural log of the sum of exponentials of the scaled scores, in float32 or wider.
    Query head i reads key/value head `i // (N // G)`. With `varying_length`, T changes from call
    to call, and kernels that plan every shape anew are passed over.

    Raises:
        ValueError: no kernel computes this on the device.
    """
    if q.device.type == "cpu":
        return cpu_flash_forward(q, k, v, scale)
    return _forward(q, k, v, scale, varying_length)


def prompt_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`causal_forward` of prompts, whose length changes from call to call.

    Long ones go through the kernel of training. One that plans every shape gets them filled up to
    `planned_tokens`, in one memory layout, so that it makes few plans: tokens at the end change
    nothing before them.
    """
    T = q.shape[2]
    if T < LONG_PROMPT or not _kernel(q).plans:
        return causal_forward(q, k, v, scale, varying_length=True)
    more = planned_tokens(T) - T
    q, k, v = (pad(x, (0, 0, 0, more)) if more else x.contiguous() for x in (q, k, v))
    out, lse = causal_forward(q, k, v, scale)
    return out[:, :, :T], lse[:, :, :T]


def planned_tokens(tokens: int) -> int:
    """The next number of tokens that plans are made for, at most a 16th more.

    There are 16 of them from a power of 2 to the next.

    >>> [planned_tokens(T) for T in (4096, 4097, 8192, 8193)]
    [4096, 4352, 8192, 8704]
    """
    step = max(1, 1 << (tokens.bit_length() - 1) >> 4)
    return -(-tokens // step) * step


def causal_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv) of this part of an attention whose merged result is (out, lse).

    Shapes as in `causal_forward`. With the forward's own `out` and `lse` these are the ordinary
    gradients; with merged ones, the exact share of this part's keys. On CUDA nothing is copied
    where `out` and `dout` have the memory layout of q.
    """
    if q.device.type == "cpu":
        return cpu_flash_backward(dout, q, k, v, out, lse, scale)
    return _backward(dout, q, k, v, out, lse, scale)


def noncausal_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, varying_length: bool = False
) -> tuple[Tensor, Tensor]:
    """Attention of every query to every key: q (B, N, T, H) over k, v (B, G, keys, H).

    Returns (out, lse), and takes `varying_length`, as `causal_forward` does.
    """
    if q.device.type == "cpu":
        return cpu_flash_forward(q, k, v, scale, causal=False)
    return _forward(q, k, v, scale, varying_length, causal=False)


def noncausal_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    *,
    varying_length: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`causal_backward` of `noncausal_forward`."""
    if q.device.type == "cpu":
        return cpu_flash_backward(dout, q, k, v, out, lse, scale, causal=False)
    return _backward(dout, q, k, v, out, lse, scale, varying_length, causal=False)


@torch.library.custom_op("phd::causal_forward", mutates_args=(), tags=EXACT_STRIDES)
def _forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, varying_length: bool, causal: bool = True
) -> tuple[Tensor, Tensor]:
    kernel = _kernel(q, varying_length)
    aligned = (_aligned(x, kernel.alignment) for x in (q, k, v))
    out, lse = kernel.forward(*aligned, scale, causal=causal)
    return _laid_out_like(q, out[..., : q.shape[3]]), lse.contiguous()


@torch.library.custom_op("phd::causal_backward", mutates_args=(), tags=EXACT_STRIDES)
def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    varying_length: bool = False,
    causal: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    kernel, inputs = _kernel(q, varying_length), (q, k, v)
    q, k, v, out, dout = (_aligned(x, kernel.alignment) for x in (*inputs, out, dout))
    dout, out = _laid_out_like(q, dout), _laid_out_like(q, out)
    gradients = kernel.backward(dout, q, k, v, out, lse.contiguous(), scale, causal=causal)
    dq, dk, dv = (
        _laid_out_like(x, gradient[..., : x.shape[3]])
        for x, gradient in zip(inputs, gradients, strict=True)
    )
    return dq, dk, dv


@_forward.register_fake
def _(q: Tensor, *others: object) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    wide = torch.promote_types(q.dtype, torch.float32)
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=wide)


@_backward.register_fake
def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *others: object) -> tuple[Tensor, ...]:  # noqa: ARG001
    return tuple(torch.empty_like(x) for x in (q, k, v))


def _kernel(q: Tensor, varying_length: bool = False) -> CausalKernel:
    _, _, T, H = q.shape
    platform = Platform.of(q.device)
    return causal_kernel(platform, q.dtype, H, tokens=T, varying_length=varying_length)


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
    kernel: CausalKernel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    cu_seqlens: Tensor,
    longest: int,
) -> tuple[Tensor, Tensor]:
    """`causal_forward` within each document, by the variable-length path of `kernel`.

    Document i is tokens `cu_seqlens[i]` to `cu_seqlens[i + 1]` of the B*T of all rows, on the
    device; `longest` is the most tokens that one has. Shapes as in `causal_forward`.
    """
    assert kernel.varlen_forward is not None
    B, N, T, H = q.shape
    q, k, v = (_pack_rows(x, kernel) for x in (q, k, v))
    out, lse = kernel.varlen_forward(q, k, v, scale, cu_seqlens, longest)
    return _unpack_rows(out, B, H), lse.view(N, B, T).transpose(0, 1).contiguous()


def varlen_backward(
    kernel: CausalKernel,
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
    assert kernel.varlen_backward is not None
    B, H = q.shape[0], q.shape[-1]
    dout, q, k, v, out = (_pack_rows(x, kernel) for x in (dout, q, k, v, out))
    lse = lse.transpose(0, 1).flatten(1).contiguous()
    gradients = kernel.varlen_backward(dout, q, k, v, out, lse, scale, cu_seqlens, longest)
    dq, dk, dv = (_unpack_rows(gradient, B, H) for gradient in gradients)
    return dq, dk, dv


def _pack_rows(x: Tensor, kernel: CausalKernel) -> Tensor:
    """(B, heads, T, H) -> (B*T, heads, H), the head dimension aligned."""
    return _aligned(x.transpose(1, 2).flatten(0, 1), kernel.alignment)


def _unpack_rows(x: Tensor, batch: int, head_dim: int) -> Tensor:
    """The inverse of `_pack_rows`."""
    return x[..., :head_dim].contiguous().unflatten(0, (batch, -1)).transpose(1, 2)


def _aligned(x: Tensor, alignment: int) -> Tensor:
    """Pad the head dimension to what a kernel reads at once; zeros change no score."""
    if excess := -x.shape[-1] % alignment:
        return pad(x, (0, excess))
    return x if x.stride(-1) == 1 else x.contiguous()


def _laid_out_like(like: Tensor, x: Tensor) -> Tensor:
    """x with the strides that `torch.empty_like(like)` has, copied where its own are others."""
    strides = torch.empty_like(like, device="meta").stride()
    if x.stride() == strides:
        return x
    if all(a == b for a, b, n in zip(x.stride(), strides, x.shape, strict=True) if n > 1):
        return x.as_strided(x.shape, strides)  # strides of a dimension of one element
    return torch.empty_like(like).copy_(x)
