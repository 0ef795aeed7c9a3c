"""How the fused kernels cut hidden copies into blocks: one table, by pattern, head and dtype."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from phd.pattern import Pattern

# Windows and chunks beyond this many hidden copies are as good as endless; the kernels count in 32
# bits.
ENDLESS = 1 << 28


@dataclass(frozen=True)
class LocalRule:
    """Rules 2 and 3 as the kernels compute them, for hidden copies h(n, s) = n*(K-1) + s-1.

    Attributes:
        hidden: K - 1.
        window: W.
        chunk: tokens in a chunk; 0: one chunk for the whole document.
        in_tokens: whether W counts tokens.
    """

    hidden: int
    window: int
    chunk: int
    in_tokens: bool

    @classmethod
    def of(cls, pattern: Pattern) -> "LocalRule":
        """Plain PHD, which sees its own token alone, has chunks of one token."""
        assert pattern.rule == "hidden"
        assert has_local_kernels(pattern)
        hidden, longest = pattern.K - 1, ENDLESS // (pattern.K - 1)
        if pattern.window is None or pattern.span_tokens == 1:
            return cls(hidden, 1, 1, False)
        in_tokens = pattern.span_unit == "token"
        window = min(pattern.window, longest if in_tokens else ENDLESS)
        return cls(hidden, window, min(pattern.chunk_tokens or 0, longest), in_tokens)


class Launch(NamedTuple):
    """A kernel's grid, its arguments, its `tl.constexpr` ones, and how Triton compiles it."""

    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    options: dict[str, int]


class ForwardBlocks(NamedTuple):
    """What a program of the forward kernel works on.

    Attributes:
        rows: queries of all its heads, filled up to a power of 2.
        queries: consecutive queries of one head.
        heads: query heads.
        keys: hidden keys that are multiplied at a time.
        warps: warps of 32 threads.
        stages: steps of a loop whose loads are under way at a time.
    """

    rows: int
    queries: int
    heads: int
    keys: int
    warps: int
    stages: int

    @property
    def constants(self) -> dict[str, int]:
        return {
            "ROWS": self.rows,
            "QUERIES": self.queries,
            "HEADS": self.heads,
            "KEYS": self.keys,
        }

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}


class BackwardBlocks(NamedTuple):
    """What a program of the backward kernel works on.

    Attributes:
        rows: queries, of any of its heads, that are multiplied at a time.
        queries: the most queries of one head that lie in the tile.
        tile: hidden keys of the tile.
        keys: the same filled up to a power of 2.
        halo: hidden keys before the tile, and queries of a head after it, that are multiplied at
            a time; 0: none, because no chunk lies in two tiles.
        warps, stages: as in `ForwardBlocks`.
    """

    rows: int
    queries: int
    tile: int
    keys: int
    halo: int
    warps: int
    stages: int

    @property
    def constants(self) -> dict[str, int]:
        return {
            "ROWS": self.rows,
            "QUERIES": self.queries,
            "TILE": self.tile,
            "KEYS": self.keys,
            "HALO": self.halo,
        }

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}


# Chosen by what Triton 3.7 and ptxas report for sm_90, not yet by time: so many rows that a step's
# loads feed several products, and so few that hardly a register spills. The figures are registers
# of a thread, of which a processor has 65,536, and bytes that spill where there are any.
FORWARD = {
    # (bytes of a number, padded H): rows, keys, warps, stages
    (2, 64): (64, 32, 4, 2),  # 96 to 107
    (2, 128): (64, 32, 4, 2),  # 132 to 168
    (2, 256): (32, 32, 4, 2),  # 190
    (4, 64): (32, 16, 4, 2),  # 168
    (4, 128): (32, 16, 8, 2),  # 246
}
BACKWARD = {
    # (bytes of a number, padded H): {keys of a tile: (rows, warps, stages)}
    # 98; with 4 warps 255. In tiles of 64, 216 for a chunk of 33, and 240 to 249 with a halo: there
    # 128 rows would spill, and 132 queries (4 heads of 33) fill five blocks of 32 rows, two of 128.
    (2, 64): {32: (128, 8, 2), 64: (32, 4, 2)},
    # 247. In tiles of 64, 255, with 8 bytes for a chunk of 33 and up to 68 with documents.
    (2, 128): {32: (32, 8, 2), 64: (32, 8, 2)},
    (2, 256): {32: (16, 8, 1)},  # 197
    (4, 64): {32: (16, 8, 1)},  # 255
    (4, 128): {16: (16, 8, 1)},  # 255, and 1,008 bytes; float32 is for comparisons
}
HALO = 16  # the fewest that a product takes

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def has_kernels(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether there are kernels for a dtype and H."""
    return dtype in DTYPES and (dtype.itemsize, table_width(head_dim)) in BACKWARD


def has_local_kernels(pattern: Pattern) -> bool:
    """Whether the kernels can follow a pattern: they have hidden copies as queries alone."""
    return not pattern.originals_see_hidden


def padded_head(head_dim: int) -> int:
    """H filled up to a power of 2, of at least the 16 that a product needs."""
    return max(16, _power_of_2(head_dim))


def table_width(head_dim: int) -> int:
    """The width that the tables have for H: narrow heads get the blocks of 64."""
    return max(64, padded_head(head_dim))


def _power_of_2(least: int) -> int:
    """The smallest power of 2 that is no less.

    >>> [_power_of_2(n) for n in (1, 2, 33)]
    [1, 2, 64]
    """
    return 1 << (least - 1).bit_length()


def forward_blocks(
    rule: LocalRule, head_dim: int, itemsize: int, asking: int, sharing: int
) -> ForwardBlocks:
    """The blocks of the forward kernel.

    Args:
        rule: the rule.
        head_dim: H.
        itemsize: bytes of a number.
        asking: hidden queries of each token, K - 1 or 1.
        sharing: N/G, query heads of one key head.
    """
    rows, keys, warps, stages = FORWARD[itemsize, table_width(head_dim)]
    # Heads share the keys of a tile. Where only a token's last copy asks, each query has K - 1 keys
    # of its own, so a tile of fewer queries and more heads has fewer keys to multiply.
    heads = min(_power_of_2(sharing), rows // (32 if asking == rule.hidden else 16))
    heads = max(1, heads)
    queries = rows // heads
    chunk = rule.chunk * asking
    whole = queries // chunk * chunk if chunk else 0
    if 4 * whole >= 3 * queries:
        queries = whole  # whole chunks see no key outside of the tile
    return ForwardBlocks(rows, queries, heads, keys, warps, stages)


def backward_blocks(
    rule: LocalRule, head_dim: int, itemsize: int, asking: int, sharing: int, documents: bool
) -> BackwardBlocks:
    """The blocks of the backward kernel; arguments as in `forward_blocks`.

    `documents`: whether a row may hold several, so that chunks of more than a token begin anywhere.
    """
    table = BACKWARD[itemsize, table_width(head_dim)]
    chunk, largest = rule.chunk * rule.hidden, max(table)
    if 0 < chunk <= largest and (rule.chunk == 1 or not documents):
        keys, halo = max(min(table), _power_of_2(chunk)), 0
        tile = keys // chunk * chunk
    else:
        keys, halo = largest, HALO
        tile = keys // rule.hidden * rule.hidden if asking < rule.hidden <= keys else keys
    queries = tile if asking == rule.hidden else max(1, tile // rule.hidden)
    rows, warps, stages = table[keys]
    rows = max(16, min(rows, _power_of_2(queries * sharing)))
    return BackwardBlocks(rows, queries, tile, keys, halo, warps, stages)
