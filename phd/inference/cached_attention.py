"""Attention of a few queries to a cache: what is remembered is read once for all copies."""

import torch
from torch import Tensor

aten = torch.ops.aten

# Scores, or the bias that is added to them, that are held at a time: 64 MiB in float32.
SCORES_AT_ONCE = 1 << 24
# Up to so many queries a head, reading keys once is worth a mask for each of the heads.
FEW_QUERIES = 16


def attend_places(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention to what a cache remembers, with its log-sum-exp.

    All queries of a key/value head, whatever their head and copy, are rows of one product, so that
    each key is read once.

    Args:
        q: (B, N, Q, H).
        k, v: (B, G, places, H); query head i reads key/value head `i // (N // G)`.
        seen: int64 (B, Q), each query sees so many places, from the first; None: all.

    Returns:
        out (B, N, Q, H), lse (B, N, Q) in float32 or wider.
    """
    B, N, Q, H = q.shape
    rows = q.to(k.dtype).reshape(B, k.shape[1], -1, H)
    if q.is_cuda:
        from phd.inference.split_kv import split_attention  # Triton comes with CUDA builds alone

        seen = None if seen is None else seen.repeat(1, N // k.shape[1])  # (B, rows)
        out, lse = split_attention(rows, k, v, seen)
    elif seen is None:
        out, lse = _flash(rows, k, v, None)
    elif Q <= FEW_QUERIES:
        bias = bias_of(torch.arange(k.shape[2]) < seen[:, None, :, None], k.dtype)
        out, lse = _flash(rows, k, v, bias.repeat(1, 1, N // k.shape[1], 1))
    else:
        return _attend_seen(q, k, v, seen)
    return out.reshape(B, N, Q, H), lse.reshape(B, N, Q)


def _attend_seen(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """`attend_places` on the CPU, of so many queries at a time that no mask takes much memory."""
    place, at_once = torch.arange(k.shape[2]), max(1, SCORES_AT_ONCE // (len(q) * k.shape[2]))
    parts = [
        attend_near(part, k, v, bias_of(place < limit[:, None, :, None], k.dtype))
        for part, limit in zip(q.split(at_once, 2), seen.split(at_once, 1), strict=True)
    ]
    return _joined(parts)


def _joined(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    out, lse = (torch.cat(x, 2) for x in zip(*parts, strict=True))
    return out, lse


def attend_near(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to a few keys, with its log-sum-exp.

    Args:
        q: (B, N, Q, H).
        k, v: (B, G, keys, H).
        bias: (B, 1, Q, keys) as k: 0 where a key is seen, else -inf; each query sees one at least.

    Returns:
        out (B, N, Q, H), lse (B, N, Q) in float32 or wider.
    """
    if not q.is_cuda:
        return _flash(q.to(k.dtype), k, v, bias)
    k, v = k.float(), v.float()
    at_once = max(1, SCORES_AT_ONCE // (q.shape[0] * q.shape[1] * k.shape[2]))
    parts = [
        dense_attention(part.float(), k, v, part_bias.float())
        for part, part_bias in zip(q.split(at_once, 2), bias.split(at_once, 2), strict=True)
    ]
    return _joined(parts)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Attention as it is written, all queries of a key/value head as rows of one product."""
    B, N, Q, H = q.shape
    with torch.autocast(q.device.type, enabled=False):
        scores = (q.reshape(B, k.shape[1], -1, H) * H**-0.5) @ k.mT
        scores = scores.view(B, N, Q, k.shape[2]) + bias
        lse = scores.logsumexp(-1)
        weights = scores.sub_(lse[..., None]).exp_().view(B, k.shape[1], -1, k.shape[2])
        return (weights @ v).view(B, N, Q, H), lse


def bias_of(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to scores: 0 where `seen`, else -inf."""
    zeros = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return zeros.masked_fill_(seen.logical_not(), -torch.inf)


def _flash(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    return aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, False, attn_mask=bias, scale=q.shape[-1] ** -0.5
    )
