"""The forward pass of new tokens of rows that a cache remembers: what all its cases share.

layer 0      cached slots  o o o o o o o o o o      hidden copies        h h h h
layer 1                    o o o o o o o o o o                             h h h
...
last layer   keys and values alone; queries         of the slots that predict  *

In a loop whose passes see the keys of the first pass, the last layer of that pass is the last one
here, and the other passes go on with the slots that predict alone.

The cached slots of a new token are those whose keys and values stay in the cache: its original, or
with naive repetition all K copies. Hidden copies are computed only for the last new tokens of a
row: in each layer for those that influence a logit or a later token.

Each case is one class, which can be read alone:

    EqualRows           equal_rows     any number of tokens, the same in rows of one length
    FusedRows           fused_rows     the same on CUDA, by Triton's kernels
    RaggedRows          ragged_rows    any numbers of tokens, in rows of any lengths
    RaggedPrompts       ragged_rows    the same, in rows that are empty before
    EqualDecodeStep     decode_step    one token of each row, in rows of one length
    RaggedDecodeStep    decode_step    one token of each row; only the device has to know lengths
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from phd.inference.cache import KVCache
from phd.inference.cached_attention import attend_cached
from phd.pattern import Pattern
from phd.rope import Rope, rotate

Pair = tuple[Tensor, Tensor]  # (cos, sin), (keys, values), (out, lse)


class IncrementalForward(ABC):
    """New tokens of the rows of a cache, in all layers.

    The slots of a layer have the same order in all cases: first the cached slots of all new tokens,
    token by token, then the hidden copies of the last `spans[layer]` new tokens of each row, token
    by token.

    Args:
        tokens: T, the new tokens of the row that has the most.
        spans: for how many tokens at the end of each row a layer computes hidden copies; never more
            than in the layer before it.
        rope: (cos, sin) of the first layer's slots, (B or 1, 1, 1, M, H).

    Attributes:
        cached_per_token: copies of a token that stay in the cache.
        hidden_per_token: the other copies of a token.
        has_hidden_keys: whether these give keys and values, which some slot sees.
        local_per_token: copies of a token, the last ones, that see hidden copies. They are the
            hidden ones, and with some patterns the originals as well.
        cached: the cached slots of the new tokens, T * cached_per_token.
    """

    def __init__(self, cache: KVCache, tokens: int, spans: Sequence[int], rope: Pair) -> None:
        self.cache, self.spans, self.rope = cache, spans, rope
        # The last layer with keys and values of its own: the last one, or that of a first pass.
        self.last = len(spans) - 1 - cache.depth + len(cache.originals)
        self.cached_per_token, self.hidden_per_token = slots_per_token(cache.pattern)
        self.has_hidden_keys = cache.pattern.has_hidden_keys
        self.local_per_token = cache.pattern.local_copies
        self.cached = tokens * self.cached_per_token

    @abstractmethod
    def slots(self, x: Tensor) -> Tensor:
        """All copies' input (B, K or 1, T, D) -> the first layer's slots (B, 1, M, D)."""

    @abstractmethod
    def last_queries(self, x: Tensor) -> Tensor:
        """The slots that predict, of all slots (B or 1, ..., M, any) of the last layer."""

    @abstractmethod
    def write_cache(self, k: Tensor, v: Tensor, layer: int) -> None:
        """Write the new cached slots (B, G, cached, H) to a layer of the cache."""

    @abstractmethod
    def read_cache(self, layer: int) -> Pair:
        """The keys and values (B, G, slots, H) of all cached slots that some query may see."""

    @abstractmethod
    def attention(self, q: Tensor, k: Tensor, v: Tensor, cached: Pair, layer: int) -> Tensor:
        """The output (B, N, queries, H) of the selected queries q.

        k and v (B, G, M, H) are all new slots of the layer that give keys and values; `read_cache`
        returned `cached`.
        """

    @abstractmethod
    def write_ring(self, k: Tensor, v: Tensor, layer: int) -> None:
        """Write new hidden copies (B, G, spans[layer] * hidden_per_token, H) into the ring."""

    def select_queries(self, x: Tensor, layer: int) -> Tensor:
        """The slots that a layer computes, of all its slots (B or 1, ..., M, any)."""
        if self.is_again(layer):
            return x
        if self.is_last(layer):
            return self.last_queries(x)
        return self._without_hidden(x, self.spans[layer] - self.spans[layer + 1])

    def select_keys(self, x: Tensor, layer: int) -> Tensor:
        """The slots that give keys and values, of all a layer's slots (B or 1, ..., M, any).

        None does in later passes of a loop that see the keys of the first.
        """
        if self.is_again(layer):
            return x[..., :0, :]
        all_of_them = self.has_hidden_keys or not self.hidden_per_token
        return x if all_of_them else x[..., : self.cached, :]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        """`phd.block.AttentionContext.attend` in one layer; updates the cache."""
        q, k = self.rotate(q, k, layer)
        v = v.squeeze(1)
        own = layer % len(self.cache.originals)
        if not self.is_again(layer):
            self.write_cache(k[:, :, : self.cached], v[:, :, : self.cached], own)
        cached = self.read_cache(own)
        if self.cache.patterns[layer].rule == "stream":
            out = self._attend_streams(q, (k, v), cached)
        else:
            # Where no logits are wanted, the last layer has no queries, and only fills the cache.
            out = self.attention(q, k, v, cached, layer) if q.shape[2] else q
        # After attention, which still needs the hidden copies that will be overwritten.
        if self.spans[layer] and self.cache.ring_size:
            self.write_ring(k[:, :, self.cached :], v[:, :, self.cached :], layer)
        return out.unsqueeze(2)

    def _attend_streams(self, q: Tensor, new: Pair, cached: Pair) -> Tensor:
        """The output (B, N, slots, H) of all new slots, each of which sees its own copy alone.

        One copy after another: so its slots are a view of the cache, which is not copied.
        """
        copies = [slice(s, None, self.cached_per_token) for s in range(self.cached_per_token)]
        k, v, keys, values = *new, *cached
        outs = [
            self.attend_stream(
                q[:, :, s], (k[:, :, s], v[:, :, s]), (keys[:, :, s], values[:, :, s])
            )
            for s in copies
        ]
        return torch.stack(outs, 3).flatten(2, 3)

    def attend_stream(self, q: Tensor, new: Pair, cached: Pair) -> Tensor:  # noqa: ARG002
        """The output of one copy's new slots (B, N, T, H), each of which sees those up to itself.

        `new` are their own keys and values, and `cached` those of all tokens, these included.
        """
        number = torch.arange(1, q.shape[2] + 1, device=q.device)
        return attend_cached(q, *cached, self.cache.lengths[:, None] + number)[0]

    def rotate(self, q: Tensor, k: Tensor, layer: int) -> Pair:
        """Queries and keys (B, 1, heads, slots, H), rotated by RoPE: (B, heads, slots, H)."""
        cos, sin = (self.of_layer(x, layer) for x in self.rope)
        q_cos, q_sin = (self.select_queries(x, layer) for x in (cos, sin))
        cos, sin = self.select_keys(cos, layer), self.select_keys(sin, layer)
        return rotate(q, q_cos, q_sin).squeeze(2), rotate(k, cos, sin).squeeze(2)

    def is_last(self, layer: int) -> bool:
        """Whether the queries of a layer are those of the slots that predict alone."""
        return layer >= self.last

    def is_again(self, layer: int) -> bool:
        """Whether a layer sees the keys of an earlier pass of a loop, and has none of its own."""
        return layer > self.last

    def of_layer(self, x: Tensor, layer: int) -> Tensor:
        """A layer's slots of a tensor (B or 1, ..., M, any) over those of the first layer."""
        if self.is_again(layer):
            return self.last_queries(x)
        return self._without_hidden(x, self.spans[0] - self.spans[layer])

    def _without_hidden(self, x: Tensor, tokens: int) -> Tensor:
        """Slots without the hidden copies of the first `tokens` tokens that have them."""
        if tokens == 0:
            return x
        first = self.cached + tokens * self.hidden_per_token
        return torch.cat([x[..., : self.cached, :], x[..., first:, :]], -2)

    def ring_and_new(self, k: Tensor, v: Tensor, layer: int) -> Pair:
        """The hidden copies in the ring, and after them those among the new slots (B, G, M, H)."""
        ring = self.cache.ring[layer]
        k, v = (x[:, :, self.cached :].to(ring.dtype) for x in (k, v))
        if not self.cache.ring_size:
            return k, v
        return torch.cat([ring[0], k], 2), torch.cat([ring[1], v], 2)


