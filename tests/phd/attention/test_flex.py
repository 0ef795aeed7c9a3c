"""FlexAttention gets block lists that say what the mask says, and refuses where it cannot run."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.nn.attention.flex_attention import flex_attention as eager_flex_attention
from torch.nn.functional import pad

import phd.attention.flex
from phd.attention.attend import attend
from phd.attention.flex import block_table, flex_mask, masked_flex
from phd.pattern import Pattern
from phd.segments import Segments

claim = settings(derandomize=True, deadline=None, max_examples=60)
BLOCK = 4  # slots: random patterns then have blocks of every kind within a few tokens
whole_blocks = st.integers(1, 5).map(lambda blocks: blocks * BLOCK)


@pytest.fixture(autouse=True, scope="module")
def small_blocks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(phd.attention.flex, "MASK_BLOCK_SIZE", BLOCK)
        yield


def listed(mask: BlockMask, kind: str) -> list[set[int]]:
    """The blocks of keys that each block of queries is listed with, as `kv` or `full_kv`."""
    count = getattr(mask, f"{kind}_num_blocks").flatten()
    order = getattr(mask, f"{kind}_indices").flatten(0, -2)
    return [set(row[:n].tolist()) for n, row in zip(count, order, strict=True)]


def check_same(ours: BlockMask, torchs: BlockMask) -> None:
    assert ours.shape == torchs.shape
    assert listed(ours, "kv") == listed(torchs, "kv")
    assert listed(ours, "full_kv") == listed(torchs, "full_kv")
    assert torch.equal(ours.to_dense(), torchs.to_dense())


@claim
@given(pattern=..., T=whole_blocks)
def test_the_block_table_is_the_mask_reduced(pattern: Pattern, T: int) -> None:
    blocks, of_keys = pattern.K * T // BLOCK, pattern.key_copies * T // BLOCK
    mask = pattern.mask(T)[:, :, : pattern.key_copies].reshape(blocks, BLOCK, of_keys, BLOCK)
    some, every = block_table(pattern, torch.zeros(1, T, dtype=torch.int64))
    assert torch.equal(some[0], mask.any(3).any(1))
    assert torch.equal(every[0], mask.all(3).all(1))


@claim
@given(pattern=..., T=whole_blocks, last_copy_only=st.booleans())
def test_the_block_mask_is_the_one_that_torch_finds_by_trying_every_slot(
    pattern: Pattern, T: int, last_copy_only: bool
) -> None:
    copies = 1 if last_copy_only else pattern.K
    dense = pattern.mask(T)[-copies:, :, : pattern.key_copies].flatten(2, 3).flatten(0, 1)

    def stored(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:  # noqa: ARG001
        return dense[query, key]

    ours = flex_mask(pattern, T, copies, torch.device("cpu"))
    torchs = create_block_mask(
        stored, None, None, Q_LEN=len(dense), KV_LEN=len(dense.T), device="cpu", BLOCK_SIZE=BLOCK
    )
    check_same(ours, torchs)


@claim
@given(pattern=..., segments=..., last_copy_only=st.booleans())
def test_so_is_the_block_mask_of_documents(
    pattern: Pattern, segments: Segments, last_copy_only: bool
) -> None:
    copies = 1 if last_copy_only else pattern.K
    B, T = segments.starts.shape
    filled = Segments.of(pad(segments.starts, (0, -T % BLOCK), value=T))
    dense = filled.mask(pattern)[:, -copies:, :, : pattern.key_copies].flatten(3, 4).flatten(1, 2)

    def stored(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:  # noqa: ARG001
        return dense[b, query, key]

    cpu = torch.device("cpu")
    ours = flex_mask(pattern, filled.starts.shape[1], copies, cpu, segments)
    queries, keys = dense.shape[1:]
    torchs = create_block_mask(stored, B, None, queries, keys, device="cpu", BLOCK_SIZE=BLOCK)
    check_same(ours, torchs)


# FlexAttention without torch.compile warns that it is slow; here the values are the point.
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@settings(claim, max_examples=30)
@given(pattern=..., T=st.integers(1, 20))
def test_flex_computes_the_dense_definition(pattern: Pattern, T: int) -> None:
    q, k, v = torch.randn(3, 2, 4, pattern.K, T, 8, dtype=torch.float64)
    k, v = (x[:, :2, : pattern.key_copies] for x in (k, v))
    for queries in (q, q[:, :, -1:]):
        out = masked_flex(eager_flex_attention, queries, k, v, pattern)
        torch.testing.assert_close(out, attend(queries, k, v, pattern, "reference"))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@settings(claim, max_examples=15)
@given(pattern=..., segments=...)
def test_flex_computes_the_dense_definition_of_documents(
    pattern: Pattern, segments: Segments
) -> None:
    B, T = segments.starts.shape
    q, k, v = torch.randn(3, B, 4, pattern.K, T, 8, dtype=torch.float64)
    k, v = (x[:, :2, : pattern.key_copies] for x in (k, v))
    for queries in (q, q[:, :, -1:]):
        out = masked_flex(eager_flex_attention, queries, k, v, pattern, segments)
        torch.testing.assert_close(out, attend(queries, k, v, pattern, "reference", segments))


def test_flex_refuses_the_cpu_by_name_and_says_what_to_choose() -> None:
    q = torch.randn(1, 2, 2, 8, 4)
    with pytest.raises(ValueError, match=r"^model\.attention=flex: .* device cpu; .*=packed"):
        attend(q, q, q, Pattern("hidden", K=2), "flex")
