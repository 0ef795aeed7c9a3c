"""Prefill and decode: the logits of the full forward pass from a cache, and no more work than that.

prefill   originals      o o o o o o o o o o o o     every token, once
          hidden copies                  h h h h     only where the future can see them:
                                                     in each layer further back
decode    all K copies of one token, together
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from phd.inference.cache import KVCache
from phd.inference.incremental import IncrementalContext, IncrementalForward
from phd.model import Transformer


@torch.no_grad()
def prefill(
    model: Transformer,
    tokens: Tensor,
    lengths: Sequence[int] | None = None,
    *,
    capacity: int | None = None,
    piece: int | None = None,
) -> tuple[Tensor, KVCache]:
    """The logits after prompts, and the cache to go on from.

    Args:
        tokens: int64 (B, T), each row's prompt from its beginning; padding behind it is not seen.
        lengths: tokens of each prompt, from 1 to T; None: T.
        capacity: tokens that the cache has room for at first; None: T.
        piece: how many tokens are computed at a time, to bound the memory; None: all.

    Returns:
        Logits (B, V) of the token after each prompt, and the cache.

    Raises:
        ValueError: a prompt is longer than `model.max_seq_len`.
    """
    B, T = tokens.shape
    lengths = [T] * B if lengths is None else list(lengths)
    assert len(lengths) == B, (lengths, B)
    assert all(1 <= length <= T for length in lengths), (lengths, T)
    cache = new_cache(model, B, capacity or T)
    piece = piece or T
    logits = None
    for start in range(0, max(lengths), piece):
        new = [min(max(length - start, 0), piece) for length in lengths]
        ends = [start < length <= start + piece for length in lengths]
        found = extend(model, tokens[:, start : start + piece], cache, new, keep=int(any(ends)))
        if not any(ends):
            continue
        found = found[:, 0]
        chosen = torch.tensor(ends, device=found.device)[:, None]
        logits = found if logits is None else torch.where(chosen, found, logits)
    assert logits is not None
    return logits, cache


def new_cache(model: Transformer, batch: int, capacity: int) -> KVCache:
    """An empty cache for a model, on its device and in the precision that it computes in."""
    weight = model.embed.weight
    kind = weight.device.type
    half = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if half else weight.dtype
    return KVCache(model.config, batch, capacity=capacity, dtype=dtype, device=weight.device)


@torch.no_grad()
def extend(
    model: Transformer,
    tokens: Tensor,
    cache: KVCache,
    lengths: Sequence[int] | None = None,
    *,
    keep: int = 1,
) -> Tensor:
    """Go on with several tokens at once.

    Args:
        tokens: int64 (B, T), new tokens of each row from the left; padding behind is not seen.
        cache: what the rows remember; gets the new tokens.
        lengths: new tokens of each row, from 0 to T; None: T.
        keep: for how many of each row's last tokens logits are wanted, at most the longest row's
            new ones. Where a row has fewer, the logits before its own mean nothing.

    Returns:
        (B, keep, V), row by row after its last `keep` tokens.

    Raises:
        ValueError: a row would be longer than `model.max_seq_len`.
    """
    B, T = tokens.shape
    new = [T] * B if lengths is None else list(lengths)
    assert len(new) == len(cache.host_lengths) == B, (len(new), len(cache.host_lengths), B)
    assert all(0 <= n <= T for n in new), (new, T)
    assert keep <= max(new), (keep, new)
    check_length(model, max(a + b for a, b in zip(cache.host_lengths, new, strict=True)))
    cache.reserve(max(cache.host_lengths) + T)
    extension = IncrementalForward(cache, model.rope, new, tokens=T, keep=keep)
    logits = _logits(model, tokens, extension)
    cache.advance(new)
    return logits


@torch.no_grad()
def decode(model: Transformer, tokens: Tensor, cache: KVCache) -> Tensor:
    """Go on with one token of each row, int64 (B,), and return the logits (B, V) after it.

    On CUDA the host waits for nothing, and every shape follows from the cache's capacity, so that
    the work can be captured (see `phd.inference.cuda_graph.Decoder`).

    Raises:
        ValueError: a row would be longer than `model.max_seq_len`.
    """
    make_room(model, cache)
    logits = one_step(model, tokens, cache, static=tokens.is_cuda)
    cache.advance([1] * len(tokens))
    return logits


def make_room(model: Transformer, cache: KVCache) -> None:
    """Have room for one more token of each row, or refuse it."""
    longest = max(cache.host_lengths) + 1
    check_length(model, longest)
    cache.reserve(longest)


def one_step(model: Transformer, tokens: Tensor, cache: KVCache, *, static: bool) -> Tensor:
    """The work of `decode` alone; where it is `static`, nothing on the host decides about it."""
    new = IncrementalForward(cache, model.rope, [1] * len(tokens), tokens=1, static=static)
    return _logits(model, tokens[:, None], new)[:, 0]


def _logits(model: Transformer, tokens: Tensor, new: IncrementalForward) -> Tensor:
    """New tokens (B, T) -> logits (B, keep, V); the cache gets their keys and values."""
    x = new.stream(model.embedded(tokens))
    for i, block in enumerate(model.blocks):
        x = block(x, IncrementalContext(new, i))
    return model.predict(model.norm(x[:, 0]))


def check_length(model: Transformer, tokens: int) -> None:
    """Refuse rows that RoPE has no positions for."""
    if tokens > model.config.max_seq_len:
        raise ValueError(
            f"model.max_seq_len={model.config.max_seq_len}: a row of {tokens} tokens is longer; "
            "pass fewer tokens, or a model with a larger model.max_seq_len"
        )
