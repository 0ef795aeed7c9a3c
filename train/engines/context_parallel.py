"""Context parallelism: the tokens of a row on several ranks, which see each other's keys.

A row of T tokens has 2c parts. Rank i of c has parts i and 2c-1-i: an early one, whose queries see
few keys, and a late one, whose queries see many, so that all ranks do the same work.

    part      0     1     2     3     4     5     6     7        c = 4
    rank      0     1     2     3     3     2     1     0

Each layer's attention, on each rank:

    forward                                       backward
    |  hidden copies just before each part,       |
    |  all-gathers of remembered k, v start       |  all-gathers of remembered k, v start
    |    each part's attention to itself          |    the early part's gradients of itself
    |    and to the hidden copies before it       |  for some heads after others:
    |  for some heads after others:               |    the gathered keys are here
    |    the gathered keys are here               |      each part's gradients of all before
    |      each part's attention to all before    |    reduce-scatter of dk, dv starts
    v                                             |  the late part's gradients of itself,
                                                  |  and of hidden copies before both
                                                  v  the sums of dk, dv are here

What is remembered are the originals, or all copies where every slot sees them (`naive_repeat`).
Large ones are sent in pieces of some heads each, so that one is under way while another is used.
The keys of a whole row are held by one layer at a time, while it computes. Between forward and
backward each rank keeps those of its own tokens, and so they are gathered twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast
from weakref import WeakValueDictionary

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from phd.attention.attend import resolve_backend
from phd.attention.packed import check_fused
from phd.attention.parts import (
    Gradients,
    PartAttention,
    first_documents,
    halo_tokens,
    remembered_copies,
)
from phd.config import Backend
from phd.pattern import Pattern
from phd.segments import Segments
from phd.torch_private import HAS_TRITON
from phd.transfer import to_device

CAUSAL = Pattern("causal")
BACKENDS = ("packed", "fused")
"""Those whose attention is made of pieces that merge; the others compute whole rows alone."""
PIECES = 4
"""How many times a layer's remembered keys and values are sent at most, some heads each time."""
PIECE_BYTES = 4 << 20
"""Of the whole row in one piece at least: fewer would wait for the link's latency."""


_GROUPS: WeakValueDictionary[str, dist.ProcessGroup] = WeakValueDictionary()
"""By name, because operators take names and no groups. Torch holds them until they are left."""


class ContextRank(NamedTuple):
    """Which of the ranks that share rows this one is.

    Attributes:
        group: the name of their process group.
        rank: of this one among them.
        ranks: c.
    """

    group: str
    rank: int
    ranks: int

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> "ContextRank":
        """This rank's in a group."""
        _GROUPS[group.group_name] = group
        return cls(group.group_name, dist.get_rank(group), dist.get_world_size(group))

    @property
    def parts(self) -> tuple[int, int]:
        """The numbers of the two parts of each row that this rank has."""
        return self.rank, 2 * self.ranks - 1 - self.rank

    def token_index(self, tokens: int) -> np.ndarray:
        """Which of a row's tokens this rank has, int64 (tokens / c,).

        >>> ContextRank("", rank=0, ranks=2).token_index(8).tolist()
        [0, 1, 6, 7]
        """
        assert tokens % (2 * self.ranks) == 0, (tokens, self.ranks)
        size = tokens // (2 * self.ranks)
        return np.concatenate([np.arange(i * size, (i + 1) * size) for i in self.parts])


