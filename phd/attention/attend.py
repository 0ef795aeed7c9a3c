"""`attend`: attention by a pattern, through one of several backends with one signature."""

from collections.abc import Callable

import torch
from torch import Tensor

from phd.attention.blocks import has_kernels, has_local_kernels
from phd.attention.causal_kernels import Platform, causal_kernel
from phd.attention.flex import flex_attention
from phd.attention.packed import fused_attention, packed_attention
from phd.config import Backend
from phd.pattern import Pattern
from phd.segments import Segments
from phd.torch_private import HAS_TRITON


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
        k, v: (B, G, K, T, H); query head i reads key/value head `i // (N // G)`. Where no slot sees
            hidden copies, they are of the originals alone: K is `pattern.key_copies`.
        pattern: which slot may attend to which, over K copies of T tokens.
        backend: `reference` (dense mask, the definition), `packed` (PyTorch's operators, fast
            everywhere), `fused` (Triton kernels, CUDA only), `flex` (CUDA only), or `auto`, which
            `resolve_backend` resolves.
        segments: the documents of each row, none of which sees another; None: each row is one.

    Returns:
        (B, N, Q, T, H). All backends agree in value and gradient.

    Raises:
        ValueError: if the backend cannot run on this device; none ever drops a rule instead.
    """
    assert k.shape[2] == pattern.key_copies, (k.shape, pattern)
    assert q.shape[2] in (1, pattern.K), (q.shape, pattern)
    assert q.shape[1] % k.shape[1] == 0, (q.shape, k.shape)
    assert segments is None or segments.starts.shape == (q.shape[0], q.shape[3]), q.shape
    chosen = resolve_backend(backend, q.device.type, q.dtype, q.shape[4], HAS_TRITON, pattern)
    return BACKENDS[chosen](q, k, v, pattern, segments)


def resolve_backend(
    backend: Backend,
    device_type: str,
    dtype: torch.dtype,
    head_dim: int,
    has_triton: bool,
    pattern: Pattern,
) -> Backend:
    """The backend that runs on a device: what `auto` stands for there, or the one that is named.

    `auto` is `fused` on CUDA where there are kernels for the dtype, H and the pattern, and Triton
    is installed, as it is wherever torch comes as a CUDA build for Linux. Elsewhere it is `packed`.

    >>> phd = Pattern("hidden", K=2)
    >>> resolve_backend("auto", "cuda", torch.bfloat16, 64, has_triton=True, pattern=phd)
    'fused'
    """
    if backend != "auto":
        return backend
    has_all = has_kernels(dtype, head_dim) and has_local_kernels(pattern)
    return "fused" if device_type == "cuda" and has_triton and has_all else "packed"


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, segments: Segments | None = None
) -> Tensor:
    """The definition: the scores of all pairs of slots, masked. O((KT)^2) time and memory."""
    B, N, Q, T, H = q.shape
    repeat = N // k.shape[1]
    keys, values = (x.repeat_interleave(repeat, 1).flatten(2, 3) for x in (k, v))
    scores = q.flatten(2, 3) @ keys.mT * H**-0.5
    mask = pattern.mask(T, q.device)[None] if segments is None else segments.mask(pattern)
    mask = mask[:, None, -Q:, :, : pattern.key_copies].flatten(4, 5).flatten(2, 3)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return (weights @ values).view(B, N, Q, T, H)


BACKENDS: dict[Backend, Callable[[Tensor, Tensor, Tensor, Pattern, Segments | None], Tensor]] = {
    "reference": reference_attention,
    "packed": packed_attention,
    "fused": fused_attention,
    "flex": flex_attention,
}


RULES_2_AND_3: dict[str, str] = {"packed": "batched products", "fused": "a fused kernel"}
"""What computes rules 2 and 3 in the backends whose rule 1 is a causal kernel."""


def describe_attention(
    pattern: Pattern,
    backend: Backend,
    platform: Platform,
    dtype: torch.dtype,
    head_dim: int,
    documents: bool = False,
) -> str:
    """The kernels that compute attention, by name.

    Args:
        backend: any, `auto` as well.
        dtype: of q, k and v.
        documents: whether attention stays within documents.

    Raises:
        ValueError: no kernel computes this on the platform.

    >>> pattern = Pattern("hidden", K=2, window=16)
    >>> hopper = Platform("cuda", (9, 0), cudnn=91900)
    >>> describe_attention(pattern, "packed", hopper, torch.bfloat16, 64)
    'rule 1 by cuDNN 9.19, rules 2 and 3 by batched products'
    """
    backend = resolve_backend(backend, platform.type, dtype, head_dim, platform.triton, pattern)
    if backend not in RULES_2_AND_3:
        return {"reference": "dense mask", "flex": "FlexAttention"}[backend]
    kernel = causal_kernel(platform, dtype, head_dim, documents=documents)
    name = kernel.name
    if kernel.cudnn:
        major, minor = divmod(platform.cudnn // 100, 100)
        name += f" {major}.{minor}"
    if pattern.rule != "hidden":
        return name
    others = "rule 2" if pattern.window is None else "rules 2 and 3"
    return f"rule 1 by {name}, {others} by {RULES_2_AND_3[backend]}"
