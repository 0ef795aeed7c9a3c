"""Attention of parts of a row, piece by piece, is the attention of the row."""

from math import ceil
from typing import NamedTuple, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from phd.attention import tiles
from phd.attention.attend import attend
from phd.attention.flash import noncausal_backward, noncausal_forward
from phd.attention.parts import PartAttention, first_documents, halo_tokens, remembered_copies
from phd.config import SpanUnit
from phd.pattern import Pattern
from phd.segments import Segments
from tests.phd.small_models import examples

B, G, N, H = 2, 2, 4, 3


class Row(NamedTuple):
    """Rows of `parts` parts of `size` tokens; with `documents`, they are cut anywhere."""

    pattern: Pattern
    Q: int
    parts: int
    size: int
    documents: Segments | None

    @property
    def tokens(self) -> int:
        return self.parts * self.size

    @property
    def halo(self) -> int:
        return halo_tokens(self.pattern, self.size, documents=self.documents is not None)


@st.composite
def rows(draw: st.DrawFn) -> Row:
    rule = draw(st.sampled_from(["causal", "flat", "hidden", "originals", "originals"]))
    K, parts = draw(st.integers(2, 4)), draw(st.integers(2, 4))
    pattern, multiple = Pattern("causal", K), 1
    if rule == "flat":
        pattern = Pattern("flat", K)
    elif rule != "causal":
        originals = rule == "originals"
        window = draw(st.integers(1, 9) if originals else st.integers(1, 9) | st.none())
        chunk = None if window is None else draw(st.none() | st.integers(1, 9))
        unit = draw(st.sampled_from(get_args(SpanUnit)))
        pattern = Pattern("hidden", K, window, chunk, unit, originals)
        multiple = (chunk or 1) if draw(st.booleans()) else 1
    size = multiple * ceil(draw(st.integers(9, 20)) / multiple)  # no window reaches over a part
    Q = 1 if pattern.rule == "flat" else draw(st.sampled_from([1, pattern.K]))
    documents = None
    if draw(st.booleans()):
        starts = torch.zeros(B, parts * size, dtype=torch.int64)
        for row in starts:
            for n in draw(st.sets(st.integers(0, parts * size - 1), max_size=5)):
                row[n] = n
        documents = Segments.of(starts.cummax(1).values)
    return Row(pattern, Q, parts, size, documents)


def part_of(row: Row, number: int) -> PartAttention:
    tokens = slice(number * row.size, (number + 1) * row.size)
    if row.documents is None:
        position = torch.arange(row.tokens)[None, tokens]
        return PartAttention(row.pattern, tokens.start, position, None, None, row.halo)
    starts = row.documents.starts
    within = Segments.of((starts[:, tokens] - tokens.start).clamp(min=0))
    return PartAttention(
        row.pattern,
        tokens.start,
        row.documents.position[:, tokens],
        within,
        first_documents(starts, tokens.start, row.size),
        row.halo,
    )


