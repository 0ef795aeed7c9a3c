"""The documents of a run: those that lanes train on, and those held out."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from xxhash import xxh3_64_intdigest

from data.config import (
    DataConfig,
    DatasetsSource,
    FilesSource,
    PythonSource,
    Source,
    TokensSource,
)
from data.source import BadRecord, Corpus, Document, Position, Record, TokenDocument
from data.sources.files import file_corpus
from data.sources.hub import HubCorpus
from data.sources.python_files import python_corpus
from data.sources.quarantine import Quarantine
from data.sources.token_files import TokenCorpus
from data.storage.shard_cache import ShardCache

SAMPLED_PLACES = 4
"""Places of a source at which a sample of it is taken, if it is seekable; else its beginning is."""

COUNTED = 100
"""Good records after which they are added to all that were read: less often costs less."""

EXPLAINED = 1000
"""Documents that are looked at to explain why there are too few."""


class ValidRecord(NamedTuple):
    """A document that can be trained on, the xxh3_64 of its text, and the position after it."""

    document: Document | TokenDocument
    digest: int
    after: Position


def open_corpus(name: str, source: Source, config: DataConfig, cache: ShardCache) -> Corpus:
    """The corpus that the settings under `data.sources.<name>` mean.

    Raises:
        ValueError: it does not exist, or has no file that could be read.
    """
    match source:
        case PythonSource():
            return python_corpus(name, packages=source.packages, cache=cache)
        case FilesSource():
            return file_corpus(name, source, cache, config.max_document_bytes)
        case DatasetsSource():
            return HubCorpus(name, source)
        case TokensSource():
            return TokenCorpus(name, Path(source.path).expanduser())


def is_held_out(digest: int, fraction: float) -> bool:
    """Whether a document is kept for evaluation: decided by its text alone.

    So the choice is the same for every seed, order and number of lanes, and copies of a document
    never lie on both sides.
    """
    return digest < fraction * 2**64


class Documents:
    """The documents of `config.sources`, split for training and evaluation.

    Attributes:
        corpora: by the sources' names.
        quarantine: what was found that is no document.
    """

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self.quarantine = Quarantine(config.max_quarantined)
        cache = ShardCache(config.cache, config.remote)
        self.corpora = {
            name: open_corpus(name, source, config, cache)
            for name, source in config.sources.items()
        }

    @property
    def identity(self) -> dict[str, Any]:
        """What decides which documents are trained on, by setting."""
        identity: dict[str, Any] = {}
        for corpus in self.corpora.values():
            identity |= corpus.identity
        return {
            **identity,
            "data.holdout": self.config.holdout,
            "data.max_document_bytes": self.config.max_document_bytes,
        }

    def valid_records(
        self, name: str, lane: int, lanes: int, position: Position = None
    ) -> Iterator[ValidRecord]:
        """One pass over a lane's documents of a source, without those that are quarantined."""
        passed = 0
        try:
            for record, after in self.corpora[name].documents(lane, lanes, position):
                checked = self._checked(record)
                if isinstance(checked, BadRecord):
                    self.quarantine.passed(passed)
                    passed = 0
                    self.quarantine.add(checked)
                    continue
                if (passed := passed + 1) == COUNTED:
                    self.quarantine.passed(passed)
                    passed = 0
                yield ValidRecord(record, checked, after)  # type: ignore[arg-type]
        finally:
            self.quarantine.passed(passed)

    def _checked(self, record: Record) -> int | BadRecord:
        """The digest of a record's text; a fault if it is no document."""
        if isinstance(record, TokenDocument):
            return record.digest
        if isinstance(record, BadRecord):
            return record
        text, origin = record
        try:
            size = len(encoded := text.encode())
        except UnicodeEncodeError as error:
            reason = f"not UTF-8: half a surrogate pair at character {error.start}"
            return BadRecord(reason, origin, ascii(text[:200]))
        if size > self.config.max_document_bytes:
            reason = f"too long: {size} bytes, more than {self.config.max_document_bytes}"
            return BadRecord(reason, origin, text[:200])
        if not text or text.isspace():
            return BadRecord("empty", origin)
        return xxh3_64_intdigest(encoded)

    def training(
        self, name: str, lane: int, position: Position = None
    ) -> Iterator[tuple[Document | TokenDocument, Position]]:
        """One pass over a lane's training documents of a source, each with the position after it.

        Raises:
            ValueError: a whole pass finds none.
        """
        barren = position is None
        fraction = self.config.holdout
        for document, digest, after in self.valid_records(name, lane, self.config.lanes, position):
            if not is_held_out(digest, fraction):
                barren = False
                yield document, after
        if barren:
            raise self._too_few(name)

    def held_out(self, name: str, most: int | None = None) -> Iterator[Document | TokenDocument]:
        """The held-out documents of a source, in its order; of the first `most` of all alone."""
        for document, digest, _ in islice(self.valid_records(name, 0, 1), most):
            if is_held_out(digest, self.config.holdout):
                yield document

    def round_robin(self, name: str, parts: int) -> Iterator[tuple[Document | TokenDocument, int]]:
        """All documents of a source with their digests, one of each of its `parts` in turn."""
        turns = [self.valid_records(name, part, parts) for part in range(parts)]
        while turns:
            for turn in list(turns):
                if (found := next(turn, None)) is None:
                    turns.remove(turn)
                else:
                    yield found.document, found.digest

    def sample(self, size: int) -> Iterator[str]:
        """Training documents' texts, about `size` bytes of them: of each source by its weight.

        Raises:
            ValueError: there are none.
        """
        _, weights = self.config.mixture[0]
        texts = {n: w for n, w in weights.items() if not isinstance(self._source(n), TokensSource)}
        found = False
        for name, weight in texts.items():
            room = size * weight / sum(texts.values()) if weight else 0
            places = SAMPLED_PLACES if self.corpora[name].is_seekable else 1
            for document, digest in self.round_robin(name, places):
                if room <= 0:
                    break
                if not is_held_out(digest, self.config.holdout):
                    assert isinstance(document, Document)
                    found = True
                    yield (text := document.text[: int(room) + 1])
                    room -= len(text.encode())
        if not found:
            raise self._too_few(next(iter(self.corpora)))

    def _source(self, name: str) -> Source:
        return self.config.sources[name]

    def _too_few(self, name: str) -> ValueError:
        """The error for a lane that finds nothing to train on."""
        digests = [digest for _, digest, _ in islice(self.valid_records(name, 0, 1), EXPLAINED)]
        bad_records = self.quarantine.bad_records
        bad = f"; not documents: {self.quarantine.summary()}" if bad_records else ""
        if not digests:
            return ValueError(
                f"data.sources.{name}: no text in it ({_place(self._source(name))}{bad}); choose a "
                "source with documents"
            )
        held_out = sum(is_held_out(digest, self.config.holdout) for digest in digests)
        count = f"{len(digests)}{' or more' if len(digests) == EXPLAINED else ''}"
        return ValueError(
            f"data.lanes={self.config.lanes}: a lane found no document to train on, for "
            f"data.sources.{name} has {count} and data.holdout={self.config.holdout} holds out "
            f"{held_out} of them{bad}. Lower data.lanes, or add documents: a long one can fill the "
            "parts of several lanes, and a .txt file is one unless a separator cuts it"
        )


def _place(source: Source) -> str:
    match source:
        case PythonSource():
            return "Python's own files"
        case FilesSource():
            return ", ".join(source.patterns)
        case DatasetsSource() | TokensSource():
            return source.path
