"""Cutting hidden copies into tiles, so that local attention is a batched matrix product."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor
from torch.nn.functional import pad

from phd.pattern import Pattern

# Hidden copies in a tile, between which its size is fitted to the chunk or the window. Products of
# fewer than 16 rows are slow; with more than 64, a short window wastes most of the scores.
SMALLEST_TILE, LARGEST_TILE = 16, 64

# The most scores that are held at a time, here and in `phd.inference`: 2^22 in float32 are 16 MiB.
# Tiles beyond that are computed later, so a window as long as the row costs time but no quadratic
# memory.
SCORES_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Tiles:
    """The tokens of a row cut into tiles of `size` tokens, which see `back` tiles before them.

    With tiles of 3 tokens, `back` = 1, and a window of 3 hidden copies (K = 2), the queries of
    tile 1 meet these keys (`h` seen, `.` masked):

        keys of tile:     0      |   1
        3'             .  h  h   |  h  .  .
        4'             .  .  h   |  h  h  .
        5'             .  .  .   |  h  h  h

    Attributes:
        pattern: a pattern whose rule is `hidden`.
        tokens: T.
        size: tokens in a tile; the last tile may have fewer.
        back: earlier tiles whose hidden copies a tile may see.
        same_mask: every tile has the same mask, as when tiles are whole chunks of one document.
    """

    pattern: Pattern
    tokens: int
    size: int
    back: int
    same_mask: bool

    @classmethod
    def of(cls, pattern: Pattern, tokens: int, one_document: bool = True) -> "Tiles":
        """Whole chunks where they are small, else tiles about as long as the window reaches.

        Chunks begin with their document. So tiles can be chunks only where rows are one document.
        """
        hidden = pattern.K - 1
        smallest, largest = ceil(SMALLEST_TILE / hidden), ceil(LARGEST_TILE / hidden)
        span = min(tokens, pattern.span_tokens, pattern.chunk_tokens or tokens)
        # Plain PHD sees one token back, as if each token were a chunk: one mask for all tiles.
        chunk = 1 if span == 1 else min(tokens, pattern.chunk_tokens or tokens)
        if chunk <= largest and (one_document or chunk == 1):
            return cls(pattern, tokens, chunk * ceil(smallest / chunk), back=0, same_mask=True)
        size = min(max(span - 1, smallest), largest)
        return cls(pattern, tokens, size, back=ceil((span - 1) / size), same_mask=False)

    @property
    def reach(self) -> int:
        """Tokens whose hidden copies a tile's queries meet."""
        return (self.back + 1) * self.size

    def ranges(self, batch: int, heads: int, groups: int, copies: int) -> Iterator["TileRange"]:
        """All tiles, in ranges that have at most `SCORES_AT_ONCE` scores (or one tile).

        Args:
            batch, heads, groups: B, N, G of the queries.
            copies: how many copies are queries; they are the last ones.
        """
        scores = batch * heads * copies * self.size * (self.pattern.K - 1) * self.reach
        step, count = max(1, SCORES_AT_ONCE // scores), ceil(self.tokens / self.size)
        for start in range(0, count, step):
            yield TileRange(self, groups, copies, start, min(start + step, count))


@dataclass(frozen=True)
class TileRange:
    """Tiles `start` to `stop`, and how tensors over tokens are cut into them."""

    tiles: Tiles
    groups: int
    copies: int
    start: int
    stop: int

    @property
    def count(self) -> int:
        return self.stop - self.start

    @property
    def tokens(self) -> slice:
        """The tokens of these tiles."""
        size = self.tiles.size
        return slice(self.start * size, min(self.stop * size, self.tiles.tokens))

    def cut_queries(self, x: Tensor) -> Tensor:
        """Cut (B, N, Q, T, H) into tiles: (B, G, tiles, N/G * Q * size, H)."""
        B, N, Q, _, H = x.shape
        size = self.tiles.size
        x = x[..., self.tokens, :]
        x = _with_tokens(x, 0, self.count * size - x.shape[3])
        x = x.reshape(B, self.groups, N // self.groups, Q, self.count, size, H)
        return x.permute(0, 1, 4, 2, 3, 5, 6).reshape(B, self.groups, self.count, -1, H)

    def join_queries(self, x: Tensor) -> Tensor:
        """The inverse of `cut_queries`: back to (B, N, Q, tokens of these tiles, H)."""
        B, H, size = x.shape[0], x.shape[-1], self.tiles.size
        x = x.view(B, self.groups, self.count, -1, self.copies, size, H)
        x = x.permute(0, 1, 3, 4, 2, 5, 6).reshape(B, -1, self.copies, self.count * size, H)
        return x[..., : self.tokens.stop - self.tokens.start, :]

    def cut_keys(self, x: Tensor) -> Tensor:
        """The hidden copies (B, G, K-1, T, H) that each tile meets: (B, G, tiles, keys, H)."""
        B, G, hidden, T, H = x.shape
        size, reach = self.tiles.size, self.tiles.reach
        start, stop = (self.start - self.tiles.back) * size, self.stop * size
        x = _with_tokens(x[..., max(start, 0) : stop, :], max(-start, 0), max(stop - T, 0))
        x = x.unfold(3, reach, size)  # (B, G, K-1, tiles, H, reach)
        return x.permute(0, 1, 3, 2, 5, 4).reshape(B, G, self.count, hidden * reach, H)

    def add_to_keys(self, total: Tensor, x: Tensor) -> None:
        """Add gradients (B, G, tiles, keys, H) of `cut_keys` to `total` (B, G, K-1, T, H)."""
        B, G, hidden, T, H = total.shape
        size, back = self.tiles.size, self.tiles.back
        x = x.view(B, G, self.count, hidden, back + 1, size, H).permute(0, 1, 3, 4, 2, 5, 6)
        x = x.reshape(B, G, hidden, back + 1, self.count * size, H)
        # A key is in up to `back` + 1 tiles. One addition for each of them.
        for i in range(back + 1):
            start = (self.start - back + i) * size
            skip, stop = max(-start, 0), min(start + self.count * size, T)
            if start + skip < stop:
                total[..., start + skip : stop, :] += x[:, :, :, i, skip : stop - start]

    def masked(self, position: Tensor) -> Tensor:
        """Which hidden keys the queries must not see.

        Args:
            position: int64 (B or 1, T), the position of each token in its document.

        Returns:
            bool (B or 1, tiles or 1, Q * size, keys). Queries past the row's end, which only fill
            the last tile, see themselves. Originals may see none.
        """
        size, back, pattern = self.tiles.size, self.tiles.back, self.tiles.pattern
        hidden, device = pattern.K - 1, position.device
        tokens = slice(size) if self.tiles.same_mask else self.tokens
        visible = pattern.visible_hidden_copies(position[:, tokens])[:, -self.copies :]
        visible = pad(visible, (0, -visible.shape[-1] % size), value=1)
        visible = visible.unflatten(-1, (-1, size)).transpose(1, 2).flatten(2)[..., None]
        number = torch.arange(-1, hidden, device=device)[:, None]  # s - 1
        query = torch.arange(size, device=device) * hidden + number[-self.copies :]
        key = torch.arange(-back * size, size, device=device) * hidden + number[1:]
        distance = query.flatten()[:, None] - key.flatten()
        return (distance < 0) | (distance >= visible)


def _with_tokens(x: Tensor, before: int, after: int) -> Tensor:
    """Add tokens of zeros to (..., T, H). Without any, x itself: `pad` would copy it."""
    return pad(x, (0, 0, before, after)) if before or after else x
