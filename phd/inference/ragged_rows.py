"""New tokens of rows of unequal lengths: every query sees the cache through its own mask."""

from collections.abc import Sequence

import torch
from torch import Tensor

from phd.attention.flash import merge_outputs, prompt_forward
from phd.inference.cache import KVCache
from phd.inference.cached_attention import attend_cached, attend_masked, bias_of
from phd.inference.incremental import (
    IncrementalForward,
    Pair,
    hidden_spans,
    rope_of_slots,
    sees_hidden,
    without_blind,
)
from phd.rope import Rope
from phd.transfer import to_device

# The most pairs of new slots, of all rows, in a mask in which originals see hidden copies: it has
# the square of the prompt's length. 2^26 in float32 are 256 MiB.
MOST_PAIRS = 1 << 26


class RaggedRows(IncrementalForward):
    """Some new tokens of each row, which had any length before.

        row 0    a a a a|a a a .        its 3 new tokens, and padding
        row 1    b b|b b b b            4 new tokens
        row 2    c c c|. . . .          none

    New tokens are left-aligned. Padding is computed like tokens and written to the cache, but
    beyond the row's length, where no query sees it and later tokens overwrite it. Hidden copies
    are right-aligned: those of the last `spans[layer]` tokens of each row.

    Args:
        new: how many new tokens each row has.
        keep: for how many of each row's last tokens there will be logits.

    Raises:
        ValueError: where originals see hidden copies, the new tokens are too many for one mask.
    """

    def __init__(self, cache: KVCache, rope: Rope, new: Sequence[int], keep: int) -> None:
        _check_pairs(cache, len(new), max(new))
        tokens, layers, device = max(new), cache.depth, cache.lengths.device
        rows = [
            hidden_spans(cache.pattern, past, past + count, keep, layers)
            for past, count in zip(cache.host_lengths, new, strict=True)
        ]
        spans = [max(of_layer) for of_layer in zip(*rows, strict=True)]
        self.keep, self.longest = keep, max(cache.host_lengths) + tokens
        self.begins = cache.lengths[:, None]
        self.counts = to_device(new, device)[:, None]
        # (B, span): which new tokens of a row have hidden copies; below 0 where it has too few.
        self.hidden_tokens = self.counts - torch.arange(spans[0], 0, -1, device=device)
        position = (self.begins + self.hidden_tokens).clamp(min=0)
        token = self.begins + torch.arange(tokens, device=device)
        super().__init__(cache, tokens, spans, rope_of_slots(rope, cache.pattern, token, position))
        self.visible = self._visible_cached(position)
        if spans[0] and self.has_hidden_keys:
            sees = self._sees_hidden(position)
            # The softmax of a query that sees nothing would be NaN. So such a query sees all: one
            # that is no token is read by nobody, and an original's result counts as nothing.
            self.blind = sees.logical_not().all(2)
            self.bias = bias_of((sees | self.blind[..., None])[:, None], cache.ring[0].dtype)
            self.ring_source, self.ring_is_new = self._into_ring()

    def _visible_cached(self, position: Tensor) -> Tensor:
        """How many cached slots each of the first layer's slots sees, (B, 1, M, 1)."""
        number = torch.arange(1, self.cached + 1, device=position.device)
        of_cached = self.begins * self.cached_per_token + number
        of_hidden = (position + 1).repeat_interleave(self.hidden_per_token, 1)
        return torch.cat([of_cached, of_hidden], 1)[:, None, :, None]

    def _sees_hidden(self, position: Tensor) -> Tensor:
        """Which hidden copies the new local slots see, bool (B, queries, keys).

        The queries are the new originals, where these see hidden copies, and then the
        span * (K-1) hidden copies. The keys are those in the ring, and then the new ones.
        """
        hidden = self.hidden_per_token
        first = (self.begins + self.hidden_tokens)[..., None] * hidden
        number = (first + torch.arange(hidden, device=first.device)).flatten(1)
        is_token = (self.hidden_tokens >= 0).repeat_interleave(hidden, 1)
        number = torch.where(is_token, number, -1)
        key = torch.cat([self.cache.ring_numbers(self.begins * hidden), number], 1)
        visible = self.cache.pattern.visible_hidden_copies(position)[:, -hidden:]
        query, seen = number, visible.transpose(1, 2).flatten(1)
        if self.local_per_token == self.cache.pattern.K:
            token = self.begins + torch.arange(self.cached, device=first.device)
            of_originals = self.cache.pattern.visible_hidden_copies(token)[:, 0]
            query = torch.cat([token * hidden - 1, query], 1)
            seen = torch.cat([of_originals, seen], 1)
        return sees_hidden(query, seen, key)

    def _into_ring(self) -> Pair:
        """For each slot of the ring (B, R): the first layer's hidden copy that it gets, if any."""
        ends, hidden = self.begins + self.counts, self.hidden_per_token
        numbers = self.cache.ring_numbers(ends * hidden)
        return numbers - (ends - self.spans[0]) * hidden, numbers >= self.begins * hidden

    def slots(self, x: Tensor) -> Tensor:
        x = x.expand(-1, self.cache.pattern.K, -1, -1)
        slots = x[:, : self.cached_per_token].transpose(1, 2).flatten(1, 2)
        if self.spans[0]:
            token = self.hidden_tokens.clamp(min=0)[:, None, :, None]
            hidden = x[:, self.cached_per_token :]
            hidden = hidden.gather(2, token.expand(-1, hidden.shape[1], -1, x.shape[3]))
            slots = torch.cat([slots, hidden.transpose(1, 2).flatten(1, 2)], 1)
        return slots[:, None]

    def last_queries(self, x: Tensor) -> Tensor:
        if self.hidden_per_token:
            first = x.shape[-2] - self.keep * self.hidden_per_token
            return x[..., first + self.hidden_per_token - 1 :: self.hidden_per_token, :]
        last = self.counts - torch.arange(self.keep, 0, -1, device=self.counts.device)
        slot = last.clamp(min=0) * self.cached_per_token + self.cached_per_token - 1
        slot = slot.view(len(slot), *[1] * (x.ndim - 3), self.keep, 1)
        return x.gather(-2, slot.expand(*x.shape[:-2], -1, x.shape[-1]))

    def write_cache(self, k: Tensor, v: Tensor, layer: int) -> None:
        self.cache.write_rows(layer, k, v, self.begins * self.cached_per_token)

    def read_cache(self, layer: int) -> Pair:
        slots = self.longest * self.cached_per_token
        keys, values = self.cache.originals[layer].narrow(3, 0, slots)
        return keys, values

    def attention(self, q: Tensor, k: Tensor, v: Tensor, cached: Pair, layer: int) -> Tensor:
        # One call for all queries, so that the cache is read once.
        out, lse = attend_cached(q, *cached, self.visible_cached(layer))
        first = self.first_local(q, layer)
        if first == q.shape[2] or not self.has_hidden_keys:
            return out
        to_cached = out[:, :, first:], lse[:, :, first:]
        local = self.with_hidden(q[:, :, first:], to_cached, k, v, layer)
        return torch.cat([out[:, :, :first], local], 2) if first else local

    def first_local(self, q: Tensor, layer: int) -> int:
        """Which query of a layer is the first that sees hidden copies: they come last."""
        last_copies = self.is_last(layer) and self.hidden_per_token
        if last_copies or self.local_per_token == self.cache.pattern.K:
            return 0
        return min(self.cached, q.shape[2])

    def visible_cached(self, layer: int) -> Tensor:
        """How many cached slots each of a layer's queries sees, (B, queries)."""
        return self.select_queries(self.of_layer(self.visible, layer), layer)[:, 0, :, 0]

    def with_hidden(self, q: Tensor, to_cached: Pair, k: Tensor, v: Tensor, layer: int) -> Tensor:
        """The output of local queries q, from (out, lse) of cached slots alone."""
        bias, ring = self._local_queries(self.bias, layer), self.cache.ring_size
        skipped = (self.spans[0] - self.spans[layer]) * self.hidden_per_token
        if skipped:  # the layer has fewer keys than the first one
            bias = torch.cat([bias[..., :ring], bias[..., ring + skipped :]], -1)
        to_hidden = attend_masked(q, *self.ring_and_new(k, v, layer), bias)
        if self.local_per_token == self.cache.pattern.K:
            blind = self._local_queries(self.blind[..., None], layer)[..., 0]
            to_hidden = without_blind(to_hidden, blind)
        return merge_outputs(to_hidden, to_cached).to(q.dtype)

    def _local_queries(self, x: Tensor, layer: int) -> Tensor:
        """The local queries of a layer, of x (B, ..., those of the first layer, any)."""
        hidden, end = self.hidden_per_token, x.shape[-2]
        if self.is_last(layer):
            return x[..., end - self.keep * hidden + hidden - 1 :: hidden, :]
        first = end - self.spans[layer + 1] * hidden
        if self.local_per_token == hidden:
            return x[..., first:, :]
        return torch.cat([x[..., : self.cached, :], x[..., first:, :]], -2)

    def write_ring(self, k: Tensor, v: Tensor, layer: int) -> None:
        source = self.ring_source - (self.spans[0] - self.spans[layer]) * self.hidden_per_token
        # Below 0 are hidden copies that this layer skips because no later token sees them.
        self.cache.write_ring_rows(layer, k, v, source.clamp(min=0), self.ring_is_new)


