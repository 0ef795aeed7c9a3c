"""What is read and how it is cut: the settings under `data.` and `tokenizer.`, torch-free."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field


class Checked:
    """A configuration value that cannot be built with an impossible setting."""

    def __post_init__(self) -> None:
        if problems := self.problems():
            raise ValueError("; ".join(problems))

    def problems(self) -> list[str]:
        """Every impossible setting or combination, one sentence each."""
        return []


@dataclass(frozen=True, kw_only=True)
class PythonSource(Checked):
    """Python source files on this machine; a file is a document.

    Attributes:
        packages: add the installed packages (`site-packages`) to the standard library.
    """

    kind: Literal["python"]
    packages: bool = False


@dataclass(frozen=True, kw_only=True)
class FilesSource(Checked):
    """Local `.txt`, `.jsonl` and `.parquet` files, also `.gz`, `.zst` or `.bz2`.

    Attributes:
        paths: files, directories (read recursively) and globs such as `books/**/*.txt`.
        text_field: the column or key that holds a document's text in `.parquet` and `.jsonl`.
        separator: what stands between two documents in a `.txt` file, for example
            `<|endoftext|>`; null: the whole file is one document.
    """

    kind: Literal["files"]
    paths: str | tuple[str, ...]
    text_field: str = "text"
    separator: str | None = None

    @property
    def patterns(self) -> tuple[str, ...]:
        """`paths`, as a tuple in either spelling."""
        return (self.paths,) if isinstance(self.paths, str) else self.paths

    def problems(self) -> list[str]:
        found = []
        if not self.patterns or not all(self.patterns):
            found.append(
                f"data.source.paths={self.paths!r}: expected at least one file, directory or glob"
            )
        if not self.text_field:
            found.append("data.source.text_field='': expected the name of a column or key")
        if self.separator == "":
            found.append("data.source.separator='': expected text, or null for one document a file")
        return found


@dataclass(frozen=True, kw_only=True)
class DatasetsSource(Checked):
    """Anything that `datasets.load_dataset` can stream: the Hub, URLs, many file formats.

    Attributes:
        path: a dataset on the Hub, or a format such as `json` or `parquet` for `data_files`.
        name: the dataset's configuration, as the Hub calls it.
        split: which of the dataset's splits is read.
        revision: a commit or tag on the Hub; null: the newest.
        data_files: URLs, paths or globs of files; null: all of the dataset's.
        text_field: the column that holds a document's text.
    """

    kind: Literal["datasets"]
    path: str
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    data_files: str | tuple[str, ...] | None = None
    text_field: str = "text"

    def problems(self) -> list[str]:
        return [
            f"data.source.{name}='': expected a name"
            for name in ("path", "split", "text_field")
            if not getattr(self, name)
        ]


Source = Annotated[PythonSource | FilesSource | DatasetsSource, Field(discriminator="kind")]


@dataclass(frozen=True, kw_only=True)
class DataConfig(Checked):
    """Where the text comes from and in what order it is read.

    Attributes:
        source: the text.
        lanes: document streams that the text is cut into; never changes within a run, whatever
            the number of ranks, which has to divide it.
        shuffle: read the documents of each block in a random order, another one in each epoch.
        block_documents: documents of a lane that are held and shuffled together.
        holdout: fraction of documents that are kept for evaluation and never trained on.
        prefetch: batches that are made ready ahead of the training step.
    """

    source: Source
    lanes: int = 8
    shuffle: bool = True
    block_documents: int = 256
    holdout: float = 0.02
    prefetch: int = 4

    def problems(self) -> list[str]:
        found = [
            f"data.{name}={value}: expected an integer of at least 1"
            for name in ("lanes", "block_documents", "prefetch")
            if (value := getattr(self, name)) < 1
        ]
        if not 0 <= self.holdout < 1:
            found.append(
                f"data.holdout={self.holdout}: expected a fraction from 0 to below 1; "
                "0 holds nothing out"
            )
        return found

    def batch_problems(self, global_batch: int, world: int = 1) -> list[str]:
        """Why batches of `global_batch` rows cannot be drawn from the lanes by `world` ranks."""
        found = []
        if global_batch % self.lanes:
            found.append(
                f"train.global_batch={global_batch}: not divisible by data.lanes={self.lanes}; "
                f"choose a multiple of {self.lanes}, or data.lanes from "
                f"{', '.join(map(str, divisors(global_batch)))}"
            )
        if self.lanes % world:
            found.append(
                f"data.lanes={self.lanes}: not divisible by the {world} ranks of this run; choose "
                f"a multiple of {world} for a new run, or a number of ranks from "
                f"{', '.join(map(str, divisors(self.lanes)))}"
            )
        return found


def divisors(number: int) -> list[int]:
    """The numbers that divide `number`.

    >>> divisors(12)
    [1, 2, 3, 4, 6, 12]
    """
    return [d for d in range(1, number + 1) if number % d == 0]


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig(Checked):
    """A SentencePiece model: a given one, or one trained on the data at first use.

    Attributes:
        path: a trained `.model`; null: train one, and keep it for the next time.
        kind: what is trained. `bpe` takes seconds, `unigram` about a minute.
        vocab_size: how many pieces to train, at most `model.vocab_size`; null: as many as that.
            Text too small to give so many gives fewer.
        sample_bytes: how much of the data's text it is trained on, from its beginning.
        cache_dir: where trained models are kept; null: `$PHD_CACHE/tokenizers`, and
            `~/.cache/phd/tokenizers` where PHD_CACHE is not set.
    """

    path: str | None = None
    kind: Literal["bpe", "unigram"] = "bpe"
    vocab_size: int | None = None
    sample_bytes: int = 32_000_000
    cache_dir: str | None = None

    def problems(self) -> list[str]:
        found = []
        if self.vocab_size is not None and self.vocab_size < 1:
            found.append(
                f"tokenizer.vocab_size={self.vocab_size}: expected an integer of at least 1"
            )
        if self.sample_bytes < 1:
            found.append(
                f"tokenizer.sample_bytes={self.sample_bytes}: expected an integer of at least 1"
            )
        if self.path == "":
            found.append("tokenizer.path='': expected the path of a SentencePiece .model")
        if self.path and self.vocab_size is not None:
            found.append(
                f"tokenizer.vocab_size={self.vocab_size}: a given tokenizer.path has its own size; "
                "leave one of the two null"
            )
        return found
