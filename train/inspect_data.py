"""Inspect the data of a configuration: its sources, a row of the first batch, the loader's speed.

python train/inspect_data.py data=python
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # first of all: the imports below take seconds
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # see conf/checkout.py
    from train import compose

    compose.run("train.inspect_data")

from collections import Counter
from itertools import islice
from time import perf_counter
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from conf.wording import plural
from data.batch import Batch
from data.config import DataConfig
from data.loader import Loader
from data.source import Document, TokenDocument
from data.sources.documents import Documents, is_held_out
from data.sources.quarantine import Quarantine
from data.stream import BY_DOCUMENTS, BatchShape, TokenStream
from data.tokenizer import Tokenizer
from train.config import Config
from train.start.tokenizer_of_weights import tokenizer_of_new_run

READ_S = 10.0
"""Seconds for which each source is read to count its documents."""

MEASURE_S = 5.0
"""Seconds for which the loader's speed is measured."""

EXCERPT = 3
"""Number of documents of each source that are shown."""


class SourceCounts(NamedTuple):
    """The counts of a source, as far as it was read.

    Attributes:
        documents: number of documents.
        held_out: number of those documents that are held out for evaluation.
        size: bytes of text in UTF-8, computed from the tokens.
        tokens: number of tokens, including separators.
        complete: whether the source was read to its end.
        first: the first documents.
    """

    documents: int
    held_out: int
    size: int
    tokens: int
    complete: bool
    first: list[Document | TokenDocument]


def count(documents: Documents, tokenizer: Tokenizer, name: str, seconds: float) -> SourceCounts:
    """Read a source until it ends or the time is over.

    Its lanes take turns. They start at different places, so what is read is a fair sample.
    """
    config = documents.config
    totals = Counter(documents=0, held_out=0, size=0, tokens=0)
    first: list[Document | TokenDocument] = []
    complete, deadline = True, perf_counter() + seconds
    for document, digest in documents.round_robin(name, config.lanes):
        tokens = tokenizer.document_tokens(document)
        totals["documents"] += 1
        totals["held_out"] += is_held_out(digest, config.holdout)
        totals["size"] += int(tokenizer.byte_lengths[tokens].sum())
        totals["tokens"] += len(tokens)
        if len(first) < EXCERPT:
            first.append(document)
        if perf_counter() > deadline:
            complete = False
            break
    return SourceCounts(**totals, complete=complete, first=first)


def loading_speed(stream: TokenStream, config: Config, seconds: float) -> tuple[float, Batch]:
    """(tokens/s of the loader without training, the first batch)."""
    with Loader(stream, workers=config.data.workers, depth=config.data.prefetch) as loader:
        first = next(loader)  # not timed: it includes opening the files
        start, targets = perf_counter(), 0
        while (spent := perf_counter() - start) < seconds and loader.failure is None:
            stats = next(loader).stats
            assert stats is not None
            targets += stats.targets
    return targets / spent, first


def shown_row(batch: Batch, tokenizer: Tokenizer) -> str:
    """The row with the most documents, as text.

    `⟨/⟩` stands for a separator and `⟨·n⟩` for n tokens of padding.
    """
    index = int((batch.rows == tokenizer.eos_id).sum(axis=1).argmax())
    row = batch.rows[index]
    end = len(row) if batch.mask is None else 1 + int(batch.mask[index].sum())
    # Separators are cut out first: the tokenizer would decode a separator to an empty text.
    cu_seqlens = np.flatnonzero(row[:end] == tokenizer.eos_id)
    parts = np.split(row[:end], np.stack([cu_seqlens, cu_seqlens + 1], axis=1).ravel())
    text = "".join(
        "⟨/⟩" if part.tolist() == [tokenizer.eos_id] else tokenizer.decode(part) for part in parts
    )
    return text + (f"⟨·{len(row) - end}⟩" if end < len(row) else "")


