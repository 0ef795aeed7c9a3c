"""How much text the sources have, without asking a server for it, and how it fills rows."""

import re
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from conf.errors import USER_ERRORS
from data.batch import Batch, document_starts
from data.config import FilesSource, PythonSource, Source, TokensSource
from data.packing import pack, pack_best_fit
from data.sources.documents import Documents, open_corpus
from data.sources.files import FileCorpus
from data.sources.token_files import TokenCorpus
from data.storage.shard_cache import ShardCache
from data.storage.transport import is_local
from data.tokenizer import Tokenizer
from train.config import Config

SAMPLE_BYTES = 500_000
"""Of the text from which lengths of documents and bytes per token are estimated."""

SAMPLED_DOCUMENTS = 2000
"""Of token files, whose lengths are exact."""

LARGE_VOCABULARY = 16_384

KNOWN_TOKENS = {
    "HuggingFaceFW/fineweb-edu/sample/10BT": 10e9,
    "HuggingFaceFW/fineweb-edu/sample/100BT": 100e9,
    "HuggingFaceFW/fineweb-edu/sample/350BT": 350e9,
    "HuggingFaceFW/fineweb-edu/data": 1.3e12,
    "allenai/c4/en": 156e9,
    "allenai/olmo-mix-1124/data/dclm": 3.70e12,
    "allenai/olmo-mix-1124/data/starcoder": 83.0e9,
    "allenai/olmo-mix-1124/data/pes2o": 58.6e9,
    "allenai/olmo-mix-1124/data/arxiv": 20.8e9,
    "allenai/olmo-mix-1124/data/open-web-math": 12.2e9,
    "allenai/olmo-mix-1124/data/algebraic-stack": 11.8e9,
    "allenai/olmo-mix-1124/data/wiki": 3.66e9,
}
"""Whole folders of datasets on the Hub, as the datasets' own pages count them."""


class SourceText(NamedTuple):
    """The training text of a source.

    Attributes:
        tokens: of one pass, about; None if it is not known.
        basis: how that is known, or why it is not, in words.
    """

    tokens: float | None
    basis: str


class Text(NamedTuple):
    """What is known of a run's text before it is read.

    Attributes:
        sources: by their names.
        rows: how many rows a sample of it fills; 0 if there is no sample.
        documents: the lengths of the documents in these rows, as `Batch.document_lengths`.
    """

    sources: dict[str, SourceText]
    rows: int = 0
    documents: tuple[int, ...] = ()


def look_at_text(config: Config) -> Text:
    """What is known of a run's text from the files of this machine.

    Files on other machines are not asked for, and compressed ones not unpacked.
    """
    look = _Look(config)
    sources = {name: look.source(name, source) for name, source in config.data.sources.items()}
    if not _lengths_matter(config):
        return Text(sources)
    rows, documents = _packed(look.lengths(), config)
    return Text(sources, rows, tuple(documents))


def _lengths_matter(config: Config) -> bool:
    """Whether the FLOPs depend on the lengths of documents."""
    return config.data.documents == "isolate" or config.data.packing == "best_fit"


