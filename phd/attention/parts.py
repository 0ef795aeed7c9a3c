"""Attention of a part of each row's tokens, in pieces that need no more than what they read.

    row          before                          | part
    keys of      the copies that are remembered  | all copies
                                      | halo     |        hidden copies just before the part

`PartAttention` computes a part's attention to itself first. Whoever has the keys of the tokens
before adds attention to them, in any order: each piece updates (out, lse) as `packed` merges its
two. The backward gives every piece's gradients from the whole attention's out and lse, as there.

Nothing here knows where the keys come from. `train.engines.context_parallel` has them sent.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from phd.attention import tiles
from phd.attention.flash import merge, noncausal_backward, noncausal_forward
from phd.attention.packed import hidden_kernels
from phd.attention.varlen import isolated_backward, isolated_forward
from phd.pattern import Pattern
from phd.segments import Segments

Gradients = tuple[Tensor, Tensor, Tensor]


def first_documents(starts: Tensor, first: int, tokens: int) -> Tensor:
    """Which keys before a part are seen by which of its queries, where documents are isolated.

    Only one document of a row can reach into a part from before it.

    Args:
        starts: int64 (B, T): where in its row each token's document begins.
        first, tokens: where the part begins, and how many tokens it has.

    Returns:
        int64 (B, 2): where in the row the document of the part's first token begins, and how many
        of the part's tokens are of it; 0 of them if it begins with the part.

    >>> first_documents(torch.tensor([[0, 1, 1, 1, 4, 5]]), first=2, tokens=4).tolist()
    [[1, 2]]
    """
    part = starts[:, first : first + tokens]
    start = part[:, 0]
    of_it = (part == start[:, None]).sum(1) * (start < first)
    return torch.stack([start, of_it], 1)


def halo_tokens(pattern: Pattern, part_tokens: int, *, documents: bool) -> int:
    """How many tokens before a part have hidden copies that a query of the part may see.

    None where every part begins with a chunk, which it does if parts are whole chunks long and rows
    are one document.
    """
    if pattern.rule != "hidden":
        return 0
    reach, chunk = pattern.span_tokens - 1, pattern.chunk_tokens
    if chunk is None:
        return reach
    return 0 if part_tokens % chunk == 0 and not documents else min(reach, chunk - 1)


def local_segments(position: Tensor, pattern: Pattern) -> Segments:
    """The documents of a part as rules 2 and 3 within it need them.

    A document that begins before the part is cut at its first chunk that begins within it, which no
    hidden copy sees across, so that chunks are counted from there:

        position   5  6  7  8  9  0  1      chunks of 4
        starts     0  0  0  3  3  5  5

    Args:
        position: int64 (B, T'), of each of the part's tokens in its document.
    """
    index = torch.arange(position.shape[1], device=position.device)
    start = index - position
    if pattern.chunk_tokens is None:
        start = start.clamp(min=0)
    else:
        first_chunk = start % pattern.chunk_tokens
        cut = torch.where(index >= first_chunk, first_chunk, 0)
        start = torch.where(start < 0, cut, start)
    # The kernels of rules 2 and 3 read `starts` alone.
    return Segments(start, start, start)


@dataclass(frozen=True)
class PartAttention:
    """Attention of consecutive tokens of every row by a pattern; `q` holds all copies or the last.

    Attributes:
        pattern: of rule `causal` or `hidden`, or `flat` with the queries of the last copy alone.
        first: how many tokens of the row lie before the part.
        position: int64 (B or 1, T'), of each token in its document.
        segments: the documents within the part, as if it were the row; None: rows are one document.
        first_documents: as the function of this name returns them, on the CPU.
        halo: tokens before the part that have hidden copies which it sees.
        fused: whether rules 2 and 3 are computed by Triton's kernels.
    """

    pattern: Pattern
    first: int
    position: Tensor
    segments: Segments | None
    first_documents: Tensor | None
    halo: int
    fused: bool = False

    @property
    def remembered(self) -> int:
        """How many copies of a token every later token sees, the first ones."""
        return remembered_copies(self.pattern)

    def attend_to_itself(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """q (B, N, Q, T', H) over k, v (B, G, copies, T', H) -> out as q, lse (B, N, Q, T')."""
        heads = q.flatten(1, 2)
        scale = q.shape[-1] ** -0.5
        out, lse = isolated_forward(heads, k[:, :, 0], v[:, :, 0], scale, self.segments)
        for r in range(1, self.remembered):
            more = isolated_forward(heads, k[:, :, r], v[:, :, r], scale, self.segments)
            out, lse = merge((out, lse), more)
        out, lse = out.view(q.shape), lse.view(q.shape[:4])
        if self.pattern.rule == "hidden":
            segments = self._hidden_segments(len(q))
            with torch.autocast(q.device.type, enabled=False):
                hidden_kernels(self.fused).merge((q, k, v), (out, lse), self.pattern, segments)
        return out, lse

    def gradients_of_itself(
        self,
        inputs: tuple[Tensor, Tensor, Tensor],
        result: tuple[Tensor, Tensor, Tensor],
    ) -> Gradients:
        """(dq, dk, dv) of `attend_to_itself`, in the dtypes of its `inputs`, q, k and v.

        Args:
            result: out and lse of the whole attention, and dout, of the shape of q.
        """
        (q, k, v), (out, lse, dout) = inputs, result
        scale, heads = q.shape[-1] ** -0.5, q.flatten(1, 2)
        merged = out.flatten(1, 2), lse.flatten(1, 2)
        dq, dk, dv = None, torch.empty_like(k), torch.empty_like(v)
        for r in range(self.remembered):
            qkv = heads, k[:, :, r], v[:, :, r]
            share, dk[:, :, r], dv[:, :, r] = isolated_backward(
                dout.flatten(1, 2), qkv, merged, scale, self.segments
            )
            dq = share if dq is None else dq.add_(share)
        assert dq is not None
        dq = dq.view(q.shape)
        if self.pattern.rule == "hidden":
            segments = self._hidden_segments(len(q))
            with torch.autocast(q.device.type, enabled=False):
                hidden_kernels(self.fused).add_gradients(
                    (dq, dk, dv), inputs, result, self.pattern, segments
                )
        return dq, dk, dv

    def _hidden_segments(self, rows: int) -> Segments | None:
        """The documents that rules 2 and 3 keep apart within the part; None: it is one."""
        pattern = self.pattern
        if pattern.span_tokens == 1:  # a token sees its own hidden copies alone
            return None
        if self.segments is None and (self.halo == 0 or pattern.chunk_tokens is None):
            return None
        position = self.position.expand(rows, -1)
        return local_segments(position, pattern)

    def add_before(self, q: Tensor, k: Tensor, v: Tensor, result: tuple[Tensor, Tensor]) -> None:
        """Add attention to the remembered copies before the part: updates (out, lse) in place.

        Args:
            q: (B, N, Q, T', H).
            k, v: (B, G, tokens before the part x remembered copies, H), token by token; there may
                be more tokens after them.
            result: out as q, lse (B, N, Q, T').
        """
        heads, scale = q.flatten(1, 2), q.shape[-1] ** -0.5
        out, lse = result[0].view(heads.shape), result[1].view(heads.shape[:3])
        for queries, keys in self._seen_before():
            more = noncausal_forward(
                heads[queries], k[keys], v[keys], scale, varying_length=self.segments is not None
            )
            # `merge` makes new tensors before these are written.
            out[queries], lse[queries] = merge((out[queries], lse[queries]), more)

    def add_gradients_before(
        self,
        gradients: Gradients,
        inputs: tuple[Tensor, Tensor, Tensor],
        result: tuple[Tensor, Tensor, Tensor],
    ) -> None:
        """Add the gradients of `add_before` to dq as q, and to dk and dv of the keys before.

        Args:
            gradients: dq, dk, dv; those of keys may be of a wider dtype than theirs.
            inputs: q, k, v as in `add_before`.
            result: out and lse of the whole attention, and dout.
        """
        (dq, dk, dv), (q, k, v), (out, lse, dout) = gradients, inputs, result
        scale = q.shape[-1] ** -0.5
        heads, out, lse, dout = (x.flatten(1, 2) for x in (q, out, lse, dout))
        dq = dq.view(heads.shape)
        for queries, keys in self._seen_before():
            of_queries = dout[queries], heads[queries]
            more_dq, more_dk, more_dv = noncausal_backward(
                *of_queries, k[keys], v[keys], out[queries], lse[queries], scale,
                varying_length=self.segments is not None,
            )  # fmt: skip
            dq[queries] += more_dq
            dk[keys] += more_dk
            dv[keys] += more_dv

    def _seen_before(self) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
        """Indices of queries (B, heads, T', ...), and of keys before the part that they all see.

        Without documents there is one such pair; with documents, one for each row.
        """
        copies, every = self.remembered, slice(None)
        if self.first_documents is None:
            if self.first:
                yield (every,), (every, every, slice(self.first * copies))
            return
        for row, (start, queries) in enumerate(self.first_documents.tolist()):
            if queries:
                at = slice(row, row + 1)
                keys = slice(start * copies, self.first * copies)
                yield (at, every, slice(queries)), (at, every, keys)

    def add_halo(self, q: Tensor, k: Tensor, v: Tensor, result: tuple[Tensor, Tensor]) -> None:
        """Add attention to the hidden copies of the halo: updates (out, lse) in place.

        Args:
            q, result: as in `add_before`.
            k, v: (B, G, K-1, halo, H), of the tokens just before the part.
        """
        # The products are in the precision of lse, float32 at least.
        with torch.autocast(q.device.type, enabled=False):
            self._add_halo(q, k, v, result)

    def _add_halo(self, q: Tensor, k: Tensor, v: Tensor, result: tuple[Tensor, Tensor]) -> None:
        out, lse = self._seeing_halo(*result)
        (q,) = self._seeing_halo(q)
        for at, scores in self._halo_scores(q, k, lse.dtype):
            before = _grouped(lse[..., at, None], k)
            total = torch.logaddexp(before, scores.logsumexp(-1, keepdim=True))
            p = (scores - total).exp()
            values = v.flatten(2, 3).to(lse.dtype)
            mixed = _grouped(out[..., at, :], k) * (before - total).exp() + p @ values
            out[..., at, :] = mixed.view(out[..., at, :].shape)
            lse[..., at] = total.view(lse[..., at].shape)

    def add_halo_gradients(
        self,
        dq: Tensor,
        inputs: tuple[Tensor, Tensor, Tensor],
        result: tuple[Tensor, Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Add the gradient of `add_halo` to dq; return those of its keys and values.

        Args:
            inputs: q, k, v as in `add_halo`.
            result: out and lse of the whole attention, and dout.

        Returns:
            dk and dv, of the dtype of lse.
        """
        with torch.autocast(dq.device.type, enabled=False):
            return self._add_halo_gradients(dq, inputs, result)

    def _add_halo_gradients(
        self,
        dq: Tensor,
        inputs: tuple[Tensor, Tensor, Tensor],
        result: tuple[Tensor, Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        q, k, v = inputs
        out, lse, dout = self._seeing_halo(*result)
        dq, q = self._seeing_halo(dq, q)
        keys, values = (x.flatten(2, 3).to(lse.dtype) for x in (k, v))
        dk, dv = torch.zeros_like(keys), torch.zeros_like(values)
        scale = q.shape[-1] ** -0.5
        for at, scores in self._halo_scores(q, k, lse.dtype):
            p = (scores - _grouped(lse[..., at, None], k)).exp()
            of_out, of_dout = (_grouped(x[..., at, :].to(lse.dtype), k) for x in (out, dout))
            ds = p * (of_dout @ values.mT - (of_dout * of_out).sum(-1, keepdim=True)) * scale
            dq[..., at, :] += (ds @ keys).view(dq[..., at, :].shape).to(dq.dtype)
            dk += ds.mT @ _grouped(q[..., at, :].to(lse.dtype), k)
            dv += p.mT @ of_dout
        return dk.view(k.shape), dv.view(v.shape)

    def _seeing_halo(self, *tensors: Tensor) -> Sequence[Tensor]:
        """Of tensors (B, N, Q, T', ...) the copies and tokens that may see the halo."""
        copies = min(tensors[0].shape[2], self.pattern.local_copies)
        return [x[:, :, -copies:, : self.halo] for x in tensors]

    def _halo_scores(
        self, q: Tensor, k: Tensor, dtype: torch.dtype
    ) -> Iterator[tuple[slice, Tensor]]:
        """For some of the tokens of q (B, N, copies, halo, H) at a time, their scores.

        They are (B, G, N/G * copies * tokens, K-1 * halo), -inf where the pattern does not allow
        them.
        """
        B, N, copies, tokens, H = q.shape
        keys = k.flatten(2, 3).to(dtype) * H**-0.5
        step = max(1, tiles.SCORES_AT_ONCE // (B * N * copies * keys.shape[2]))
        for start in range(0, tokens, step):
            at = slice(start, min(start + step, tokens))
            scores = _grouped(q[..., at, :].to(dtype), k) @ keys.mT
            allowed = self._halo_mask(copies, at).flatten(-2)[:, None, None]
            shape = *scores.shape[:2], N // k.shape[1], copies, -1, scores.shape[-1]
            yield at, scores.view(shape).masked_fill(~allowed, -torch.inf).view(scores.shape)

    def _halo_mask(self, copies: int, tokens: slice) -> Tensor:
        """What the last copies of these tokens may see: (B or 1, copies, tokens, K-1, halo)."""
        K, device = self.pattern.K, self.position.device
        n = self.position[:, None, tokens, None, None]
        index = torch.arange(self.halo, device=device)
        m = n - (index[tokens, None, None] + self.halo - index)
        s = torch.arange(K - copies, K, device=device)[:, None, None, None]
        r = torch.arange(1, K, device=device)[:, None]
        return (m >= 0) & self.pattern.allows(n, s, m, r)


def remembered_copies(pattern: Pattern) -> int:
    """How many copies of a token every later token sees: all with `flat`, else the original."""
    return pattern.K if pattern.rule == "flat" else 1


def _grouped(x: Tensor, keys: Tensor) -> Tensor:
    """(B, N, copies, tokens, H) by key head: (B, G, N/G * copies * tokens, H)."""
    return x.unflatten(1, (keys.shape[1], -1)).flatten(2, 4)
