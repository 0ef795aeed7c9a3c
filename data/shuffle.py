"""Documents in another order each epoch, with nothing to save but a place.

A lane's documents are taken in blocks. The order within a block is drawn from (seed, lane, epoch,
block) alone, so any place can be gone back to by reading that one block again:

    corpus      a b c | d e f | g h       block 0, 1, 2 of three documents
    epoch 0     b a c | f d e | g h
    epoch 1     c a b | d f e | h g
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from xxhash import xxh3_64_intdigest

from data.source import Document, Position

Pass = Iterator[tuple[Document, Position]]


class Cursor(NamedTuple):
    """The place of a token in a lane: the value from which the lane goes on exactly.

    Attributes:
        epoch: passes over the lane's documents that are complete.
        block: blocks of this epoch that are complete.
        position: the corpus' position at the block's start.
        document: place in the block's shuffled order.
        token: offset in the document's tokens.
    """

    epoch: int = 0
    block: int = 0
    position: Position = None
    document: int = 0
    token: int = 0


@dataclass(frozen=True)
class Shuffle:
    """How the documents of one lane are ordered; with `enabled` false, as they come."""

    seed: int
    lane: int
    block_documents: int
    enabled: bool = True

    def order(self, epoch: int, block: int, count: int) -> Sequence[int]:
        """The order in which a block's `count` documents are read."""
        places = range(count)
        if not self.enabled:
            return places
        # Sorting by a hash needs no generator whose stream another version may change.
        key = f"{self.seed} {self.lane} {epoch} {block}"
        return sorted(places, key=lambda place: xxh3_64_intdigest(f"{key} {place}".encode()))


def endless(
    read: Callable[[Position], Pass], shuffle: Shuffle, start: Cursor
) -> Iterator[tuple[Document, Cursor]]:
    """A lane's documents from `start` on, epoch after epoch, each with its own cursor.

    `read` makes one pass from a position; it has to give a document if that is None.
    """
    epoch, block, position, first, _ = start
    while True:
        for documents, after in _blocks(read(position), shuffle.block_documents):
            order = shuffle.order(epoch, block, len(documents))
            for place in range(first, len(documents)):
                yield documents[order[place]], Cursor(epoch, block, position, place)
            block, position, first = block + 1, after, 0
        epoch, block, position = epoch + 1, 0, None


def _blocks(documents: Pass, size: int) -> Iterator[tuple[list[Document], Any]]:
    """Blocks of `size` documents, the last maybe shorter, each with the position after it."""
    block: list[Document] = []
    after = None
    for document, after in documents:
        block.append(document)
        if len(block) == size:
            yield block, after
            block = []
    if block:
        yield block, after
