"""The settings under `data.` and `tokenizer.`: what is read and how it is cut; needs no torch."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import inf
from typing import Annotated, Literal

from pydantic import Field

from conf.errors import Problem
from conf.settings import Settings, above, at_least, seconds_to_wait, without_effect
from conf.validation import closest, did_you_mean
from conf.wording import plural


@dataclass(frozen=True, kw_only=True)
class AnySource(Settings):
    """What all kinds of sources have; `*` in a problem's key stands for the source's name.

    Attributes:
        weight: the source's share of the tokens, relative to the weights of the other sources.
        epochs: how often the source is read from beginning to end. After that the other sources
            share what it had, and when all sources have ended, the run ends, too. null: it is read
            again and again.
    """

    weight: float = 1.0
    epochs: int | None = None

    def problems(self) -> list[Problem]:
        weight = at_least(self, "data.sources.*", 0.0, "weight")
        return weight + at_least(self, "data.sources.*", 1, "epochs")

    def _empty_problems(self, *names: str) -> list[Problem]:
        return [
            Problem(f"data.sources.*.{name}", "", "expected text")
            for name in names
            if not getattr(self, name)
        ]


@dataclass(frozen=True, kw_only=True)
class PythonSource(AnySource):
    """Python source files on this machine; each file is a document.

    Attributes:
        kind: `python`.
        packages: read the installed packages (`site-packages`) besides the standard library.
    """

    kind: Literal["python"]
    packages: bool = False


@dataclass(frozen=True, kw_only=True)
class FilesSource(AnySource):
    """`.txt`, `.jsonl`, `.ndjson`, `.json` and `.parquet` files, here or elsewhere.

    Their names may be in small or capital letters and end with `.gz`, `.zst`, `.bz2` or `.xz`.
    `.json` is read as JSON lines, which is what C4's files are. A plain one in a directory that
    holds something else is passed over.

    Attributes:
        kind: `files`.
        paths: files, directories (read with all folders below them) and globs such as
            `books/**/*.txt`, on this machine or as URLs that fsspec opens: `https://`,
            `hf://datasets/`, `s3://`. A directory that a glob matches is read if it is called like
            a file, as `x.parquet/` is, or if the glob matches no files.
        text_field: the column or key that holds a document's text in `.parquet` and `.jsonl`;
            `data.text` is the `text` within `data`.
        separator: the text between two documents in a `.txt` file, for example `<|end|>`; `\\n`
            and `\\t` in it mean a line break and a tab. null: each file is one document.
    """

    kind: Literal["files"]
    paths: str | tuple[str, ...]
    text_field: str = "text"
    separator: str | None = None

    @property
    def unescaped_separator(self) -> str | None:
        """`separator` with real line breaks and tabs."""
        return self.separator and self.separator.replace("\\n", "\n").replace("\\t", "\t")

    @property
    def patterns(self) -> tuple[str, ...]:
        """`paths` as a tuple, also if it is a single text."""
        return (self.paths,) if isinstance(self.paths, str) else self.paths

    def problems(self) -> list[Problem]:
        found = super().problems() + self._empty_problems("text_field")
        if not self.patterns or not all(self.patterns):
            expected = "expected at least one file, directory, glob or URL"
            found.append(Problem("data.sources.*.paths", self.paths, expected))
        if self.separator == "":
            expected = "expected text, or null for one document a file"
            found.append(Problem("data.sources.*.separator", "", expected))
        return found


@dataclass(frozen=True, kw_only=True)
class DatasetsSource(AnySource):
    """Whatever `datasets.load_dataset` can stream: the Hub, URLs, many file formats.

    Attributes:
        kind: `datasets`.
        path: a dataset on the Hub, or a format such as `json` or `parquet` for `data_files`.
        name: the dataset's configuration, as the Hub calls it; null: its default.
        split: the split of the dataset that is read.
        revision: a commit or tag on the Hub; null: the newest.
        data_files: URLs, paths or globs of files; null: all files of the dataset.
        text_field: the column that holds a document's text; `data.text` is the `text` within
            `data`.
    """

    kind: Literal["datasets"]
    path: str
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    data_files: str | tuple[str, ...] | None = None
    text_field: str = "text"

    def problems(self) -> list[Problem]:
        return super().problems() + self._empty_problems("path", "split", "text_field")


@dataclass(frozen=True, kw_only=True)
class TokensSource(AnySource):
    """Documents that are tokens already, as `python train/pretokenize.py` writes them.

    Attributes:
        kind: `tokens`.
        path: the directory that `train/pretokenize.py` has written.
    """

    kind: Literal["tokens"]
    path: str

    def problems(self) -> list[Problem]:
        return super().problems() + self._empty_problems("path")


Source = Annotated[
    PythonSource | FilesSource | DatasetsSource | TokensSource, Field(discriminator="kind")
]


@dataclass(frozen=True, kw_only=True)
class Phase(Settings):
    """Other weights of the sources from some point of the run on, as in two-stage pretraining.

    Attributes:
        after_tokens: how many tokens of the run, over all lanes, come before these weights apply.
        weights: the new weights, by the source's name; sources that are not named keep theirs.
    """

    after_tokens: int = 0
    weights: dict[str, float] = field(default_factory=dict)

    def problems(self) -> list[Problem]:
        found = at_least(self, "data.phases.*", 1, "after_tokens")
        if not self.weights:
            expected = "expected the weight of at least one source"
            found.append(Problem("data.phases.*.weights", self.weights, expected))
        return found + [
            Problem(f"data.phases.*.weights.{name}", weight, "expected a number of at least 0")
            for name, weight in self.weights.items()
            if not 0 <= weight < inf
        ]


@dataclass(frozen=True, kw_only=True)
class RemoteConfig(Settings):
    """How long the loader waits for files on other machines.

    Attributes:
        timeout_s: a request that brings no byte for this many seconds is given up and made again.
        retry_s: a file from which no byte has come for this many seconds, over all requests, counts
            as lost, and the run ends.
    """

    timeout_s: float = 60.0
    retry_s: float = 300.0

    def problems(self) -> list[Problem]:
        return [
            *seconds_to_wait(self, "data.remote", "timeout_s"),
            *above(self, "data.remote", 0, "retry_s"),
        ]


@dataclass(frozen=True, kw_only=True)
class CacheConfig(Settings):
    """Local copies of files.

    Compressed files are always unpacked into the cache, because a resumed run must be able to read
    on from any place in them. Files on other machines are copied if `remote` is true.

    Attributes:
        dir: the directory of the copies; null: `$PHD_CACHE/shards`, or `~/.cache/phd/shards` if
            PHD_CACHE is not set. If that cannot be written, a directory for temporary files.
        max_gb: the size of the cache in gigabytes (10^9 bytes). When it is exceeded, the copies
            that have not been used for longest are deleted, except those that are being read.
        remote: copy files on other machines into the cache before they are read.
    """

    dir: str | None = None
    max_gb: float = 100.0
    remote: bool = False

    def problems(self) -> list[Problem]:
        return at_least(self, "data.cache", 0.0, "max_gb")


@dataclass(frozen=True, kw_only=True)
class DataConfig(Settings):
    """Where the text comes from and in what order it is read.

    Attributes:
        sources: the sources of text, under names of your choice. Several sources are mixed by
            their weights.
        phases: weights that replace those of the sources later in the run, under names of your
            choice.
        lanes: how many independent streams of documents the data is cut into. The number of ranks
            must divide it, and it must divide `train.global_batch`. It is fixed for the whole run.
        shuffle: read the documents of each block in a random order, which differs in each epoch.
        block_documents: how many documents of a lane and source are held in memory and shuffled
            together. `best_fit` also packs this many documents of a lane at a time.
        holdout: the fraction of the documents that are kept for evaluation and never trained on.
        documents: `concatenate` lets a token attend to the documents before its own in the row.
            `isolate` does not, and counts positions and chunks from the beginning of each document.
        packing: `sequential` cuts documents where a row ends and wastes nothing. `best_fit` cuts
            only documents that are longer than a row, and fills the rest of a row with padding.
        max_document_bytes: a document with more UTF-8 bytes than this is a bad record: it is left
            out and written to the run's `quarantine.jsonl`.
        max_quarantined: the run stops when more than this fraction of the records are bad. The
            first 20 bad records never stop it, unless this is 0.
        workers: how many threads read and tokenize. 0: the training thread does it between two
            steps.
        prefetch: how many batches are prepared ahead of the training step.
        remote: how long the loader waits for files on other machines.
        cache: local copies of files.
    """

    sources: dict[str, Source]
    phases: dict[str, Phase] = field(default_factory=dict)
    lanes: int = 8  # for 1, 2, 4 or 8 ranks; recipe=olmo2 has 256
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
    def heldout_names(self) -> dict[str, str]:
        """By source, the names of its held-out documents: under these their losses are kept."""
        alone = len(self.sources) == 1
        return {source: "heldout" if alone else source for source in self.sources if self.holdout}

    @property
    def mixture(self) -> list[tuple[int, dict[str, float]]]:
        """(tokens after which they apply, weight of every source); the first apply from 0 on."""
        weights = {name: source.weight for name, source in self.sources.items()}
        mixture = [(0, weights)]
        for phase in sorted(self.phases.values(), key=lambda phase: phase.after_tokens):
            weights = {**weights, **phase.weights}
            mixture.append((phase.after_tokens, weights))
        return mixture

    def problems(self) -> list[Problem]:
        positive = ("lanes", "block_documents", "prefetch", "max_document_bytes")
        found = at_least(self, "data", 1, *positive) + at_least(self, "data", 0, "workers")
        if not 0 <= self.holdout < 1:
            expected = "expected a fraction from 0 to below 1"
            found.append(Problem("data.holdout", self.holdout, expected, "0 holds nothing out"))
        if not 0 <= self.max_quarantined <= 1:
            expected = "expected a fraction from 0 to 1"
            found.append(Problem("data.max_quarantined", self.max_quarantined, expected))
        return found + self._mixture_problems()

    def _mixture_problems(self) -> list[Problem]:
        if not self.sources:
            return [Problem("data.sources", self.sources, "expected at least one source")]
        allowed = "a name is made of letters, digits, _ and -"
        found = [
            Problem(f"data.sources.{name}", expected=allowed)
            for name in self.sources
            if not name.replace("_", "").replace("-", "").isalnum()
        ]
        # A typing error in a phase would otherwise silently leave a weight as it was.
        names = ", ".join(self.sources)
        found += [
            Problem(
                f"data.phases.{phase}.weights.{name}",
                expected=f"no such source; expected one of {names}",
                hint=did_you_mean(closest(name, self.sources)),
            )
            for phase, settings in self.phases.items()
            for name in settings.weights
            if name not in self.sources
        ]
        # Of two phases with the same start, which one applies would depend on their names.
        starts = [phase.after_tokens for phase in self.phases.values()]
        if len(starts) > len(set(starts)):
            reason = "two phases cannot begin together"
            keys = tuple(f"data.phases.{name}.after_tokens" for name in self.phases)
            found.append(Problem("data.phases.*.after_tokens", starts, reason, others=keys))
        # The mixture exists only if the phases are right.
        return found or self._zero_weight_problems()

    def _zero_weight_problems(self) -> list[Problem]:
        keys = (
            *(f"data.sources.{name}.weight" for name in self.sources),
            *(f"data.phases.{name}.weights" for name in self.phases),
        )
        return [
            Problem(
                "data.sources.*.weight",
                list(weights.values()),
                f"expected at least one above 0 from token {start} on",
                others=keys,
            )
            for start, weights in self.mixture
            if not any(weights.values())
        ]

    def batch_problems(self, global_batch: int, world_size: int = 1) -> list[Problem]:
        """Why `world_size` ranks cannot read batches of `global_batch` rows from the lanes."""
        found = []
        # Row i of every batch comes from lane i % lanes, so each lane must have as many rows.
        if global_batch % self.lanes:
            found.append(
                Problem(
                    "train.global_batch",
                    global_batch,
                    f"not divisible by data.lanes={self.lanes}",
                    f"choose a multiple of {self.lanes}, or data.lanes from "
                    f"{_listed(divisors(global_batch))}",
                    others=("data.lanes",),
                )
            )
        # A rank reads whole lanes, so that its cursors are its own.
        if self.lanes % world_size:
            found.append(
                Problem(
                    "data.lanes",
                    self.lanes,
                    f"not divisible by the {plural(world_size, 'rank')} that read rows",
                    f"choose a multiple of {world_size} for a new run, or a number of such ranks "
                    f"from {_listed(divisors(self.lanes))}",
                )
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
    """A SentencePiece model: one that exists, or one that is trained on the data at first use.

    Attributes:
        path: a trained `.model`; null: train one, and keep it for later runs.
        kind: what is trained: `bpe` takes seconds, `unigram` about a minute.
        vocab_size: how many pieces are trained, at most `model.vocab_size`; null: as many as that.
            Very little text gives fewer pieces.
        sample_bytes: how many bytes of the data's text it is trained on.
        cache_dir: the directory where trained models are kept; null: `$PHD_CACHE/tokenizers`, or
            `~/.cache/phd/tokenizers` if PHD_CACHE is not set. If that cannot be written, a
            directory for temporary files.
    """

    path: str | None = None
    kind: Literal["bpe", "unigram"] = "bpe"
    vocab_size: int | None = None
    sample_bytes: int = 32_000_000
    cache_dir: str | None = None

    def problems(self) -> list[Problem]:
        found = at_least(self, "tokenizer", 1, "vocab_size", "sample_bytes")
        if self.path == "":
            expected = "expected the path of a SentencePiece .model"
            found.append(Problem("tokenizer.path", "", expected))
        if self.path and self.vocab_size is not None:
            found.append(
                Problem(
                    "tokenizer.vocab_size",
                    self.vocab_size,
                    "a given tokenizer.path has its own size",
                    "leave one of the two null",
                    others=("tokenizer.path",),
                )
            )
        return found

    def unused(self) -> list[Problem]:
        """What would be said about training a tokenizer, where one is given."""
        if self.path is None:
            return []
        reason = "the tokenizer of tokenizer.path is trained already"
        return without_effect(
            self, "tokenizer", reason, "leave out the path", "kind", "sample_bytes"
        )
