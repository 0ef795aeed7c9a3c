"""`attend`: attention by a pattern, through one of several backends with one signature."""

from collections.abc import Callable

import torch
from torch import Tensor

from phd.attention.flex import flex_attention
from phd.attention.packed import packed_attention
from phd.config import Backend
from phd.pattern import Pattern
from phd.segments import Segments


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    backend: Backend = "auto",
    segments: Segments | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(H)) v over the slots that `pattern` lets each query see.

    Args:
        q: (B, N, Q, T, H): the queries of every copy (Q = K), or of the last one alone (Q = 1),
            which is all that the last layer needs.
        k, v: (B, G, K, T, H); query head i reads key/value head `i // (N // G)`.
        pattern: which slot may attend to which, over K copies of T tokens.
        backend: `reference` (dense mask, the definition), `packed` (fast, everywhere), `flex`
            (CUDA only), or `auto`, which `resolve_backend` resolves.
        segments: the documents of each row, none of which sees another; None: each row is one.

    Returns:
        (B, N, Q, T, H). All backends agree in value and gradient.

    Raises:
        ValueError: if the backend cannot run on this device; none ever drops a rule instead.
    """
    assert k.shape[2] == pattern.K, (k.shape, pattern)
    assert q.shape[2] in (1, pattern.K), (q.shape, pattern)
    assert q.shape[1] % k.shape[1] == 0, (q.shape, k.shape)
    assert segments is None or segments.starts.shape == (q.shape[0], q.shape[3]), q.shape
    return BACKENDS[resolve_backend(backend, q.device)](q, k, v, pattern, segments)


def resolve_backend(backend: Backend, device: torch.device) -> Backend:  # noqa: ARG001
    """The backend that runs on a device: what `auto` stands for there, or the one that is named.

    Today `auto` is `packed` on every device: it is the fastest on the CPU, and flex has not been
    measured to beat it on a GPU.
    """
    return "packed" if backend == "auto" else backend


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, segments: Segments | None = None
) -> Tensor:
    """The definition: the scores of all pairs of slots, masked. O((KT)^2) time and memory."""
    B, N, Q, T, H = q.shape
    repeat = N // k.shape[1]
    keys, values = (x.repeat_interleave(repeat, 1).flatten(2, 3) for x in (k, v))
    scores = q.flatten(2, 3) @ keys.mT * H**-0.5
    mask = pattern.mask(T, q.device)[None] if segments is None else segments.mask(pattern)
    mask = mask[:, None, -Q:].flatten(4, 5).flatten(2, 3)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return (weights @ values).view(B, N, Q, T, H)


BACKENDS: dict[Backend, Callable[[Tensor, Tensor, Tensor, Pattern, Segments | None], Tensor]] = {
    "reference": reference_attention,
    "packed": packed_attention,
    "flex": flex_attention,
}
