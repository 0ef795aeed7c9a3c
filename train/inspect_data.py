"""What a configuration will feed to the model, before anything is trained on it.

python train/inspect_data.py data=python
"""

from collections import Counter
from itertools import islice
from time import perf_counter
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from conf.errors import ConfigError
from data.batch import Batch
from data.loader import Loader
from data.source import Document, TokenDocument
from data.sources.documents import Documents, is_held_out
from data.stream import BatchShape, TokenStream
from data.tokenizer import Tokenizer
from data.tokenizer_training import prepare_tokenizer
from train import compose
from train.config import Config

READ_S = 10.0
"""Seconds for which each source is read to count what is in it."""

MEASURE_S = 5.0
"""Seconds for which the loader is timed."""

EXCERPT = 3
"""Documents of each source that are shown."""


class Counted(NamedTuple):
    """What was read of a source.

    Attributes:
        documents, held_out: how many there were, and how many of them are held out.
        size: UTF-8 bytes of text, as the tokens spell them.
        tokens: separators included.
        whole: whether that is all there is.
        first: the first documents.
    """

    documents: int
    held_out: int
    size: int
    tokens: int
    whole: bool
    first: list[Document | TokenDocument]


def count(documents: Documents, tokenizer: Tokenizer, name: str, seconds: float) -> Counted:
    """Read a source, at all its lanes' places in turn, until it ends or the time is over."""
    config = documents.config
    totals = Counter(documents=0, held_out=0, size=0, tokens=0)
    first: list[Document | TokenDocument] = []
    whole, deadline = True, perf_counter() + seconds
    for document, digest in documents.round_robin(name, config.lanes):
        tokens = tokenizer.document_tokens(document)
        totals["documents"] += 1
        totals["held_out"] += is_held_out(digest, config.holdout)
        totals["size"] += int(tokenizer.byte_lengths[tokens].sum())
        totals["tokens"] += len(tokens)
        if len(first) < EXCERPT:
            first.append(document)
        if perf_counter() > deadline:
            whole = False
            break
    return Counted(**totals, whole=whole, first=first)


def loading_speed(stream: TokenStream, config: Config, seconds: float) -> tuple[float, Batch]:
    """(tokens/s of the loader alone, the first batch)."""
    with Loader(stream, workers=config.data.workers, depth=config.data.prefetch) as loader:
        first = next(loader)
        start, targets = perf_counter(), 0
        while (spent := perf_counter() - start) < seconds and loader.failure is None:
            stats = next(loader).stats
            assert stats is not None
            targets += stats.targets
    return targets / spent, first


def shown_row(batch: Batch, tokenizer: Tokenizer) -> str:
    """The row with the most documents as text: `⟨/⟩` is a separator, `⟨·n⟩` n tokens of padding."""
    number = int((batch.rows == tokenizer.eos_id).sum(axis=1).argmax())
    row = batch.rows[number]
    end = len(row) if batch.mask is None else 1 + int(batch.mask[number].sum())
    cu_seqlens = np.flatnonzero(row[:end] == tokenizer.eos_id)
    parts = np.split(row[:end], np.stack([cu_seqlens, cu_seqlens + 1], axis=1).ravel())
    text = "".join(
        "⟨/⟩" if part.tolist() == [tokenizer.eos_id] else tokenizer.decode(part) for part in parts
    )
    return text + (f"⟨·{len(row) - end}⟩" if end < len(row) else "")


def print_source(
    name: str, found: Counted, weight: float, tokenizer: Tokenizer, console: Console
) -> None:
    """One source's documents, and a few of them."""
    known = "" if found.whole else "the first "
    epoch = found.tokens * (found.documents - found.held_out) // max(1, found.documents)
    table = Table(title=f"data.sources.{name}", title_justify="left", show_header=False)
    table.add_row("share of the tokens", f"{weight:.1%}")
    table.add_row("documents", f"{known}{found.documents:,}, {found.held_out:,} of them held out")
    table.add_row("text", f"{known}{found.size:,} bytes")
    table.add_row(
        "tokens", f"{known}{found.tokens:,}, {found.size / max(1, found.tokens):.2f} bytes each"
    )
    whole = f"about {epoch:,}" if found.whole else f"not known: read for {READ_S:.0f} s only"
    table.add_row("tokens of an epoch", whole)
    console.print(table)
    for document in found.first:
        if isinstance(document, Document):
            size, text = f"{len(document.text):,} characters", document.text[:60]
        else:
            size, text = f"{len(document.tokens):,} tokens", tokenizer.decode(document.tokens[:20])
        console.print(f"  {document.origin}  {size}  {text!r}", markup=False)


def main(config: Config) -> int:
    """Read, count, show a row, and time the loader."""
    console = Console(soft_wrap=True, highlight=False)
    try:
        documents = Documents(config.data)
        tokenizer = prepare_tokenizer(
            config.tokenizer, documents, vocab_size=config.model.vocab_size
        )
        _, weights = config.data.mixture[0]
        for name, weight in weights.items():
            found = count(documents, tokenizer, name, READ_S)
            print_source(name, found, weight / sum(weights.values()), tokenizer, console)
        quarantine = documents.quarantine
        records, faults = quarantine.records, len(quarantine.bad_records)
        shape = BatchShape(global_batch=config.train.global_batch, seq_len=config.train.seq_len)
        stream = TokenStream(documents, tokenizer, shape, seed=config.seed)
        speed, batch = loading_speed(stream, config, MEASURE_S)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError([str(error)]) from error
    console.print(
        f"\n[bold]a row[/] of the first batch, {config.train.seq_len} tokens; ⟨/⟩ ends a document"
    )
    console.print(shown_row(batch, tokenizer), markup=False)
    if batch.mask is not None:
        stats = batch.stats
        assert stats is not None
        console.print(f"padding: {1 - stats.targets / stats.positions:.1%} of the first batch")
    console.print(f"\nquarantined: {faults} of {records:,} records")
    if faults:
        console.print(f"  {quarantine.summary()}; for example", markup=False)
    for fault in islice(quarantine.bad_records.values(), EXCERPT):
        console.print(f"  {fault.origin}: {fault.reason}", markup=False)
    console.print(
        f"the loader alone: {speed:,.0f} tokens/s with data.workers={config.data.workers}"
    )
    return 0


if __name__ == "__main__":
    compose.run(main)