@dataclass(frozen=True)
class LayerContext:
    """The `phd.block.AttentionContext` of new tokens in one layer."""

    new: IncrementalForward
    layer: int

    def select_queries(self, x: Tensor) -> Tensor:
        return self.new.select_queries(x, self.layer)

    def select_keys(self, x: Tensor) -> Tensor:
        return self.new.select_keys(x, self.layer)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.new.attend(q, k, v, self.layer)


def slots_per_token(pattern: Pattern) -> tuple[int, int]:
    """How many copies of a token stay in the cache, and how many are hidden copies that do not."""
    return pattern.cached_slots_per_token, pattern.K - pattern.cached_slots_per_token


def rope_of_slots(rope: Rope, pattern: Pattern, tokens: Tensor, hidden_tokens: Tensor) -> Pair:
    """(cos, sin), each (B or 1, 1, 1, M, H), of the first layer's slots.

    Args:
        tokens: int64 (B or 1, T), the positions of the new tokens.
        hidden_tokens: int64 (B or 1, span), of those with hidden copies.
    """
    copy = torch.arange(pattern.K, device=tokens.device)
    cached, hidden = copy.split(slots_per_token(pattern))
    parts = zip(rope.at(tokens, cached), rope.at(hidden_tokens, hidden), strict=True)
    cos, sin = (torch.cat(x, 1)[:, None, None] for x in parts)
    return cos, sin


def hidden_spans(pattern: Pattern, past: int, end: int, keep: int, layers: int) -> list[int]:
    """For how many of a row's tokens `past` to `end` each layer has to compute hidden copies.

    There will be logits for the last `keep` of them.
    """
    if pattern.cached_slots_per_token == pattern.K:
        return [0] * layers
    first = [pattern.first_influential_token(end - keep, above) for above in range(layers, 0, -1)]
    return [end - max(past, token) for token in first]


def sees_hidden(query: Tensor, visible: Tensor, key: Tensor) -> Tensor:
    """Which hidden copies are seen, by their numbers in a row: bool (..., queries, keys).

    Args:
        query: (..., queries); of an original, that of the hidden copy before it.
        visible: (..., queries), how many hidden copies each query sees, from itself back.
        key: (..., keys); below 0 where there is none.
    """
    distance = query[..., None] - key[..., None, :]
    return (distance >= 0) & (distance < visible[..., None]) & (key >= 0)[..., None, :]


def without_blind(result: Pair, blind: Tensor) -> Pair:
    """A part of attention, (out, lse), in which blind queries, bool (B or 1, Q), see nothing.

    Their log-sum-exp is that of no key, so that they add nothing where parts are merged.
    """
    out, lse = result
    return out, lse.masked_fill(blind[:, None], -torch.inf)
