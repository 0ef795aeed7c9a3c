"""The documents of a run: those that lanes train on, and those held out."""

from array import array
from collections.abc import Generator, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from xxhash import xxh3_64_intdigest

from conf.errors import DataError
from data.config import (
    DataConfig,
    DatasetsSource,
    FilesSource,
    PythonSource,
    Source,
    TokensSource,
)
from data.source import BadRecord, Corpus, Document, Position, Record, TokenDocument
from data.sources.files import FileCorpus, file_corpus, python_corpus
from data.sources.hub import HubCorpus
from data.sources.lanes import first_documents
from data.sources.quarantine import Quarantine
from data.sources.token_files import TokenCorpus
from data.storage.shard_cache import ShardCache

SAMPLED_PLACES = 4
"""Places of a source at which a sample of it begins, if it is seekable; else only its beginning is
read."""

COUNT_EVERY = 100
"""Valid records after which they are counted for all lanes, which takes a lock."""

EXPLANATION_DOCUMENTS = 1000
"""Documents that are read to explain why a lane has none."""


class NoTrainingDocumentsError(DataError):
    """A lane finds no document to train on: `why`, and a sentence that says what to do."""

    def __init__(self, why: str, remedy: str) -> None:
        super().__init__(f"{why}. {remedy}")
        self.why = why


TrainingDocument = tuple[Document | TokenDocument, Position]
"""A document that is trained on, and the position after it."""


class ValidRecord(NamedTuple):
    """A document that can be trained on, the xxh3_64 of its text, and the position after it."""

    document: Document | TokenDocument
    digest: int
    after: Position


