"""Prefill and decode: the logits of the full forward pass from a cache, with the least work.

prefill   originals      o o o o o o o o o o o o     every token, once
          hidden copies                  h h h h     only those that influence a later token,
                                                     which are more in lower layers
decode    all K copies of one token, together
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from phd.inference.cache import KVCache
from phd.inference.decode_step import EqualDecodeStep, RaggedDecodeStep
from phd.inference.equal_rows import EqualRows
from phd.inference.fused_rows import FusedRows, has_fused_rows
from phd.inference.incremental import IncrementalForward, LayerContext
from phd.inference.ragged_rows import RaggedPrompts, RaggedRows
from phd.model import Transformer
from phd.transfer import to_device


@torch.no_grad()
def prefill(
    model: Transformer,
    tokens: Tensor,
    lengths: Sequence[int] | None = None,
    *,
    capacity: int | None = None,
    piece: int | None = None,
) -> tuple[Tensor, KVCache]:
    """The logits after prompts, and the cache from which `decode` and `extend` continue.

    Args:
        tokens: int64 (B, T), each row's prompt from the left; padding after it has no effect.
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
        last = extend(model, tokens[:, start : start + piece], cache, new, keep=int(any(ends)))
        if not any(ends):
            continue
        last = last[:, 0]
        if logits is not None:
            last = torch.where(to_device(ends, last.device)[:, None], last, logits)
        logits = last
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
    """Add several tokens to each row at once.

    Args:
        tokens: int64 (B, T), new tokens of each row from the left; padding after has no effect.
        cache: what the rows remember; the new tokens are added to it.
        lengths: new tokens of each row, from 0 to T; None: T.
        keep: for how many of each row's last tokens logits are wanted, at most as many as the row
            with the most new tokens has. A row with fewer gets undefined logits before its own.

    Returns:
        (B, keep, V): the logits after each row's last `keep` tokens.

    Raises:
        ValueError: a row would be longer than `model.max_seq_len`.
    """
    B, T = tokens.shape
    new = [T] * B if lengths is None else list(lengths)
    assert len(new) == len(cache.host_lengths) == B, (len(new), len(cache.host_lengths), B)
    assert all(0 <= n <= T for n in new), (new, T)
    assert keep <= max(new), (keep, new)
    if max(new) == 0:
        return model.predict(model.embed.weight.new_zeros(B, 0, model.config.dim))
    longest = max(a + b for a, b in zip(cache.host_lengths, new, strict=True))
    check_length(model, longest)
    # The cache has room for the padding of shorter rows, too: it is written and later overwritten.
    cache.reserve(max(cache.host_lengths) + max(new))
    logits = _logits(model, tokens[:, : max(new)], _forward_of(model, cache, new, keep))
    cache.advance(new)
    return logits


def _forward_of(
    model: Transformer, cache: KVCache, new: Sequence[int], keep: int
) -> IncrementalForward:
    """The case of `phd.inference.incremental` for `new` tokens of each row."""
    rope, one_token = model.rope, set(new) == {1} and keep == 1
    if len(set(cache.host_lengths)) == len(set(new)) == 1:
        if one_token and cache.pattern.cached_slots_per_token == 1:
            return EqualDecodeStep(cache, rope)
        rows = FusedRows if has_fused_rows(cache) else EqualRows
        return rows(cache, rope, new[0], keep)
    if one_token:
        return RaggedDecodeStep(cache, rope, reach=max(cache.host_lengths) + 1)
    if max(cache.host_lengths) == 0:
        return RaggedPrompts(cache, rope, new, keep)
    return RaggedRows(cache, rope, new, keep)


@torch.no_grad()
def decode(model: Transformer, tokens: Tensor, cache: KVCache) -> Tensor:
    """Add one token to each row, int64 (B,), and return the logits (B, V) after it.

    On CUDA the host waits for nothing, and every shape follows from the cache's capacity, so that
    the work can be captured (see `phd.inference.cuda_graph.Decoder`).

    Raises:
        ValueError: a row would be longer than `model.max_seq_len`.
    """
    make_room(model, cache)
    new = [1] * len(tokens)
    if tokens.is_cuda:
        logits = static_decode_step(model, tokens, cache)
    else:
        logits = _logits(model, tokens[:, None], _forward_of(model, cache, new, keep=1))[:, 0]
    cache.advance(new)
    return logits


def make_room(model: Transformer, cache: KVCache) -> None:
    """Reserve room for one more token of each row, or refuse it."""
    longest = max(cache.host_lengths) + 1
    check_length(model, longest)
    cache.reserve(longest)


def static_decode_step(model: Transformer, tokens: Tensor, cache: KVCache) -> Tensor:
    """The work of `decode` alone, in which nothing on the host depends on the rows' lengths."""
    step = RaggedDecodeStep(cache, model.rope, reach=cache.capacity)
    return _logits(model, tokens[:, None], step)[:, 0]


def _logits(model: Transformer, tokens: Tensor, new: IncrementalForward) -> Tensor:
    """New tokens (B, T) -> logits (B, keep, V); the cache gets their keys and values."""
    x = new.slots(model.embedded(tokens))
    for i, block in enumerate(model.unrolled):
        x = block(x, LayerContext(new, i))
    return model.predict(model.norm(x[:, 0]))


def check_length(model: Transformer, tokens: int) -> None:
    """Refuse rows that are longer than RoPE's table."""
    if tokens > model.config.max_seq_len:
        raise ValueError(
            f"model.max_seq_len={model.config.max_seq_len}: a row of {tokens} tokens is longer; "
            "pass fewer tokens, or a model with a larger model.max_seq_len"
        )
