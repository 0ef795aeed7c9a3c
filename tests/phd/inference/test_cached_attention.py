"""Attention of a few queries equals the formula, and parts of it merge."""

import pytest
import torch

from phd.attention.flash import merge
from phd.inference.cached_attention import attend_cached, attend_masked, bias_of, dense_attention

B, N, G, H, KEYS = 2, 4, 2, 8, 30


def tensors(Q: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(Q)
    shapes = (B, N, Q, H), (B, G, KEYS, H), (B, G, KEYS, H)
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return q, k, v


def by_formula(q, k, v, mask) -> tuple[torch.Tensor, torch.Tensor]:
    k, v = (x.repeat_interleave(N // G, 1) for x in (k, v))
    scores = (q @ k.mT * H**-0.5).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def check(found: tuple[torch.Tensor, torch.Tensor], expected) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("Q", [1, 3, 20])
def test_each_query_sees_its_number_of_slots(Q: int) -> None:
    q, k, v = tensors(Q)
    visible = torch.randint(1, KEYS + 1, (B, Q))
    mask = torch.arange(KEYS) < visible[:, None, :, None]
    check(attend_cached(q, k, v, visible), by_formula(q, k, v, mask))
    everything = torch.ones(B, 1, Q, KEYS, dtype=torch.bool)
    check(attend_cached(q, k, v), by_formula(q, k, v, everything))


@pytest.mark.parametrize("attention", [attend_masked, dense_attention])
def test_each_query_sees_the_keys_that_its_bias_leaves(attention) -> None:
    q, k, v = tensors(5)
    mask = torch.rand(B, 1, 5, KEYS) < 0.5
    check(attention(q, k, v, bias_of(mask, q.dtype)), by_formula(q, k, v, mask))


def test_two_parts_of_the_keys_merge_to_the_whole() -> None:
    q, k, v = tensors(5)
    mask = torch.rand(B, 1, 5, KEYS) < 0.5
    mask[..., 0] = mask[..., -1] = True
    parts = []
    for keys in (slice(11), slice(11, None)):
        bias = bias_of(mask[..., keys], q.dtype)
        parts.append(attend_masked(q, k[:, :, keys], v[:, :, keys], bias))
    check(merge(*parts), by_formula(q, k, v, mask))
    check(merge(*reversed(parts)), by_formula(q, k, v, mask))
