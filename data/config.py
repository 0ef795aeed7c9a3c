"""What is read and how it is cut: the settings under `data.` and `tokenizer.`, torch-free."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import inf
from typing import Annotated, Literal

from pydantic import Field

from conf.settings import Settings, at_least


@dataclass(frozen=True, kw_only=True)
class AnySource(Settings):
    """What every source has; `*` in a problem stands for the source's name.

    Attributes:
        weight: the source's share of the tokens, relative to the other sources' weights.
        epochs: passes after which the source is used up; null: it never is.
    """

    weight: float = 1.0
    epochs: int | None = None

    def problems(self) -> list[str]:
        return at_least(self, "data.sources.*", 0.0, "weight") + at_least(
            self, "data.sources.*", 1, "epochs"
        )

    def _empty_problems(self, *names: str) -> list[str]:
        return [
            f"data.sources.*.{name}='': expected text" for name in names if not getattr(self, name)
        ]


@dataclass(frozen=True, kw_only=True)
class PythonSource(AnySource):
    """Python source files on this machine; a file is a document.

    Attributes:
        packages: add the installed packages (`site-packages`) to the standard library.
    """

    kind: Literal["python"]
    packages: bool = False


@dataclass(frozen=True, kw_only=True)
class FilesSource(AnySource):
    """`.txt`, `.jsonl` and `.parquet` files, also `.gz`, `.zst` or `.bz2`, here or elsewhere.

    A `.json` that is named, or is compressed, is taken for JSON lines, as C4's are.

    Attributes:
        paths: files, directories (read recursively) and globs such as `books/**/*.txt`, on this
            machine or as URLs that fsspec opens: `https://`, `hf://datasets/`, `s3://`.
        text_field: the column or key that holds a document's text in `.parquet` and `.jsonl`.
        separator: what stands between two documents in a `.txt` file, for example `<|end|>`;
            `\\n` and `\\t` mean a line's end and a tab; null: the whole file is one document.
    """

    kind: Literal["files"]
    paths: str | tuple[str, ...]
    text_field: str = "text"
    separator: str | None = None

    @property
    def unescaped_separator(self) -> str | None:
        """`separator`, with its line ends and tabs."""
        return self.separator and self.separator.replace("\\n", "\n").replace("\\t", "\t")

    @property
    def patterns(self) -> tuple[str, ...]:
        """`paths`, as a tuple in either spelling."""
        return (self.paths,) if isinstance(self.paths, str) else self.paths

    def problems(self) -> list[str]:
        found = super().problems() + self._empty_problems("text_field")
        if not self.patterns or not all(self.patterns):
            found.append(
                f"data.sources.*.paths={self.paths!r}: expected at least one file, directory, "
                "glob or URL"
            )
        if self.separator == "":
            found.append(
                "data.sources.*.separator='': expected text, or null for one document a file"
            )
        return found


@dataclass(frozen=True, kw_only=True)
class DatasetsSource(AnySource):
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
        return super().problems() + self._empty_problems("path", "split", "text_field")


@dataclass(frozen=True, kw_only=True)
class TokensSource(AnySource):
    """Documents that are tokens already, as `python train/pretokenize.py` writes them.

    Attributes:
        path: the directory that was written.
    """

    kind: Literal["tokens"]
    path: str

    def problems(self) -> list[str]:
        return super().problems() + self._empty_problems("path")


Source = Annotated[
    PythonSource | FilesSource | DatasetsSource | TokensSource, Field(discriminator="kind")
]


@dataclass(frozen=True, kw_only=True)
class Phase(Settings):
    """Other weights from some point of the run on, as in two-stage pretraining.

    Attributes:
        after_tokens: tokens of the run, over all lanes, after which the weights apply.
        weights: by the source's name; sources that are not named keep the weight they have.
    """

    after_tokens: int = 0
    weights: dict[str, float] = field(default_factory=dict)

    def problems(self) -> list[str]:
        found = at_least(self, "data.phases.*", 1, "after_tokens")
        if not self.weights:
            found.append("data.phases.*.weights={}: expected the weight of at least one source")
        return found + [
            f"data.phases.*.weights.{name}={weight}: expected a number of at least 0"
            for name, weight in self.weights.items()
            if not 0 <= weight < inf
        ]


@dataclass(frozen=True, kw_only=True)
class RemoteConfig(Settings):
    """How patiently files on other machines are read.

    Attributes:
        timeout_s: seconds without a byte after which a request is given up and made again.
        retry_s: seconds without progress after which a file counts as lost and the run stops.
    """

    timeout_s: float = 60.0
    retry_s: float = 300.0

    def problems(self) -> list[str]:
        return [
            f"data.remote.{name}={value}: expected a number above 0"
            for name in ("timeout_s", "retry_s")
            if not (value := getattr(self, name)) > 0
        ]


@dataclass(frozen=True, kw_only=True)
class CacheConfig(Settings):
    """Local copies of files: of compressed ones always, unpacked, so that reading can go on
    anywhere in them; of remote ones if asked for.

    Attributes:
        dir: where they are; null: `$PHD_CACHE/shards`, and `~/.cache/phd/shards` where PHD_CACHE
            is not set.
        max_gb: gigabytes from which on the least recently used that nobody reads are removed.
        remote: copy remote files before they are read.
    """

    dir: str | None = None
    max_gb: float = 100.0
    remote: bool = False

    def problems(self) -> list[str]:
        return at_least(self, "data.cache", 0.0, "max_gb")


@dataclass(frozen=True, kw_only=True)
class DataConfig(Settings):
    """Where the text comes from and in what order it is read.

    Attributes:
        sources: the text, by names of your choice; more than one make a mixture by weight.
        phases: other weights from some token on, by names of your choice.
        lanes: document streams that the text is cut into; never changes within a run, whatever
            the number of ranks, which has to divide it.
        shuffle: read the documents of each block in a random order, another one in each epoch.
        block_documents: documents of a lane and source that are held and shuffled together; with
            `best_fit`, also how many of a lane are packed together.
        holdout: fraction of documents that are kept for evaluation and never trained on.
        documents: `concatenate` lets a token see the documents before its own in its row;
            `isolate` does not, and counts positions and chunks from each document's beginning.
        packing: `sequential` cuts the documents where a row ends and wastes nothing; `best_fit`
            cuts only those that are longer than a row, and fills up with padding.
        max_document_bytes: UTF-8 bytes beyond which a document is quarantined.
        max_quarantined: fraction of quarantined documents beyond which the run stops; the first 20
            never stop it, unless this is 0.
        workers: threads that read and tokenise; 0: the training thread does it between steps.
        prefetch: batches that are made ready ahead of the training step.
    """

    sources: dict[str, Source]
    phases: dict[str, Phase] = field(default_factory=dict)
    lanes: int = 8
    shuffle: bool = True
    block_documents: int = 256
    holdout: float = 0.02
    documents: Literal["concatenate", "isolate"] = "concatenate"
    packing: Literal["sequential", "best_fit"] = "sequential"
    max_document_bytes: int = 16_000_000
    max_quarantined: float = 0.02
    workers: int = 1
    prefetch: int = 4
    remote: RemoteConfig = field(default_factory=RemoteConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)

    @property
    def mixture(self) -> list[tuple[int, dict[str, float]]]:
        """(tokens after which they apply, weight of every source), the first from 0 on."""
        weights = {name: source.weight for name, source in self.sources.items()}
        mixture = [(0, weights)]
        for phase in sorted(self.phases.values(), key=lambda phase: phase.after_tokens):
            weights = {**weights, **phase.weights}
            mixture.append((phase.after_tokens, weights))
        return mixture

    def problems(self) -> list[str]:
        found = at_least(
            self, "data", 1, "lanes", "block_documents", "prefetch", "max_document_bytes"
        )
        found += at_least(self, "data", 0, "workers")
        if not 0 <= self.holdout < 1:
            found.append(
                f"data.holdout={self.holdout}: expected a fraction from 0 to below 1; "
                "0 holds nothing out"
            )
        if not 0 <= self.max_quarantined <= 1:
            found.append(
                f"data.max_quarantined={self.max_quarantined}: expected a fraction from 0 to 1"
            )
        return found + self._mixture_problems()

    def _mixture_problems(self) -> list[str]:
        if not self.sources:
            return ["data.sources={}: expected at least one source"]
        found = [
            f"data.sources.{name}: a name is made of letters, digits, _ and -"
            for name in self.sources
            if not name.replace("_", "").replace("-", "").isalnum()
        ]
        found += [
            f"data.phases.{phase}.weights.{name}: no such source; expected one of "
            f"{', '.join(self.sources)}"
            for phase, settings in self.phases.items()
            for name in settings.weights
            if name not in self.sources
        ]
        starts = [phase.after_tokens for phase in self.phases.values()]
        if len(starts) > len(set(starts)):
            found.append(f"data.phases.*.after_tokens={starts}: two phases cannot begin together")
        found += [
            f"data.sources.*.weight={list(weights.values())} from token {start} on: expected at "
            "least one above 0"
            for start, weights in self.mixture
            if not found and not any(weights.values())
        ]
        return found

    def batch_problems(self, global_batch: int, world_size: int = 1) -> list[str]:
        """Why `world_size` ranks cannot draw batches of `global_batch` rows from the lanes."""
        found = []
        if global_batch % self.lanes:
            found.append(
                f"train.global_batch={global_batch}: not divisible by data.lanes={self.lanes}; "
                f"choose a multiple of {self.lanes}, or data.lanes from "
                f"{_listed(divisors(global_batch))}"
            )
        if self.lanes % world_size:
            found.append(
                f"data.lanes={self.lanes}: not divisible by the {world_size} ranks of this run; "
                f"choose a multiple of {world_size} for a new run, or a number of ranks from "
                f"{_listed(divisors(self.lanes))}"
            )
        return found


def divisors(number: int) -> list[int]:
    """The numbers that divide `number`.

    >>> divisors(12)
    [1, 2, 3, 4, 6, 12]
    """
    return [d for d in range(1, number + 1) if number % d == 0]


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig(Settings):
    """A SentencePiece model: a given one, or one trained on the data at first use.

    Attributes:
        path: a trained `.model`; null: train one, and keep it for the next time.
        kind: what is trained. `bpe` takes seconds, `unigram` about a minute.
        vocab_size: how many pieces to train, at most `model.vocab_size`; null: as many as that.
            Text too small to give so many gives fewer.
        sample_bytes: how much of the data's text it is trained on.
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
