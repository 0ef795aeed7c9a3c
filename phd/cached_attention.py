"""Attention of a few queries to a cache: what is remembered is read once for all copies."""

import torch
from torch import Tensor

aten = torch.ops.aten


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
    if seen is not None:
        seen = seen.repeat(1, N // k.shape[1])  # (B, rows)
    if q.is_cuda:
        from phd.split_attention import split_attention  # Triton comes with CUDA builds alone

        out, lse = split_attention(rows, k, v, seen)
    else:
        mask = None
        if seen is not None:
            hidden = torch.arange(k.shape[2]) >= seen[:, None, :, None]
            mask = torch.zeros(hidden.shape, dtype=k.dtype).masked_fill_(hidden, -torch.inf)
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            rows, k, v, 0.0, False, attn_mask=mask, scale=H**-0.5
        )
    return out.reshape(B, N, Q, H), lse.reshape(B, N, Q)


def attend_near(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to a few keys, with its log-sum-exp.

    Args:
        q: (B, N, Q, H).
        k, v: (B, G, keys, H).
        seen: bool (B, 1, Q, keys).

    Returns:
        out (B, N, Q, H), 0 where nothing is seen, and lse (B, N, Q), both in float32 or wider.
    """
    B, N, Q, H = q.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    with torch.autocast(q.device.type, enabled=False):
        scores = (q.reshape(B, k.shape[1], -1, H) * H**-0.5) @ k.mT
        scores = scores.view(B, N, Q, k.shape[2]).masked_fill_(~seen, -torch.inf)
        lse = scores.logsumexp(-1)
        # Where nothing is seen, -inf less -inf would be no number.
        peak = lse.clamp(min=torch.finfo(dtype).min)[..., None]
        weights = scores.sub_(peak).exp_().view(B, k.shape[1], -1, k.shape[2])
        return (weights @ v).view(B, N, Q, H), lse


def merged(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The attention to two sets of keys together, from out and lse of each (see `phd.packed`)."""
    (out, lse), (more, more_lse) = one, other
    share = torch.sigmoid(more_lse - lse)[..., None]
    return torch.lerp(out.to(share.dtype), more.to(share.dtype), share), torch.logaddexp(
        lse, more_lse
    )
