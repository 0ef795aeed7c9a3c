"""Who attends to whom: the attention rule of every variant, as one value."""

from dataclasses import dataclass
from math import ceil
from typing import Literal, TypeVar

import torch
from torch import Tensor

from phd.config import ModelConfig, SpanUnit

Rule = Literal["causal", "flat", "stream", "hidden"]
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

    The neighbours of PHD are values of the same attributes. In State-Prediction Separation (`sps`,
    arXiv 2607.01218) a slot sees another that is not later if it is an original, or at most w
    tokens back; with w = 1, a window of 2 tokens, which the originals have as well:

    >>> sps = Pattern("hidden", K=2, window=2, span_unit="token", originals_see_hidden=True)
    >>> print(sps.draw(4))
         0  1  2  3  0' 1' 2' 3'
    0    o  .  .  .  .  .  .  .
    1    o  o  .  .  h  .  .  .
    2    o  o  o  .  .  h  .  .
    3    o  o  o  o  .  .  h  .
    0'   o  .  .  .  h  .  .  .
    1'   o  o  .  .  h  h  .  .
    2'   o  o  o  .  .  h  h  .
    3'   o  o  o  o  .  .  h  h

    Free Pause (`free_pause`, arXiv 2609.03807) has hidden copies that write no keys at all:

    >>> print(Pattern("causal", K=2).draw(3))
         0  1  2  0' 1' 2'
    0    o  .  .  .  .  .
    1    o  o  .  .  .  .
    2    o  o  o  .  .  .
    0'   o  .  .  .  .  .
    1'   o  o  .  .  .  .
    2'   o  o  o  .  .  .

    Naive repetition, pause tokens (`pause`, arXiv 2310.02226) and Hidden Decoding
    (`hidden_decoding`, arXiv 2607.08186) see all before them, and differ in what copies are fed:

    >>> print(Pattern("flat", K=2).draw(3))
         0  1  2  0' 1' 2'
    0    o  .  .  .  .  .
    1    o  o  .  h  .  .
    2    o  o  o  h  h  .
    0'   o  .  .  h  .  .
    1'   o  o  .  h  h  .
    2'   o  o  o  h  h  h

    With `model.full_every`, most layers of Hidden Decoding have this rule instead:

    >>> print(Pattern("stream", K=2).draw(3))
         0  1  2  0' 1' 2'
    0    o  .  .  .  .  .
    1    o  o  .  .  .  .
    2    o  o  o  .  .  .
    0'   .  .  .  h  .  .
    1'   .  .  .  h  h  .
    2'   .  .  .  h  h  h

    Attributes:
        rule: `causal` (every copy sees the originals up to its own token, and nothing else), `flat`
            (every slot sees itself and all before it, token by token), `stream` (every slot sees
            itself and the slots of its own copy before it), or `hidden` (PHD: originals are
            remembered, hidden copies are local).
        K: copies of each token.
        window: W, the reach of hidden copies, itself included; None: no rule 3 (plain PHD).
        chunk_tokens: tokens in a chunk; None: one chunk for the whole row.
        span_unit: whether W counts hidden copies or tokens.
        originals_see_hidden: rule 3 holds for originals, too. With h(n, 0) = n*(K-1) - 1, that of
            the hidden copy before it, an original sees W hidden copies.
    """

    rule: Rule
    K: int = 1
    window: int | None = None
    chunk_tokens: int | None = None
    span_unit: SpanUnit = "hidden"
    originals_see_hidden: bool = False

    def __post_init__(self) -> None:
        assert self.window is not None or not self.originals_see_hidden, self

    @classmethod
    def of(cls, config: ModelConfig, layer: int = -1) -> "Pattern":
        """The pattern of a model; with one copy every variant is vanilla.

        Args:
            layer: the pattern of this one; by default that of the last one. It is that of all,
                unless `model.full_every` says otherwise.
        """
        K = config.K
        if K == 1:
            return cls("causal")
        if config.has_streams(layer % config.layers):
            return cls("stream", K)
        match config.variant:
            case "naive_repeat" | "pause" | "hidden_decoding":
                return cls("flat", K)
            case "free_pause":
                return cls("causal", K)
            case "sps" if config.window:
                # Its w tokens back are a window of w + 1, which the token itself is part of.
                return cls(
                    "hidden", K, config.window + 1, span_unit="token", originals_see_hidden=True
                )
            case "phd" | "sps":
                return cls("hidden", K)
            case _:
                span = config.window, config.chunk_tokens, config.span_unit
                return cls("hidden", K, *span, config.originals_see_hidden)

    def allows(self, n: Index, s: Index, m: Index, r: Index) -> Index:
        """Whether slot (n, s) may attend to slot (m, r); ints, or tensors that broadcast."""
        if self.rule == "flat":
            return (m < n) | ((m == n) & (r <= s))
        if self.rule == "stream":
            return (r == s) & (m <= n)
        remembered = (r == 0) & (m <= n)
        if self.rule == "causal":
            return remembered & (s >= 0)  # every copy
        own = (m == n) & (r >= 1) & (r <= s)
        if self.window is None:
            return remembered | own
        distance = n * (self.K - 1) + s - (m * (self.K - 1) + r)
        reach = n - m if self.span_unit == "token" else distance
        is_local = (s >= 0) if self.originals_see_hidden else (s >= 1)
        near = is_local & (r >= 1) & (distance >= 0) & (reach < self.window)
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

    @property
    def key_copies(self) -> int:
        """How many copies of a token give keys and values, the first ones: some slot sees them."""
        return 1 if self.rule == "causal" else self.K

    @property
    def local_copies(self) -> int:
        """How many copies of a token, the last ones, see hidden copies by rules 2 and 3."""
        if self.rule != "hidden":
            return 0
        return self.K if self.originals_see_hidden else self.K - 1

    @property
    def originals_are_vanilla(self) -> bool:
        """Whether originals see originals alone, and so compute what a vanilla model does.

        Where layers have several patterns, that has to be so in each of them.
        """
        return self.rule != "flat" and not self.originals_see_hidden

    def visible_hidden_copies(self, position: Tensor) -> Tensor:
        """How many hidden copies each local copy sees, its own included.

        Hidden copies are numbered h(n, s) = n*(K-1) + s-1. By rules 2 and 3 together, the hidden
        copies that copy h sees are an interval that ends with h itself; this is its length. The
        packed backend masks by it. An original's interval ends with the hidden copy before it, and
        may be empty.

        Args:
            position: int64 (..., T), the position of each token in its document.

        Returns:
            int64 (..., local_copies, T).
        """
        assert self.rule == "hidden"
        own = torch.arange(self.K - self.local_copies, self.K, device=position.device)[:, None]
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
        if self.rule == "stream":
            return low, high if r == s else low - 1
        if self.rule == "flat" or r == 0:
            return low, high
        index = s - (self.K - self.local_copies)
        if index < 0:
            return low, low - 1
        first = n * (self.K - 1) + s - self.visible_hidden_copies(n)[..., index, :]
        return (first - (r - 1) + self.K - 2) // (self.K - 1), high

    @property
    def span_tokens(self) -> int:
        """How many tokens have hidden copies that one sees at most, its own included."""
        if self.window is None:
            return 1
        if self.span_unit == "token":
            return self.window
        # The window of an original begins one hidden copy before that of its first hidden copy.
        before = self.window if self.originals_see_hidden else self.window - 1
        return 1 + ceil(before / (self.K - 1))

    @property
    def cached_slots_per_token(self) -> int:
        """How many copies of a token stay in the KV cache: the original, or all.

        All stay with `flat` and with `stream`.
        """
        return self.K if self.rule in ("flat", "stream") else 1

    @property
    def has_hidden_keys(self) -> bool:
        """Whether there are keys of hidden copies that do not stay in the KV cache."""
        return self.key_copies > self.cached_slots_per_token

    def first_influential_token(self, token: int, layers: int) -> int:
        """The first token whose hidden copies influence those of `token` and of later ones.

        In each of `layers` layers a hidden copy sees `span_tokens` - 1 further back, but nothing
        before its chunk. Where originals see hidden copies, all that is remembered depends on them;
        then the last layer alone, whose output nobody remembers, needs no more than the span.

        >>> Pattern("hidden", K=2, window=3, chunk_tokens=100).first_influential_token(50, layers=4)
        42
        """
        if self.originals_see_hidden and layers > 1:
            return 0
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

        The ring has room for W hidden copies, or for a chunk where that is shorter. Where originals
        see those of W tokens, it has room for W - 1 tokens, all that a later token sees: the w of
        `sps`. With naive repetition hidden copies stay, and there is no ring.
        """
        if self.rule != "hidden" or self.window is None:
            return tokens * self.cached_slots_per_token, 0
        hidden, by_token = self.K - 1, self.span_unit == "token"
        ring = self.window * hidden if by_token else self.window
        if self.chunk_tokens is not None:
            ring = min(ring, self.chunk_tokens * hidden)
        if self.originals_see_hidden and by_token:
            ring -= hidden  # a token's own
        return tokens, min(ring, tokens * hidden)

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


def patterns_of(config: ModelConfig) -> tuple[Pattern, ...]:
    """The pattern of each layer that a token goes through."""
    return tuple(Pattern.of(config, layer) for layer in range(config.layers)) * config.passes
