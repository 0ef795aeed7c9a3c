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
)
from phd.rope import Rope
from phd.transfer import to_device


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
    """

    def __init__(self, cache: KVCache, rope: Rope, new: Sequence[int], keep: int) -> None:
        tokens, layers, device = max(new), len(cache.originals), cache.lengths.device
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
        if spans[0]:
            self.bias = bias_of(self._sees_hidden(position)[:, None], cache.ring[0].dtype)
            self.ring_source, self.ring_is_new = self._into_ring()

    def _visible_cached(self, position: Tensor) -> Tensor:
        """How many cached slots each of the first layer's slots sees, (B, 1, M, 1)."""
        number = torch.arange(1, self.cached + 1, device=position.device)
        of_cached = self.begins * self.cached_per_token + number
        of_hidden = (position + 1).repeat_interleave(self.hidden_per_token, 1)
        return torch.cat([of_cached, of_hidden], 1)[:, None, :, None]

    def _sees_hidden(self, position: Tensor) -> Tensor:
        """Which hidden copies the new ones see, bool (B, span * (K-1), keys).

        The keys are those in the ring, and then the new ones.
        """
        hidden = self.hidden_per_token
        first = (self.begins + self.hidden_tokens)[..., None] * hidden
        number = (first + torch.arange(hidden, device=first.device)).flatten(1)
        is_token = (self.hidden_tokens >= 0).repeat_interleave(hidden, 1)
        number = torch.where(is_token, number, -1)
        visible = self.cache.pattern.visible_hidden_copies(position).transpose(1, 2).flatten(1)
        key = torch.cat([self.cache.ring_numbers(self.begins * hidden), number], 1)
        # No query sees what is no token. As a query that sees everything: the softmax of a query
        # that sees nothing would be NaN.
        return sees_hidden(number, visible, key) | ~is_token[..., None]

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

    def write_cache(self, k: Tensor, v: Tensor, layer: int) -> Pair:
        self.cache.write_rows(layer, k, v, self.begins * self.cached_per_token)
        slots = self.longest * self.cached_per_token
        keys, values = self.cache.originals[layer].narrow(3, 0, slots)
        return keys, values

    def attention(self, q: Tensor, k: Tensor, v: Tensor, cached: Pair, layer: int) -> Tensor:
        # One call for all queries, so that the cache is read once.
        out, lse = attend_cached(q, *cached, self.visible_cached(layer))
        first = self.first_hidden(q, layer)
        if first == q.shape[2]:
            return out
        to_cached = out[:, :, first:], lse[:, :, first:]
        hidden = self.with_hidden(q[:, :, first:], to_cached, k, v, layer)
        return torch.cat([out[:, :, :first], hidden], 2) if first else hidden

    def first_hidden(self, q: Tensor, layer: int) -> int:
        """Which query of a layer is the first of a hidden copy."""
        last_copies = self.is_last(layer) and self.hidden_per_token
        return 0 if last_copies else min(self.cached, q.shape[2])

    def visible_cached(self, layer: int) -> Tensor:
        """How many cached slots each of a layer's queries sees, (B, queries)."""
        return self.select_queries(self.of_layer(self.visible, layer), layer)[:, 0, :, 0]

    def with_hidden(self, q: Tensor, to_cached: Pair, k: Tensor, v: Tensor, layer: int) -> Tensor:
        """The output of hidden copies' queries q, from (out, lse) of cached slots alone."""
        to_hidden = attend_masked(q, *self.ring_and_new(k, v, layer), self._bias_of_layer(layer))
        return merge_outputs(to_hidden, to_cached).to(q.dtype)

    def _bias_of_layer(self, layer: int) -> Tensor:
        """The mask of a layer's hidden copies: fewer keys and queries than the first layer's."""
        bias, hidden, ring = self.bias, self.hidden_per_token, self.cache.ring_size
        skipped = (self.spans[0] - self.spans[layer]) * hidden
        if skipped:
            bias = torch.cat([bias[..., :ring], bias[..., ring + skipped :]], -1)
        if self.is_last(layer):
            return bias[:, :, -self.keep * hidden :][:, :, hidden - 1 :: hidden]
        return bias[:, :, -self.spans[layer + 1] * hidden :]

    def write_ring(self, k: Tensor, v: Tensor, layer: int) -> None:
        source = self.ring_source - (self.spans[0] - self.spans[layer]) * self.hidden_per_token
        # Below 0 are hidden copies that this layer skips because no later token sees them.
        self.cache.write_ring_rows(layer, k, v, source.clamp(min=0), self.ring_is_new)


class RaggedPrompts(RaggedRows):
    """`RaggedRows` of rows that are empty before.

    All rows begin with their first token, and padding comes last. So causal attention among the new
    cached slots is right for rows of any length, and needs no mask.
    """

    def attention(self, q: Tensor, k: Tensor, v: Tensor, cached: Pair, layer: int) -> Tensor:
        if self.is_last(layer) and not self.hidden_per_token:
            return super().attention(q, k, v, cached, layer)
        first, outs = self.first_hidden(q, layer), []
        if first:
            own = k[:, :, : self.cached], v[:, :, : self.cached]
            scale = q.shape[-1] ** -0.5
            outs.append(prompt_forward(q[:, :, :first], *own, scale)[0])
        if first < q.shape[2]:
            q = q[:, :, first:]
            to_cached = attend_cached(q, *cached, self.visible_cached(layer)[:, first:])
            outs.append(self.with_hidden(q, to_cached, k, v, layer))
        return torch.cat(outs, 2)
