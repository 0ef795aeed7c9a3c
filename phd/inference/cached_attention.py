"""Attention of a few queries to a cache, whose keys are read once for all copies."""

import torch
from torch import Tensor

from phd.attention.tiles import SCORES_AT_ONCE
from phd.torch_private import cpu_flash_forward

# Up to this number of queries per head it is faster to read the keys once for all heads of a group,
# although each head then needs a copy of the mask.
FEW_QUERIES = 16


def attend_cached(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention to cached slots, with its log-sum-exp.

    All queries of a key/value head, of all its heads and copies, are rows of one product, so each
    key is read once.

    Args:
        q: (B, N, Q, H).
        k, v: (B, G, slots, H); query head i reads key/value head `i // (N // G)`.
        visible: int64 (B, Q), how many slots each query sees, from slot 0 on; None: all.

    Returns:
        out (B, N, Q, H), lse (B, N, Q) in float32 or wider.
    """
    B, N, Q, H = q.shape
    rows = q.to(k.dtype).reshape(B, k.shape[1], -1, H)
    if q.is_cuda:
        # Triton comes with CUDA builds alone.
        from phd.inference.kernels.split_kv import split_attention

        visible = None if visible is None else visible.repeat(1, N // k.shape[1])  # (B, rows)
        out, lse = split_attention(rows, k, v, visible)
    elif visible is None:
        out, lse = _flash(rows, k, v, None)
    elif Q <= FEW_QUERIES:
        bias = _bias_of_first(visible, k)
        out, lse = _flash(rows, k, v, bias.repeat(1, 1, N // k.shape[1], 1))
    else:
        return _attend_in_parts(q, k, v, visible)
    return out.reshape(B, N, Q, H), lse.reshape(B, N, Q)


def _attend_in_parts(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """`attend_cached` on the CPU, some queries at a time, so that masks take little memory."""
    at_once = max(1, SCORES_AT_ONCE // (len(q) * k.shape[2]))
    parts = [
        attend_masked(part, k, v, _bias_of_first(count, k))
        for part, count in zip(q.split(at_once, 2), visible.split(at_once, 1), strict=True)
    ]
    return _joined(parts)


def _bias_of_first(visible: Tensor, k: Tensor) -> Tensor:
    """The bias (B, 1, Q, slots) of queries that see the first `visible` (B, Q) slots."""
    slot = torch.arange(k.shape[2], device=k.device)
    return bias_of(slot < visible[:, None, :, None], k.dtype)


def _joined(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    out, lse = (torch.cat(x, 2) for x in zip(*parts, strict=True))
    return out, lse


def attend_masked(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to a few keys through a mask, with its log-sum-exp.

    Args:
        q: (B, N, Q, H).
        k, v: (B, G, keys, H).
        bias: (B or 1, 1, Q, keys), of the dtype of k: 0 where a key is seen, else -inf. Each query
            sees at least one key.

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
    """Attention by its formula, with all queries of a key/value head as rows of one product."""
    B, N, Q, H = q.shape
    with torch.autocast(q.device.type, enabled=False):
        scores = (q.reshape(B, k.shape[1], -1, H) * H**-0.5) @ k.mT
        scores = scores.view(B, N, Q, k.shape[2]) + bias
        lse = scores.logsumexp(-1)
        weights = scores.sub_(lse[..., None]).exp_().view(B, k.shape[1], -1, k.shape[2])
        return (weights @ v).view(B, N, Q, H), lse


def bias_of(is_seen: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to scores: 0 where a key is seen, else -inf."""
    zeros = torch.zeros(is_seen.shape, dtype=dtype, device=is_seen.device)
    return zeros.masked_fill_(is_seen.logical_not(), -torch.inf)


def _flash(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    return cpu_flash_forward(q, k, v, q.shape[-1] ** -0.5, causal=False, bias=bias)
