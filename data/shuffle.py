"""Documents in another order each epoch, with nothing to save but a small cursor.

A lane's documents are taken in blocks. The order within a block depends on (seed, lane, source,
epoch, block) alone, so reading that one block again leads back to any place in it:

    corpus      a b c | d e f | g h       block 0, 1, 2 of three documents
    epoch 0     b a c | f d e | g h
    epoch 1     c a b | d f e | h g
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from xxhash import xxh3_64_intdigest

from data.source import Document, Position, TokenDocument

AnyDocument = Document | TokenDocument
Pass = Iterator[tuple[AnyDocument, Position]]


class Cursor(NamedTuple):
    """A document of a lane's part of a source, from which reading goes on exactly.

    Attributes:
        epoch: passes over that part that are complete.
        block: blocks of this epoch that are complete.
        position: the corpus' position at the block's start.
        document: its number in the block's shuffled order.
    """

    epoch: int = 0
    block: int = 0
    position: Position = None
    document: int = 0


@dataclass(frozen=True)
class Shuffle:
    """How a lane's documents of a source are ordered; with `enabled` false, as they come."""

    key: str
    block_documents: int
    enabled: bool = True

    def order(self, epoch: int, block: int, count: int) -> Sequence[int]:
        """The order in which a block's `count` documents are read."""
        numbers = range(count)
        if not self.enabled:
            return numbers
        # Sorted by a hash, because another version of a library may change its generators.
        key = f"{self.key} {epoch} {block} "
        return sorted(numbers, key=lambda number: xxh3_64_intdigest(f"{key}{number}".encode()))


def epochs(
    read: Callable[[Position], Pass], shuffle: Shuffle, start: Cursor, limit: int | None = None
) -> Iterator[tuple[AnyDocument, Cursor]]:
    """Documents from `start` on, epoch after epoch until `limit`, each with the cursor after it.

    Args:
        read: one pass from a position; from None, which is the beginning, it gives a document or
            raises, so that this cannot search without end.
        limit: epochs; None: no end.
    """
    # The cursor of a document is that of its block, so that going on reads the block again.
    epoch, block, position, first = start
    while limit is None or epoch < limit:
        for documents, after in _blocks(read(position), shuffle.block_documents):
            order = shuffle.order(epoch, block, len(documents))
            for number in range(first, len(documents)):
                yield documents[order[number]], Cursor(epoch, block, position, number + 1)
            block, position, first = block + 1, after, 0
        # Back to the beginning of the corpus; the epoch's number gives it another order.
        epoch, block, position, first = epoch + 1, 0, None, 0


def _blocks(documents: Pass, size: int) -> Iterator[tuple[list[AnyDocument], Any]]:
    """Blocks of `size` documents, each with the position after it; the last may be shorter."""
    block: list[AnyDocument] = []
    after = None
    for document, after in documents:
        block.append(document)
        if len(block) == size:
            yield block, after
            block = []
    if block:
        yield block, after
