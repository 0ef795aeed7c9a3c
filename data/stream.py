"""The token stream of a run: batches that depend on the config, the seed and the step alone.

Each lane is a stream of its own. Row i of every global batch comes from lane i % lanes, and a
rank owns the lanes rank::world, so the same rows are drawn however many ranks share the work:

    lanes = 4, global_batch = 8    row    0 1 2 3 4 5 6 7
                                   lane   0 1 2 3 0 1 2 3
                                   rank   0 1 0 1 0 1 0 1    of world = 2
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, repeat
from typing import Any, NamedTuple

import numpy as np

from conf.errors import ConfigError
from data.mixture import Lane, LaneCursor, SourceState
from data.packing import PADDING, Row, document_starts, pack, pack_best_fit
from data.sources.documents import Documents
from data.tokenizer import Tokenizer

Cursors = Mapping[str, Mapping[str, Any]]
"""The cursor of each lane, by the lane's number in text: a JSON object."""


class OutOfTextError(ValueError):
    """Every source has been read as often as its `epochs` allow."""


class BatchStats(NamedTuple):
    """What a batch adds to a run: of one rank's rows, or, merged, of all ranks'.

    Attributes:
        targets: how many count.
        positions: how many there are, padding included.
        target_bytes: UTF-8 bytes that the targets stand for.
        lanes: where the lanes go on after this batch, by their number.
        reached: how far their text has come: before the last document. With best-fit packing they
            go on from earlier, from the beginning of the documents that are packed together.
    """

    targets: int
    positions: int
    target_bytes: int
    lanes: dict[int, LaneCursor]
    reached: dict[int, LaneCursor]

    @classmethod
    def merged(cls, parts: Sequence["BatchStats"]) -> "BatchStats":
        """Those of all ranks in one."""
        return cls(
            sum(part.targets for part in parts),
            sum(part.positions for part in parts),
            sum(part.target_bytes for part in parts),
            {lane: cursor for part in parts for lane, cursor in part.lanes.items()},
            {lane: cursor for part in parts for lane, cursor in part.reached.items()},
        )

    @property
    def cursors(self) -> Cursors:
        """`lanes` as plain values, from which a `TokenStream` goes on."""
        return {str(lane): self.lanes[lane].to_json() for lane in sorted(self.lanes)}

    def tokens(self, source: str) -> int:
        """Tokens that these lanes have read of a source so far."""
        return sum(cursor.sources[source].tokens for cursor in self.reached.values())

    def epoch(self, source: str) -> int:
        """Complete passes of the slowest of these lanes over its share of a source."""
        return min(cursor.sources[source].cursor.epoch for cursor in self.reached.values())


class Batch(NamedTuple):
    """One rank's rows of a global batch.

    Attributes:
        rows: [B, T+1] int64; inputs are `rows[:, :-1]`, targets `rows[:, 1:]`.
        mask: [B, T] bool, false for targets that are padding; None: there is none.
        starts: [B, T] int64, where in its row each input's document begins; None: documents are
            not told apart.
        stats: what it adds to the run.
    """

    rows: np.ndarray
    mask: np.ndarray | None
    starts: np.ndarray | None
    stats: BatchStats

    @property
    def document_lengths(self) -> list[int]:
        """Tokens of each document, or part of one, as the rows isolate them."""
        B, T = self.rows[:, 1:].shape
        if self.starts is None:
            return [T] * B
        borders = np.flatnonzero(self.starts == np.arange(T))
        return np.diff(borders, append=B * T).tolist()


@dataclass(frozen=True, kw_only=True)
class BatchShape:
    """A global batch of `global_batch` rows of T tokens, and the share of it that a rank reads."""

    global_batch: int
    seq_len: int
    rank: int = 0
    world_size: int = 1

    def lanes(self, lanes: int) -> list[int]:
        """The lane of each row of this rank."""
        return [row % lanes for row in range(self.rank, self.global_batch, self.world_size)]


