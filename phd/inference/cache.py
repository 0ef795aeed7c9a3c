"""The key/value cache: originals stay, hidden copies pass through a ring."""

from collections.abc import Sequence
from copy import copy
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor

from phd.config import ModelConfig
from phd.pattern import Pattern, patterns_of
from phd.transfer import to_device

# The capacity of a cache that grows is a multiple of this number of tokens.
CAPACITY_STEP = 256


class KVCache:
    """The keys and values that a batch of rows keeps of its tokens so far, in every layer.

        originals   token n in slot n; with naive repetition, copy s of it in slot n*K + s
        ring        hidden copy h = n*(K-1) + s-1 in slot h % R

        K = 2, W = 3, after token 4:     originals  0  1  2  3  4  .  .  .     ring  3' 4' 2'

    Rows are left-aligned: each has its own length, and no query sees a slot beyond it.

    Attributes:
        pattern: which slot may attend to which, in the last layer.
        patterns: the same for each layer that a token goes through; what the cache keeps is alike
            in all of them.
        originals: for each layer, keys and values (2, B, G, slots, H).
        ring: for each layer, keys and values (2, B, G, R, H); R = 0 where hidden copies are not
            kept, else W hidden copies, or those of W tokens, or of a chunk where that has fewer.
        lengths: int64 (B,) on the device, the tokens of each row.
        host_lengths: the same on the host, so that reading them does not wait for the device.
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
        self.pattern, self.patterns = Pattern.of(config), patterns_of(config)
        self.host_lengths = [0] * batch
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        shape = (2, batch, config.kv_heads, 0, config.head_dim)
        empty = torch.empty(shape, dtype=dtype, device=device)
        self.originals = [empty] * config.cached_layers
        self.ring = [empty] * config.cached_layers
        self._resize(capacity)

    @property
    def capacity(self) -> int:
        """Tokens that there is room for in each row."""
        return self.originals[0].shape[3] // self.pattern.cached_slots_per_token

    @property
    def depth(self) -> int:
        """The layers that a token goes through. Later passes of a loop may have none in here."""
        return len(self.patterns)

    @property
    def dtype(self) -> torch.dtype:
        """Of the keys and values."""
        return self.originals[0].dtype

    @property
    def ring_size(self) -> int:
        """R, the hidden copies that there is room for in each row."""
        return self.ring[0].shape[3]

    @property
    def nbytes(self) -> int:
        """Bytes that are allocated for keys and values."""
        return sum(x.nbytes for x in (*self.originals, *self.ring))

    def reserve(self, tokens: int) -> None:
        """Make room for rows of `tokens` tokens.

        A cache that is too small grows by half at least, so that copying it takes linear time in
        all, and to a multiple of `CAPACITY_STEP`.
        """
        if tokens > self.capacity:
            wanted = max(tokens, self.capacity * 3 // 2)
            capacity = ceil(wanted / CAPACITY_STEP) * CAPACITY_STEP
            self._resize(max(tokens, min(capacity, self.config.max_seq_len)))

    def _resize(self, capacity: int) -> None:
        slots, ring = self.pattern.cached_slots(capacity)
        for i, (originals, hidden) in enumerate(zip(self.originals, self.ring, strict=True)):
            self.originals[i] = _grown(originals, slots)
            # A ring grows only while the capacity is less than a window or a chunk. Until then it
            # has never been full, so every hidden copy keeps its slot.
            self.ring[i] = _grown(hidden, ring)

    def of_layers(self, first: int, stop: int | None) -> "KVCache":
        """The same cache, of these layers alone: what is written to it is written here."""
        part = copy(self)
        part.originals, part.ring = self.originals[first:stop], self.ring[first:stop]
        part.patterns = self.patterns[first:stop]
        return part

    def select(self, rows: Tensor) -> None:
        """Keep these rows, int64 (new B,), in this order; a row may be taken several times."""
        self.originals = [x.index_select(1, rows) for x in self.originals]
        self.ring = [x.index_select(1, rows) for x in self.ring]
        self.lengths = self.lengths.index_select(0, rows)
        self.host_lengths = [self.host_lengths[row] for row in rows.tolist()]

    def replace(self, rows: Sequence[int], other: "KVCache") -> None:
        """Let these rows remember what the rows of another cache do, in the same order.

        All else stays where it is, so a captured graph goes on with the new rows.

        Args:
            other: of the same model, and of no more room.
        """
        assert other.capacity <= self.capacity, (other.capacity, self.capacity)
        index = to_device(rows, self.lengths.device)
        for mine, theirs in (*zip(self.originals, other.originals, strict=True),
                             *zip(self.ring, other.ring, strict=True)):  # fmt: skip
            # A smaller ring was never full, so its hidden copies have the same slots in this one.
            mine.narrow(3, 0, theirs.shape[3]).index_copy_(1, index, theirs)
        self.lengths.index_copy_(0, index, other.lengths)
        for row, length in zip(rows, other.host_lengths, strict=True):
            self.host_lengths[row] = length

    def clear(self, rows: Sequence[int]) -> None:
        """Forget all tokens of these rows."""
        self.lengths.index_fill_(0, to_device(rows, self.lengths.device), 0)
        for row in rows:
            self.host_lengths[row] = 0

    def advance(self, tokens: Sequence[int]) -> None:
        """Add the number of new tokens of each row to its length."""
        self.host_lengths = [a + b for a, b in zip(self.host_lengths, tokens, strict=True)]
        if len(set(tokens)) == 1:
            self.lengths += tokens[0]
        else:
            self.lengths += to_device(tokens, self.lengths.device)

    def write_slice(self, layer: int, k: Tensor, v: Tensor, first: int) -> None:
        """Write new cached slots (B, G, new, H) from slot `first` on, the same in all rows."""
        written = self.originals[layer].narrow(3, first, k.shape[2])
        written[0].copy_(k)
        written[1].copy_(v)

    def write_rows(self, layer: int, k: Tensor, v: Tensor, first: Tensor) -> None:
        """Write new cached slots (B, G, new, H) from slot `first` (B, 1) of each row on."""
        row = torch.arange(len(k), device=k.device)[:, None]
        slot = first + torch.arange(k.shape[2], device=k.device)
        originals = self.originals[layer]
        # Keys and values in one assignment: torch.compile does it in place. With two it would copy
        # the whole cache.
        new = torch.stack([k, v]).to(originals.dtype).permute(1, 3, 0, 2, 4)
        originals[:, row, :, slot] = new

    def ring_numbers(self, written: Tensor) -> Tensor:
        """Which hidden copy each slot of the ring holds when `written` (..., 1) have been written.

        Hidden copies are numbered from the beginning of their row. Returns int64 (..., R), below 0
        where the slot is empty.
        """
        last, slot = written - 1, torch.arange(self.ring_size, device=written.device)
        return last - (last - slot) % max(self.ring_size, 1)  # without a ring there are no slots

    def write_ring_slice(self, layer: int, k: Tensor, v: Tensor, written: int) -> None:
        """Write new hidden copies (B, G, new, H) into the ring, of which only the last R stay.

        `written` is how many hidden copies each row has then, the same in all rows.
        """
        count = min(k.shape[2], self.ring_size)
        first = (written - count) % self.ring_size
        to_end = min(count, self.ring_size - first)
        for ring, x in zip(self.ring[layer], (k, v), strict=True):
            x = x[:, :, x.shape[2] - count :]
            ring[:, :, first : first + to_end].copy_(x[:, :, :to_end])
            if to_end < count:  # the rest goes to the ring's beginning
                ring[:, :, : count - to_end].copy_(x[:, :, to_end:])

    def write_ring_rows(
        self, layer: int, k: Tensor, v: Tensor, source: Tensor, is_new: Tensor
    ) -> None:
        """Write new hidden copies (B, G, new, H) into the ring, each row's in its own slots.

        Args:
            source: int64 (B, R), the new hidden copy that each slot gets.
            is_new: bool (B, R), whether it gets one.
        """
        is_new = is_new[:, None, :, None]
        index = source[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])
        for ring, x in zip(self.ring[layer], (k, v), strict=True):
            ring.copy_(torch.where(is_new, x.gather(2, index).to(ring.dtype), ring))


def _grown(x: Tensor, slots: int) -> Tensor:
    """The same keys and values with room for more slots, which are 0.

    Masked slots have a weight of 0, and 0 times what empty memory may hold need not be 0.
    """
    if x.shape[3] == slots:
        return x
    grown = x.new_zeros(*x.shape[:3], slots, x.shape[4])
    grown[:, :, :, : x.shape[3]] = x
    return grown


class KVBytes(NamedTuple):
    """Bytes of the keys and values of one sequence, over all layers."""

    total: int
    hidden: int


def kv_bytes(config: ModelConfig, context: int, dtype: torch.dtype) -> KVBytes:
    """The bytes of a cache of one sequence of `context` tokens, without allocating it.

    `hidden` is the share of hidden copies: the ring, or those that naive repetition keeps.
    """
    total, originals = (
        KVCache(c, capacity=context, dtype=dtype, device="meta").nbytes
        for c in (config, config.vanilla_twin)
    )
    return KVBytes(total, total - originals)