def shares(config: DataConfig, name: str) -> str:
    """A source's part of the tokens, and what it is from each phase on.

    >>> from data.config import Phase, PythonSource
    >>> source = PythonSource(kind="python")
    >>> anneal = Phase(after_tokens=9000, weights={"b": 3})
    >>> shares(DataConfig(sources={"a": source, "b": source}, phases={"anneal": anneal}), "b")
    '50.0%; from token 9,000 on 75.0%'
    """
    return "; ".join(
        f"{f'from token {start:,} on ' if start else ''}{weights[name] / sum(weights.values()):.1%}"
        for start, weights in config.mixture
    )


def print_source(
    name: str, found: SourceCounts, share: str, tokenizer: Tokenizer, console: Console
) -> None:
    """Print the counts of a source and its `share` of the tokens, and a few of its documents."""
    # What is printed after "the first" was counted in a part of the source.
    first = "" if found.complete else "the first "
    epoch = found.tokens * (found.documents - found.held_out) // max(1, found.documents)
    table = Table(title=f"data.sources.{name}", title_justify="left", show_header=False)
    table.add_row("share of the tokens", share)
    table.add_row("documents", f"{first}{found.documents:,}, {found.held_out:,} of them held out")
    table.add_row("text", f"{first}{plural(found.size, 'byte')}")
    table.add_row(
        "tokens", f"{first}{found.tokens:,}, {found.size / max(1, found.tokens):.2f} bytes each"
    )
    estimate = f"about {epoch:,}" if found.complete else f"not known: read for {READ_S:.0f} s only"
    table.add_row("tokens of an epoch", estimate)
    console.print(table)
    for document in found.first:
        if isinstance(document, Document):
            size, text = plural(len(document.text), "character"), document.text[:60]
        else:
            size = plural(len(document.tokens), "token")
            text = tokenizer.decode(document.tokens[:20])
        console.print(f"  {document.origin}  {size}  {text!r}", markup=False)


def main(config: Config) -> int:
    """Count each source, show a row of the first batch, and measure the loader's speed."""
    console = Console(soft_wrap=True, highlight=False)
    documents = Documents(config.data)
    for remark in documents.remarks:
        console.print(remark, markup=False)
    tokenizer = tokenizer_of_new_run(config, documents, console)
    # The tokenizer may have been trained on some of the records, which are counted from here on.
    quarantine = documents.quarantine = Quarantine(config.data.max_quarantined)
    for name in config.data.sources:
        found = count(documents, tokenizer, name, READ_S)
        print_source(name, found, shares(config.data, name), tokenizer, console)
    records, bad = quarantine.records, len(quarantine.bad_records)
    shape = BatchShape(global_batch=config.train.global_batch, seq_len=config.train.seq_len)
    stream = TokenStream(documents, tokenizer, shape, seed=config.seed)
    for name in sorted(stream.empty_lanes()):
        documents.set_lane_starts(name, stream.cut_by_documents(name))
        console.print(f"data.sources.{name}: {BY_DOCUMENTS}", markup=False)
    # The quarantine was counted before: the loader reads the same records again.
    speed, batch = loading_speed(stream, config, MEASURE_S)
    console.print(
        f"\n[bold]a row[/] of the first batch, {config.train.seq_len} tokens; ⟨/⟩ ends a document"
    )
    console.print(shown_row(batch, tokenizer), markup=False)
    if batch.mask is not None:
        stats = batch.stats
        assert stats is not None
        console.print(f"padding: {1 - stats.targets / stats.positions:.1%} of the first batch")
    console.print(f"\nquarantined: {bad} of {plural(records, 'record')}")
    if bad:
        console.print(f"  {quarantine.summary()}; for example", markup=False)
    for record in islice(quarantine.bad_records.values(), EXCERPT):
        console.print(f"  {record.origin}: {record.reason}", markup=False)
    console.print(
        f"the loader alone: {speed:,.0f} tokens/s with data.workers={config.data.workers}"
    )
    return 0