def in_parts(row: Row, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> list[Tensor]:
    """(out, dq, dk, dv), of which each part computes its share."""
    copies = remembered_copies(row.pattern)
    keys, values = (x[:, :, :copies].transpose(2, 3).flatten(2, 3) for x in (k, v))
    out, dq, dk, dv = (torch.zeros_like(x) for x in (q, q, k, v))
    d_keys, d_values = torch.zeros_like(keys), torch.zeros_like(values)  # of all parts
    for number in range(row.parts):
        part = part_of(row, number)
        at = slice(part.first, part.first + row.size)
        near = slice(part.first - row.halo, part.first)
        own = tuple(x[..., at, :] for x in (q, k, v))
        halo = tuple(x[:, :, 1:, near] for x in (k, v))
        result = part.attend_to_itself(*own)
        part.add_before(own[0], keys, values, result)
        if row.halo and number:
            part.add_halo(own[0], *halo, result)
        out[..., at, :] = result[0]
        results = (*result, dout[..., at, :].contiguous())
        of_q, dk_own, dv_own = part.gradients_of_itself(own, results)  # type: ignore[arg-type]
        part.add_gradients_before((of_q, d_keys, d_values), (own[0], keys, values), results)
        if row.halo and number:
            dk_halo, dv_halo = part.add_halo_gradients(of_q, (own[0], *halo), results)
            dk[:, :, 1:, near] += dk_halo
            dv[:, :, 1:, near] += dv_halo
        dq[..., at, :] = of_q
        dk[..., at, :] += dk_own
        dv[..., at, :] += dv_own
    for total, of_all in ((dk, d_keys), (dv, d_values)):
        total[:, :, :copies] += of_all.unflatten(2, (-1, copies)).transpose(2, 3)
    return [out, dq, dk, dv]


@examples(120)
@given(row=rows(), at_once=st.sampled_from([1, tiles.SCORES_AT_ONCE]))
def test_parts_compute_what_the_dense_definition_says(row: Row, at_once: int) -> None:
    assert row.halo <= row.size
    K = row.pattern.key_copies
    shapes = [(B, N, row.Q), (B, G, K), (B, G, K), (B, N, row.Q)]
    q, k, v, dout = (torch.randn(*s, row.tokens, H, dtype=torch.float64) for s in shapes)
    qkv = [x.requires_grad_() for x in (q, k, v)]
    expected = attend(q, k, v, row.pattern, "reference", row.documents)
    gradients = torch.autograd.grad(expected, qkv, dout)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(tiles, "SCORES_AT_ONCE", at_once)
        found = in_parts(row, q, k, v, dout)
    for ours, theirs in zip(found, (expected, *gradients), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_autocast_does_not_reach_into_the_pieces() -> None:
    """As `test_autocast_does_not_reach_into_the_packed_backend`: products would be rounded."""
    pattern = Pattern("hidden", K=3, window=9)
    row = Row(pattern, Q=3, parts=2, size=8, documents=None)
    shapes = [(B, N, 3), (B, G, 3), (B, G, 3), (B, N, 3)]
    tensors = [torch.randn(*shape, row.tokens, H) for shape in shapes]
    expected = in_parts(row, *tensors)
    with torch.autocast("cpu", torch.bfloat16):
        found = in_parts(row, *tensors)
    assert row.halo == 4
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_a_part_needs_no_halo_where_every_part_begins_with_a_chunk() -> None:
    chunks = Pattern("hidden", K=3, window=16, chunk_tokens=16)
    assert halo_tokens(chunks, 32, documents=False) == 0
    assert halo_tokens(chunks, 24, documents=False) == 8
    assert halo_tokens(chunks, 32, documents=True) == 8  # chunks begin with their document
    assert halo_tokens(Pattern("hidden", K=3, window=16), 32, documents=False) == 8
    assert halo_tokens(Pattern("hidden", K=2, window=16, chunk_tokens=3), 4, documents=False) == 2
    for others in (Pattern("hidden", K=3), Pattern("causal"), Pattern("flat", K=3)):
        assert halo_tokens(others, 24, documents=True) == 0


@pytest.mark.parametrize("keys", [5, 11, 30])
def test_attention_to_all_keys_gives_its_share_of_a_merged_attention(keys: int) -> None:
    """As in `test_flash`; there may be fewer keys than queries, or more."""
    q, dout, extra = (torch.randn(B, N, 11, H, dtype=torch.float64) for _ in range(3))
    k, v = (torch.randn(B, G, keys, H, dtype=torch.float64) for _ in range(2))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    whole_k, whole_v = (x.repeat_interleave(N // G, 1) for x in (k, v))
    scores = torch.cat([0.3 * q @ whole_k.mT, torch.ones(B, N, 11, 1)], -1)
    p = scores.softmax(-1)
    merged = p[..., :-1] @ whole_v + p[..., -1:] * extra
    expected = torch.autograd.grad(merged, leaves, dout, retain_graph=True)
    with torch.no_grad():
        lse = scores.logsumexp(-1)
        found = noncausal_backward(dout, q, k, v, merged, lse, 0.3)
        torch.testing.assert_close(tuple(found), expected)
        out, own = noncausal_forward(q, k, v, 0.3)
        torch.testing.assert_close(own, scores[..., :-1].logsumexp(-1))
        torch.testing.assert_close(out, scores[..., :-1].softmax(-1) @ whole_v)
