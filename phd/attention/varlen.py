"""Causal attention within each document of a row, forward and backward as plain functions.

                 keys: a0 a1 a2 b0 b1
    query a2            x  x  x  .  .
    query b0            .  .  .  x  .       where the kernel has it, its variable-length path,
    query b1            .  .  .  x  x       elsewhere `flash` on one document after another

Both read on the host where documents begin, from the copy there, and do not wait for the device.
They are custom operators, which `torch.compile` does not look into: otherwise it would compile a
graph for every new set of documents.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from phd.attention.causal_kernels import CausalKernel, Platform, causal_kernel
from phd.attention.flash import causal_backward, causal_forward, varlen_backward, varlen_forward
from phd.segments import Segments


def causal_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments | None = None) -> Tensor:
    """Causal attention: q (B, N, T, H) over k, v (B, G, T, H) -> (B, N, T, H), differentiable.

    It is `scaled_dot_product_attention(is_causal=True, enable_gqa=True)` by the kernel that
    `phd.attention.causal_kernels` chooses, and within each document where segments are given.
    """
    return _Causal.apply(q, k, v, segments)


class _Causal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, segments: Segments | None) -> Tensor:
        out, lse = isolated_forward(q, k, v, q.shape[-1] ** -0.5, segments)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.segments = segments
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, lse = ctx.saved_tensors
        scale = q.shape[-1] ** -0.5
        dq, dk, dv = isolated_backward(grads[0], (q, k, v), (out, lse), scale, ctx.segments)
        return dq, dk, dv, None


def isolated_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, segments: Segments | None
) -> tuple[Tensor, Tensor]:
    """`causal_forward` within each document; segments None: each row is one document."""
    if segments is None:
        return causal_forward(q, k, v, scale)
    return _forward(q, k, v, scale, segments.cu_seqlens, segments.cu_seqlens_cpu)


def isolated_backward(
    dout: Tensor,
    qkv: tuple[Tensor, Tensor, Tensor],
    result: tuple[Tensor, Tensor],
    scale: float,
    segments: Segments | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`causal_backward` within each document; `result` is the merged (out, lse)."""
    if segments is None:
        return causal_backward(dout, *qkv, *result, scale)
    return _backward(dout, *qkv, *result, scale, segments.cu_seqlens, segments.cu_seqlens_cpu)


@torch.library.custom_op("phd::isolated_forward", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, cu_seqlens: Tensor, cu_seqlens_cpu: Tensor
) -> tuple[Tensor, Tensor]:
    kernel = _kernel(q)
    if kernel.varlen_forward:
        return varlen_forward(kernel, q, k, v, scale, cu_seqlens, _longest(cu_seqlens_cpu))
    out, lse = _result_like(q)
    for at in _documents(cu_seqlens_cpu, q.shape[2]):
        out[at], lse[at] = causal_forward(q[at], k[at], v[at], scale, varying_length=True)
    return out, lse


@torch.library.custom_op("phd::isolated_backward", mutates_args=())
def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    cu_seqlens: Tensor,
    cu_seqlens_cpu: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    kernel = _kernel(q)
    if kernel.varlen_backward:
        longest = _longest(cu_seqlens_cpu)
        return varlen_backward(kernel, dout, q, k, v, out, lse, scale, cu_seqlens, longest)
    dq, dk, dv = (_token_major(x) for x in (q, k, v))
    for at in _documents(cu_seqlens_cpu, q.shape[2]):
        dq[at], dk[at], dv[at] = causal_backward(
            dout[at], q[at], k[at], v[at], out[at], lse[at], scale
        )
    return dq, dk, dv


@_forward.register_fake
def _(q: Tensor, *others: object) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    return _result_like(q)


@_backward.register_fake
def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *others: object) -> tuple[Tensor, ...]:  # noqa: ARG001
    return tuple(_token_major(x) for x in (q, k, v))


def _kernel(q: Tensor) -> CausalKernel:
    return causal_kernel(Platform.of(q.device), q.dtype, q.shape[3], documents=True)


def _longest(cu_seqlens_cpu: Tensor) -> int:
    return int(cu_seqlens_cpu.diff().max())


def _documents(cu_seqlens_cpu: Tensor, tokens: int) -> Iterator[tuple[slice, slice, slice]]:
    """For each document, the index of its row and tokens in (B, heads, T, ...)."""
    for start, stop in pairwise(cu_seqlens_cpu.tolist()):
        row, first = divmod(start, tokens)
        yield slice(row, row + 1), slice(None), slice(first, first + stop - start)


def _token_major(x: Tensor) -> Tensor:
    """New memory for (B, heads, T, H), token by token, which is the layout that kernels return."""
    B, heads, T, H = x.shape
    return x.new_empty(B, T, heads, H).transpose(1, 2)


def _result_like(q: Tensor) -> tuple[Tensor, Tensor]:
    """New memory for out and lse."""
    wide = torch.promote_types(q.dtype, torch.float32)
    return _token_major(q), q.new_empty(q.shape[:3], dtype=wide)
