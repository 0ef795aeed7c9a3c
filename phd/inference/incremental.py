"""New tokens of rows that a cache remembers: which slots are computed, and what they see.

layer 0      originals  o o o o o o o o o o      hidden copies        h h h h
layer 1                 o o o o o o o o o o                             h h h
...
last layer   keys and values alone; queries      of the slots that predict  *
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor

from phd.attention.flash import causal_forward, merged_out
from phd.inference.cache import KVCache
from phd.inference.cached_attention import SCORES_AT_ONCE, attend_near, attend_places, bias_of
from phd.rope import Rope, rotate

Pair = tuple[Tensor, Tensor]


# Queries that attention on the CPU is fast with, and the most scores that a block has a mask of.
QUERIES_OF_BLOCK, SCORES_OF_BLOCK = 128, 1 << 22


class TokenBlock(NamedTuple):
    """Tokens `begin` to `stop` of aligned rows; their hidden copies see those from `low` on."""

    begin: int
    stop: int
    low: int


class IncrementalForward:
    """What new tokens add to a cache, for all layers.

    A layer's slots are those of all new tokens that are remembered, `places` of each, and then the
    hidden copies of the last `spans[layer]` new tokens of each row, token by token.

    Args:
        new: how many new tokens each row has; their ends are what they are aligned to.
        tokens: T, the most that a row may have.
        keep: for how many of each row's last tokens there will be logits.
        static: every shape follows from those of the tokens and the cache, and nothing on the host
            decides about lengths, as CUDA graphs need; for one token of each row.

    Attributes:
        remembered: new slots that are remembered, T * places.
        hidden: hidden copies of a token that are not.
        reach: places that some row may see.
        aligned: all rows are of one length before, and of one after, and the host knows them.
        causal: several new slots see each other as those of a row, and all that was there before.
        spans: for how many tokens at the end of each row a layer needs hidden copies.
    """

    def __init__(
        self,
        cache: KVCache,
        rope: Rope,
        new: Sequence[int],
        *,
        tokens: int,
        keep: int = 1,
        static: bool = False,
    ) -> None:
        self.cache, self.new, self.tokens, self.keep = cache, list(new), tokens, keep
        self.layers, self.places = len(cache.originals), cache.pattern.places
        self.remembered = tokens * self.places
        self.hidden = cache.pattern.K - self.places
        self.past = list(cache.host_lengths)
        self.aligned = not static and len(set(self.past)) == len(set(new)) == 1
        self.reach = (cache.capacity if static else max(self.past) + tokens) * self.places
        # Padding lies behind: at first, causal attention is right whatever the lengths are.
        several = not static and self.remembered > 1
        self.causal = several and (self.aligned or max(self.past) == 0)
        self.spans = [1 if self.hidden else 0] * self.layers if static else self._spans(new)
        device = cache.lengths.device
        self.begins = cache.lengths[:, None]
        self.counts = torch.full_like(self.begins, new[0])
        if len(set(new)) > 1:
            self.counts = torch.tensor(new, device=device)[:, None]
        # Places among the new tokens of those with hidden copies, (B, span); below 0: no token.
        self.hidden_tokens = self.counts - torch.arange(self.spans[0], 0, -1, device=device)
        self.hidden_position = (self.begins + self.hidden_tokens).clamp(min=0)
        self.rope = self._rope(rope, tokens)
        together = not self.causal or not self.aligned or not self.hidden
        one = self.aligned and self.remembered == 1  # which sees all there is
        self.seen = self._seen() if together and not one else None
        self._block_biases: dict[TokenBlock, Tensor] = {}
        if self.spans[0] and not (self.aligned and self.causal):
            self.hidden_bias = bias_of(self._hidden_seen(), cache.ring[0].dtype)
        if self.spans[0]:
            self.into_ring = None if self.aligned else self._into_ring()

    def _spans(self, new: Sequence[int]) -> list[int]:
        if not self.hidden:
            return [0] * self.layers
        needed = self.cache.pattern.hidden_needed
        ends = [(past, past + count) for past, count in zip(self.past, new, strict=True)]
        return [
            max(end - max(past, needed(end - self.keep, above)) for past, end in ends)
            for above in range(self.layers, 0, -1)
        ]

    def _rope(self, rope: Rope, tokens: int) -> Pair:
        """(cos, sin) of the first layer's slots, (B or 1, 1, 1, M, H)."""
        rows = slice(1) if self.aligned else slice(None)
        device = self.begins.device
        token = (self.begins + torch.arange(tokens, device=device))[rows]
        copy = torch.arange(self.cache.pattern.K, device=device)
        at_once = tokens == 1 and self.spans[0] == 1
        cos, sin = rope.at(token, copy if at_once else copy[: self.places])
        if self.spans[0] and not at_once:
            more = rope.at(self.hidden_position[rows], copy[self.places :])
            cos, sin = (torch.cat(pair, 1) for pair in zip((cos, sin), more, strict=True))
        return cos[:, None, None], sin[:, None, None]

    def _seen(self) -> Tensor:
        """How many places each of the first layer's slots sees, (B, 1, M, 1)."""
        number = torch.arange(1, self.remembered + 1, device=self.begins.device)
        seen = self.begins * self.places + number
        if self.spans[0]:
            hidden = (self.hidden_position + 1).repeat_interleave(self.hidden, 1)
            seen = torch.cat([seen, hidden], 1)
        return seen[:, None, :, None]

    def _hidden_seen(self) -> Tensor:
        """Which hidden copies the new ones see, bool (B, 1, span * (K-1), keys).

        The keys are those that the ring held before, and then the new ones.
        """
        first = (self.begins + self.hidden_tokens)[..., None] * self.hidden
        number = (first + torch.arange(self.hidden, device=first.device)).flatten(1)
        seen = (
            self.cache.pattern.visible_hidden_copies(self.hidden_position)
            .transpose(1, 2)
            .flatten(1)
        )
        some_lack = min(self.new) < self.spans[0]
        if some_lack:
            # What is no token is seen by none, and sees all: no number comes of seeing nothing.
            is_token = (self.hidden_tokens >= 0).repeat_interleave(self.hidden, 1)
            number = torch.where(is_token, number, -1)
        key = torch.cat([self._held(self.begins), number], 1)
        behind = number[..., None] - key[:, None]
        is_seen = (behind >= 0) & (behind < seen[..., None]) & (key >= 0)[:, None]
        if some_lack:
            is_seen |= (number < 0)[..., None]
        return is_seen[:, None]

    def _held(self, lengths: Tensor) -> Tensor:
        """The number of the hidden copy in each place of the ring after so many tokens (B, 1),
        (B, R); below 0 where there is none."""
        ring = self.cache.ring[0].shape[3]
        last = lengths * self.hidden - 1
        return last - (last - torch.arange(ring, device=lengths.device)) % max(ring, 1)

    def _into_ring(self) -> Pair:
        """For each place of the ring, which of the first layer's new hidden copies it gets, and
        whether it gets one; (B, 1, R, 1)."""
        held = self._held(self.begins + self.counts)
        first = (self.begins + self.counts - self.spans[0]) * self.hidden
        is_new = held >= self.begins * self.hidden
        return (held - first)[:, None, :, None], is_new[:, None, :, None]

    def blocks(self, first: int) -> Iterator[TokenBlock]:
        """The tokens of aligned rows from `first` on, cut into blocks from the end, so that those
        of all layers are the same but for the first."""
        pattern, end = self.cache.pattern, self.past[0] + self.new[0]
        assert pattern.span_tokens is not None
        span = min(pattern.span_tokens, pattern.chunk_tokens or pattern.span_tokens)
        size = max(span, ceil(QUERIES_OF_BLOCK / self.hidden))
        size = max(1, min(size, SCORES_OF_BLOCK // (2 * span * self.hidden**2)))
        begins = [first, *reversed(range(end - size, first, -size))]
        for begin, stop in zip(begins, [*begins[1:], end], strict=True):
            yield TokenBlock(begin, stop, pattern.hidden_needed(begin, layers=1))

    def block_bias(self, block: TokenBlock) -> Tensor:
        """What is added to the scores of a block's hidden copies, (1, 1, queries, keys) for
        `IncrementalContext._near_block`; made once for all layers, unless it is too big."""
        bias = self._block_biases.get(block)
        if bias is None:
            numbers = partial(torch.arange, device=self.begins.device)
            token, past = numbers(block.begin, block.stop), self.past[0]
            query = numbers(block.begin * self.hidden, block.stop * self.hidden)
            seen = self.cache.pattern.visible_hidden_copies(token).T.flatten()
            key = numbers(max(block.low, past) * self.hidden, block.stop * self.hidden)
            if block.low < past:
                key = torch.cat([self._held(self.begins[:1])[0], key])
            behind = query[:, None] - key
            hidden = (behind >= 0) & (behind < seen[:, None]) & (key >= 0)
            originals = (query // self.hidden)[:, None] >= token
            is_seen = torch.cat([hidden, originals], 1)
            bias = bias_of(is_seen, self.cache.ring[0].dtype)[None, None]
            if sum(kept.numel() for kept in self._block_biases.values()) < SCORES_AT_ONCE:
                self._block_biases[block] = bias
        return bias

    def stream(self, x: Tensor) -> Tensor:
        """All copies' input (B, K or 1, T, D) -> the first layer's slots (B, 1, M, D)."""
        x = x.expand(-1, self.cache.pattern.K, -1, -1)
        slots = x[:, : self.places].transpose(1, 2).flatten(1, 2)
        if self.spans[0]:
            token = self.hidden_tokens.clamp(min=0)[:, None, :, None]
            hidden = x[:, self.places :]
            hidden = hidden.gather(2, token.expand(-1, self.hidden, -1, x.shape[3]))
            slots = torch.cat([slots, hidden.transpose(1, 2).flatten(1, 2)], 1)
        return slots[:, None]

    def of_layer(self, x: Tensor, layer: int) -> Tensor:
        """A layer's slots of what belongs to the first layer's, (B or 1, ..., M, any)."""
        return self._less(x, self.spans[0] - self.spans[layer])

    def select_queries(self, x: Tensor, layer: int) -> Tensor:
        """The slots that a layer computes, of (B or 1, ..., M, any) of its own."""
        if layer < self.layers - 1:
            return self._less(x, self.spans[layer] - self.spans[layer + 1])
        if self.keep == 0:
            return x[..., :0, :]
        # The last copy of the last tokens.
        if self.hidden:
            return x[..., -self.keep * self.hidden :, :][..., self.hidden - 1 :: self.hidden, :]
        if self.aligned:
            end = self.new[0] * self.places
            return x[..., end - (self.keep - 1) * self.places - 1 : end : self.places, :]
        last = self.counts - torch.arange(self.keep, 0, -1, device=self.counts.device)
        slots = last.clamp(min=0) * self.places + self.places - 1
        slots = slots.view(-1, *[1] * (x.ndim - 3), self.keep, 1)
        return x.gather(-2, slots.expand(*x.shape[:-2], -1, x.shape[-1]))

    def _less(self, x: Tensor, tokens: int) -> Tensor:
        """Without the hidden copies of the first `tokens` tokens that have some."""
        if tokens == 0:
            return x
        first = self.remembered + tokens * self.hidden
        return torch.cat([x[..., : self.remembered, :], x[..., first:, :]], -2)


class Near(NamedTuple):
    """The few keys (B, G, keys, H) and values that hidden copies see through a mask."""

    k: Tensor
    v: Tensor
    bias: Tensor


@dataclass(frozen=True)
class IncrementalContext:
    """How a layer sees new tokens; see `phd.attention.context.AttentionContext`."""

    extension: IncrementalForward
    layer: int

    def select_queries(self, x: Tensor) -> Tensor:
        return self.extension.select_queries(x, self.layer)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        new = self.extension
        cos, sin = (new.of_layer(x, self.layer) for x in new.rope)
        v = v.squeeze(1)
        if new.tokens == 1 and q.shape[3] == k.shape[3]:
            # Of so little, one call costs half as much as two.
            turned = rotate(torch.cat([q, k], 2), cos, sin).squeeze(2)
            q, k = turned.split([q.shape[2], k.shape[2]], 1)
        else:
            k = rotate(k, cos, sin).squeeze(2)
            q = rotate(q, self.select_queries(cos), self.select_queries(sin)).squeeze(2)
        out = self._attend(q, k, v)
        if new.spans[self.layer] and self.ring.shape[3]:
            self._turn_ring(k, v)
        return out.unsqueeze(2)

    @property
    def last(self) -> bool:
        return self.layer == self.extension.layers - 1

    @property
    def ring(self) -> Tensor:
        return self.extension.cache.ring[self.layer]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Queries (B, N, T', H) over everything, of which the new slots are (B, G, M, H)."""
        new = self.extension
        own = [x.narrow(2, 0, new.remembered) for x in (k, v)]
        places = self._remember(*own)
        if not q.shape[2]:
            return q
        first = 0 if self.last and new.hidden else min(new.remembered, q.shape[2])
        if not new.causal or (self.last and not new.hidden):
            return self._attend_together(q, places, k, v, first)
        parts = []
        if first:
            parts.append(self._attend_causally(q[:, :, :first], places, own))
        if q.shape[2] > first:
            parts.append(self._attend_hidden(q[:, :, first:], places, k, v))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def _attend_together(self, q: Tensor, places: Pair, k: Tensor, v: Tensor, first: int) -> Tensor:
        """All queries over what is remembered, which is read once, and then those of hidden
        copies, from the `first` on, over hidden copies."""
        far = attend_places(q, *places, self._seen(slice(None)))
        if q.shape[2] == first:
            return far[0]
        of_hidden = [x.narrow(2, first, q.shape[2] - first) for x in (q, *far)]
        near = attend_near(of_hidden[0], *self._near(k, v))
        hidden = merged_out(near, (of_hidden[1], of_hidden[2])).to(q.dtype)
        return torch.cat([far[0].narrow(2, 0, first), hidden], 2) if first else hidden

    def _attend_causally(self, q: Tensor, places: Pair, own: Sequence[Tensor]) -> Tensor:
        """Queries of new slots that are remembered, over each other and all that was before."""
        new = self.extension
        result = causal_forward(q, own[0], own[1], q.shape[-1] ** -0.5)
        if not new.past[0]:
            return result[0]
        old = (x[:, :, : new.past[0] * new.places] for x in places)
        return merged_out(result, attend_places(q, *old))

    def _attend_hidden(self, q: Tensor, places: Pair, k: Tensor, v: Tensor) -> Tensor:
        """Queries of a prompt's hidden copies, over all places, and over hidden copies.

        In aligned rows a block of tokens at a time: what all of it sees needs no mask.
        """
        new = self.extension
        if not new.aligned:
            far = attend_places(q, *places, self._seen(slice(-q.shape[2], None)))
            return merged_out(attend_near(q, *self._near(k, v)), far).to(q.dtype)
        per_token = 1 if self.last else new.hidden
        first = new.past[0] + new.new[0] - q.shape[2] // per_token
        outs = []
        for block in new.blocks(first):
            part = q[:, :, (block.begin - first) * per_token : (block.stop - first) * per_token]
            result = attend_near(part, *self._near_block(block, places, k, v))
            if block.begin:
                far = attend_places(part, *(x[:, :, : block.begin] for x in places))
                outs.append(merged_out(result, far).to(q.dtype))
            else:
                outs.append(result[0].to(q.dtype))
        return outs[0] if len(outs) == 1 else torch.cat(outs, 2)

    def _near_block(self, block: TokenBlock, places: Pair, k: Tensor, v: Tensor) -> Near:
        """What a block sees through a mask: hidden copies, and the originals of its own tokens."""
        new, past = self.extension, self.extension.past[0]
        first = past + new.new[0] - new.spans[self.layer]
        start, stop = (
            new.remembered + (token - first) * new.hidden
            for token in (max(block.low, past), block.stop)
        )
        k, v = (
            torch.cat([
                *([held] if block.low < past else []),
                own[:, :, start:stop].to(held.dtype),
                remembered[:, :, block.begin : block.stop],
            ], 2)
            for held, own, remembered in zip(self.ring, (k, v), places, strict=True)
        )  # fmt: skip
        bias = new.block_bias(block)
        if self.last:
            bias = bias[:, :, new.hidden - 1 :: new.hidden]
        return Near(k, v, bias)

    def _near(self, k: Tensor, v: Tensor) -> Near:
        """The hidden copies in the ring, and then those of the new slots (B, G, M, H)."""
        new, ring, bias = self.extension, self.ring, self._hidden_bias()
        own = (x.narrow(2, new.remembered, x.shape[2] - new.remembered) for x in (k, v))
        k, v = (x.to(ring.dtype) for x in own)
        if new.aligned and not new.past[0]:
            return Near(k, v, bias[..., ring.shape[3] :])  # there is nothing in it
        if not ring.shape[3]:
            return Near(k, v, bias)
        return Near(torch.cat([ring[0], k], 2), torch.cat([ring[1], v], 2), bias)

    def _seen(self, queries: slice) -> Tensor | None:
        """How many places some of the layer's queries see, (B, queries); None: all."""
        new = self.extension
        if new.seen is None:
            return None
        return self.select_queries(new.of_layer(new.seen, self.layer))[:, 0, queries, 0]

    def _remember(self, k: Tensor, v: Tensor) -> Pair:
        """Write what is remembered, (B, G, T * places, H), to the cache; all places in reach."""
        new, cache = self.extension, self.extension.cache.originals[self.layer]
        if new.aligned:
            written = cache.narrow(3, new.past[0] * new.places, new.remembered)
            written[0].copy_(k)
            written[1].copy_(v)
        else:
            number = torch.arange(new.remembered, device=k.device)
            row, place = torch.arange(len(k), device=k.device), new.begins * new.places + number
            # In one piece, which torch.compile does in place; else it would copy the whole cache.
            written = torch.stack([k, v]).to(cache.dtype).permute(1, 3, 0, 2, 4)
            cache[:, row[:, None], :, place] = written
        keys, values = cache.narrow(3, 0, new.reach)
        return keys, values

    def _hidden_bias(self) -> Tensor:
        """`IncrementalForward.hidden_bias` for this layer's keys and queries."""
        new = self.extension
        bias, unused = new.hidden_bias, (new.spans[0] - new.spans[self.layer]) * new.hidden
        if unused:
            ring = self.ring.shape[3]
            bias = torch.cat([bias[..., :ring], bias[..., ring + unused :]], -1)
        if self.last:
            return bias[:, :, -new.keep * new.hidden :][:, :, new.hidden - 1 :: new.hidden]
        return bias[:, :, -new.spans[self.layer + 1] * new.hidden :]

    def _turn_ring(self, k: Tensor, v: Tensor) -> None:
        """Write the new hidden copies' keys and values (B, G, M, H) into the ring."""
        new, ring = self.extension, self.ring
        if new.aligned:
            # The last so many, from their first one's place on, and round the corner.
            size = ring.shape[3]
            count = min(new.new[0] * new.hidden, new.spans[self.layer] * new.hidden, size)
            place = ((new.past[0] + new.new[0]) * new.hidden - count) % size
            turn = min(count, size - place)
            for part, x in zip(ring, (k, v), strict=True):
                first = x.shape[2] - count
                part.narrow(2, place, turn).copy_(x.narrow(2, first, turn))
                if turn < count:
                    part.narrow(2, 0, count - turn).copy_(x.narrow(2, first + turn, count - turn))
            return
        assert new.into_ring is not None
        number, is_new = new.into_ring
        number = number - (new.spans[0] - new.spans[self.layer]) * new.hidden
        # Below 0 are hidden copies that nobody will see, or they would have been computed.
        source = (number.clamp(min=0) + new.remembered).expand(-1, k.shape[1], -1, k.shape[3])
        for part, x in zip(ring, (k, v), strict=True):
            part.copy_(torch.where(is_new, x.gather(2, source).to(part.dtype), part))
