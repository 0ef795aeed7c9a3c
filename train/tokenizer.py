"""Train a tokenizer for later runs, and report its compression and its speed.

python train/tokenizer.py data=python tokenizer=unigram model.vocab_size=8192 out=python.model
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # first of all: the imports below take seconds
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # see conf/checkout.py
    from train import compose
    from train.arguments import TokenizerArguments

    compose.run_with(TokenizerArguments, "train.tokenizer")

import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from conf.errors import ConfigError, Problem, reason_of
from conf.wording import plural
from data.config import TokensSource
from data.sources.documents import Documents
from data.tokenizer import Tokenizer
from data.tokenizer_training import train, training_options
from train.arguments import TokenizerArguments
from train.config import Config

MEASURED = 8_000_000
"""Bytes of the sample that are encoded to measure a tokenizer; of held-out text an eighth of it."""


ROUND = 64
"""The vocabulary size is rounded up to a multiple of this, which suits the tiles of GPU kernels."""


class Encoded(NamedTuple):
    """The result of encoding some texts."""

    documents: int
    size: int  # bytes in UTF-8
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Report:
    """A tokenizer and its measurements.

    Attributes:
        tokenizer: the trained tokenizer.
        documents: number of documents in the sample that it was trained on.
        size: bytes of the sample in UTF-8.
        training_s: seconds of training, without reading the sample.
        sample: the result of encoding the beginning of the sample in one thread.
        held_out: the result of encoding held-out text; None if no text is held out.
    """

    tokenizer: Tokenizer
    documents: int
    size: int
    training_s: float
    sample: Encoded
    held_out: Encoded | None


def make_tokenizer(config: Config) -> Report:
    """Train a tokenizer on a sample of the data, as a run without a tokenizer does, and measure it.

    Raises:
        ValueError: there is no text, or the vocabulary is too small for it.
    """
    if config.tokenizer.path is not None:
        hint = "choose tokenizer=bpe or tokenizer=unigram to train another one"
        path = config.tokenizer.path
        raise ConfigError([Problem("tokenizer.path", path, "is trained already", hint)])
    documents = Documents(config.data)
    # The list keeps reading out of the time of training.
    sample = list(documents.sample(config.tokenizer.sample_bytes))
    start = perf_counter()
    tokenizer = train(iter(sample), training_options(config.tokenizer, config.model.vocab_size))
    training_s = perf_counter() - start
    held_out = list(_held_out(documents, MEASURED // 8))
    return Report(
        tokenizer=tokenizer,
        documents=len(sample),
        size=sum(len(text.encode()) for text in sample),
        training_s=training_s,
        sample=encode(tokenizer, _beginning(sample, MEASURED)),
        held_out=encode(tokenizer, held_out) if held_out else None,
    )


def encode(tokenizer: Tokenizer, texts: Iterable[str]) -> Encoded:
    """Encode texts one by one, in this thread. Only encoding itself is timed."""
    documents = size = tokens = 0
    seconds = 0.0
    for text in texts:
        start = perf_counter()
        count = len(tokenizer.encode(text))
        seconds += perf_counter() - start
        documents, size, tokens = documents + 1, size + len(text.encode()), tokens + count
    return Encoded(documents, size, tokens, seconds)


def _held_out(documents: Documents, size: int) -> Iterator[str]:
    """About `size` bytes of held-out text, divided among the sources by their weights."""
    config = documents.config
    _, weights = config.mixture[0]
    # Sources of tokens are skipped: their text is not known.
    texts = {n: w for n, w in weights.items() if not isinstance(config.sources[n], TokensSource)}
    for name, weight in texts.items() if config.holdout else ():
        found = (document.text for document in documents.held_out(name))  # type: ignore[union-attr]
        yield from _beginning(found, size * weight / sum(texts.values()))


def _beginning(texts: Iterable[str], size: float) -> Iterator[str]:
    """The first texts, until they have `size` bytes; the last one is not cut."""
    for text in texts if size else ():
        yield text
        size -= len(text.encode())
        if size <= 0:
            break


def print_report(report: Report, console: Console) -> None:
    """Print the report as a table."""
    tokenizer, sample = report.tokenizer, report.sample
    table = Table(title="the tokenizer", title_justify="left", show_header=False)
    table.add_row("pieces", f"{tokenizer.vocab_size:,}")
    table.add_row(
        "trained on", f"{plural(report.documents, 'document')}, {report.size / 1e6:,.1f} MB"
    )
    table.add_row("training", f"{report.training_s:.1f} s")
    table.add_row("bytes per token", f"{_bytes_per_token(report.held_out)} of held-out text")
    table.add_row("", f"{_bytes_per_token(sample)} of the sample")
    table.add_row(
        "speed, one thread",
        f"{sample.size / sample.seconds / 1e6:.1f} MB/s, "
        f"{sample.tokens / sample.seconds:,.0f} tokens/s",
    )
    table.add_row("fingerprint", tokenizer.fingerprint)
    console.print(table)


def _bytes_per_token(encoded: Encoded | None) -> str:
    return "none" if encoded is None else f"{encoded.size / encoded.tokens:.3f}"


def main(args: TokenizerArguments, config: Config) -> int:
    """Train the tokenizer, write it, and print the report."""
    console = Console(soft_wrap=True, highlight=False)
    try:
        report = make_tokenizer(config)
        report.tokenizer.save(args.path)
    except OSError as error:
        raise ConfigError(
            [Problem("out", args.out, f"cannot be written ({reason_of(error)})")]
        ) from error
    print_report(report, console)
    path = shlex.quote(str(args.path))
    rounded = -(-report.tokenizer.vocab_size // ROUND) * ROUND
    # The model's vocabulary may be larger than the tokenizer's; the rest is never used.
    use = f"tokenizer=file tokenizer.path={path} model.vocab_size={rounded}"
    console.print(f"written: {path}\nuse it: {use}", markup=False)
    return 0