@dataclass(frozen=True)
class ContextPart:
    """A rank's part of the rows of a micro-batch: a `phd.model.RowPart`.

    Attributes:
        place: this rank's.
        position: int64 (B or 1, T'), each token's position in its document.
        documents: of each of the two parts, the documents in it, and of the one that begins before
            it what `phd.attention.parts.first_documents` tells; None: rows are one document.
    """

    place: ContextRank
    position: Tensor
    documents: tuple[tuple[Segments, Tensor], ...] | None

    @classmethod
    def of(
        cls,
        place: ContextRank,
        tokens: int,
        starts: np.ndarray | None,
        device: torch.device | str = "cpu",
    ) -> "ContextPart":
        """The part of rows of `tokens` tokens.

        Args:
            starts: int64 (B, T), where in its row each token's document begins; None: documents are
                not isolated.
        """
        index = torch.from_numpy(place.token_index(tokens))
        if starts is None:
            return cls(place, to_device(index[None], device), None)
        of_all = torch.from_numpy(np.ascontiguousarray(starts)).long()
        documents = []
        for part in index.chunk(2):
            first = int(part[0])
            within = (of_all[:, part] - first).clamp(min=0)
            first_ones = first_documents(of_all, first, len(part))
            documents.append((Segments.of(within).to(device), first_ones))
        return cls(place, to_device(index - of_all[:, index], device), tuple(documents))

    @property
    def tables(self) -> list[Tensor]:
        """Its tensors, from which `from_tables` makes it again."""
        found = [self.position]
        for segments, first_ones in self.documents or ():
            found += [segments.starts, segments.cu_seqlens, segments.cu_seqlens_cpu, first_ones]
        return found

    @classmethod
    def from_tables(cls, place: ContextRank, tables: Sequence[Tensor]) -> "ContextPart":
        position, *others = tables
        if not others:
            return cls(place, position, None)
        documents = (others[:4], others[4:])
        return cls(place, position, tuple((Segments(*x[:3]), x[3]) for x in documents))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, backend: Backend) -> Tensor:
        """`phd.attention.attend.attend` of this rank's tokens; every rank of the group calls it."""
        chosen = resolve_backend(backend, q.device.type, q.dtype, q.shape[4], HAS_TRITON, pattern)
        assert chosen in BACKENDS, chosen
        fused = chosen == "fused"
        if fused and pattern.rule == "hidden":
            check_fused(q, pattern)
        B, N, Q, T, H = q.shape
        if pattern.rule == "stream":
            # Each copy over its own past: the copies are further key heads.
            G = k.shape[1]
            heads = q.unflatten(1, (G, -1)).transpose(2, 3).flatten(1, 3).unsqueeze(2)
            k, v = (x[:, :, -Q:].flatten(1, 2).unsqueeze(2) for x in (k, v))
            out = _ContextAttention.apply(heads, k, v, self, CAUSAL, fused)
            return out.view(B, G, Q, N // G, T, H).transpose(2, 3).reshape(B, N, Q, T, H)
        if pattern.rule != "flat" or Q < pattern.K:
            return _ContextAttention.apply(q, k, v, self, pattern, fused)
        # Every slot sees every slot before it: a plain causal row of K*T slots, token-major.
        q, k, v = (x.transpose(2, 3).flatten(2, 3).unsqueeze(2) for x in (q, k, v))
        out = _ContextAttention.apply(q, k, v, self.repeated(Q), CAUSAL, fused)
        return out.view(B, N, T, Q, H).transpose(2, 3)

    def repeated(self, K: int) -> "ContextPart":
        """The same part of rows in which every token stands K times, one after another."""
        documents = None
        if self.documents is not None:
            documents = tuple((x.repeated(K), first_ones * K) for x, first_ones in self.documents)
        return ContextPart(self.place, self.position.repeat_interleave(K, 1), documents)

    def halves(self, pattern: Pattern, fused: bool) -> tuple[PartAttention, ...]:
        """The attention of each of the two parts."""
        positions = self.position.chunk(2, 1)
        size = positions[0].shape[1]
        halo = halo_tokens(pattern, size, documents=self.documents is not None)
        assert halo <= size, (halo, size)  # `train.config` refuses it
        documents = self.documents or ((None, None), (None, None))
        return tuple(
            PartAttention(pattern, number * size, position, *of_part, halo, fused)
            for number, position, of_part in zip(
                self.place.parts, positions, documents, strict=True
            )
        )


class _ContextAttention(torch.autograd.Function):
    """Attention of a rank's two parts of each row to the whole row."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        part: ContextPart,
        pattern: Pattern,
        fused: bool,
    ) -> Tensor:
        work = (*part.place, *_fields(pattern), fused)
        out, lse, halo = _forward(q, k, v, part.tables, *work)
        ctx.save_for_backward(q, k, v, out, lse, halo, *part.tables)
        ctx.work = work
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, halo, *tables = ctx.saved_tensors
        dout = grads[0].contiguous()
        return *_backward(dout, q, k, v, out, lse, halo, tables, *ctx.work), None, None, None


def _fields(pattern: Pattern) -> tuple[Any, ...]:
    """What `Pattern` is made of: operators take no such values."""
    span = pattern.window, pattern.chunk_tokens, pattern.span_unit
    return pattern.rule, pattern.K, *span, pattern.originals_see_hidden


# Operators, into which torch.compile does not look: it would make a graph for every set of
# documents. Activation checkpointing keeps their results, so that nothing is gathered once more.


@torch.library.custom_op("train::context_forward", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: list[Tensor],
    group: str,
    rank: int,
    ranks: int,
    rule: str,
    K: int,
    window: int | None,
    chunk_tokens: int | None,
    span_unit: str,
    originals_see_hidden: bool,
    fused: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    part = ContextPart.from_tables(ContextRank(group, rank, ranks), tables)
    pattern = Pattern(rule, K, window, chunk_tokens, span_unit, originals_see_hidden)  # type: ignore[arg-type]
    return context_forward(q, k, v, part, pattern, fused)


@torch.library.custom_op("train::context_backward", mutates_args=())
def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    halo: Tensor,
    tables: list[Tensor],
    group: str,
    rank: int,
    ranks: int,
    rule: str,
    K: int,
    window: int | None,
    chunk_tokens: int | None,
    span_unit: str,
    originals_see_hidden: bool,
    fused: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    part = ContextPart.from_tables(ContextRank(group, rank, ranks), tables)
    pattern = Pattern(rule, K, window, chunk_tokens, span_unit, originals_see_hidden)  # type: ignore[arg-type]
    return context_backward((q, k, v), (out, lse, dout), halo, part, pattern, fused)


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, tables: list[Tensor], *work: Any) -> tuple[Tensor, ...]:  # noqa: ARG001
    _, _, _, rule, K, window, chunk_tokens, span_unit, originals, _ = work
    pattern = Pattern(rule, K, window, chunk_tokens, span_unit, originals)
    B, N, Q, T, H = q.shape
    halo = halo_tokens(pattern, T // 2, documents=len(tables) > 1)
    lse = q.new_empty(B, N, Q, T, dtype=torch.promote_types(q.dtype, torch.float32))
    hidden = k.new_empty(2, 2, B, k.shape[1], k.shape[2] - 1, halo, H)
    return q.new_empty(q.shape), lse, hidden


@_backward.register_fake
def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, ...]:  # noqa: ARG001
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def context_forward(
    q: Tensor, k: Tensor, v: Tensor, part: ContextPart, pattern: Pattern, fused: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of a rank's tokens to the whole row.

    Args:
        q: (B, N, Q, T', H), the two parts one after the other.
        k, v: (B, G, copies, T', H).

    Returns:
        out as q, lse (B, N, Q, T'), and the halo (2, 2, B, G, K-1, halo, H): of each part the keys
        and values of the hidden copies just before it; zeros before the first one of the row.
    """
    halves = part.halves(pattern, fused)
    # In this order: NCCL does one after the other, and this one is small and needed first.
    exchange = _HaloExchange.of(k, v, halves[0].halo, part.place)
    pieces = _Piece.all_of(q, k, v, pattern, part.place)
    inputs = list(zip(*(x.chunk(2, 3) for x in (q, k, v)), strict=True))
    results = [half.attend_to_itself(*qkv) for half, qkv in zip(halves, inputs, strict=True)]
    halo = exchange.wait()
    for half, qkv, kv, result in zip(halves, inputs, halo, results, strict=True):
        if half.halo and half.first:
            half.add_halo(qkv[0], kv[0], kv[1], result)
    while pieces:
        _add_before(list(zip(halves, inputs, results, strict=True)), pieces.pop(0).wait())
    (out, lse), (more_out, more_lse) = results
    return torch.cat([out, more_out], 3), torch.cat([lse, more_lse], 3), halo


def context_backward(
    inputs: tuple[Tensor, Tensor, Tensor],
    result: tuple[Tensor, Tensor, Tensor],
    halo: Tensor,
    part: ContextPart,
    pattern: Pattern,
    fused: bool,
) -> Gradients:
    """(dq, dk, dv) of `context_forward`.

    Args:
        inputs: q, k, v.
        result: out, lse and dout.
        halo: as `context_forward` returns it.
    """
    halves, place = part.halves(pattern, fused), part.place
    pieces = _Piece.all_of(*inputs, pattern, place)
    of_inputs, of_result = (
        list(zip(*(x.chunk(2, 3) for x in tensors), strict=True)) for tensors in (inputs, result)
    )
    early = halves[0].gradients_of_itself(of_inputs[0], of_result[0])
    late_dq = torch.zeros_like(early[0])
    each = list(zip(halves, (early[0], late_dq), of_inputs, of_result, strict=True))
    copies, scatterings = remembered_copies(pattern), []
    while pieces:
        scatterings.append(_add_gradients_before(each, pieces.pop(0).wait(), place, copies))
    of_halo = torch.zeros_like(halo, dtype=result[1].dtype)
    for (half, dq, (q, _, _), found), kv, d_kv in zip(each, halo, of_halo, strict=True):
        if half.halo and half.first:
            d_kv[0], d_kv[1] = half.add_halo_gradients(dq, (q, *kv), found)
    exchange = _HaloExchange.back(of_halo, place)
    late = halves[1].gradients_of_itself(of_inputs[1], of_result[1])
    late[0].add_(late_dq)
    dq, dk, dv = (torch.cat(x, 3) for x in zip(early, late, strict=True))
    exchange.add_to(dk, dv)
    for heads, scattering in scatterings:
        scattering.add_to(dk[:, heads], dv[:, heads])
    return dq, dk, dv


def heads_sent(pattern: Pattern, heads: int) -> int:
    """How many heads the remembered keys have: copies that attend to their own past are further."""
    return heads * (pattern.K if pattern.rule == "stream" else 1)


def row_bytes(numbers: int, itemsize: int, heads: int) -> tuple[int, int]:
    """What a layer holds of a row's keys and values at most, forward and backward.

    All of them as they come, and a piece of them in order; in the backward pass, when the last
    piece is done, that piece with its gradients in float32, and those of all as they are sent.

    Args:
        numbers: of the keys and values of the whole row.
        itemsize: bytes of one of them.
        heads: that the row's keys have.
    """
    size = numbers * itemsize
    pieces = pieces_of(size, heads)
    return size + size // pieces, 4 * numbers + (size + 4 * numbers) // pieces


# A function for each piece, so that its memory is free when the next one is used.


def _add_before(each: list[Any], piece: "_Received") -> None:
    """Add each part's attention to the keys before it, of the heads of a piece."""
    heads = piece.queries
    for half, (q, _, _), (out, lse) in each:
        half.add_before(q[:, heads], *piece.row, (out[:, heads], lse[:, heads]))


def _add_gradients_before(
    each: list[Any], piece: "_Received", place: ContextRank, copies: int
) -> tuple[slice, "_Scattering"]:
    """Add those to dq, and start to sum dk and dv over the ranks, of the key heads returned."""
    heads = piece.queries
    # Summed in float32 within a rank, too: bfloat16 would lose what many parts add.
    of_row = torch.zeros_like(piece.row, dtype=each[0][3][1].dtype)
    for half, dq, (q, _, _), result in each:
        out, lse, dout = (x[:, heads] for x in result)
        half.add_gradients_before(
            (dq[:, heads], *of_row), (q[:, heads], *piece.row), (out, lse, dout)
        )
    return piece.keys, _Scattering.of(of_row, place, copies)


def pieces_of(size: int, heads: int) -> int:
    """In how many pieces of as many heads `size` bytes of the keys of a whole row are sent."""
    large_enough = max(1, min(PIECES, size // PIECE_BYTES))
    return max(n for n in range(1, large_enough + 1) if heads % n == 0)


class _Piece(NamedTuple):
    """Some key heads of what is remembered, on their way to all ranks.

    Attributes:
        queries, keys: the heads that read, and those that are read.
    """

    gathering: "_Gathering"
    queries: slice
    keys: slice

    @classmethod
    def all_of(
        cls, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, place: ContextRank
    ) -> list["_Piece"]:
        """Start to gather all heads."""
        N, G = q.shape[1], k.shape[1]
        size = 2 * k[:, :, : remembered_copies(pattern)].nbytes * place.ranks
        heads = G // pieces_of(size, G)
        found = []
        for first in range(0, G, heads):
            keys = slice(first, first + heads)
            queries = slice(first * N // G, (first + heads) * N // G)
            gathering = _Gathering.of(k[:, keys], v[:, keys], pattern, place)
            found.append(cls(gathering, queries, keys))
        return found

    def wait(self) -> "_Received":
        return _Received(self.queries, self.keys, self.gathering.wait())


class _Received(NamedTuple):
    """A piece that is here, in `row` as `_Gathering.wait` has it."""

    queries: slice
    keys: slice
    row: Tensor


class _Gathering(NamedTuple):
    """The all-gather of what is remembered, under way.

    Attributes:
        whole: (c, 2 parts, 2, B, G, L, copies, H): keys and values, by rank.
    """

    whole: Tensor
    work: dist.Work
    place: ContextRank

    @classmethod
    def of(cls, k: Tensor, v: Tensor, pattern: Pattern, place: ContextRank) -> "_Gathering":
        copies = remembered_copies(pattern)
        both = torch.stack([k[:, :, :copies], v[:, :, :copies]]).transpose(3, 4)
        own = both.unflatten(3, (2, -1)).movedim(3, 0).contiguous()
        whole = own.new_empty(place.ranks * 2, *own.shape[1:])
        work = start_all_gather(whole, own, _GROUPS[place.group])
        return cls(whole.unflatten(0, (-1, 2)), work, place)

    def wait(self) -> Tensor:
        """Keys and values of the whole row, (2, B, G, T * copies, H), token by token."""
        self.work.wait()
        ranks, _, *shape = self.whole.shape
        row = self.whole.new_empty(*shape[:3], 2 * ranks, *shape[3:])
        early, late = row.movedim(3, 0).chunk(2)
        early.copy_(self.whole[:, 0])
        late.index_copy_(0, _backwards(ranks, row.device), self.whole[:, 1])  # `flip` would copy it
        return row.flatten(3, 5)


class _Scattering(NamedTuple):
    """The reduce-scatter of the gradients of what is remembered, under way.

    Attributes:
        own: (2 parts, 2, B, G, L, copies, H): this rank's sums, of dk and dv.
    """

    own: Tensor
    work: dist.Work
    whole: Tensor  # it must live as long as the work

    @classmethod
    def of(cls, of_row: Tensor, place: ContextRank, copies: int) -> "_Scattering":
        """Start to sum dk and dv of the whole row, as `_Gathering.wait` has it, over the ranks."""
        parts = of_row.unflatten(3, (2 * place.ranks, -1, copies)).movedim(3, 0)
        early, late = parts.chunk(2)
        by_rank = of_row.new_empty(place.ranks, 2, *parts.shape[1:])
        by_rank[:, 0] = early
        by_rank[:, 1].index_copy_(0, _backwards(place.ranks, of_row.device), late)
        whole = by_rank.flatten(0, 1)
        own = torch.empty_like(whole[:2])
        work = start_reduce_scatter(own, whole, _GROUPS[place.group])
        return cls(own, work, whole)

    def add_to(self, dk: Tensor, dv: Tensor) -> None:
        """Add the sums to this rank's gradients (B, G, copies, T', H)."""
        self.work.wait()
        sums = self.own.movedim(0, 3).flatten(3, 4).transpose(3, 4)  # (2, B, G, copies, T', H)
        for total, more in zip((dk, dv), sums, strict=True):
            total[:, :, : more.shape[2]] += more


def _backwards(count: int, device: torch.device) -> Tensor:
    """count - 1, ..., 1, 0."""
    return torch.arange(count - 1, -1, -1, device=device)


class _HaloExchange(NamedTuple):
    """The exchange of hidden copies between parts that are neighbours, under way.

        part      0     1     2     3     4     5
        rank      0     1     2     2     1     0
                  --->  --->  --->  --->  --->         keys and values; gradients go back

    Attributes:
        received: what came from the rank before and from the one after, a part's halo each.
        own: what this rank gives itself, if it has the two parts in the middle.
    """

    received: Tensor
    own: Tensor | None
    work: dist.Work | None
    place: ContextRank

    @classmethod
    def of(cls, k: Tensor, v: Tensor, halo: int, place: ContextRank) -> "_HaloExchange":
        """Send the last hidden copies of both parts, (B, G, copies, T', H), to the parts after."""
        size = k.shape[3] // 2
        first, second = (
            torch.stack([x[:, :, 1:, end - halo : end] for x in (k, v)]) for end in (size, 2 * size)
        )
        return cls._start(second, first, place)

    @classmethod
    def back(cls, gradients: Tensor, place: ContextRank) -> "_HaloExchange":
        """Send the gradients of both parts' halos to the parts before."""
        of_first, of_second = gradients
        return cls._start(of_first, of_second, place)

    @classmethod
    def _start(cls, to_previous: Tensor, to_next: Tensor, place: ContextRank) -> "_HaloExchange":
        """Send something to the ranks before and after this one, where there are such."""
        received = to_next.new_zeros(2, *to_next.shape)
        last = place.rank == place.ranks - 1
        own = to_next if last else None
        if not to_next.numel():
            return cls(received, own, None, place)
        sizes = [0] * place.ranks
        sent = []
        if place.rank:
            sizes[place.rank - 1] = 1
            sent.append(to_previous)
        if not last:
            sizes[place.rank + 1] = 1
            sent.append(to_next)
        first = 0 if place.rank else 1
        work = dist.all_to_all_single(
            received[first : first + len(sent)],
            torch.stack(sent),
            sizes,
            sizes,
            group=_GROUPS[place.group],
            async_op=True,
        )
        return cls(received, own, work, place)

    def wait(self) -> Tensor:
        """What came from the rank before and from the one after (or from this one, in the middle).

        Zeros where there is none.
        """
        if self.work is not None:
            self.work.wait()
        if self.own is not None:
            self.received[1] = self.own
        return self.received

    def add_to(self, dk: Tensor, dv: Tensor) -> None:
        """Add the gradients that have come back to those of this rank's hidden copies."""
        # The rank before has the part that follows this one's second part.
        of_second, of_first = self.wait()
        halo, size = of_first.shape[-2], dk.shape[3] // 2
        for number, total in enumerate((dk, dv)):
            total[:, :, 1:, size - halo : size] += of_first[number]
            total[:, :, 1:, 2 * size - halo :] += of_second[number]


def start_all_gather(whole: Tensor, own: Tensor, group: dist.ProcessGroup) -> dist.Work:
    """Start to gather `own` of all ranks into `whole`, one after another."""
    # Its name before torch 2.13, which says that the old one is deprecated.
    start = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return cast(dist.Work, start(whole, own, group=group, async_op=True))


def start_reduce_scatter(own: Tensor, whole: Tensor, group: dist.ProcessGroup) -> dist.Work:
    """Start to sum `whole` over all ranks; this rank's part of the sum comes into `own`."""
    start = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    return cast(dist.Work, start(own, whole, group=group, async_op=True))