class _Look:
    """The sources of a run, as far as they are on this machine."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.cache = ShardCache(config.data.cache, config.data.remote)
        self.tokenizer = _tokenizer(config)
        # Of Python source with a vocabulary of 4096 pieces, and of English with one of 100 000.
        self.bytes_per_token = 3.2 if config.model.vocab_size < LARGE_VOCABULARY else 4.4
        self.how = f"at an assumed {self.bytes_per_token} bytes a token"
        self.sampled: list[str] = []
        if self.tokenizer is None and not _lengths_matter(config):
            return
        try:
            self.sampled = self._sample()
        except USER_ERRORS:
            return  # `source` says of each source what is wrong with it
        if self.tokenizer is not None and self.sampled:
            tokens = sum(map(self._tokens, self.sampled))
            self.bytes_per_token = sum(len(text.encode()) for text in self.sampled) / tokens
            self.how = f"at {self.bytes_per_token:.2f} bytes a token of its tokenizer"

    def source(self, name: str, source: Source) -> SourceText:
        """What is known of one source."""
        if isinstance(source, FilesSource) and not all(map(is_local, source.patterns)):
            return _known(source)
        if not isinstance(source, FilesSource | PythonSource | TokensSource):
            return SourceText(None, "not known without asking its server")
        try:
            corpus = open_corpus(name, source, self.config.data, self.cache)
        except USER_ERRORS:
            return SourceText(None, "not known: it cannot be looked at here")
        trained_on = 1 - self.config.data.holdout
        if isinstance(corpus, TokenCorpus):
            return SourceText(corpus.index.tokens * trained_on, "counted when they were written")
        assert isinstance(corpus, FileCorpus)
        if not corpus.text_bytes:
            return SourceText(None, "has no text")
        return SourceText(corpus.text_bytes / self.bytes_per_token * trained_on, self.how)

    def lengths(self) -> list[int]:
        """The lengths in tokens of documents of this machine's sources, if all are."""
        data = self.config.data
        try:
            if all(isinstance(source, TokensSource) for source in data.sources.values()):
                documents = Documents(data)
                found = documents.round_robin(next(iter(data.sources)), data.lanes)
                return [len(d.tokens) for d, _ in islice(found, SAMPLED_DOCUMENTS)]  # type: ignore[union-attr]
        except USER_ERRORS:
            return []
        return [self._tokens(text) for text in self.sampled]

    def _sample(self) -> list[str]:
        """Training documents of all sources by their weights; none if one is not at hand."""
        data = self.config.data
        texts = {n: s for n, s in data.sources.items() if isinstance(s, FilesSource | PythonSource)}
        if len(texts) < len(data.sources):
            return []
        files = [source for source in texts.values() if isinstance(source, FilesSource)]
        if not all(is_local(pattern) for source in files for pattern in source.patterns):
            return []
        documents = Documents(data)
        if not all(corpus.is_seekable for corpus in documents.corpora.values()):
            return []
        return list(documents.sample(SAMPLE_BYTES))

    def _tokens(self, text: str) -> int:
        """The tokens of a document, its separator included."""
        if self.tokenizer is not None:
            return len(self.tokenizer.encode_document(text))
        return 1 + round(len(text.encode()) / self.bytes_per_token)


def _tokenizer(config: Config) -> Tokenizer | None:
    """The tokenizer of the run, if it exists already."""
    for path in (config.tokenizer.path, config.run_dir / "tokenizer.model"):
        try:
            if path is not None:
                return Tokenizer.load(Path(path).expanduser())
        except (OSError, *USER_ERRORS):
            continue
    return None


def _known(source: FilesSource) -> SourceText:
    """The size of a dataset on the Hub that is read as a whole."""
    total = 0.0
    for pattern in source.patterns:
        path = re.sub(r"@[^/]*", "", pattern.removeprefix("hf://datasets/"))
        # Whole folders, and the globs that mean all of their files.
        folder = re.sub(r"/((c4-train\.)?\*[^/]*)?$", "", path)
        if folder not in KNOWN_TOKENS:
            return SourceText(None, "not known without asking its server")
        total += KNOWN_TOKENS[folder]
    return SourceText(total, "as the dataset's page counts them")


def _packed(lengths: list[int], config: Config) -> tuple[int, list[int]]:
    """(how many rows documents of these lengths fill, the documents' parts in them)."""
    T, data = config.train.seq_len, config.data
    separator, other = 1, 2
    documents = [(np.array([other] * (n - 1) + [separator]), None) for n in lengths]
    if data.packing == "sequential":
        rows = [row for row, _, _ in pack(documents, T) if row.targets == T]
    else:
        found = pack_best_fit(documents, T, group=data.block_documents, separator=separator)
        rows = [row for row, _, _ in found]
    if not rows:
        return 0, []
    tokens = np.stack([row.tokens for row in rows])
    mask = np.arange(T) < np.array([row.targets for row in rows])[:, None]
    starts = document_starts(tokens, separator) if data.documents == "isolate" else None
    return len(rows), Batch(tokens, mask, starts).document_lengths
