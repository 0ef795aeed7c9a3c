"""Who attends to whom: the attention rule of every variant, as one value."""

from dataclasses import dataclass
from math import ceil
from typing import Literal, TypeVar

import torch
from torch import Tensor

from phd.config import ModelConfig, SpanUnit

Rule = Literal["causal", "flat", "hidden"]
Index = TypeVar("Index", int, Tensor)


@dataclass(frozen=True)
class Pattern:
    """The attention rule over the K*T slots of a row (arXiv 2504.14992, section 3).

    Slot (n, s) is copy s of token n; copy 0 is the *original*, copies 1..K-1 are *hidden*.
    With `phd_cswa`, K = 2, a window of 2 hidden copies and chunks of 3, the second copies (rows
    `n'`) see all originals up to their own, and each other within the window and the chunk:

    >>> print(Pattern("hidden", K=2, window=2, chunk_tokens=3).draw(6))
         0  1  2  3  4  5  0' 1' 2' 3' 4' 5'
    0    o  .  .  .  .  .  .  .  .  .  .  .
    1    o  o  .  .  .  .  .  .  .  .  .  .
    2    o  o  o  .  .  .  .  .  .  .  .  .
    3    o  o  o  o  .  .  .  .  .  .  .  .
    4    o  o  o  o  o  .  .  .  .  .  .  .
    5    o  o  o  o  o  o  .  .  .  .  .  .
    0'   o  .  .  .  .  .  h  .  .  .  .  .
    1'   o  o  .  .  .  .  h  h  .  .  .  .
    2'   o  o  o  .  .  .  .  h  h  .  .  .
    3'   o  o  o  o  .  .  .  .  .  h  .  .
    4'   o  o  o  o  o  .  .  .  .  h  h  .
    5'   o  o  o  o  o  o  .  .  .  .  h  h

    The upper left quadrant is the vanilla causal mask: originals never see a hidden copy, so they
    compute what the vanilla model computes, and only they have to stay in the KV cache.

    Attributes:
        rule: `causal` (K = 1), `flat` (naive repetition: every slot sees itself and all before it,
            token by token), or `hidden` (PHD: originals are remembered, hidden copies are local).
        K: copies of each token.
        window: W, the reach of hidden copies, itself included; None: no rule 3 (plain PHD).
        chunk_tokens: tokens in a chunk; None: one chunk for the whole row.
        span_unit: whether W counts hidden copies or tokens.
    """

    rule: Rule
    K: int = 1
    window: int | None = None
    chunk_tokens: int | None = None
    span_unit: SpanUnit = "hidden"

    @classmethod
    def of(cls, config: ModelConfig) -> "Pattern":
        """The pattern of a model; with one copy every variant is vanilla."""
        if config.K == 1:
            return cls("causal")
        if config.variant == "naive_repeat":
            return cls("flat", config.K)
        if config.variant == "phd":
            return cls("hidden", config.K)
        return cls("hidden", config.K, config.window, config.chunk_tokens, config.span_unit)

    def allows(self, n: Index, s: Index, m: Index, r: Index) -> Index:
        """Whether slot (n, s) may attend to slot (m, r); ints, or tensors that broadcast."""
        if self.rule == "flat":
            return (m < n) | ((m == n) & (r <= s))
        remembered = (r == 0) & (m <= n)
        own = (m == n) & (r >= 1) & (r <= s)
        if self.window is None:
            return remembered | own
        distance = n * (self.K - 1) + s - (m * (self.K - 1) + r)
        reach = n - m if self.span_unit == "token" else distance
        near = (s >= 1) & (r >= 1) & (distance >= 0) & (reach < self.window)
        if self.chunk_tokens is not None:
            near = near & (n // self.chunk_tokens == m // self.chunk_tokens)
        return remembered | own | near

    def mask(self, tokens: int, device: torch.device | str = "cpu") -> Tensor:
        """The dense mask, bool (K, T, K, T) as [query copy, query token, key copy, key token].

        O((KT)^2) memory: the definition that tests hold the fast backends against.
        """
        copy = torch.arange(self.K, device=device)
        token = torch.arange(tokens, device=device)
        return self.allows(token[:, None, None], copy[:, None, None, None], token, copy[:, None])

    def visible_hidden_copies(self, position: Tensor) -> Tensor:
        """How many hidden copies each hidden copy sees, its own included.

        Hidden copies are numbered h(n, s) = n*(K-1) + s-1. By rules 2 and 3 together, the hidden
        copies that copy h sees are an interval that ends with h itself; this is its length. The
        packed backend masks by it.

        Args:
            position: int64 (..., T), the position of each token in its document.

        Returns:
            int64 (..., K-1, T).
        """
        assert self.rule == "hidden"
        own = torch.arange(1, self.K, device=position.device)[:, None]
        n = position[..., None, :]
        if self.window is None:
            return own.expand(*position.shape[:-1], -1, position.shape[-1])
        before = n if self.chunk_tokens is None else n % self.chunk_tokens
        if self.span_unit == "token":
            return before.clamp(max=self.window - 1) * (self.K - 1) + own
        return torch.minimum(before * (self.K - 1) + own, own.clamp(min=self.window))

    def visible_tokens(self, s: int, r: int, position: Tensor) -> tuple[Tensor, Tensor]:
        """The interval of tokens whose copy r is seen by copy s of each token.

        Returns (low, high), int64 as `position` (..., T), positions in the document as well. Both
        ends are seen; the interval is empty where high < low.
        """
        n = position
        low, high = torch.zeros_like(n), n if r <= s else n - 1
        if self.rule == "flat" or r == 0:
            return low, high
        if s == 0:
            return low, low - 1
        first = n * (self.K - 1) + s - self.visible_hidden_copies(n)[..., s - 1, :]
        return (first - (r - 1) + self.K - 2) // (self.K - 1), high

    @property
    def span_tokens(self) -> int | None:
        """How many tokens have hidden copies that one sees at most, its own included; None: all."""
        if self.window is None:
            return 1
        if self.span_unit == "token":
            return self.window
        return 1 + ceil((self.window - 1) / (self.K - 1))

    @property
    def cached_slots_per_token(self) -> int:
        """How many copies of a token stay in the KV cache: the original, or all with `flat`."""
        return self.K if self.rule == "flat" else 1

    def first_influential_token(self, token: int, layers: int) -> int:
        """The first token whose hidden copies influence those of `token` and of later ones.

        In each of `layers` layers a hidden copy sees `span_tokens` - 1 further back, but nothing
        before its chunk.

        >>> Pattern("hidden", K=2, window=3, chunk_tokens=100).first_influential_token(50, layers=4)
        42
        """
        assert self.rule == "hidden"
        assert self.span_tokens is not None
        first = max(0, token - layers * (self.span_tokens - 1))
        if self.chunk_tokens is None:
            return first
        return max(first, token // self.chunk_tokens * self.chunk_tokens)

    def pairs(self, tokens: int, copies: int | None = None) -> int:
        """How many (query, key) pairs of a row the pattern allows; FLOP counts build on it.

        Counts the queries of the last `copies` copies only; None: of all.
        """
        copies = self.K if copies is None else copies
        triangle = tokens * (tokens + 1) // 2
        if self.rule == "flat":
            below = copies * self.K * (tokens * (tokens - 1) // 2)
            return below + tokens * sum(range(self.K - copies + 1, self.K + 1))
        total = copies * triangle
        if self.rule == "hidden":
            position = torch.arange(tokens, device="cpu")
            total += int(self.visible_hidden_copies(position)[-copies:].sum())
        return total

    def cached_slots(self, tokens: int) -> tuple[int, int]:
        """(slots that stay, hidden copies in the ring) of one row in a cache for `tokens` tokens.

        The ring has room for W hidden copies, or for a chunk where that is shorter. With naive
        repetition hidden copies stay, and there is no ring.
        """
        if self.rule != "hidden" or self.window is None:
            return tokens * self.cached_slots_per_token, 0
        ring = self.window * (self.K - 1) if self.span_unit == "token" else self.window
        bound = tokens if self.chunk_tokens is None else min(tokens, self.chunk_tokens)
        return tokens, min(ring, bound * (self.K - 1))

    def draw(self, tokens: int) -> str:
        """The mask as text, a row for each query: `o` it sees an original, `h` a hidden copy."""
        slots = [(n, s) for s in range(self.K) for n in range(tokens)]
        names = [f"{n}{chr(39) * s}" for n, s in slots]
        width = max(map(len, names)) + 1
        lines = ["".join([" " * (width + 2), *(name.ljust(width) for name in names)])]
        for (n, s), name in zip(slots, names, strict=True):
            cells = (("h" if r else "o") if self.allows(n, s, m, r) else "." for m, r in slots)
            lines.append(name.ljust(width + 2) + "".join(cell.ljust(width) for cell in cells))
        return "\n".join(line.rstrip() for line in lines)