def open_corpus(name: str, source: Source, config: DataConfig, cache: ShardCache) -> Corpus:
    """The corpus that the settings under `data.sources.<name>` mean.

    Raises:
        ConfigError: it does not exist, or has no file of a known format.
        DataError: it is damaged or not finished.
        TransientError: it cannot be reached at present.
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
    """Whether a document is kept for evaluation, which its text alone decides.

    So the choice is the same for every seed, order and number of lanes, and two equal documents
    are never one in training and one in evaluation.
    """
    return digest < fraction * 2**64


class Documents:
    """The documents of `config.sources`, split for training and evaluation.

    Attributes:
        corpora: by the sources' names.
        quarantine: the records that are no documents.
        lane_starts: the positions at which the lanes begin, of the sources that are cut by
            documents; the others are cut as their corpus does it, most of them by bytes.
    """

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self.quarantine = Quarantine(config.max_quarantined)
        cache = ShardCache(config.cache, config.remote)
        # All corpora share one cache, which is one folder for all runs of a machine.
        self.corpora = {
            name: open_corpus(name, source, config, cache)
            for name, source in config.sources.items()
        }
        self.lane_starts: dict[str, list[Position]] = {}
        # First passes over lanes of which a document was read to see whether there is one.
        self._begun: dict[tuple[str, int], Iterator[TrainingDocument]] = {}

    @property
    def remarks(self) -> list[str]:
        """What the user should know of the files that are read, and of those that are not."""
        files = (corpus for corpus in self.corpora.values() if isinstance(corpus, FileCorpus))
        return [remark for corpus in files for remark in corpus.remarks]

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What decides which documents are trained on, by setting."""
        fingerprint: dict[str, Any] = {}
        for corpus in self.corpora.values():
            fingerprint |= corpus.fingerprint
        return {
            **fingerprint,
            "data.holdout": self.config.holdout,
            "data.max_document_bytes": self.config.max_document_bytes,
        }

    def valid_records(
        self, name: str, lane: int, lanes: int, position: Position = None
    ) -> Iterator[ValidRecord]:
        """One pass over a lane's documents of a source, without those that are quarantined.

        Raises:
            DataError: too many records are no documents, or the source is damaged.
            TransientError: the source cannot be read at present.
        """
        uncounted = 0
        try:
            for record, after in self.corpora[name].documents(lane, lanes, position):
                checked = self._checked(record)
                if isinstance(checked, BadRecord):
                    # The rate of bad records, which `add` checks, needs all the valid ones.
                    self.quarantine.count_valid(uncounted)
                    uncounted = 0
                    self.quarantine.add(checked)
                    continue
                if (uncounted := uncounted + 1) == COUNT_EVERY:
                    self.quarantine.count_valid(uncounted)
                    uncounted = 0
                yield ValidRecord(record, checked, after)  # type: ignore[arg-type]
        finally:
            self.quarantine.count_valid(uncounted)

    def _checked(self, record: Record) -> int | BadRecord:
        """The digest of a document's text, or why the record is no document."""
        if isinstance(record, TokenDocument):
            return record.digest
        if isinstance(record, BadRecord):
            return record
        text, origin = record
        try:
            # A JSON escape can spell half of a surrogate pair, which is no text in UTF-8.
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

    def has_training_documents(self, name: str, lane: int, *, keep: bool) -> bool:
        """Whether a lane finds a document of a source to train on.

        Args:
            keep: what is read for it is not read again: the lane's first pass goes on from there.

        Raises:
            DataError, TransientError: as `valid_records`.
        """
        documents = self._training(name, lane, None)
        first = next(documents, None)
        if keep and first is not None:
            self._begun[name, lane] = chain([first], documents)
        else:
            documents.close()
        return first is not None

    def cut_by_documents(self, name: str) -> list[Position] | None:
        """Where a source's lanes begin if each gets training documents; reads all of the source.

        Returns:
            the positions, a JSON value; None if there are fewer documents than lanes.

        Raises:
            DataError, TransientError: as `valid_records`.
        """
        sizes = array("q", (size for size, _ in self._training_sizes(name)))
        firsts = first_documents(sizes, self.config.lanes)
        if firsts is None:
            return None
        # Read again, since the positions of millions of documents would take gigabytes.
        last = {first - 1 for first in firsts}
        found = enumerate(self._training_sizes(name))
        return [None, *(after for number, (_, after) in found if number in last)]

    def _training_sizes(self, name: str) -> Iterator[tuple[int, Position]]:
        """The size of each training document of a source, and the position after it."""
        # Not `valid_records`: these records are counted when they are read for training.
        for record, after in self.corpora[name].documents(0, 1):
            digest = self._checked(record)
            if not isinstance(digest, BadRecord) and not is_held_out(digest, self.config.holdout):
                is_text = isinstance(record, Document)
                yield len(record.text.encode() if is_text else record.tokens), after  # type: ignore[union-attr]

    def set_lane_starts(self, name: str, starts: list[Position]) -> None:
        """Cut a source's lanes at these positions, before any of it is read for training."""
        self.lane_starts[name] = starts
        self._begun = {key: begun for key, begun in self._begun.items() if key[0] != name}

    def _lane_records(self, name: str, lane: int, position: Position) -> Iterator[ValidRecord]:
        """One pass over a lane's documents from a position on, held-out ones among them."""
        if name not in self.lane_starts:
            yield from self.valid_records(name, lane, self.config.lanes, position)
            return
        start, *following = self.lane_starts[name][lane:]
        position = start if position is None else position
        end = following[0] if following else None
        if end is not None and position == end:
            return
        for record in self.valid_records(name, 0, 1, position):
            yield record
            if record.after == end:
                return

    def _training(self, name: str, lane: int, position: Position) -> Generator[TrainingDocument]:
        for document, digest, after in self._lane_records(name, lane, position):
            if not is_held_out(digest, self.config.holdout):
                yield document, after

    def training(
        self, name: str, lane: int, position: Position = None
    ) -> Generator[TrainingDocument]:
        """One pass over a lane's training documents of a source, each with the position after it.

        Raises:
            NoTrainingDocumentsError: a whole pass finds none.
            DataError, TransientError: as `valid_records`.
        """
        # Without this error, `shuffle.epochs` would begin pass after pass without end.
        # A pass from the middle may find nothing, if the documents before were the last ones.
        found = position is not None
        begun = None if found else self._begun.pop((name, lane), None)
        for item in begun or self._training(name, lane, position):
            found = True
            yield item
        if not found:
            raise self.no_training_documents(name)

    def held_out(self, name: str, most: int | None = None) -> Iterator[Document | TokenDocument]:
        """The held-out documents among the first `most` of a source, or among all, in its order."""
        for document, digest, _ in islice(self.valid_records(name, 0, 1), most):
            if is_held_out(digest, self.config.holdout):
                yield document

    def round_robin(self, name: str, parts: int) -> Iterator[tuple[Document | TokenDocument, int]]:
        """All documents of a source with their digests, one from each of its `parts` in turn."""
        readers = [self.valid_records(name, part, parts) for part in range(parts)]
        while readers:
            for reader in list(readers):
                if (found := next(reader, None)) is None:
                    readers.remove(reader)
                else:
                    yield found.document, found.digest

    def sample(self, size: int) -> Iterator[str]:
        """Training documents' texts, about `size` bytes in all, from each source by its weight.

        Raises:
            DataError: there are none; and as `valid_records`.
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
                    # Only the beginning of a document that is longer than the room.
                    yield (text := document.text[: int(room) + 1])
                    room -= len(text.encode())
        if not found:
            raise self.no_training_documents(next(iter(self.corpora)))

    def _source(self, name: str) -> Source:
        return self.config.sources[name]

    def no_training_documents(self, name: str) -> NoTrainingDocumentsError:
        """The error for a lane that finds nothing to train on, which says why."""
        documents = islice(self.valid_records(name, 0, 1), EXPLANATION_DOCUMENTS)
        digests = [digest for _, digest, _ in documents]
        bad_records = self.quarantine.bad_records
        bad = f"; not documents: {self.quarantine.summary()}" if bad_records else ""
        if not digests:
            location = _location(self._source(name))
            return NoTrainingDocumentsError(
                f"data.sources.{name}: no text in it ({location}{bad})",
                "Choose a source with documents",
            )
        held_out = sum(is_held_out(digest, self.config.holdout) for digest in digests)
        or_more = " or more" if len(digests) == EXPLANATION_DOCUMENTS else ""
        return NoTrainingDocumentsError(
            f"data.lanes={self.config.lanes}: a lane found no document to train on, because "
            f"data.sources.{name} has {len(digests)}{or_more} and "
            f"data.holdout={self.config.holdout} holds out {held_out} of them{bad}",
            "Lower data.lanes, or add documents: each lane needs one to train on, and a .txt file "
            "is one document unless a separator cuts it",
        )


def _location(source: Source) -> str:
    match source:
        case PythonSource():
            return "Python's own files"
        case FilesSource():
            return ", ".join(source.patterns)
        case DatasetsSource() | TokensSource():
            return source.path
