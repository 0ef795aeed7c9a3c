"""Prefill and decode: the logits of the full forward pass from a cache, and no more work than that.

prefill   originals      o o o o o o o o o o o o     every token, once
          hidden copies                  h h h h     only where the future can see them:
                                                     in each layer further back
decode    all K copies of one token, together
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from phd.cache import KVCache
from phd.cached_attention import attend_places, merge_near
from phd.model import Transformer
from phd.rope import rotate

Pair = tuple[Tensor, Tensor]


@torch.no_grad()
def prefill(
    model: Transformer,
    tokens: Tensor,
    lengths: Sequence[int] | None = None,
    *,
    capacity: int | None = None,
    piece: int | None = None,
) -> tuple[Tensor, KVCache]:
    """The logits after prompts, and the cache to go on from.

    Args:
        tokens: int64 (B, T), each row's prompt from its beginning; padding behind it is not seen.
        lengths: tokens of each prompt, from 1 to T; None: T.
        capacity: tokens that the cache has room for at first; None: T.
        piece: how many tokens are computed at a time, to bound the memory; None: all.

    Returns:
        Logits (B, V) of the token after each prompt, and the cache.

    Raises:
        ValueError: a prompt is longer than `model.max_seq_len`.
    """
    B, T = tokens.shape
    lengths = [T] * B if lengths is None else list(lengths)
    assert len(lengths) == B, (lengths, B)
    assert all(1 <= length <= T for length in lengths), (lengths, T)
    cache = new_cache(model, B, capacity or T)
    piece = piece or T
    logits = None
    for start in range(0, max(lengths), piece):
        new = [min(max(length - start, 0), piece) for length in lengths]
        ends = [start < length <= start + piece for length in lengths]
        found = extend(model, tokens[:, start : start + piece], cache, new, keep=int(any(ends)))
        if not any(ends):
            continue
        found = found[:, 0]
        chosen = torch.tensor(ends, device=found.device)[:, None]
        logits = found if logits is None else torch.where(chosen, found, logits)
    assert logits is not None
    return logits, cache


def new_cache(model: Transformer, batch: int, capacity: int) -> KVCache:
    """An empty cache for a model, on its device and in the precision that it computes in."""
    weight = model.embed.weight
    kind = weight.device.type
    half = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if half else weight.dtype
    return KVCache(model.config, batch, capacity=capacity, dtype=dtype, device=weight.device)


@torch.no_grad()
def extend(
    model: Transformer,
    tokens: Tensor,
    cache: KVCache,
    lengths: Sequence[int] | None = None,
    *,
    keep: int = 1,
) -> Tensor:
    """Go on with several tokens at once.

    Args:
        tokens: int64 (B, T), new tokens of each row from the left; padding behind is not seen.
        cache: what the rows remember; gets the new tokens.
        lengths: new tokens of each row, from 0 to T; None: T.
        keep: for how many of each row's last tokens logits are wanted, at most the shortest row's
            new ones. A row without new tokens gets logits that mean nothing.

    Returns:
        (B, keep, V), row by row after its last `keep` tokens.

    Raises:
        ValueError: a row would be longer than `model.max_seq_len`.
    """
    B, T = tokens.shape
    new = [T] * B if lengths is None else list(lengths)
    assert len(new) == len(cache.host_lengths) == B, (len(new), len(cache.host_lengths), B)
    assert all(0 <= n <= T for n in new), (new, T)
    assert keep <= T, (keep, T)
    check_length(model, max(a + b for a, b in zip(cache.host_lengths, new, strict=True)))
    cache.reserve(max(cache.host_lengths) + T)
    logits = _forward(_Plan(model, cache, tuple(new), T, keep, static=False), tokens)
    cache.advance(new)
    return logits


@torch.no_grad()
def decode(model: Transformer, tokens: Tensor, cache: KVCache) -> Tensor:
    """Go on with one token of each row, int64 (B,), and return the logits (B, V) after it.

    On CUDA the host waits for nothing, and every shape follows from the cache's capacity, so that
    the work can be captured (see `phd.decoder.Decoder`).

    Raises:
        ValueError: a row would be longer than `model.max_seq_len`.
    """
    longest = max(cache.host_lengths) + 1
    check_length(model, longest)
    cache.reserve(longest)
    B = len(cache.host_lengths)
    plan = _Plan(model, cache, (1,) * B, 1, keep=1, static=tokens.is_cuda)
    logits = _forward(plan, tokens[:, None])
    cache.advance(plan.new)
    return logits[:, 0]


def _forward(plan: "_Plan", tokens: Tensor) -> Tensor:
    """New tokens (B, T) -> logits (B, keep, V); writes their keys and values to the cache."""
    model = plan.model
    x = plan.stream(model.embedded(tokens))
    for i, block in enumerate(model.blocks):
        x = block(x, _ExtensionView(plan, i))
    return model.predict(model.norm(x[:, 0]))


def check_length(model: Transformer, tokens: int) -> None:
    """Refuse rows that RoPE has no positions for."""
    if tokens > model.config.max_seq_len:
        raise ValueError(
            f"model.max_seq_len={model.config.max_seq_len}: a row of {tokens} tokens is longer; "
            "pass fewer tokens, or a model with a larger model.max_seq_len"
        )


@dataclass(frozen=True)
class _Plan:
    """Which slots of new tokens are computed in which layer, and what they see.

    A layer's slots are those of all new tokens that are remembered, `places` of each, and then the
    hidden copies of the last `spans[layer]` new tokens of each row, token by token.

    Attributes:
        new: new tokens of each row.
        tokens: T, the most that a row may have.
        keep: for how many of each row's last tokens there will be logits.
        static: every shape follows from those of the tokens and the cache alone, and the host
            knows nothing of lengths, as CUDA graphs need; for one token of each row.
    """

    model: Transformer
    cache: KVCache
    new: tuple[int, ...]
    tokens: int
    keep: int
    static: bool

    @cached_property
    def device(self) -> torch.device:
        return self.cache.lengths.device

    @cached_property
    def layers(self) -> int:
        return self.model.config.layers

    @cached_property
    def past(self) -> list[int]:
        return list(self.cache.host_lengths)

    @cached_property
    def aligned(self) -> bool:
        """All rows are of one length before, and of one after, and the host knows them."""
        return not self.static and len(set(self.past)) == 1 and len(set(self.new)) == 1

    @cached_property
    def fresh(self) -> bool:
        """Nothing has been seen yet."""
        return not self.static and max(self.past) == 0

    @cached_property
    def places(self) -> int:
        return self.cache.pattern.places

    @cached_property
    def remembered(self) -> int:
        """Slots of new tokens that are remembered."""
        return self.tokens * self.places

    @cached_property
    def hidden(self) -> int:
        """Hidden copies of a token that live apart from what is remembered."""
        return self.cache.pattern.K - self.places

    @cached_property
    def reach(self) -> int:
        """Places that some row may see."""
        tokens = self.cache.capacity if self.static else max(self.past) + self.tokens
        return tokens * self.places

    @cached_property
    def spans(self) -> list[int]:
        """For how many tokens at the end of each row a layer needs hidden copies."""
        if not self.hidden:
            return [0] * self.layers
        if self.static:
            return [1] * self.layers
        needed = self.cache.pattern.hidden_needed
        return [
            max(
                past + new - max(past, needed(past + new - self.keep, above))
                for past, new in zip(self.past, self.new, strict=True)
            )
            for above in range(self.layers, 0, -1)
        ]

    @cached_property
    def counts(self) -> Tensor:
        """`new` on the device, (B, 1)."""
        if len(set(self.new)) == 1:  # nothing to copy to the device
            return torch.full_like(self.begins, self.new[0])
        return torch.tensor(self.new, device=self.device)[:, None]

    @cached_property
    def begins(self) -> Tensor:
        """Tokens of each row before, (B, 1)."""
        return self.cache.lengths[:, None]

    @cached_property
    def hidden_tokens(self) -> Tensor:
        """Places among the new tokens of those with hidden copies, (B, span); below 0: no token."""
        return self.counts - torch.arange(self.spans[0], 0, -1, device=self.device)

    @cached_property
    def hidden_position(self) -> Tensor:
        """Their places in their rows."""
        return (self.begins + self.hidden_tokens).clamp(min=0)

    @cached_property
    def hidden_slots(self) -> Tensor:
        """The number of each of their hidden copies, (B, span * (K-1))."""
        first = (self.begins + self.hidden_tokens)[..., None] * self.hidden
        return (first + torch.arange(self.hidden, device=self.device)).flatten(1)

    @cached_property
    def rope(self) -> Pair:
        """(cos, sin) of the first layer's slots, (B or 1, 1, M, H/2)."""
        rows = slice(1) if self.aligned else slice(None)
        token = (self.begins + torch.arange(self.tokens, device=self.device))[rows]
        copy = torch.arange(self.cache.pattern.K, device=self.device)
        cos, sin = self.model.rope.at(token, copy[: self.places])
        if self.spans[0]:
            more = self.model.rope.at(self.hidden_position[rows], copy[self.places :])
            cos, sin = (torch.cat(pair, 1) for pair in zip((cos, sin), more, strict=True))
        return cos[:, None], sin[:, None]

    @cached_property
    def seen(self) -> Tensor | None:
        """How many places each of the first layer's slots sees, (B, 1, M, 1); None: all of them."""
        if self.aligned and self.tokens == self.places == 1:
            return None
        number = torch.arange(1, self.remembered + 1, device=self.device)
        seen = self.begins * self.places + number
        if self.spans[0]:
            hidden = (self.hidden_position + 1).repeat_interleave(self.hidden, 1)
            seen = torch.cat([seen, hidden], 1)
        return seen[:, None, :, None]

    @cached_property
    def hidden_seen(self) -> Tensor:
        """Which hidden copies the new ones see, bool (B, 1, span * (K-1), keys).

        The keys are those that the ring held before, and then the new ones.
        """
        seen = self.cache.pattern.hidden_seen(self.hidden_position)
        seen = seen.transpose(1, 2).flatten(1)[..., None]
        query = self.hidden_slots[..., None]
        held = self._held(self.begins)[:, None]
        behind = query - self.hidden_slots[:, None]
        is_token = (self.hidden_tokens >= 0).repeat_interleave(self.hidden, 1)[:, None]
        old = (held >= 0) & (query - held < seen)
        new = (behind >= 0) & (behind < seen) & is_token
        return torch.cat([old, new], 2)[:, None]

    def _held(self, lengths: Tensor) -> Tensor:
        """The number of the hidden copy in each place of the ring after so many tokens (B, 1),
        (B, R); below 0 where there is none."""
        ring = self.cache.ring[0].shape[3]
        last = lengths * self.hidden - 1
        return last - (last - torch.arange(ring, device=self.device)) % max(ring, 1)

    @cached_property
    def into_ring(self) -> Pair:
        """For each place of the ring, which of the first layer's new hidden copies it gets, and
        whether it gets one; (B, 1, R, 1)."""
        held = self._held(self.begins + self.counts)
        first = (self.begins + self.counts - self.spans[0]) * self.hidden
        is_new = held >= self.begins * self.hidden
        return (held - first)[:, None, :, None], is_new[:, None, :, None]

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
        """A layer's slots of what belongs to the first layer's, (B or 1, 1, M, ...)."""
        return self._less(x, self.spans[0] - self.spans[layer])

    def asked(self, x: Tensor, layer: int) -> Tensor:
        """The slots that a layer computes, of (B or 1, 1, M, ...) of its own."""
        if layer < self.layers - 1:
            return self._less(x, self.spans[layer] - self.spans[layer + 1])
        if self.keep == 0:
            return x[:, :, :0]
        # The last copy of the last tokens.
        if self.hidden:
            return x[:, :, -self.keep * self.hidden :][:, :, self.hidden - 1 :: self.hidden]
        last = (self.counts - torch.arange(self.keep, 0, -1, device=self.device)).clamp(min=0)
        slots = (last * self.places + self.places - 1)[:, None, :, None]
        if x.shape[0] == 1:
            slots = slots[:1]
        return x.gather(2, slots.expand(-1, -1, -1, x.shape[3]))

    def _less(self, x: Tensor, tokens: int) -> Tensor:
        """Without the hidden copies of the first `tokens` tokens that have some."""
        if tokens == 0:
            return x
        first = self.remembered + tokens * self.hidden
        return torch.cat([x[:, :, : self.remembered], x[:, :, first:]], 2)


