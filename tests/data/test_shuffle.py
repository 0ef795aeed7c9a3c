from collections.abc import Callable, Iterator
from itertools import islice

from hypothesis import given
from hypothesis import strategies as st

from data.shuffle import Cursor, Shuffle, epochs
from data.source import Document

shuffles = st.builds(
    Shuffle,
    key=st.sampled_from(["0 0 web", "0 1 web", "1 0 web"]),
    block_documents=st.integers(1, 6),
    enabled=st.booleans(),
)


def reader(count: int) -> Callable[[int | None], Iterator[tuple[Document, int]]]:
    """Reads a corpus of numbered documents, whose position is the next one's number."""

    def read(position: int | None) -> Iterator[tuple[Document, int]]:
        for i in range(position or 0, count):
            yield Document(str(i), ""), i + 1

    return read


def numbers(count: int, shuffle: Shuffle, wanted: int) -> list[int]:
    documents = epochs(reader(count), shuffle, Cursor())
    return [int(d.text) for d, _ in islice(documents, wanted)]


@given(shuffle=shuffles, count=st.integers(1, 17))
def test_every_epoch_reads_every_document_once_and_blocks_in_their_order(
    shuffle: Shuffle, count: int
) -> None:
    read = numbers(count, shuffle, 3 * count)
    for epoch in (read[:count], read[count : 2 * count], read[2 * count :]):
        assert sorted(epoch) == list(range(count))
        blocks = [i // shuffle.block_documents for i in epoch]
        assert blocks == sorted(blocks)


@given(shuffle=shuffles, count=st.integers(1, 17), start=st.integers(0, 40))
def test_it_goes_on_exactly_from_every_cursor(shuffle: Shuffle, count: int, start: int) -> None:
    read = reader(count)
    whole = list(islice(epochs(read, shuffle, Cursor()), start + 20))
    assert list(islice(epochs(read, shuffle, whole[start][1]), 19)) == whole[start + 1 :]


@given(shuffle=shuffles, count=st.integers(1, 9), limit=st.integers(1, 3))
def test_it_ends_after_as_many_epochs_as_are_allowed(
    shuffle: Shuffle, count: int, limit: int
) -> None:
    read = reader(count)
    whole = list(epochs(read, shuffle, Cursor(), limit))
    assert [d for d, _ in whole] == [
        Document(str(i), "") for i in numbers(count, shuffle, limit * count)
    ]
    assert list(epochs(read, shuffle, whole[-1][1], limit)) == []


def test_the_order_depends_on_key_epoch_and_block() -> None:
    base = Shuffle("1 1 web", block_documents=50)
    orders = [
        base.order(1, 1, 50),
        base.order(2, 1, 50),
        base.order(1, 2, 50),
        Shuffle("2 1 web", 50).order(1, 1, 50),
        range(50),
    ]
    assert len({tuple(order) for order in orders}) == len(orders)
    assert base.order(1, 1, 50) == base.order(1, 1, 50)


def test_the_order_is_the_same_in_every_version() -> None:
    assert Shuffle("7 3", block_documents=8).order(2, 5, 8) == [7, 4, 5, 0, 2, 3, 1, 6]


def test_every_document_comes_to_every_place_about_equally_often() -> None:
    first = [Shuffle(str(seed), 4).order(0, 0, 4)[0] for seed in range(4000)]
    assert all(900 < first.count(i) < 1100 for i in range(4))


def test_without_shuffling_documents_come_as_they_lie() -> None:
    plain = Shuffle("", block_documents=3, enabled=False)
    assert numbers(5, plain, 12) == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]


def test_every_block_has_an_order_of_its_own() -> None:
    read = numbers(400, Shuffle("x", block_documents=20), 400)
    orders = {tuple(i % 20 for i in read[start : start + 20]) for start in range(0, 400, 20)}
    assert len(orders) == 20
