"""Several sources in one stream of documents, each with its part of the tokens.

The next document is of the source whose tokens, divided by its weight, are the fewest. This is
stride scheduling (Waldspurger and Weihl, MIT/LCS/TM-528, 1995). So weights are parts of the tokens,
whatever the documents' lengths, and they are right to within a document at any time. The choice
depends only on the counts, which the cursor holds:

    weights 3 : 1, documents of 100 tokens

    tokens of web      0      0    100  200  300    300  400  500  600
    tokens of books    0      100  100  100  100    200  200  200  200
    next               books  web  web  web  books  web  web  web  books

If that were all, every lane would read a document of a rare source at the same step. So a fraction
of the next document is counted, too, which is fixed for each lane, phase and source: in one lane
the source is chosen when its next document would begin, in another when it would end.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from xxhash import xxh3_64_intdigest

from data.shuffle import AnyDocument, Cursor, Shuffle, epochs
from data.sources.documents import Documents
from data.tokenizer import Tokenizer


class SourceState(NamedTuple):
    """What a lane has read of a source.

    Attributes:
        cursor: where its documents go on.
        tokens: tokens that were read so far.
        phase_start: how many of them were read before the present phase.
    """

    cursor: Cursor = Cursor()
    tokens: int = 0
    phase_start: int = 0

    def to_json(self) -> dict[str, Any]:
        """As plain values, under the names that checkpoints have."""
        return {**self.cursor._asdict(), "tokens": self.tokens, "earlier": self.phase_start}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "SourceState":
        """The inverse of `to_json`."""
        cursor = Cursor(*(values[field] for field in Cursor._fields))
        return cls(cursor, values["tokens"], values["earlier"])


class LaneCursor(NamedTuple):
    """The value from which a lane goes on exactly.

    Attributes:
        sources: by name, before the next document.
        phase: number of the weights that apply.
        skip: what has been read already of the documents that follow: tokens of the first one or,
            with best-fit packing, rows of the group that is packed together.
        ahead: with best-fit packing, the tokens of that group. They were read beyond the cursor.
    """

    sources: dict[str, SourceState]
    phase: int = 0
    skip: int = 0
    ahead: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of all sources before the next document."""
        return sum(state.tokens for state in self.sources.values())

    def of_sources(self, names: Iterable[str]) -> "LaneCursor":
        """The cursor with these sources: new ones at their beginning, and no others."""
        sources = {name: self.sources.get(name, SourceState()) for name in names}
        return self._replace(sources=sources)

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        sources = {name: state.to_json() for name, state in self.sources.items()}
        values = {"sources": sources, "phase": self.phase, "skip": self.skip}
        return {**values, "ahead": self.ahead} if self.ahead else values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "LaneCursor":
        """The inverse of `to_json`."""
        sources = {name: SourceState.from_json(state) for name, state in values["sources"].items()}
        return cls(sources, values["phase"], values["skip"], values.get("ahead", 0))


@dataclass(frozen=True)
class Lane:
    """One lane of a run's documents: all sources, mixed and tokenised."""

    documents: Documents
    tokenizer: Tokenizer
    seed: int
    number: int

    def read(self, start: LaneCursor | None = None) -> Iterator[tuple[np.ndarray, LaneCursor]]:
        """Documents' tokens [n] with their separators, each with the cursor before it.

        It ends when every source with a weight has been read as often as its `epochs` allow. The
        last document is an empty one, with the cursor of the end.
        """
        config = self.documents.config
        cursor = (start or LaneCursor({})).of_sources(config.sources)
        readers = {name: self._source(name, state.cursor) for name, state in cursor.sources.items()}
        # The next document of each source is read before it is chosen, since its length counts.
        ahead: dict[str, tuple[np.ndarray, Cursor]] = {}
        mixture = config.mixture
        starts = [after_tokens for after_tokens, _ in mixture]
        total = cursor.tokens
        while True:
            cursor = _in_phase(cursor, starts, total * config.lanes)
            weights = mixture[cursor.phase][1]
            for name in [n for n in readers if n not in ahead and weights[n]]:
                # A source ends for good; the others go on with their weights among themselves.
                if (item := next(readers[name], None)) is None:
                    del readers[name]
                    cursor = _used_up(cursor, name, config.sources[name].epochs)
                else:
                    ahead[name] = self.tokenizer.document_tokens(item[0]), item[1]
            if not any(weights[name] for name in ahead):
                yield np.empty(0, dtype=np.int32), cursor
                return
            name = self._next_source(cursor, weights, ahead)
            # The cursor given is that before the document: a row that ends within it goes on there.
            tokens, after = ahead.pop(name)
            yield tokens, cursor
            count = len(tokens)
            total += count
            state = cursor.sources[name]
            state = SourceState(after, state.tokens + count, state.phase_start)
            cursor = LaneCursor({**cursor.sources, name: state}, cursor.phase)

    def _source(self, name: str, start: Cursor) -> Iterator[tuple[AnyDocument, Cursor]]:
        config = self.documents.config
        key = f"{self.seed} {self.number} {name}"
        shuffle = Shuffle(key, config.block_documents, config.shuffle)
        read = partial(self.documents.training, name, self.number)
        return epochs(read, shuffle, start, config.sources[name].epochs)

    def _next_source(
        self,
        cursor: LaneCursor,
        weights: Mapping[str, float],
        ahead: Mapping[str, tuple[np.ndarray, Cursor]],
    ) -> str:
        """The source that is furthest behind its weight, of those whose next document is read."""
        candidates = [name for name in ahead if weights[name]]
        if len(candidates) == 1:
            return candidates[0]

        def tokens_over_weight(name: str) -> float:
            state = cursor.sources[name]
            # A hash instead of a random generator, whose state would have to be saved.
            key = f"{self.seed} {self.number} {cursor.phase} {name}"
            fraction = xxh3_64_intdigest(key.encode()) / 2**64
            tokens = state.tokens - state.phase_start + fraction * len(ahead[name][0])
            return tokens / weights[name]

        # Sorted, so that a tie does not depend on the order of the settings.
        return min(sorted(candidates), key=tokens_over_weight)


def _in_phase(cursor: LaneCursor, starts: Sequence[int], tokens: int) -> LaneCursor:
    """The cursor, in the phase that applies after so many tokens of the run.

    Args:
        starts: tokens of the run after which each phase begins.
        tokens: those of this lane times the number of lanes. All lanes read about as many, so that
            each can begin a phase without asking the others.
    """
    while (following := cursor.phase + 1) < len(starts) and tokens >= starts[following]:
        states = cursor.sources.items()
        sources = {name: state._replace(phase_start=state.tokens) for name, state in states}
        cursor = LaneCursor(sources, following)
    return cursor


def _used_up(cursor: LaneCursor, name: str, epochs: int | None) -> LaneCursor:
    """The cursor when all of a source's epochs are complete."""
    assert epochs is not None
    state = cursor.sources[name]._replace(cursor=Cursor(epoch=epochs))
    return cursor._replace(sources={**cursor.sources, name: state})
