"""The key/value cache: originals for ever, hidden copies in a ring."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from phd.config import ModelConfig
from phd.pattern import Pattern

# Places that a cache grows by.
BLOCK = 256


class KVCache:
    """What a batch of rows remembers of the tokens so far, in every layer.

        originals   token n at place n; with naive repetition, copy s of it at place n*K + s
        ring        hidden copy h = n*(K-1) + s-1 at place h % R

        K = 2, W = 3, after token 4:     originals  0  1  2  3  4  .  .  .     ring  3' 4' 2'

    Rows are left-aligned: each has a length of its own, and nothing behind it is seen.

    Attributes:
        pattern: which slot may attend to which.
        originals: for each layer, keys and values (2, B, G, places, H).
        ring: for each layer, keys and values (2, B, G, R, H); R = 0 where hidden copies are not
            kept, else W hidden copies, or those of W tokens, or of a chunk where that has fewer.
        lengths: int64 (B,) on the device, the tokens of each row.
        host_lengths: the same on the host, so that nobody waits for the device to know them.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int = 1,
        *,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config = config
        self.pattern = Pattern.of(config)
        self.host_lengths = [0] * batch
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        shape = (2, batch, config.kv_heads, 0, config.head_dim)
        empty = torch.empty(shape, dtype=dtype, device=device)
        self.originals = [empty] * config.layers
        self.ring = [empty] * config.layers
        self._hold(capacity)

    @property
    def capacity(self) -> int:
        """Tokens that there is room for in each row."""
        return self.originals[0].shape[3] // self.pattern.places

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values, as they are allocated."""
        return sum(x.nbytes for x in (*self.originals, *self.ring))

    def reserve(self, tokens: int) -> None:
        """Make room for rows of so many tokens: by whole blocks, half as much again at least."""
        if tokens > self.capacity:
            blocks = -(-max(tokens, self.capacity * 3 // 2) // BLOCK)
            self._hold(max(tokens, min(blocks * BLOCK, self.config.max_seq_len)))

    def _hold(self, capacity: int) -> None:
        places, ring = self.pattern.cached_slots(capacity)
        for i, (originals, hidden) in enumerate(zip(self.originals, self.ring, strict=True)):
            self.originals[i] = _grown(originals, places)
            # A ring that may still grow holds less than its places: it has not come round yet.
            self.ring[i] = _grown(hidden, ring)

    def select(self, rows: Tensor) -> None:
        """Keep these rows, int64 (new B,), in this order; one may be taken several times."""
        self.originals = [x.index_select(1, rows) for x in self.originals]
        self.ring = [x.index_select(1, rows) for x in self.ring]
        self.lengths = self.lengths.index_select(0, rows)
        self.host_lengths = [self.host_lengths[row] for row in rows.tolist()]

    def advance(self, tokens: Sequence[int]) -> None:
        """Count the tokens that each row has got."""
        self.host_lengths = [a + b for a, b in zip(self.host_lengths, tokens, strict=True)]
        if len(set(tokens)) == 1:
            self.lengths += tokens[0]
        else:
            self.lengths += torch.tensor(tokens, device=self.lengths.device)


def _grown(x: Tensor, places: int) -> Tensor:
    """The same keys and values with room for more: zeros, since 0 times what is unseen is 0."""
    if x.shape[3] == places:
        return x
    grown = x.new_zeros(*x.shape[:3], places, x.shape[4])
    grown[:, :, :, : x.shape[3]] = x
    return grown


class KVBytes(NamedTuple):
    """Bytes of the keys and values of one sequence, over all layers."""

    total: int
    hidden: int


def kv_bytes(config: ModelConfig, context: int, dtype: torch.dtype) -> KVBytes:
    """What a cache of one sequence of `context` tokens allocates; here it allocates nothing.

    `hidden` is the share of hidden copies: the ring, or what naive repetition remembers of them.
    """
    total, originals = (
        KVCache(c, capacity=context, dtype=dtype, device="meta").nbytes
        for c in (config, config.vanilla_twin)
    )
    return KVBytes(total, total - originals)