def _check_pairs(cache: KVCache, rows: int, tokens: int) -> None:
    """Refuse a mask that would take gigabytes."""
    K = cache.pattern.K
    pairs = rows * K * tokens * ((K - 1) * tokens + cache.ring_size)
    if cache.pattern.originals_see_hidden and pairs > MOST_PAIRS:
        raise ValueError(
            f"{rows} rows of unequal lengths with up to {tokens} new tokens: where originals see "
            "hidden copies, their mask would be too large; pass rows of one length together, or "
            "fewer tokens at a time (`piece` of phd.inference.prefill.prefill)"
        )


class RaggedPrompts(RaggedRows):
    """`RaggedRows` of rows that are empty before.

    All rows begin with their first token, and padding comes last. So causal attention among the new
    cached slots is right for rows of any length, and needs no mask.
    """

    def attention(self, q: Tensor, k: Tensor, v: Tensor, cached: Pair, layer: int) -> Tensor:
        if self.is_last(layer) and not self.hidden_per_token:
            return super().attention(q, k, v, cached, layer)
        first, outs = self.first_local(q, layer), []
        if first:
            own = k[:, :, : self.cached], v[:, :, : self.cached]
            scale = q.shape[-1] ** -0.5
            outs.append(prompt_forward(q[:, :, :first], *own, scale)[0])
        if first < q.shape[2]:
            q = q[:, :, first:]
            to_cached = attend_cached(q, *cached, self.visible_cached(layer)[:, first:])
            has_keys = self.has_hidden_keys
            outs.append(self.with_hidden(q, to_cached, k, v, layer) if has_keys else to_cached[0])
        return torch.cat(outs, 2)
