"""Cutting the hidden copies into blocks, so that local attention is a batched matrix product."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor
from torch.nn.functional import pad

from phd.pattern import Pattern

# Slots of a block, within which its length is fitted to the chunk or the window: enough for an
# efficient product, few enough that a short window does not waste most of its scores.
SMALLEST_BLOCK, LARGEST_BLOCK = 16, 64

# Scores that are held at a time; blocks beyond that wait their turn, so that a window as long as
# the row costs time but no quadratic memory. 2^22 in float32 are 16 MiB.
SCORES_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Tiles:
    """Blocks of `size` tokens, each of which sees the hidden copies of `back` blocks before it.

    With blocks of 3 tokens, `back` = 1, and a window of 3 hidden copies (K = 2), the queries of
    block 1 meet these keys (`h` seen, `.` masked):

        keys of block:    0      |   1
        3'             .  h  h   |  h  .  .
        4'             .  .  h   |  h  h  .
        5'             .  .  .   |  h  h  h

    Attributes:
        pattern: a pattern whose rule is `hidden`.
        tokens: T.
        size: tokens in a block; the last block may be ragged.
        back: earlier blocks whose hidden copies a block may see.
        alike: every block has the same mask, as when blocks are whole chunks of one document.
    """

    pattern: Pattern
    tokens: int
    size: int
    back: int
    alike: bool

    @classmethod
    def of(cls, pattern: Pattern, tokens: int, one_document: bool = True) -> "Tiles":
        """Whole chunks where they are small, else blocks about as long as the window reaches.

        Unless every row is one document, chunks begin anywhere, so blocks cannot be chunks.
        """
        hidden = pattern.K - 1
        smallest, largest = ceil(SMALLEST_BLOCK / hidden), ceil(LARGEST_BLOCK / hidden)
        span = min(tokens, pattern.span_tokens or tokens, pattern.chunk_tokens or tokens)
        # Plain PHD sees one token back, as if each token were a chunk: one mask for all blocks.
        chunk = 1 if span == 1 else min(tokens, pattern.chunk_tokens or tokens)
        if chunk <= largest and (one_document or chunk == 1):
            return cls(pattern, tokens, chunk * ceil(smallest / chunk), back=0, alike=True)
        size = min(max(span - 1, smallest), largest)
        return cls(pattern, tokens, size, back=ceil((span - 1) / size), alike=False)

    @property
    def reach(self) -> int:
        """Tokens whose hidden copies a block's queries meet."""
        return (self.back + 1) * self.size

    def turns(self, batch: int, heads: int, groups: int, copies: int) -> Iterator["TileRange"]:
        """All blocks, in turns of at most `SCORES_AT_ONCE` scores (or of one block).

        batch, heads, groups: B, N, G of the queries; copies: how many hidden copies ask, the last.
        """
        scores = batch * heads * copies * self.size * (self.pattern.K - 1) * self.reach
        step, count = max(1, SCORES_AT_ONCE // scores), ceil(self.tokens / self.size)
        for start in range(0, count, step):
            yield TileRange(self, groups, copies, start, min(start + step, count))


@dataclass(frozen=True)
class TileRange:
    """Blocks `start` to `stop`, and how tensors over tokens are cut into them."""

    blocks: Tiles
    groups: int
    copies: int
    start: int
    stop: int

    @property
    def count(self) -> int:
        return self.stop - self.start

    @property
    def rows(self) -> slice:
        """The tokens of these blocks."""
        size = self.blocks.size
        return slice(self.start * size, min(self.stop * size, self.blocks.tokens))

    def queries(self, x: Tensor) -> Tensor:
        """Cut (B, N, Q, T, H) into blocks: (B, G, blocks, N/G * Q * size, H)."""
        B, N, Q, _, H = x.shape
        size = self.blocks.size
        x = x[..., self.rows, :]
        x = pad(x, (0, 0, 0, self.count * size - x.shape[3]))
        x = x.reshape(B, self.groups, N // self.groups, Q, self.count, size, H)
        return x.permute(0, 1, 4, 2, 3, 5, 6).reshape(B, self.groups, self.count, -1, H)

    def unblock(self, x: Tensor) -> Tensor:
        """The inverse of `queries`: back to (B, N, Q, tokens of these blocks, H)."""
        B, H, size = x.shape[0], x.shape[-1], self.blocks.size
        x = x.view(B, self.groups, self.count, -1, self.copies, size, H)
        x = x.permute(0, 1, 3, 4, 2, 5, 6).reshape(B, -1, self.copies, self.count * size, H)
        return x[..., : self.rows.stop - self.rows.start, :]

    def keys(self, x: Tensor) -> Tensor:
        """The hidden copies (B, G, K-1, T, H) that each block meets: (B, G, blocks, keys, H)."""
        B, G, hidden, T, H = x.shape
        size, reach = self.blocks.size, self.blocks.reach
        start, stop = (self.start - self.blocks.back) * size, self.stop * size
        x = pad(x[..., max(start, 0) : stop, :], (0, 0, max(-start, 0), max(stop - T, 0)))
        x = x.unfold(3, reach, size)  # (B, G, K-1, blocks, H, reach)
        return x.permute(0, 1, 3, 2, 5, 4).reshape(B, G, self.count, hidden * reach, H)

    def add_to_keys(self, total: Tensor, x: Tensor) -> None:
        """Add gradients (B, G, blocks, keys, H) to `total` (B, G, K-1, T, H), undoing `keys`."""
        B, G, hidden, T, H = total.shape
        size, back = self.blocks.size, self.blocks.back
        x = x.view(B, G, self.count, hidden, back + 1, size, H).permute(0, 1, 3, 4, 2, 5, 6)
        x = x.reshape(B, G, hidden, back + 1, self.count * size, H)
        for i in range(back + 1):
            start = (self.start - back + i) * size
            skip, stop = max(-start, 0), min(start + self.count * size, T)
            if start + skip < stop:
                total[..., start + skip : stop, :] += x[:, :, :, i, skip : stop - start]

    def masked(self, position: Tensor) -> Tensor:
        """Which hidden keys the hidden queries must not see, by the tokens' places in documents.

        position is (B or 1, T); the result bool (B or 1, blocks or 1, Q * size, keys). Queries
        past the row's end, which only fill the last block, see themselves.
        """
        size, back, pattern = self.blocks.size, self.blocks.back, self.blocks.pattern
        hidden, device = pattern.K - 1, position.device
        rows = slice(size) if self.blocks.alike else self.rows
        seen = pattern.visible_hidden_copies(position[:, rows])[:, -self.copies :]
        seen = pad(seen, (0, -seen.shape[-1] % size), value=1)
        seen = seen.unflatten(-1, (-1, size)).transpose(1, 2).flatten(2)[..., None]
        number = torch.arange(hidden, device=device)[:, None]  # s - 1
        query = torch.arange(size, device=device) * hidden + number[-self.copies :]
        key = torch.arange(-back * size, size, device=device) * hidden + number
        distance = query.flatten()[:, None] - key.flatten()
        return (distance < 0) | (distance >= seen)
