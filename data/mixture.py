"""Several sources in one stream of documents, each with its share of the tokens.

Next comes the source whose tokens, over its weight, are the fewest: stride scheduling (Waldspurger
and Weihl, MIT/LCS/TM-528, 1995). So weights are shares of the tokens, whatever the documents'
lengths, and they are kept to within a document. What comes next depends on nothing but the counts,
which the cursor holds:

    weights 3 : 1, documents of 100 tokens

    tokens of web      0      0    100  200  300    300  400  500  600
    tokens of books    0      100  100  100  100    200  200  200  200
    next               books  web  web  web  books  web  web  web  books

Lanes must not take a document of a rare source all at the same step. So a part of the next document
counts, too, the same for all documents of a lane, phase and source: for one lane a source's turn
comes when its next document would begin, for another when it would end.
"""

from collections.abc import Iterator, Mapping
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
        earlier: how many of them before the present phase.
    """

    cursor: Cursor = Cursor()
    tokens: int = 0
    earlier: int = 0

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {**self.cursor._asdict(), "tokens": self.tokens, "earlier": self.earlier}

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
        skip: what has been used of the documents that follow: tokens of the first, or, with
            best-fit packing, rows of the group that is packed together.
    """

    sources: dict[str, SourceState]
    phase: int = 0
    skip: int = 0

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        sources = {name: drawn.to_json() for name, drawn in self.sources.items()}
        return {"sources": sources, "phase": self.phase, "skip": self.skip}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "LaneCursor":
        """The inverse of `to_json`."""
        sources = {name: SourceState.from_json(drawn) for name, drawn in values["sources"].items()}
        return cls(sources, values["phase"], values["skip"])


@dataclass(frozen=True)
class Lane:
    """One lane of a run's documents: all sources, mixed and tokenised."""

    documents: Documents
    tokenizer: Tokenizer
    seed: int
    number: int

    def read(self, start: LaneCursor | None = None) -> Iterator[tuple[np.ndarray, LaneCursor]]:
        """Documents' tokens [n] with their separators, each with the cursor before it.

        It ends when every source with a weight has been read as often as its `epochs` allow; last
        comes an empty document with the cursor of the end.
        """
        config = self.documents.config
        cursor = start or LaneCursor(dict.fromkeys(config.sources, SourceState()))
        readers = {name: self._source(name, drawn.cursor) for name, drawn in cursor.sources.items()}
        ahead: dict[str, tuple[np.ndarray, Cursor]] = {}
        mixture = config.mixture
        total = sum(drawn.tokens for drawn in cursor.sources.values())
        while True:
            while (following := cursor.phase + 1) < len(mixture):
                if total * config.lanes < mixture[following][0]:
                    break
                cursor = _begin(cursor, following)
            weights = mixture[cursor.phase][1]
            for name in [n for n in readers if n not in ahead and weights[n]]:
                if (item := next(readers[name], None)) is None:
                    del readers[name]
                    cursor = _used_up(cursor, name, config.sources[name].epochs)
                else:
                    ahead[name] = self.tokenizer.document_tokens(item[0]), item[1]
            if not any(weights[name] for name in ahead):
                yield np.empty(0, dtype=np.int32), cursor
                return
            name = self._next(cursor, weights, ahead)
            tokens, after = ahead.pop(name)
            yield tokens, cursor
            count = len(tokens)
            total += count
            _, before, earlier = cursor.sources[name]
            drawn = SourceState(after, before + count, earlier)
            cursor = LaneCursor({**cursor.sources, name: drawn}, cursor.phase)

    def _source(self, name: str, start: Cursor) -> Iterator[tuple[AnyDocument, Cursor]]:
        config = self.documents.config
        key = f"{self.seed} {self.number} {name}"
        shuffle = Shuffle(key, config.block_documents, config.shuffle)
        read = partial(self.documents.training, name, self.number)
        return epochs(read, shuffle, start, config.sources[name].epochs)

    def _next(
        self,
        cursor: LaneCursor,
        weights: Mapping[str, float],
        ahead: Mapping[str, tuple[np.ndarray, Cursor]],
    ) -> str:
        """The source whose turn it is, of those whose next document is there."""
        turns = [name for name in ahead if weights[name]]
        if len(turns) == 1:
            return turns[0]

        def place(name: str) -> float:
            drawn = cursor.sources[name]
            key = f"{self.seed} {self.number} {cursor.phase} {name}"
            part = xxh3_64_intdigest(key.encode()) / 2**64
            tokens = drawn.tokens - drawn.earlier + part * len(ahead[name][0])
            return tokens / weights[name]

        return min(sorted(turns), key=place)


def _used_up(cursor: LaneCursor, name: str, epochs: int | None) -> LaneCursor:
    """The cursor when all of a source's epochs are complete."""
    assert epochs is not None
    drawn = cursor.sources[name]._replace(cursor=Cursor(epoch=epochs))
    return cursor._replace(sources={**cursor.sources, name: drawn})


def _begin(cursor: LaneCursor, phase: int) -> LaneCursor:
    """The cursor when new weights begin to apply."""
    sources = {n: d._replace(earlier=d.tokens) for n, d in cursor.sources.items()}
    return LaneCursor(sources, phase)
