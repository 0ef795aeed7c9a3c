import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data.packing import pack

lengths = st.lists(st.integers(1, 12), min_size=1, max_size=12)


def numbered(lengths: list[int]) -> list[tuple[np.ndarray, int]]:
    """Documents whose tokens are their places in the whole stream."""
    ends = np.cumsum(lengths)
    return [
        (np.arange(end - n, end), i) for i, (n, end) in enumerate(zip(lengths, ends, strict=True))
    ]


@given(lengths=lengths, seq_len=st.integers(1, 9))
def test_rows_are_the_stream_cut_every_seq_len_tokens_with_one_more(
    lengths: list[int], seq_len: int
) -> None:
    total = sum(lengths)
    twin = [np.arange(s, s + seq_len + 1) for s in range(0, total - seq_len, seq_len)]
    rows = [row for row, _, _ in pack(numbered(lengths), seq_len)]
    assert np.array_equal(np.array(rows), np.array(twin))


@given(lengths=lengths, seq_len=st.integers(1, 9))
def test_packing_goes_on_exactly_after_every_row(lengths: list[int], seq_len: int) -> None:
    documents = numbered(lengths)
    whole = list(pack(documents, seq_len))
    for i, (_, place, token) in enumerate(whole):
        rest = list(pack(documents[place:], seq_len, skip=token))
        assert len(rest) == len(whole) - i - 1
        assert all(np.array_equal(a[0], b[0]) for a, b in zip(rest, whole[i + 1 :], strict=True))
        assert 0 <= token < lengths[place]


def test_rows_are_independent_of_each_other() -> None:
    first, second = (row for row, _, _ in pack(numbered([9]), 4))
    first[:] = -1
    assert second.tolist() == [4, 5, 6, 7, 8]
