"""Speed of the loader alone, and the time to resume in the middle of a corpus."""

import gzip
import json
import shutil
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import torch
from pyarrow.parquet import ParquetWriter

from data.config import (
    CacheConfig,
    DataConfig,
    FilesSource,
    PythonSource,
    Source,
    TokenizerConfig,
    TokensSource,
)
from data.loader import Loader
from data.mixture import LaneCursor, SourceState
from data.shuffle import Cursor
from data.source import Document
from data.sources.documents import Documents
from data.sources.token_files import INDEX, TokenIndex, shard_name, write_tokens
from data.stream import BatchShape, TokenStream
from data.tokenizer import Tokenizer
from data.tokenizer_training import prepare_tokenizer
from train.benchmarks.timing import Result, Times, Work, beside

CPU = torch.device("cpu")
SEQ_LEN, LANES, VOCAB_SIZE = 2048, 8, 4096

MANY_TOKENS = 50_000_000
"""Pre-tokenised tokens that are read in a turn: at 120 M tokens/s about half a second."""

SHORT_PART = 16
"""The short form reads one text of so many."""

PLACES = (0.01, 0.5, 0.99)
"""Where reading resumes, as fractions of the corpus."""

BLOCK = 256
"""Documents of a shuffled block: the default of `data.block_documents`."""

ROW_GROUP = 64
"""Documents of a Parquet row group: about a megabyte, so that a seek decodes little."""


def bench_loading(repeat: int, *, short: bool = False) -> Result:
    """Time the loader without workers, on one core, against SentencePiece on the same texts.

    The short form reads a part of them.
    """
    with TemporaryDirectory() as name:
        folder = Path(name)
        texts = _texts()[:: SHORT_PART if short else 1]
        many_tokens = MANY_TOKENS // (SHORT_PART if short else 1)
        tokenizer = _tokenizer()
        total = sum(len(tokenizer.encode_document(text)) for text in texts)
        _write_jsonl(folder / "text.jsonl", texts)
        _write_parquet(folder / "text.parquet", texts)
        write_tokens(folder / "tokens", [texts], tokenizer)
        sources: dict[str, Source] = {
            "jsonl": FilesSource(kind="files", paths=str(folder / "text.jsonl")),
            "parquet": FilesSource(kind="files", paths=str(folder / "text.parquet")),
        }
        works = {n: _loading(source, folder, tokenizer, total) for n, source in sources.items()}
        tokens = TokensSource(kind="tokens", path=str(folder / "tokens"))
        works["pre-tokenised"] = _loading(tokens, folder, tokenizer, many_tokens)
        alone: Work = lambda: [*map(tokenizer.encode, texts)]  # noqa: E731
        times = beside("SentencePiece", alone, works, repeat, CPU)
    # Tokens are read about a hundred times as fast as text, so a turn reads more of them.
    amounts = dict.fromkeys(times.seconds, total) | {"pre-tokenised": many_tokens}
    rows = {name: _speed(times, name, amount, total) for name, amount in amounts.items()}
    ratios = {f"{name}_over_sentencepiece": rows[name]["x_SentencePiece"] for name in sources}
    ratios["pretokenised_million_tokens_per_s"] = rows["pre-tokenised"]["million_tokens_per_s"]
    return Result(list(rows.values()), ratios)


def _speed(times: Times, name: str, amount: int, total: int) -> dict[str, Any]:
    """The row of a source that reads `amount` tokens in a turn; SentencePiece makes `total`."""
    ratio, more = times.ratio(name), amount / total
    return {
        "work": name,
        "million_tokens_per_s": amount / times.typical_s(name) / 1e6,
        "x_SentencePiece": more / ratio.median,
        "x_low": more / ratio.high,
        "x_high": more / ratio.low,
        "seconds": times.seconds[name],
    }


def bench_resuming(repeat: int, gigabytes: float) -> Result:
    """Time from a cursor to the first batch, in one lane, at several places of a corpus.

    The corpus repeats one block of texts in one order. So the work after the seek is equal, and
    only the place makes a difference.
    """
    with TemporaryDirectory() as name:
        folder = Path(name)
        texts, tokenizer, size = _texts()[:BLOCK], _tokenizer(), round(gigabytes * 1e9)
        sources = _large_corpora(folder, texts, size, tokenizer)
        rows: list[dict[str, Any]] = []
        for form, source in sources.items():
            # Without shuffling, the blocks are equal at all places.
            config = replace(_config(source, folder, lanes=1), shuffle=False, block_documents=BLOCK)
            cursors = _cursors(Documents(config))
            works = {
                f"{place:.0%}": _resuming(config, tokenizer, cursor)
                for place, cursor in zip(PLACES, cursors, strict=True)
            }
            times = beside("1%", works.pop("1%"), works, repeat, CPU)
            typical = {f"at {name} ms": times.typical_s(name) * 1e3 for name in times.seconds}
            last = dict(zip(("99%_over_1%", "x_low", "x_high"), times.ratio("99%"), strict=True))
            rows.append({"work": form} | typical | last | {"seconds": times.seconds})
    return Result(rows, {f"{row['work']}_99%_over_1%": row["99%_over_1%"] for row in rows})