class TokenStream:
    """A stream of batches, endless unless all sources have `epochs`.

    Args:
        cursors: where each lane goes on; those of a batch continue with the next one. The lanes
            of other ranks may be among them. None: at the beginning.

    Raises:
        ConfigError: the batch cannot be divided equally over lanes and ranks.
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
        if problems := config.batch_problems(shape.global_batch, shape.world_size):
            raise ConfigError(problems)
        self.documents = documents
        self.tokenizer = tokenizer
        self.shape = shape
        self.seed = seed
        self._start = cursors

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Everything that decides what a cursor means, by setting; a JSON object.

        The batch's shape is not part of it: lanes go on exactly in rows of another number and
        length. (Best-fit packing alone counts in rows.)
        """
        config = self.documents.config
        return {
            **self.documents.identity,
            "data.sources.*.weight and data.phases": [list(part) for part in config.mixture],
            "data.lanes": config.lanes,
            "data.shuffle": config.shuffle,
            "data.block_documents": config.block_documents,
            "data.documents": config.documents,
            "data.packing": self._packing,
            "seed": self.seed,
            "tokenizer": self.tokenizer.fingerprint,
        }

    @property
    def _packing(self) -> str:
        packing = self.documents.config.packing
        return packing if packing == "sequential" else f"{packing} in rows of {self.shape.seq_len}"

    @property
    def lanes(self) -> list[int]:
        """The lane of each row of a batch."""
        return self.shape.lanes(self.documents.config.lanes)

    def __iter__(self) -> Iterator[Batch]:
        """The batches; the end of all text raises an `OutOfTextError`."""
        rows = self.rows(self.lanes)
        while True:
            yield self.batch(rows)

    def rows(self, lanes: Sequence[int]) -> Generator[tuple[Row, LaneCursor]]:
        """Rows of these lanes in turn, over and over, each with its lane's cursor after it."""
        readers = {lane: self._lane(lane) for lane in lanes}
        for lane in cycle(lanes):
            yield next(readers[lane])

    def _lane(self, lane: int) -> Iterator[tuple[Row, LaneCursor]]:
        config, T = self.documents.config, self.shape.seq_len
        start = None if self._start is None else LaneCursor.from_json(self._start[str(lane)])
        skip = start.skip if start else 0
        documents = Lane(self.documents, self.tokenizer, self.seed, lane).read(start)
        if config.packing == "sequential":
            rows = pack(documents, T, skip)
        else:
            group, separator = config.block_documents, self.tokenizer.eos_id
            rows = pack_best_fit(documents, T, skip, group=group, separator=separator)
        after = start or LaneCursor(dict.fromkeys(config.sources, SourceState()))
        reached = after
        for row, (sources, phase, _), used in rows:
            yield row, (after := LaneCursor(sources, phase, used))
            reached = row.reached
        nothing = Row(np.full(T + 1, PADDING, dtype=np.int64), 0, reached)
        yield from repeat((nothing, after))

    def batch(self, rows: Iterator[tuple[Row, LaneCursor]]) -> Batch:
        """The next batch of this rank, of rows that come in the order of `lanes`.

        Lanes whose text has ended give rows of padding, until all have. Of several ranks none
        knows of the others' lanes: their batches have no targets from there on.

        Raises:
            OutOfTextError: nothing is left.
        """
        config, order, T = self.documents.config, self.lanes, self.shape.seq_len
        tokens = np.empty((len(order), T + 1), dtype=np.int64)
        counted = np.empty(len(order), dtype=np.int64)
        after, reached = {}, {}
        for i, lane in enumerate(order):
            row, after[lane] = next(rows)
            tokens[i], counted[i], reached[lane] = row
        if not counted.any() and self.shape.world_size == 1:
            raise self.out_of_text()
        lengths = self.tokenizer.byte_lengths.take(tokens[:, 1:])
        mask = None
        if counted.min() < T:
            mask = np.arange(T) < counted[:, None]
            lengths *= mask
        isolated = config.documents == "isolate"
        return Batch(
            rows=tokens,
            mask=mask,
            starts=document_starts(tokens, self.tokenizer.eos_id) if isolated else None,
            stats=BatchStats(
                targets=int(counted.sum()),
                positions=lengths.size,
                target_bytes=int(lengths.sum()),
                lanes=after,
                reached=reached,
            ),
        )

    def out_of_text(self) -> OutOfTextError:
        """What is to be said when nothing is left, of which of several ranks none knows."""
        limits = {name: source.epochs for name, source in self.documents.config.sources.items()}
        return OutOfTextError(
            f"data.sources.*.epochs={limits}: all text has been read so often; raise them to go "
            "on, or end the run earlier with train.max_tokens"
        )
