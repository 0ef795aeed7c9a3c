"""The token stream of a run: batches that depend on the config, the seed and the step alone.

Each lane is a stream of its own. Row i of every global batch comes from lane i % lanes, and a
rank owns the lanes rank::world, so the same rows are drawn however many ranks share the work:

    lanes = 4, global_batch = 8    row    0 1 2 3 4 5 6 7
                                   lane   0 1 2 3 0 1 2 3
                                   rank   0 1 0 1 0 1 0 1    of world = 2
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from data.documents import Documents
from data.packing import pack
from data.shuffle import Cursor, Shuffle, endless
from data.tokenizer import Tokenizer

Cursors = dict[str, dict[str, Any]]
"""The cursor of each lane, by the lane's number in text: a JSON object."""


class Batch(NamedTuple):
    """One rank's rows of a global batch.

    Attributes:
        rows: [B, T+1] int64; inputs are `rows[:, :-1]`, targets `rows[:, 1:]`.
        target_bytes: UTF-8 bytes that the targets stand for.
        epoch: complete passes of the rank's slowest lane over its documents.
        cursors: where this rank's lanes go on after this batch.
    """

    rows: np.ndarray
    target_bytes: int
    epoch: int
    cursors: Cursors


@dataclass(frozen=True, kw_only=True)
class BatchShape:
    """A global batch of `global_batch` rows of T tokens, and the share of it that a rank reads."""

    global_batch: int
    seq_len: int
    rank: int = 0
    world: int = 1


class TokenStream:
    """An endless stream of batches.

    Args:
        cursors: where each lane goes on; those of a batch continue with the next one. The lanes
            of other ranks may be among them. None: at the beginning.

    Raises:
        ValueError: the batch cannot be dealt to lanes and ranks equally.
    """

    def __init__(
        self,
        documents: Documents,
        tokenizer: Tokenizer,
        shape: BatchShape,
        *,
        seed: int,
        cursors: Cursors | None = None,
    ) -> None:
        config = documents.config
        if problems := config.batch_problems(shape.global_batch, shape.world):
            raise ValueError("; ".join(problems))
        self.documents = documents
        self.tokenizer = tokenizer
        self.shape = shape
        self.seed = seed
        self._start = cursors

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Everything that decides what a cursor means, by setting; a JSON object.

        The batch's shape is not part of it: lanes go on exactly in rows of another number and
        length.
        """
        config = self.documents.config
        return {
            **self.documents.identity,
            "data.lanes": config.lanes,
            "data.shuffle": config.shuffle,
            "data.block_documents": config.block_documents,
            "seed": self.seed,
            "tokenizer": self.tokenizer.fingerprint,
        }

    def __iter__(self) -> Iterator[Batch]:
        shape, lanes = self.shape, self.documents.config.lanes
        rows_of = {lane: self._rows(lane) for lane in range(shape.rank, lanes, shape.world)}
        order = [row % lanes for row in range(shape.rank, shape.global_batch, shape.world)]
        rows = np.empty((len(order), shape.seq_len + 1), dtype=np.int64)
        while True:
            after = {}
            for i, lane in enumerate(order):
                rows[i], after[lane] = next(rows_of[lane])
            yield Batch(
                rows=rows.copy(),
                target_bytes=int(self.tokenizer.byte_lengths[rows[:, 1:]].sum()),
                epoch=min(cursor.epoch for cursor in after.values()),
                cursors={str(lane): cursor._asdict() for lane, cursor in after.items()},
            )

    def _rows(self, lane: int) -> Iterator[tuple[np.ndarray, Cursor]]:
        """A lane's rows [T+1], each with the cursor of the next one."""
        config = self.documents.config
        start = Cursor() if self._start is None else Cursor(**self._start[str(lane)])
        shuffle = Shuffle(self.seed, lane, config.block_documents, config.shuffle)
        documents = endless(partial(self.documents.training, lane), shuffle, start)
        tokens = ((self.tokenizer.encode_document(d.text), cursor) for d, cursor in documents)
        for row, cursor, token in pack(tokens, self.shape.seq_len, skip=start.token):
            yield row, cursor._replace(token=token)


def check_fingerprint(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Makes sure that cursors which were saved with one fingerprint are valid with another.

    Raises:
        ValueError: they differ; it says in what.
    """
    changed = [
        f"{key} was {saved.get(key)!r} and is now {now.get(key)!r}"
        for key in dict.fromkeys([*saved, *now])
        if saved.get(key) != now.get(key)
    ]
    if changed:
        raise ValueError(
            f"this run cannot go on with other data: {'; '.join(changed)}. Restore what changed, "
            "or start a new run with another run.name"
        )
