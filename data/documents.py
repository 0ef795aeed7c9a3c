"""The documents of a run: those that lanes train on, and those held out."""

from collections.abc import Iterator
from typing import Any

from xxhash import xxh3_64_intdigest

from data.config import DataConfig, DatasetsSource, FilesSource, PythonSource
from data.files import local_corpus
from data.hub import HubCorpus
from data.python_files import python_corpus
from data.source import Corpus, Document, Position


def open_corpus(source: PythonSource | FilesSource | DatasetsSource) -> Corpus:
    """The corpus that the settings under `data.source` mean.

    Raises:
        ValueError: it does not exist, or has no file that could be read.
    """
    match source:
        case PythonSource():
            return python_corpus(packages=source.packages)
        case FilesSource():
            return local_corpus(source)
        case DatasetsSource():
            return HubCorpus(source)


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a document is kept for evaluation: decided by its text alone.

    So the choice is the same for every seed, order and number of lanes, and copies of a document
    never lie on both sides.
    """
    return xxh3_64_intdigest(text.encode()) < fraction * 2**64


class Documents:
    """The documents of `config.source` that have any text, split for training and evaluation."""

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self.corpus = open_corpus(config.source)

    @property
    def identity(self) -> dict[str, Any]:
        """What decides which documents are trained on, by setting."""
        return {**self.corpus.identity, "data.holdout": self.config.holdout}

    def training(self, lane: int, position: Position = None) -> Iterator[tuple[Document, Position]]:
        """One pass over a lane's training documents, each with the position after it.

        Raises:
            ValueError: a whole pass finds none.
        """
        barren = position is None
        for document, after in self.corpus.documents(lane, self.config.lanes, position):
            if self._is_chosen(document.text, held_out=False):
                barren = False
                yield document, after
        if barren:
            raise self._too_few()

    def held_out(self) -> Iterator[Document]:
        """The held-out documents, in the corpus' order."""
        for document, _ in self.corpus.documents(lane=0, lanes=1):
            if self._is_chosen(document.text, held_out=True):
                yield document

    def sample(self, size: int) -> Iterator[str]:
        """The first training documents' texts, about `size` bytes of them.

        Raises:
            ValueError: there are none.
        """
        room = size
        for document, _ in self.corpus.documents(lane=0, lanes=1):
            if self._is_chosen(document.text, held_out=False):
                yield (text := document.text[:room])
                room -= len(text.encode())
            if room <= 0:
                return
        if room == size:
            raise self._too_few()

    def _is_chosen(self, text: str, *, held_out: bool) -> bool:
        return bool(text.strip()) and is_held_out(text, self.config.holdout) == held_out

    def _too_few(self) -> ValueError:
        """The error for a lane that finds nothing to train on."""
        held_out = [
            is_held_out(document.text, self.config.holdout)
            for document, _ in self.corpus.documents(lane=0, lanes=1)
            if document.text.strip()
        ]
        if not held_out:
            return ValueError(
                f"data.source: no text in it ({self._place()}); choose a source with documents"
            )
        return ValueError(
            f"data.lanes={self.config.lanes}: a lane found no document to train on, for "
            f"data.source has {len(held_out)} and data.holdout={self.config.holdout} holds out "
            f"{sum(held_out)} of them; lower data.lanes or add documents (a .txt file is one, "
            "unless data.source.separator cuts it)"
        )

    def _place(self) -> str:
        source = self.config.source
        match source:
            case PythonSource():
                return "Python's own files"
            case FilesSource():
                return ", ".join(source.patterns)
            case DatasetsSource():
                return source.path
