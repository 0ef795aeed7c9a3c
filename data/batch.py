"""Rows of tokens as the model reads them, and what they add to a run.

rows               a b / c d e      one row of T+1 = 6 tokens; `/` ends a document
inputs             a b / c d        the row without its last token
targets            b / c d e        the row without its first token
document_starts    0 0 2 2 2        where each input's document begins, if they are isolated
"""

from collections.abc import Iterator, Mapping, Sequence
from math import ceil
from typing import Any, NamedTuple

import numpy as np

from data.mixture import LaneCursor
from data.tokenizer import Tokenizer

IGNORED_TARGET = -100
"""The target of a position that does not count; PyTorch's cross-entropy ignores it by default."""

Cursors = Mapping[str, Mapping[str, Any]]
"""The cursor of each lane, by the lane's number in text: a JSON object."""


class BatchStats(NamedTuple):
    """What a batch adds to a run: of one rank's rows, or, merged, of all ranks'.

    Attributes:
        targets: how many count.
        positions: how many there are, padding included.
        target_bytes: UTF-8 bytes that the targets stand for.
        lanes: the cursors from which the lanes go on after this batch, by their number; empty for
            held-out text.
        progress: the cursors of the last documents that were read for it. With best-fit packing,
            `lanes` lie before them, at the first of the documents that are packed together.
    """

    targets: int
    positions: int
    target_bytes: int
    lanes: dict[int, LaneCursor]
    progress: dict[int, LaneCursor]

    @classmethod
    def merged(cls, parts: Sequence["BatchStats"]) -> "BatchStats":
        """The stats of all ranks in one."""
        return cls(
            sum(part.targets for part in parts),
            sum(part.positions for part in parts),
            sum(part.target_bytes for part in parts),
            {lane: cursor for part in parts for lane, cursor in part.lanes.items()},
            {lane: cursor for part in parts for lane, cursor in part.progress.items()},
        )

    @property
    def cursors(self) -> Cursors:
        """`lanes` as plain values, from which a `TokenStream` goes on."""
        return {str(lane): self.lanes[lane].to_json() for lane in sorted(self.lanes)}

    def tokens(self, source: str) -> int:
        """Tokens that these lanes have read of a source so far."""
        return sum(cursor.sources[source].tokens for cursor in self.progress.values())

    def epoch(self, source: str) -> int:
        """Complete passes of the slowest of these lanes over its part of a source."""
        return min(cursor.sources[source].cursor.epoch for cursor in self.progress.values())


class Batch(NamedTuple):
    """Rows of text, for training or evaluation: a rank's part of a global batch, or all of one.

    Attributes:
        rows: [B, T+1] int64.
        mask: [B, T] bool, false for targets that are padding; None: all targets count.
        document_starts: [B, T] int64, where in its row each input's document begins; None:
            documents are not isolated.
        stats: what it adds to the run; None for a part of a batch.
        documents: [B, T] int64, the number of the document that each target is of, from 0; None:
            not known. A document may go on in another row.
    """

    rows: np.ndarray
    mask: np.ndarray | None = None
    document_starts: np.ndarray | None = None
    stats: BatchStats | None = None
    documents: np.ndarray | None = None

    @property
    def inputs(self) -> np.ndarray:
        """[B, T] int64: the tokens that are read."""
        return self.rows[:, :-1]

    @property
    def targets(self) -> np.ndarray:
        """[B, T] int64: the tokens to predict, `IGNORED_TARGET` where they do not count."""
        targets = self.rows[:, 1:]
        # Without a mask this is a view: a full batch of sequential packing copies nothing.
        return targets if self.mask is None else np.where(self.mask, targets, IGNORED_TARGET)

    @property
    def document_lengths(self) -> list[int]:
        """Inputs of each document, or part of one, as the rows isolate them, padding left out.

        Where documents are not isolated, a row is one.
        """
        B, T = self.inputs.shape
        if self.document_starts is None:
            if self.mask is None:
                return [T] * B
            lengths = self.mask.sum(axis=1)
        else:
            # A position is the first of its document if the document starts at that position.
            document = np.cumsum((self.document_starts == np.arange(T)).ravel()) - 1
            lengths = np.bincount(document if self.mask is None else document[self.mask.ravel()])
        return lengths[lengths > 0].tolist()

    def split(self, size: int) -> Iterator["Batch"]:
        """Micro-batches of `size` rows; the last one may have fewer."""
        for start in range(0, len(self.rows), size):
            yield self._taken(slice(start, start + size))

    def shard(self, rank: int, world_size: int) -> "Batch":
        """A rank's equal part: every `world_size`-th row, filled up with rows that do not count.

        7 rows, world_size = 3    rank 0: 0 3 6    rank 1: 1 4 -    rank 2: 2 5 -
        """
        # All ranks make the same collective calls, so all need the same number of rows.
        filled = ceil(len(self.rows) / world_size) * world_size
        return self._filled_up(np.arange(rank, filled, world_size))

    def filled_up(self, size: int) -> "Batch":
        """These rows, filled up with rows that do not count to a multiple of `size`."""
        return self._filled_up(np.arange(ceil(len(self.rows) / size) * size))

    def _filled_up(self, wanted: np.ndarray) -> "Batch":
        """The wanted rows; those past the end repeat the last one, and do not count."""
        B, T = self.inputs.shape
        part = self._taken(np.minimum(wanted, B - 1))
        mask = np.ones((len(wanted), T), dtype=bool) if part.mask is None else part.mask
        return part._replace(mask=mask & (wanted < B)[:, None])

    def _taken(self, rows: slice | np.ndarray) -> "Batch":
        """Some rows, as a batch without stats."""
        mask, starts, documents = (
            None if array is None else array[rows]
            for array in (self.mask, self.document_starts, self.documents)
        )
        return Batch(self.rows[rows], mask, starts, documents=documents)


def make_batch(
    rows: np.ndarray,
    counted: np.ndarray,
    tokenizer: Tokenizer,
    *,
    isolate: bool,
    lanes: dict[int, LaneCursor] | None = None,
    progress: dict[int, LaneCursor] | None = None,
) -> Batch:
    """A batch with its stats.

    Args:
        rows: [B, T+1] int64.
        counted: [B] int64, how many of a row's T targets count, the first ones.
        isolate: whether documents are isolated from each other.
        lanes, progress: see `BatchStats`.
    """
    T = rows.shape[1] - 1
    lengths = tokenizer.byte_lengths.take(rows[:, 1:])
    mask = None
    # No mask where it would be all true: attention and loss then have nothing to do for it.
    if counted.min() < T:
        mask = np.arange(T) < counted[:, None]
        lengths *= mask
    stats = BatchStats(
        targets=int(counted.sum()),
        positions=lengths.size,
        target_bytes=int(lengths.sum()),
        lanes=lanes or {},
        progress=progress or {},
    )
    return Batch(rows, mask, document_starts(rows, tokenizer.eos_id) if isolate else None, stats)


def document_starts(rows: np.ndarray, separator: int) -> np.ndarray:
    """Where the document of each input token begins, of rows [B, T+1]: int64 [B, T].

    A separator counts to the document that follows it. So every target belongs to the document of
    its input, and a document looks as it does at inference, where a separator precedes it.

    >>> document_starts(np.array([[5, 6, 0, 7, 8, 0, 9]]), separator=0)
    array([[0, 0, 2, 2, 2, 5]])
    """
    inputs = rows[:, :-1]
    # The running maximum is the last separator so far, and 0 before the first one.
    starts = np.where(inputs == separator, np.arange(inputs.shape[1]), 0)
    return np.maximum.accumulate(starts, axis=1)
