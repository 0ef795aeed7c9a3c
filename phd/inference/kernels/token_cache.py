"""What the kernels of one decoded token read and write of a layer's cache."""

from typing import NamedTuple

import torch
from torch import Tensor

from phd.attention.blocks import LocalRule
from phd.inference.cache import KVCache
from phd.pattern import Pattern


class TokenCache(NamedTuple):
    """A layer's keys and values, and where a token's hidden copies wait until they are seen.

        originals   token n in slot n; with naive repetition, copy s of it in slot n*K + s
        ring        hidden copy h = n*(K-1) + s-1 of an earlier token in slot h % R
        new         hidden copy s of the new token in slot s-1

    A new hidden copy may take a slot of the ring whose old one the token's other copies still see.
    So it waits in `new` until all of them have attended.

    Attributes:
        originals: (2, B, G, slots, H).
        ring: (2, B, G, R, H).
        new: (2, B, G, K-1, H); nothing in it is needed after the layer.
        lengths: int64 (B,) on the device, the tokens of each row before the new one.
    """

    originals: Tensor
    ring: Tensor
    new: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, cache: KVCache, layer: int, new: Tensor) -> "TokenCache":
        """A layer of `cache`, with `new` of `new_hidden_copies`, which all layers can share."""
        return cls(cache.originals[layer], cache.ring[layer], new, cache.lengths)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """B, G, slots, H."""
        _, B, G, slots, H = self.originals.shape
        return B, G, slots, H

    def check(self, pattern: Pattern) -> None:
        """What the kernels take for granted: they compute addresses from shapes."""
        _, B, G, _, H = self.originals.shape
        hidden = pattern.K - pattern.cached_slots_per_token
        for x in (self.originals, self.ring, self.new):
            assert x.is_contiguous(), (x.shape, x.stride())
            assert x.dtype == self.originals.dtype, (x.dtype, self.originals.dtype)
            assert x.shape[:3] + x.shape[4:] == (2, B, G, H), x.shape
        assert self.new.shape[3] == hidden, (self.new.shape, pattern)
        assert self.lengths.shape == (B,), (self.lengths.shape, B)
        assert self.lengths.dtype == torch.int64, self.lengths.dtype


def new_hidden_copies(cache: KVCache) -> Tensor:
    """Room for the hidden copies of one token of each row, (2, B, G, K-1, H)."""
    hidden = cache.pattern.K - cache.pattern.cached_slots_per_token
    originals = cache.originals[0]
    return originals.new_empty(*originals.shape[:3], hidden, originals.shape[4])


def copies_of(pattern: Pattern) -> dict[str, int]:
    """Of how many copies a token has, how many stay in the cache, and how many do not."""
    cached = pattern.cached_slots_per_token
    return {"K": pattern.K, "CACHED": cached, "HIDDEN": pattern.K - cached}


def rule_of(pattern: Pattern) -> dict[str, int | bool]:
    """Rules 2 and 3 as the kernel's constants; they have no effect without hidden copies."""
    if pattern.cached_slots_per_token == pattern.K:
        return {"WINDOW": 1, "CHUNK": 1, "IN_TOKENS": False}
    rule = LocalRule.of(pattern)
    return {"WINDOW": rule.window, "CHUNK": rule.chunk, "IN_TOKENS": rule.in_tokens}
