"""The token stream of a run: rows that depend on the config, the seed and the step alone.

Each lane is a stream of its own. Row i of every global batch comes from lane i % lanes, and a
rank owns the lanes rank::world_size. So the same rows are read however many ranks share the work:

    lanes = 4, global_batch = 8    row    0 1 2 3 4 5 6 7
                                   lane   0 1 2 3 0 1 2 3
                                   rank   0 1 0 1 0 1 0 1    of world_size = 2
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, repeat
from math import inf
from typing import Any, NamedTuple

import numpy as np

from conf.errors import ConfigError, DataError
from data.batch import Cursors
from data.fingerprint import MIXTURE, check_fingerprint
from data.mixture import Lane, LaneCursor
from data.packing import PADDING, Row, pack, pack_best_fit
from data.sources.documents import Documents
from data.tokenizer import Tokenizer

BY_DOCUMENTS = "its lanes are cut by documents, because in equal bytes some would have none"
"""What is told of a source whose lanes are not cut by bytes."""


class OutOfTextError(DataError):
    """Every source has been read as often as its `epochs` allow."""


@dataclass(frozen=True, kw_only=True)
class BatchShape:
    """A global batch of `global_batch` rows of T tokens, and the rank that reads its part of it."""

    global_batch: int
    seq_len: int
    rank: int = 0
    world_size: int = 1

    def lanes(self, lanes: int) -> list[int]:
        """The lane of each row of this rank."""
        return [row % lanes for row in range(self.rank, self.global_batch, self.world_size)]


class LaneRow(NamedTuple):
    """A row, the lane that it comes from, and the cursor from which the lane goes on after it."""

    lane: int
    row: Row
    after: LaneCursor


class TokenStream:
    """The rows of a run's lanes.

    Args:
        cursors: where each lane goes on; those of a batch continue with the next one. The lanes
            of other ranks may be among them. None: at the beginning.

    Raises:
        ConfigError: the batch cannot be dealt to lanes and ranks equally.
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
        # Sources of which the cursors may have read; `check_resumes` knows it better.
        self._read_before = frozenset(config.sources if cursors else ())

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Everything that decides what a cursor means, by setting; a JSON object.

        The batch's shape is not part of it: a lane goes on exactly in rows of another number and
        length. Only best-fit packing depends on the length, because its cursors count rows.
        """
        config = self.documents.config
        return {
            **self.documents.fingerprint,
            MIXTURE: [list(part) for part in config.mixture],
            "data.lanes": config.lanes,
            "data.shuffle": config.shuffle,
            "data.block_documents": config.block_documents,
            "data.documents": config.documents,
            "data.packing": self._packing,
            "seed": self.seed,
            "tokenizer": self.tokenizer.fingerprint,
            **{_lanes_key(name): s for name, s in self.documents.lane_starts.items()},
        }

    def check_resumes(self, saved: Mapping[str, Any]) -> list[str]:
        """Make sure that the cursors mean the same as where they were saved.

        What has decided nothing so far may change: phases that have not begun, and sources that
        have had no weight. Lanes stay cut as they were: at the positions in `saved`, or by bytes if
        it has none.

        Args:
            saved: the fingerprint of the stream that gave the cursors.

        Returns:
            a sentence for each of those changes.

        Raises:
            ConfigError: something else has changed.
        """
        tokens_read = self._tokens_read()
        phases = [weights for start, weights in saved.get(MIXTURE, []) if start <= tokens_read]
        self._read_before = frozenset(
            n for phase in phases for n, weight in phase.items() if weight
        )
        for name, corpus in self.documents.corpora.items():
            same = all(saved.get(key) == value for key, value in corpus.fingerprint.items())
            if same and (starts := saved.get(_lanes_key(name))) is not None:
                self.documents.set_lane_starts(name, starts)
        return check_fingerprint(saved, self.fingerprint, tokens_read)

    def empty_lanes(self) -> set[str]:
        """The sources, of all phases, of which a lane of this rank has nothing to train on.

        Those whose lanes were read before are left out: they stay as they are.

        Raises:
            DataError, TransientError: a source is damaged, or cannot be read at present.
        """
        config = self.documents.config
        used = {name for _, weights in config.mixture for name, w in weights.items() if w}
        return {
            name
            for name in used - self._read_before - set(self.documents.lane_starts)
            if not all(self._has_text(name, lane) for lane in sorted(set(self.lanes)))
        }

    def _has_text(self, name: str, lane: int) -> bool:
        # What only a later phase reads would be held open until then.
        at_once = not self._start and self.documents.config.mixture[0][1][name] > 0
        return self.documents.has_training_documents(name, lane, keep=at_once)

    def cut_by_documents(self, name: str) -> list[Any]:
        """Where the lanes of a source begin if it is cut by documents, so that none is empty.

        Returns:
            a JSON value for `Documents.set_lane_starts`.

        Raises:
            DataError: it has fewer documents than lanes.
        """
        starts = self.documents.cut_by_documents(name)
        if starts is not None:
            return starts
        error = self.documents.no_training_documents(name)
        if self.documents.config.mixture[0][1][name]:
            raise error
        # A run that goes on cannot change its lanes.
        lanes = "" if self._start else "lower data.lanes, "
        raise DataError(
            f"data.phases give data.sources.{name} a weight later in the run, but {error.why}. "
            f"Now {lanes}add documents to it, or leave it out of data.phases"
        )

    def _tokens_read(self) -> float:
        """The token of the run up to which the cursors' lanes have read; inf if it is not known."""
        cursors = [LaneCursor.from_json(values) for values in (self._start or {}).values()]
        best_fit = self.documents.config.packing == "best_fit"
        if best_fit and any(cursor.skip and not cursor.ahead for cursor in cursors):
            return inf  # checkpoints of the first versions do not say how far a group reaches
        tokens = max((cursor.tokens + cursor.ahead for cursor in cursors), default=0)
        return tokens * self.documents.config.lanes

    def _start_of(self, lane: int) -> LaneCursor:
        # Cursors of all lanes are in the checkpoint; this rank takes those of its own.
        start = LaneCursor.from_json(self._start[str(lane)]) if self._start else LaneCursor({})
        return start.of_sources(self.documents.config.sources)

    @property
    def _packing(self) -> str:
        packing = self.documents.config.packing
        return packing if packing == "sequential" else f"{packing} in rows of {self.shape.seq_len}"

    @property
    def lanes(self) -> list[int]:
        """The lane of each row of a batch."""
        return self.shape.lanes(self.documents.config.lanes)

    def rows(self, lanes: Sequence[int]) -> Generator[LaneRow]:
        """Rows of these lanes in turn, without end; a lane whose text has ended gives padding.

        Raises:
            DataError, TransientError: a source is damaged, or cannot be read at present.
        """
        readers = {lane: self._lane(lane) for lane in lanes}
        for lane in cycle(lanes):
            yield next(readers[lane])

    def _lane(self, lane: int) -> Iterator[LaneRow]:
        config, T = self.documents.config, self.shape.seq_len
        start = self._start_of(lane)
        skip = start.skip
        documents = Lane(self.documents, self.tokenizer, self.seed, lane).read(start)
        if config.packing == "sequential":
            rows = pack(documents, T, skip)
        else:
            group, separator = config.block_documents, self.tokenizer.eos_id
            rows = pack_best_fit(documents, T, skip, group=group, separator=separator)
        after = progress = start
        # `used` says how much of the next documents this row and those before it took.
        for row, cursor, used in rows:
            after, progress = cursor._replace(skip=used, ahead=row.ahead), row.progress
            yield LaneRow(lane, row, after)
        padding = Row(np.full(T + 1, PADDING, dtype=np.int64), 0, progress)
        # The other lanes may have text left, and a batch needs a row of every lane.
        yield from repeat(LaneRow(lane, padding, after))

    def out_of_text(self) -> OutOfTextError:
        """The error for a run whose lanes have all come to the end of their text.

        Of several ranks none knows of the others' lanes, so a rank does not raise it by itself.
        """
        limits = {name: source.epochs for name, source in self.documents.config.sources.items()}
        return OutOfTextError(
            f"data.sources.*.epochs={limits}: all text has been read so often; raise them to go "
            "on, or end the run earlier with train.max_tokens"
        )


def _lanes_key(name: str) -> str:
    """The key in a fingerprint of where a source's lanes begin that are cut by documents."""
    return f"data.sources.{name}.lanes"