@dataclass(frozen=True)
class _ExtensionView:
    """How a layer sees new tokens; see `phd.view.View`."""

    plan: _Plan
    layer: int

    def asked(self, x: Tensor) -> Tensor:
        return self.plan.asked(x, self.layer)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        plan = self.plan
        tables = [plan.of_layer(x, self.layer) for x in plan.rope]
        k, v = rotate(k, *(x.unsqueeze(2) for x in tables))[:, :, 0], v[:, 0]
        q = rotate(q, *(self.asked(x).unsqueeze(2) for x in tables))
        out = self._attend(q[:, :, 0], k, v)
        if plan.hidden:
            self._turn_ring(k, v)
        return out.unsqueeze(2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Queries (B, N, T', H) over everything, of which the new slots are (B, G, M, H)."""
        plan, last = self.plan, self.layer == self.plan.layers - 1
        new = k[:, :, : plan.remembered], v[:, :, : plan.remembered]
        places = self._remember(*new)
        out = torch.empty_like(q)
        # Prompts begin with causal attention among what is remembered.
        causal = plan.remembered if plan.fresh and not last else 0
        if causal:
            out[:, :, :causal] = scaled_dot_product_attention(
                q[:, :, :causal], *new, is_causal=True, enable_gqa=True
            )
        q = q[:, :, causal:]
        if not q.shape[2]:
            return out
        seen = plan.seen
        if seen is not None:
            seen = plan.asked(plan.of_layer(seen, self.layer), self.layer)[:, 0, causal:, 0]
        found, lse = attend_places(q, *places, seen)
        hidden = slice(0 if last or causal else plan.remembered, None)
        if plan.hidden and found[:, :, hidden].numel():
            result = found[:, :, hidden], lse[:, :, hidden]
            found[:, :, hidden] = self._with_hidden(q[:, :, hidden], result, k, v)
        out[:, :, causal:] = found
        return out

    def _remember(self, k: Tensor, v: Tensor) -> Pair:
        """Write what is remembered, (B, G, T * places, H), to the cache; all places in reach."""
        plan, cache = self.plan, self.plan.cache.originals[self.layer]
        if plan.aligned:
            begin = plan.past[0] * plan.places
            cache[0, :, :, begin : begin + plan.remembered] = k
            cache[1, :, :, begin : begin + plan.remembered] = v
        else:
            number = torch.arange(plan.remembered, device=plan.device)
            place = (plan.begins * plan.places + number)[:, None, :, None].expand(k.shape)
            for part, x in zip(cache, (k, v), strict=True):
                part.scatter_(2, place, x.to(part.dtype))
        keys, values = cache[:, :, :, : plan.reach]
        return keys, values

    def _with_hidden(self, q: Tensor, result: Pair, k: Tensor, v: Tensor) -> Tensor:
        """Hidden queries' attention over places, merged with that to hidden copies, new and old."""
        keys, values = (
            torch.cat([ring, x[:, :, self.plan.remembered :].to(ring.dtype)], 2)
            for ring, x in zip(self.plan.cache.ring[self.layer], (k, v), strict=True)
        )
        return merge_near(q, result, keys, values, self._hidden_mask())

    def _hidden_mask(self) -> Tensor:
        """`plan.hidden_seen` for this layer's keys, and the queries that it computes."""
        plan, mask = self.plan, self.plan.hidden_seen
        unused = (plan.spans[0] - plan.spans[self.layer]) * plan.hidden
        if unused:
            ring = plan.cache.ring[self.layer].shape[3]
            mask = torch.cat([mask[..., :ring], mask[..., ring + unused :]], -1)
        if self.layer == plan.layers - 1:
            return mask[:, :, -plan.keep * plan.hidden :][:, :, plan.hidden - 1 :: plan.hidden]
        return mask[:, :, -plan.spans[self.layer + 1] * plan.hidden :]

    def _turn_ring(self, k: Tensor, v: Tensor) -> None:
        """Write the new hidden copies' keys and values (B, G, M, H) into the ring."""
        plan, ring = self.plan, self.plan.cache.ring[self.layer]
        if not (ring.shape[3] and plan.spans[self.layer]):
            return
        number, is_new = plan.into_ring
        number = number - (plan.spans[0] - plan.spans[self.layer]) * plan.hidden
        is_new = is_new & (number >= 0)
        source = (number.clamp(min=0) + plan.remembered).expand(-1, k.shape[1], -1, k.shape[3])
        for part, x in zip(ring, (k, v), strict=True):
            part.copy_(torch.where(is_new, x.gather(2, source).to(part.dtype), part))
