"""What a batch of rows says, and how it is cut for ranks and micro-batches."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.batch import IGNORED_TARGET, Batch, BatchStats, document_starts, make_batch
from data.mixture import LaneCursor
from data.tokenizer import Tokenizer

T = 5


def batch_of(rows: int, *, mask: bool = True, starts: bool = True) -> Batch:
    """Rows of which every token is different."""
    tokens = np.arange(rows * (T + 1)).reshape(rows, T + 1)
    keep = np.random.default_rng(rows).random((rows, T)) < 0.7
    return Batch(
        tokens,
        keep if mask else None,
        np.minimum(tokens[:, :-1], 3) if starts else None,
        BatchStats(7, rows * T, 9, {}, {}),
    )


def counted(batch: Batch) -> list[int]:
    """The targets that count, sorted; in `batch_of` no two are equal."""
    return sorted(batch.targets[batch.targets != IGNORED_TARGET].tolist())


def test_a_target_is_the_token_after_its_input_and_padding_is_none() -> None:
    rows = np.array([[1, 2, 3, 4, 5, 6]])
    assert Batch(rows).inputs.tolist() == [[1, 2, 3, 4, 5]]
    assert Batch(rows).targets.tolist() == [[2, 3, 4, 5, 6]]
    mask = np.array([[True, True, False, False, False]])
    masked = Batch(rows, mask).targets
    assert masked.tolist() == [[2, 3, IGNORED_TARGET, IGNORED_TARGET, IGNORED_TARGET]]
    assert masked.dtype == np.int64
    assert rows.tolist() == [[1, 2, 3, 4, 5, 6]]


@given(rows=st.integers(1, 9), size=st.integers(1, 10), mask=st.booleans(), starts=st.booleans())
def test_micro_batches_side_by_side_are_the_batch(
    rows: int, size: int, mask: bool, starts: bool
) -> None:
    batch = batch_of(rows, mask=mask, starts=starts)
    parts = list(batch.split(size))
    assert [len(part.rows) for part in parts[:-1]] == [size] * (len(parts) - 1)
    assert 1 <= len(parts[-1].rows) <= size
    for field in ("rows", "mask", "document_starts"):
        whole = getattr(batch, field)
        if whole is None:
            assert all(getattr(part, field) is None for part in parts)
        else:
            assert np.array_equal(np.concatenate([getattr(p, field) for p in parts]), whole)
    assert all(part.stats is None for part in parts)


@given(rows=st.integers(1, 9), world_size=st.integers(1, 10), mask=st.booleans())
def test_ranks_have_equal_parts_and_every_target_counts_once(
    rows: int, world_size: int, mask: bool
) -> None:
    batch = batch_of(rows, mask=mask)
    parts = [batch.shard(rank, world_size) for rank in range(world_size)]
    assert {len(part.rows) for part in parts} == {-(-rows // world_size)}
    assert sorted(target for part in parts for target in counted(part)) == counted(batch)
    for rank, part in enumerate(parts):
        own = len(batch.rows[rank::world_size])
        assert np.array_equal(part.rows[:own], batch.rows[rank::world_size])
        assert batch.document_starts is not None
        assert part.document_starts is not None
        assert np.array_equal(part.document_starts[:own], batch.document_starts[rank::world_size])
        assert (part.targets[own:] == IGNORED_TARGET).all()


def test_stats_of_ranks_are_added_and_their_lanes_put_together() -> None:
    cursors = [LaneCursor({}, phase) for phase in range(4)]
    ranks = [
        BatchStats(3, 4, 10, {0: cursors[0]}, {0: cursors[1]}),
        BatchStats(2, 4, 20, {1: cursors[2]}, {1: cursors[3]}),
    ]
    merged = BatchStats.merged(ranks)
    assert merged[:3] == (5, 8, 30)
    assert merged.lanes == {0: cursors[0], 1: cursors[2]}
    assert merged.progress == {0: cursors[1], 1: cursors[3]}
    assert list(merged.cursors) == ["0", "1"]


@pytest.mark.parametrize("full", [True, False])
def test_a_batch_counts_its_targets_and_their_bytes(tokenizer: Tokenizer, full: bool) -> None:
    rows = np.random.default_rng(0).integers(0, tokenizer.vocab_size, (3, T + 1))
    targets = np.array([T, T, T if full else 2])
    batch = make_batch(rows, targets, tokenizer, isolate=True)
    assert (batch.mask is None) == full
    assert batch.stats is not None
    assert batch.stats.targets == targets.sum() == len(counted(batch))
    assert batch.stats.positions == 3 * T
    assert batch.stats.target_bytes == sum(tokenizer.byte_lengths[i] for i in counted(batch))
    assert np.array_equal(batch.document_starts, document_starts(rows, tokenizer.eos_id))
    assert make_batch(rows, targets, tokenizer, isolate=False).document_starts is None


def test_lengths_of_documents_are_those_that_the_rows_isolate() -> None:
    rows = np.array([[0, 5, 5, 0, 5, 5], [5, 0, 5, 5, 5, 5]])
    starts = document_starts(rows, separator=0)
    assert Batch(rows, document_starts=starts).document_lengths == [3, 2, 1, 4]
    assert Batch(rows).document_lengths == [T, T]


def test_padding_belongs_to_no_document() -> None:
    rows = np.array([[0, 5, 5, 0, 5, 5], [5, 0, 5, 5, 5, 5], [5, 5, 5, 5, 5, 5]])
    starts = document_starts(rows, separator=0)
    for counted, isolated, whole in (
        ([T, T, T], [3, 2, 1, 4, T], [T, T, T]),
        ([4, 1, 2], [3, 1, 1, 2], [4, 1, 2]),
        ([3, 0, 1], [3, 1], [3, 1]),
        ([0, 0, 0], [], []),
    ):
        mask = np.arange(T) < np.array(counted)[:, None]
        assert Batch(rows, mask, starts).document_lengths == isolated
        assert Batch(rows, mask).document_lengths == whole


@given(rows=st.lists(st.lists(st.integers(0, 2), min_size=6, max_size=6), min_size=1, max_size=4))
def test_a_separator_begins_the_document_after_it(rows: list[list[int]]) -> None:
    tokens = np.array(rows)
    starts = document_starts(tokens, separator=0)
    for row, found in zip(tokens.tolist(), starts.tolist(), strict=True):
        twin = [max([0, *(j for j in range(i + 1) if row[j] == 0)]) for i in range(5)]
        assert found == twin