def _texts() -> list[str]:
    """The standard library's source files: about 12 MB that every machine has."""
    config = DataConfig(sources={"python": PythonSource(kind="python")})
    found = Documents(config).valid_records("python", 0, 1)
    return [record.document.text for record in found if isinstance(record.document, Document)]


def _tokenizer() -> Tokenizer:
    documents = Documents(DataConfig(sources={"python": PythonSource(kind="python")}))
    return prepare_tokenizer(TokenizerConfig(), documents, vocab_size=VOCAB_SIZE)


def _config(source: Source, folder: Path, *, lanes: int) -> DataConfig:
    cache = CacheConfig(dir=str(folder / "cache"))
    return DataConfig(sources={"text": source}, lanes=lanes, holdout=0.0, cache=cache)


def _stream(config: DataConfig, tokenizer: Tokenizer, cursors: Any = None) -> TokenStream:
    shape = BatchShape(global_batch=8, seq_len=SEQ_LEN)
    return TokenStream(Documents(config), tokenizer, shape, seed=0, cursors=cursors)


def _loading(source: Source, folder: Path, tokenizer: Tokenizer, tokens: int) -> Work:
    """Make batches of `tokens` tokens in this thread."""
    config = _config(source, folder, lanes=LANES)

    def work() -> None:
        batches = Loader(_stream(config, tokenizer))
        for _ in range(tokens // (8 * SEQ_LEN)):
            next(batches)

    return work


def _resuming(config: DataConfig, tokenizer: Tokenizer, cursor: LaneCursor) -> Work:
    documents = Documents(config)
    shape = BatchShape(global_batch=8, seq_len=SEQ_LEN)
    cursors = {"0": cursor.to_json()}
    return lambda: Loader(TokenStream(documents, tokenizer, shape, seed=0, cursors=cursors)).peek()


def _cursors(documents: Documents) -> list[LaneCursor]:
    """Cursors at `PLACES` of the only lane's documents."""
    block = documents.config.block_documents
    positions = [position for _, position in documents.training("text", 0)]
    cursors = []
    for place in PLACES:
        number = round(place * len(positions)) // block
        cursor = Cursor(block=number, position=positions[number * block - 1] if number else None)
        cursors.append(LaneCursor({"text": SourceState(cursor)}))
    return cursors


def _large_corpora(
    folder: Path, texts: list[str], size: int, tokenizer: Tokenizer
) -> dict[str, Source]:
    """Write a corpus of `size` bytes of text, which repeats the texts, in several formats."""
    repeats = -(-size // sum(len(text.encode()) for text in texts))
    _write_jsonl(folder / "large.jsonl", texts * repeats)
    with (
        (folder / "large.jsonl").open("rb") as plain,
        gzip.open(folder / "large.jsonl.gz", "wb", compresslevel=1) as packed,
    ):
        shutil.copyfileobj(plain, packed, 1 << 20)
    _write_parquet(folder / "large.parquet", texts * repeats)
    sources: dict[str, Source] = {
        form: FilesSource(kind="files", paths=str(folder / f"large.{form}"))
        for form in ("jsonl", "jsonl.gz", "parquet")
    }
    _write_repeated_tokens(folder / "tokens", texts, repeats, tokenizer)
    return sources | {"tokens": TokensSource(kind="tokens", path=str(folder / "tokens"))}


def _write_repeated_tokens(
    path: Path, texts: list[str], repeats: int, tokenizer: Tokenizer
) -> None:
    """Write the repeated texts as token files. They are tokenised once, and copied then."""
    write_tokens(path, [texts], tokenizer)
    index = TokenIndex.load(path / INDEX)
    [first] = index.shards
    for number in range(1, repeats):
        shard = replace(first, name=shard_name(number))
        for suffix in shard.xxh3_128:
            shutil.copy(path / f"{first.name}.{suffix}", path / f"{shard.name}.{suffix}")
        index = index.with_shard(shard)
    replace(index, parts=repeats).save(path / INDEX)


def _write_jsonl(path: Path, texts: list[str]) -> None:
    with path.open("w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)


def _write_parquet(path: Path, texts: list[str]) -> None:
    schema = pa.schema({"text": pa.string()})
    with ParquetWriter(path, schema) as writer:
        for start in range(0, len(texts), ROW_GROUP):
            writer.write_table(pa.table({"text": texts[start : start + ROW_GROUP]}, schema=schema))
