"""Causal attention within each document of a row, forward and backward as plain functions.

                 keys: a0 a1 a2 b0 b1
    query a2            x  x  x  .  .
    query b0            .  .  .  x  .       on CUDA in half precision one variable-length kernel,
    query b1            .  .  .  x  x       elsewhere `flash` on one document after another

Both read on the host where documents begin. They are custom operators, which `torch.compile` does
not look into: otherwise it would compile a graph for every new set of documents.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from phd.attention.flash import (
    HALF_PRECISION,
    causal_backward,
    causal_forward,
    varlen_backward,
    varlen_forward,
)
from phd.segments import Segments


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
    if _has_varlen_kernel(q):
        return varlen_forward(q, k, v, scale, cu_seqlens, _longest(cu_seqlens_cpu))
    out, lse = _result_like(q)
    for at in _documents(cu_seqlens_cpu, q.shape[2]):
        out[at], lse[at] = causal_forward(q[at], k[at], v[at], scale)
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
    if _has_varlen_kernel(q):
        longest = _longest(cu_seqlens_cpu)
        return varlen_backward(dout, q, k, v, out, lse, scale, cu_seqlens, longest)
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


def _has_varlen_kernel(q: Tensor) -> bool:
    return q.device.type == "cuda" and q.dtype in HALF_PRECISION


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
