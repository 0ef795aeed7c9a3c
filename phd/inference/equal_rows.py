"""New tokens of rows of one length: the host knows every position, so all reads are slices."""

from collections.abc import Iterator
from functools import partial
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor

from phd.attention.flash import merge_outputs, prompt_forward
from phd.attention.tiles import SCORES_AT_ONCE
from phd.inference.cache import KVCache
from phd.inference.cached_attention import attend_cached, attend_masked, bias_of
from phd.inference.incremental import (
    IncrementalForward,
    Pair,
    hidden_spans,
    rope_of_slots,
    sees_hidden,
)
from phd.rope import Rope

# A tile has at least this number of queries: with fewer, the CPU's flash kernel is slower.
QUERIES_PER_TILE = 128
# The most values of masks that are kept for all layers; 2^24 in float32 are 64 MiB.
KEPT_MASKS = 1 << 24


class TokenTile(NamedTuple):
    """Tokens `begin` to `stop`, whose hidden copies see hidden copies of tokens from `low` on."""

    begin: int
    stop: int
    low: int


class EqualRows(IncrementalForward):
    """T new tokens of each row, which had one length before.

        queries                  keys without a mask           keys through a mask
        cached slots             cached before, new (causal)   -
        a tile's hidden copies   originals before the tile     the tile's originals, hidden copies

    Where originals see hidden copies, they go by tiles, too.

    Args:
        tokens: T.
        keep: for how many of the last tokens there will be logits.
    """

    def __init__(self, cache: KVCache, rope: Rope, tokens: int, keep: int) -> None:
        self.past, self.keep = cache.host_lengths[0], keep
        self.end = self.past + tokens
        spans = hidden_spans(cache.pattern, self.past, self.end, keep, cache.depth)
        token = torch.arange(self.past, self.end, device=cache.lengths.device)[None]
        tables = rope_of_slots(rope, cache.pattern, token, token[:, tokens - spans[0] :])
        super().__init__(cache, tokens, spans, tables)
        self._biases: dict[tuple[TokenTile, bool], Tensor] = {}

    def slots(self, x: Tensor) -> Tensor:
        x = x.expand(-1, self.cache.pattern.K, -1, -1)
        parts = [x[:, : self.cached_per_token].transpose(1, 2).flatten(1, 2)]
        if self.spans[0]:
            hidden = x[:, self.cached_per_token :, x.shape[2] - self.spans[0] :]
            parts.append(hidden.transpose(1, 2).flatten(1, 2))
        return torch.cat(parts, 1)[:, None]

    def last_queries(self, x: Tensor) -> Tensor:
        # The last copy of the last tokens: a hidden copy, or with naive repetition a cached slot.
        per_token = self.hidden_per_token or self.cached_per_token
        first = x.shape[-2] - self.keep * per_token
        return x[..., first + per_token - 1 :: per_token, :]

    def write_cache(self, k: Tensor, v: Tensor, layer: int) -> None:
        self.cache.write_slice(layer, k, v, self.past * self.cached_per_token)

    def read_cache(self, layer: int) -> Pair:
        keys, values = self.cache.originals[layer].narrow(3, 0, self.end * self.cached_per_token)
        return keys, values

    def attention(self, q: Tensor, k: Tensor, v: Tensor, cached: Pair, layer: int) -> Tensor:
        if not self.is_last(layer):
            first = self._attend_cached_slots(q[:, :, : self.cached], (k, v), cached, layer)
            if q.shape[2] == self.cached:
                return first
            # Token by token, as the output projection reads it: then it copies nothing.
            out = q.new_empty(*q.transpose(1, 2).shape).transpose(1, 2)
            out[:, :, : self.cached] = first
            hidden = q[:, :, self.cached :]
            out[:, :, self.cached :] = self.attend_hidden(hidden, (k, v), cached, layer)
            return out
        if self.hidden_per_token:
            return self.attend_hidden(q, (k, v), cached, layer)
        # The last copy of each of the last tokens sees all cached slots up to itself.
        past, device = self.end - self.keep, q.device
        visible = torch.arange(past + 1, self.end + 1, device=device) * self.cached_per_token
        return attend_cached(q, *cached, visible.expand(len(q), -1))[0]

    def _attend_cached_slots(self, q: Tensor, new: Pair, cached: Pair, layer: int) -> Tensor:
        """Queries of the new cached slots, in a layer that is not the last."""
        if self.local_per_token == self.cache.pattern.K:
            return self._attend_in_tiles(q, range(1), new, cached, layer)
        k, v = new
        return self._attend_causally(q, (k[:, :, : self.cached], v[:, :, : self.cached]), cached)

    def _attend_causally(self, q: Tensor, own: Pair, cached: Pair) -> Tensor:
        """Queries of the new cached slots over each other, and over all that were there before."""
        result = prompt_forward(q, *own, q.shape[-1] ** -0.5)
        if not self.past:
            return result[0]
        old = (x[:, :, : -own[0].shape[2]] for x in cached)
        return merge_outputs(result, attend_cached(q, *old))

    def attend_stream(self, q: Tensor, new: Pair, cached: Pair) -> Tensor:
        q, k, v = (x.contiguous() for x in (q, *new))
        return self._attend_causally(q, (k, v), cached)

    def attend_hidden(self, q: Tensor, new: Pair, cached: Pair, layer: int) -> Tensor:
        """Queries of hidden copies, which in the last layer are the last ones alone."""
        K = self.cache.pattern.K
        copies = range(K - 1 if self.is_last(layer) else 1, K)
        return self._attend_in_tiles(q, copies, new, cached, layer)

    def _attend_in_tiles(
        self, q: Tensor, copies: range, new: Pair, cached: Pair, layer: int
    ) -> Tensor:
        """Queries of these copies of the last tokens, a tile of tokens at a time.

        All queries of a tile see every original before the tile, so only the rest needs a mask.
        """
        per_token = len(copies)
        first = self.end - q.shape[2] // per_token
        outs = []
        for tile in self._tiles(first):
            part = q[:, :, (tile.begin - first) * per_token : (tile.stop - first) * per_token]
            bias = self._bias(tile, originals=copies.start == 0)
            if self.is_last(layer):
                bias = bias[:, :, self.hidden_per_token - 1 :: self.hidden_per_token]
            result = attend_masked(part, *self._masked_keys(tile, new, cached, layer), bias)
            out = result[0]
            if tile.begin:
                before = attend_cached(part, *(x[:, :, : tile.begin] for x in cached))
                out = merge_outputs(result, before)
            outs.append(out.to(q.dtype))
        return outs[0] if len(outs) == 1 else torch.cat(outs, 2)

    def _tiles(self, first: int) -> Iterator[TokenTile]:
        """The tokens from `first` on, in tiles.

        Tiles are cut from the end, so that all layers have the same tiles except the first, and
        share their masks.
        """
        pattern, hidden = self.cache.pattern, self.hidden_per_token
        span = min(pattern.span_tokens, pattern.chunk_tokens or pattern.span_tokens)
        # A tile as long as the span has 2 * span tokens of keys: its own, and those further back.
        most = SCORES_AT_ONCE // (2 * span * hidden**2)
        size = max(1, min(max(span, ceil(QUERIES_PER_TILE / hidden)), most))
        begins = [first, *reversed(range(self.end - size, first, -size))]
        for begin, stop in zip(begins, [*begins[1:], self.end], strict=True):
            yield TokenTile(begin, stop, pattern.first_influential_token(begin, layers=1))

    def _masked_keys(self, tile: TokenTile, new: Pair, cached: Pair, layer: int) -> Pair:
        """What a tile sees through a mask: hidden copies, and the originals of its own tokens."""
        ring, first = self.cache.ring[layer], self.end - self.spans[layer]
        start, stop = (
            self.cached + (token - first) * self.hidden_per_token
            for token in (max(tile.low, self.past), tile.stop)
        )
        keys, values = (
            torch.cat([
                *([in_ring] if tile.low < self.past else []),
                x[:, :, start:stop].to(ring.dtype),
                originals[:, :, tile.begin : tile.stop],
            ], 2)
            for in_ring, x, originals in zip(ring, new, cached, strict=True)
        )  # fmt: skip
        return keys, values

    def _bias(self, tile: TokenTile, *, originals: bool) -> Tensor:
        """The mask of `_masked_keys` for all hidden copies of a tile, (1, 1, queries, keys).

        Or for its originals. It is made once for all layers, until the masks that are kept reach
        `KEPT_MASKS` values.
        """
        bias = self._biases.get((tile, originals))
        if bias is not None:
            return bias
        token = torch.arange(tile.begin, tile.stop, device=self.cache.lengths.device)
        per_token = 1 if originals else self.hidden_per_token
        is_seen = token.repeat_interleave(per_token)[:, None] >= token
        if self.has_hidden_keys:
            is_seen = torch.cat([self._sees_hidden(tile, token, originals), is_seen], 1)
        bias = bias_of(is_seen, self.cache.ring[0].dtype)[None, None]
        if sum(kept.numel() for kept in self._biases.values()) < KEPT_MASKS:
            self._biases[tile, originals] = bias
        return bias

    def _sees_hidden(self, tile: TokenTile, token: Tensor, originals: bool) -> Tensor:
        """Which of the hidden copies in `_masked_keys` the queries of a tile see."""
        hidden, numbers = self.hidden_per_token, partial(torch.arange, device=token.device)
        key = numbers(max(tile.low, self.past) * hidden, tile.stop * hidden)
        if tile.low < self.past:
            key = torch.cat([self.cache.ring_numbers(self.cache.lengths[:1] * hidden), key])
        visible = self.cache.pattern.visible_hidden_copies(token)
        if originals:
            return sees_hidden(token * hidden - 1, visible[0], key)
        query = numbers(tile.begin * hidden, tile.stop * hidden)
        return sees_hidden(query, visible[-hidden:].T.flatten(), key)

    def write_ring(self, k: Tensor, v: Tensor, layer: int) -> None:
        self.cache.write_ring_slice(layer, k, v, self.end * self.hidden_per_token)
