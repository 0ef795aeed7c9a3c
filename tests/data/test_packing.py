from collections import Counter
from itertools import islice, pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data.packing import PADDING, pack, pack_best_fit

lengths = st.lists(st.integers(1, 12), min_size=1, max_size=12)
SEPARATOR = 10_000


def numbered(lengths: list[int]) -> list[tuple[np.ndarray, int]]:
    """Documents whose tokens are their places in the whole stream."""
    ends = np.cumsum(lengths)
    return [
        (np.arange(end - n, end), i) for i, (n, end) in enumerate(zip(lengths, ends, strict=True))
    ]


def separated(lengths: list[int]) -> list[tuple[np.ndarray, int]]:
    """The same, counted from 1, with a separator for the last token of each."""
    return [(np.append(t[:-1] + 1, SEPARATOR), i) for t, i in numbered(lengths)]


@given(lengths=lengths, seq_len=st.integers(1, 9))
def test_rows_are_the_stream_cut_every_seq_len_tokens_with_one_more(
    lengths: list[int], seq_len: int
) -> None:
    total = sum(lengths)
    rows = [row for row, _, _ in pack(numbered(lengths), seq_len)]
    assert len(rows) == -(-(total - 1) // seq_len)
    for i, row in enumerate(rows):
        first, last = i * seq_len, min(total - 1, (i + 1) * seq_len)
        assert row.targets == last - first
        assert row.tokens[: row.targets + 1].tolist() == list(range(first, last + 1))
        assert (row.tokens[row.targets + 1 :] == PADDING).all()


@given(lengths=lengths, seq_len=st.integers(1, 9))
def test_packing_goes_on_exactly_after_every_row(lengths: list[int], seq_len: int) -> None:
    documents = numbered(lengths)
    whole = list(pack(documents, seq_len))
    for i, (_, place, token) in enumerate(whole):
        rest = list(pack(documents[place:], seq_len, skip=token))
        assert len(rest) == len(whole) - i - 1
        for (a, *_), (b, *_) in zip(rest, whole[i + 1 :], strict=True):
            assert np.array_equal(a.tokens, b.tokens)
        assert 0 <= token <= lengths[place]


def test_rows_are_independent_of_each_other() -> None:
    first, second = (row.tokens for row, _, _ in pack(numbered([9]), 4))
    first[:] = -1
    assert second.tolist() == [4, 5, 6, 7, 8]


def best_fit(lengths: list[int], seq_len: int, group: int, start: int = 0, skip: int = 0):  # type: ignore[no-untyped-def]
    documents = separated(lengths)[start:]
    return list(pack_best_fit(documents, seq_len, skip, group=group, separator=SEPARATOR))


@given(lengths=lengths, seq_len=st.integers(1, 9), group=st.integers(1, 5))
def test_best_fit_makes_every_token_a_target_once_after_the_token_before_it(
    lengths: list[int], seq_len: int, group: int
) -> None:
    seen: Counter[tuple[int, int]] = Counter()
    for (tokens, targets, _, _), _, _ in best_fit(lengths, seq_len, group):
        assert tokens.shape == (seq_len + 1,)
        assert (tokens[targets + 1 :] == PADDING).all()
        seen.update(zip(tokens[:targets].tolist(), tokens[1 : targets + 1].tolist(), strict=True))
    expected: Counter[tuple[int, int]] = Counter()
    for tokens, _ in separated(lengths):
        before = [SEPARATOR, *tokens.tolist()]
        expected.update(pairwise(before))
    assert seen == expected


@given(lengths=lengths, seq_len=st.integers(1, 9), group=st.integers(1, 5))
def test_best_fit_cuts_only_documents_longer_than_a_row(
    lengths: list[int], seq_len: int, group: int
) -> None:
    rows = [
        row.tokens[1 : row.targets + 1].tolist() for row, _, _ in best_fit(lengths, seq_len, group)
    ]
    for tokens, _ in separated(lengths):
        pieces = [row for row in rows if set(tokens.tolist()) - {SEPARATOR} & set(row)]
        if 1 < len(tokens) <= seq_len:
            [row] = pieces
            at = row.index(tokens[0])
            assert row[at : at + len(tokens)] == tokens.tolist()
        elif len(tokens) > seq_len:
            # A last piece that is the separator alone holds no token to find it by.
            assert len(pieces) == -(-(len(tokens) - 1) // seq_len)


@given(lengths=lengths, seq_len=st.integers(1, 9), group=st.integers(1, 5))
def test_best_fit_goes_on_exactly_after_every_row(
    lengths: list[int], seq_len: int, group: int
) -> None:
    whole = best_fit(lengths, seq_len, group)
    for i, (_, place, used) in enumerate(whole):
        rest = best_fit(lengths, seq_len, group, place, used)
        assert len(rest) == len(whole) - i - 1
        for (a, *_), (b, *_) in zip(rest, whole[i + 1 :], strict=True):
            assert np.array_equal(a.tokens, b.tokens)
            assert a.targets == b.targets


def test_best_fit_puts_a_document_where_it_leaves_the_least_room() -> None:
    rows = best_fit([6, 5, 2, 3, 4], seq_len=9, group=5)
    # 6 opens a row and 5 another; 4 fits behind 5 exactly, 3 behind 6 exactly, 2 in a row alone.
    held = [sorted(t for t in row.tokens.tolist() if 0 < t < SEPARATOR) for row, *_ in rows]
    assert held == [[1, 2, 3, 4, 5, 14, 15], [7, 8, 9, 10, 17, 18, 19], [12]]


def test_best_fit_rows_come_in_the_order_of_their_first_documents() -> None:
    rows = best_fit([2, 9, 3, 9, 7], seq_len=9, group=5)
    firsts = [int(min(t for t in row.tokens if 0 < t < SEPARATOR)) for row, *_ in rows]
    assert firsts == [1, 3, 12, 15]


def test_a_row_knows_how_far_was_read_for_it() -> None:
    progress = [row.progress for row, _, _ in best_fit([2, 9, 3, 9, 7], seq_len=9, group=2)]
    assert progress == [0, 1, 2, 3, 4]
    long = [row.progress for row, _, _ in best_fit([20, 20], seq_len=5, group=2)]
    assert long == [0, 0, 0, 0, 0, 0, 0, 1]
    assert [row.progress for row, _, _ in pack(numbered([3, 3, 3]), 4)] == [1, 2]


def test_an_empty_document_at_the_end_gives_no_row_and_its_place_to_the_last() -> None:
    end = (np.empty(0, dtype=np.int32), 9)
    packed = list(pack([*numbered([3, 3]), end], 4))
    assert [(row.targets, place, used) for row, place, used in packed] == [(4, 1, 1), (1, 9, 0)]
    packed = list(pack([*numbered([3, 2]), end], 4))
    assert [(row.targets, place, used) for row, place, used in packed] == [(4, 1, 1), (0, 9, 0)]
    fitted = list(pack_best_fit([*separated([3, 3]), end], 9, group=5, separator=SEPARATOR))
    assert [(row.targets, row.progress, *rest) for row, *rest in fitted] == [(6, 9, 0, 1)]


def test_best_fit_wastes_little_and_cuts_few() -> None:
    generator = np.random.default_rng(0)
    lengths = np.minimum(generator.lognormal(4, 1, 4096).astype(int) + 1, 5000).tolist()
    rows = best_fit(lengths, seq_len=256, group=256)
    padding = 1 - sum(row.targets for row, *_ in rows) / (256 * len(rows))
    assert padding < 0.02


def test_rows_are_made_as_they_are_asked_for() -> None:
    def endless():  # type: ignore[no-untyped-def]
        while True:
            yield np.array([1, 2, SEPARATOR]), 0

    assert len(list(islice(pack(endless(), 4), 5))) == 5
    packed = pack_best_fit(endless(), 4, group=3, separator=SEPARATOR)
    assert len(list(islice(packed, 5))) == 5
