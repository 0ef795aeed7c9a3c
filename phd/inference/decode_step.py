"""One new token of each row: all its copies go through a layer together."""

from abc import abstractmethod

import torch
from torch import Tensor

from phd.attention.flash import merge_outputs
from phd.inference.cache import KVCache
from phd.inference.cached_attention import attend_cached, attend_masked, bias_of
from phd.inference.incremental import (
    IncrementalForward,
    Pair,
    sees_hidden,
    slots_per_token,
    without_blind,
)
from phd.rope import Rope, rotate


class DecodeStep(IncrementalForward):
    """One new token of each row, whose K copies are the slots of every layer.

        queries            keys: cached slots, read once for all queries    hidden copies
        original           all up to its own                                -, or the ring
        hidden copies      all up to the token's                            the ring and the
                                                                            token's own, by a mask

    Args:
        position: int64 (B, 1), or (1, 1) where all rows have one: the new token's position.
        more_layers: the cache has layers before the last one alone (`KVCache.of_layers`).
    """

    def __init__(
        self, cache: KVCache, rope: Rope, position: Tensor, *, more_layers: bool = False
    ) -> None:
        _, hidden = slots_per_token(cache.pattern)
        copy = torch.arange(cache.pattern.K, device=position.device)
        cos, sin = (x[:, None, None] for x in rope.at(position, copy))
        spans = [1 if hidden else 0] * (cache.depth + more_layers)
        super().__init__(cache, 1, spans, (cos, sin))
        if self.has_hidden_keys:
            sees = self._sees_hidden(position)
            # Only an original may see none: its softmax is of all, and then it counts as nothing.
            self.blind = sees.logical_not().all(2)
            if self.local_per_token == cache.pattern.K:
                sees |= self.blind[..., None]
            self.bias = bias_of(sees[:, None], cache.ring[0].dtype)

    def _sees_hidden(self, position: Tensor) -> Tensor:
        """Which hidden copies the new local copies see, bool (B or 1, local, R + K-1).

        The keys are those in the ring, and then the new ones.
        """
        hidden = self.hidden_per_token
        number = position * hidden + torch.arange(-1, hidden, device=position.device)
        key = torch.cat([self.cache.ring_numbers(position * hidden), number[:, 1:]], 1)
        visible = self.cache.pattern.visible_hidden_copies(position).flatten(1)
        return sees_hidden(number[:, -self.local_per_token :], visible, key)

    @abstractmethod
    def visible_cached(self) -> Tensor | None:
        """How many cached slots the K copies see, (B, K); None: all that `read_cache` returns."""

    def slots(self, x: Tensor) -> Tensor:
        return slots_of_token(x, self.cache.pattern.K)

    def last_queries(self, x: Tensor) -> Tensor:
        return x[..., -1:, :]

    def rotate(self, q: Tensor, k: Tensor, layer: int) -> Pair:
        if not q.shape[3] == k.shape[3] == self.rope[0].shape[3]:
            return super().rotate(q, k, layer)
        # A kernel's time is that of starting it, so one call for both takes half the time of two.
        both = rotate(torch.cat([q, k], 2), *self.rope).squeeze(2)
        q, k = both.split([q.shape[2], k.shape[2]], 1)
        return q, k

    def attention(self, q: Tensor, k: Tensor, v: Tensor, cached: Pair, layer: int) -> Tensor:
        last, visible = self.is_last(layer), self.visible_cached()
        if visible is not None and last:
            visible = visible[:, -1:]
        out, lse = attend_cached(q, *cached, visible)
        if not self.has_hidden_keys:
            return out
        keys = self.ring_and_new(k, v, layer)
        if last:
            to_hidden = attend_masked(q, *keys, self.bias[:, :, -1:])
            return merge_outputs(to_hidden, (out, lse)).to(q.dtype)
        if self.local_per_token == q.shape[2]:
            to_hidden = without_blind(attend_masked(q, *keys, self.bias), self.blind)
            return merge_outputs(to_hidden, (out, lse)).to(q.dtype)
        to_hidden = attend_masked(q[:, :, 1:], *keys, self.bias)
        hidden = merge_outputs(to_hidden, (out[:, :, 1:], lse[:, :, 1:])).to(q.dtype)
        return torch.cat([out[:, :, :1], hidden], 2)


class EqualDecodeStep(DecodeStep):
    """A decode step of rows of one length, which the host knows: all is slices, without a mask.

    For patterns with one cached slot per token, which then sees all of the cache.
    """

    def __init__(self, cache: KVCache, rope: Rope) -> None:
        assert cache.pattern.cached_slots_per_token == 1, cache.pattern
        self.past = cache.host_lengths[0]
        super().__init__(cache, rope, cache.lengths[:1, None])

    def visible_cached(self) -> None:
        return None

    def write_cache(self, k: Tensor, v: Tensor, layer: int) -> None:
        self.cache.write_slice(layer, k, v, self.past)

    def read_cache(self, layer: int) -> Pair:
        keys, values = self.cache.originals[layer].narrow(3, 0, self.past + 1)
        return keys, values

    def write_ring(self, k: Tensor, v: Tensor, layer: int) -> None:
        self.cache.write_ring_slice(layer, k, v, (self.past + 1) * self.hidden_per_token)


class RaggedDecodeStep(DecodeStep):
    """A decode step of rows of any lengths, which are read on the device alone.

    Nothing on the host depends on lengths, and all shapes follow from those of the cache and from
    `reach`. So with `reach` = the cache's capacity, a CUDA graph or a compiled function of this
    work serves all lengths.

    Args:
        reach: tokens of the cache that queries are given; at least the longest row's, with its new
            token.
        more_layers: as in `DecodeStep`.
    """

    def __init__(
        self, cache: KVCache, rope: Rope, reach: int, *, more_layers: bool = False
    ) -> None:
        self.begins, self.reach = cache.lengths[:, None], reach
        super().__init__(cache, rope, self.begins, more_layers=more_layers)
        number = torch.arange(1, self.cached + 1, device=self.begins.device)
        of_cached = self.begins * self.cached_per_token + number
        of_hidden = (self.begins + 1).expand(-1, self.hidden_per_token)
        self.visible = torch.cat([of_cached, of_hidden], 1)
        if self.hidden_per_token:
            written, new = self.begins * self.hidden_per_token, self.hidden_per_token
            numbers = cache.ring_numbers(written + new)
            self.ring_source = (numbers - written).clamp(min=0)
            self.ring_is_new = numbers >= written

    def visible_cached(self) -> Tensor:
        return self.visible

    def write_cache(self, k: Tensor, v: Tensor, layer: int) -> None:
        self.cache.write_rows(layer, k, v, self.begins * self.cached_per_token)

    def read_cache(self, layer: int) -> Pair:
        slots = self.reach * self.cached_per_token
        keys, values = self.cache.originals[layer].narrow(3, 0, slots)
        return keys, values

    def write_ring(self, k: Tensor, v: Tensor, layer: int) -> None:
        self.cache.write_ring_rows(layer, k, v, self.ring_source, self.ring_is_new)


def slots_of_token(x: Tensor, copies: int) -> Tensor:
    """All copies' input (B, K or 1, 1, D) of one token -> its slots (B, 1, K, D)."""
    return x.expand(-1, copies, -1, -1).transpose(1, 2)
