"""Random corpora, settings and kill points: whatever happens, the rows are the same.

`make soak-data CASES=500 SEED=0` runs many; here are some tens.
"""

import bz2
import gzip
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from conf.errors import DataError
from data.batch import Batch, Cursors
from data.config import (
    CacheConfig,
    DataConfig,
    DatasetsSource,
    FilesSource,
    Phase,
    RemoteConfig,
    Source,
    TokensSource,
    divisors,
)
from data.loader import Loader
from data.mixture import Lane
from data.sources.documents import Documents
from data.sources.token_files import write_tokens
from data.stream import BatchShape, OutOfTextError, TokenStream
from data.tokenizer import Tokenizer

CASES = int(os.environ.get("CASES", "40"))
FIRST = int(os.environ.get("SEED", "0"))
WORDS = "the parallel hidden decoding transformer keeps only original tokens"

FORMS = (
    *("jsonl", "jsonl.gz", "jsonl.zst", "jsonl.bz2", "txt", "separated", "parquet", "tokens"),
    *("datasets-jsonl", "datasets-parquet"),
)


@dataclass(frozen=True)
class Case:
    """One random run: its data and its shape. Ranks and workers may change while it goes on."""

    config: DataConfig
    texts: dict[str, list[str]]
    global_batch: int
    seq_len: int
    seed: int
    steps: int


def write_shard(path: Path, texts: list[str], generator: Random) -> None:
    """Some texts in the form that the file's name says."""
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    half = len(lines) // 2
    match path.name.split(".", 1)[1]:
        case "jsonl":
            path.write_bytes(lines)
        case "jsonl.gz":  # of several members
            path.write_bytes(gzip.compress(lines[:half]) + gzip.compress(lines[half:]))
        case "jsonl.zst":  # of several frames
            path.write_bytes(zstandard.compress(lines[:half]) + zstandard.compress(lines[half:]))
        case "jsonl.bz2":
            path.write_bytes(bz2.compress(lines))
        case "txt":
            path.write_text("\n\n".join(texts), newline="")
        case "parquet":
            rows = generator.choice([1, 3, 100])
            pq.write_table(
                pa.table({"text": pa.array(texts, pa.string())}), path, row_group_size=rows
            )


def cut(texts: list[str], parts: int, generator: Random) -> list[list[str]]:
    """The texts in some parts, of which some may be empty."""
    places = sorted(generator.choices(range(len(texts) + 1), k=parts - 1))
    return [texts[a:b] for a, b in zip([0, *places], [*places, len(texts)], strict=True)]


def draw_source(
    name: str, folder: Path, generator: Random, tokenizer: Tokenizer, url: str | None
) -> tuple[Source, list[str]]:
    """A corpus of some form, written, and its texts."""
    form = generator.choice(FORMS[:-3] if url else FORMS)
    texts = [
        f"{name}{i} "
        + " ".join(generator.choices(WORDS.split(), k=generator.choice([1, 5, 20, 60])))
        for i in range(generator.randint(40, 90))
    ]
    folder = folder / name
    folder.mkdir()
    settings: dict[str, Any] = {"weight": generator.choice([1.0, 0.3, 4.0])}
    if form == "tokens":
        write_tokens(folder / "tokens", cut(texts, generator.randint(1, 4), generator), tokenizer)
        return TokensSource(kind="tokens", path=str(folder / "tokens"), **settings), texts
    if form == "txt":
        for i, text in enumerate(texts):
            (folder / f"{i:03}.txt").write_text(text)
    else:
        end = {"separated": "txt"}.get(form, form.removeprefix("datasets-"))
        for i, part in enumerate(cut(texts, generator.randint(1, 5), generator)):
            if part or form.startswith("datasets-") is False:
                write_shard(folder / f"{i:03}.{end}", part, generator)
    if form.startswith("datasets-"):
        path = {"jsonl": "json", "parquet": "parquet"}[end]
        files = tuple(sorted(map(str, folder.iterdir())))
        return DatasetsSource(kind="datasets", path=path, data_files=files, **settings), texts
    separator = "\n\n" if form == "separated" else None
    files = [f"{url}/{name}/{p.name}" for p in folder.iterdir()] if url else [str(folder)]
    return FilesSource(
        kind="files", paths=tuple(sorted(files)), separator=separator, **settings
    ), texts


def draw_case(
    folder: Path, generator: Random, tokenizer: Tokenizer, url: str | None = None
) -> Case:
    """A random run whose data lies in a folder, or is served from it under a URL."""
    made = {
        name: draw_source(name, folder, generator, tokenizer, url)
        for name in "abc"[: generator.choice([1, 1, 2, 3])]
    }
    sources = {name: source for name, (source, _) in made.items()}
    if len(sources) > 1 and generator.random() < 0.4:
        sources["b"] = replace(sources["b"], epochs=generator.randint(1, 2))
    elif generator.random() < 0.4:  # text that ends
        sources = {n: replace(s, epochs=generator.randint(1, 2)) for n, s in sources.items()}
    phases = {}
    if len(sources) > 1 and generator.random() < 0.4:
        phases = {
            "later": Phase(after_tokens=generator.randint(1, 3000), weights={"a": 9.0, "b": 0.1})
        }
    seq_len = generator.randint(4, 60)
    config = DataConfig(
        sources=sources,
        phases=phases,
        shuffle=generator.random() < 0.8,
        block_documents=generator.randint(1, 9),
        holdout=generator.choice([0.0, 0.1]),
        documents=generator.choice(["concatenate", "isolate"]),
        packing=generator.choice(["sequential", "best_fit"]),
        remote=RemoteConfig(timeout_s=0.5, retry_s=30),
        cache=CacheConfig(dir=str(folder / "cache"), remote=generator.random() < 0.3),
    )
    wanted = generator.choice([1, 2, 3, 4, 6, 8])
    lanes = next(n for n in (8, 6, 4, 3, 2, 1) if n <= wanted and feeds(replace(config, lanes=n)))
    config = replace(config, lanes=lanes)
    global_batch = lanes * generator.randint(1, 3)
    texts = {name: own for name, (_, own) in made.items()}
    size = sum(len(tokenizer.encode_document(t)) for own in texts.values() for t in own)
    steps = min(300, round(generator.choice([0.6, 1.3, 2.4]) * size / (global_batch * seq_len)) + 3)
    return Case(config, texts, global_batch, seq_len, generator.randint(0, 9), steps)


def feeds(config: DataConfig) -> bool:
    """Whether every lane has a document of every source, as every run must."""
    documents = Documents(config)
    try:
        for name in config.sources:
            for lane in range(config.lanes):
                next(documents.training(name, lane))
    except DataError as error:
        if "a lane found no document" in str(error):
            return False
        raise
    return True


def stream(
    case: Case, tokenizer: Tokenizer, rank: int, world_size: int, cursors: Cursors | None
) -> TokenStream:
    shape = BatchShape(
        global_batch=case.global_batch, seq_len=case.seq_len, rank=rank, world_size=world_size
    )
    return TokenStream(Documents(case.config), tokenizer, shape, seed=case.seed, cursors=cursors)


def as_bytes(batches: list[Batch], world_size: int) -> bytes:
    """The batches of all ranks at a step, put together by row."""
    parts = []
    for batch in batches:
        rows, mask, starts = batch.rows, batch.mask, batch.document_starts
        mask = np.ones_like(rows[:, 1:]) if mask is None else mask
        parts.append(np.concatenate([rows, mask, mask if starts is None else starts], axis=1))
    whole = np.empty((len(parts) * len(parts[0]), parts[0].shape[1]), np.int64)
    for rank, part in enumerate(parts):
        whole[rank::world_size] = part
    return whole.tobytes()


def interrupted(case: Case, generator: Random, tokenizer: Tokenizer) -> Iterator[bytes]:
    """The run, killed and taken up again and again by other numbers of ranks and workers."""
    cursors: Cursors | None = None
    done = 0
    while done < case.steps:
        world_size = generator.choice(divisors(case.config.lanes))
        workers, depth = generator.choice([0, 0, 1, 2, 3]), generator.randint(1, 4)
        wanted = min(generator.choice([1, 2, 7, 30, 300]), case.steps - done)
        with ExitStack() as alive:
            ranks = [
                alive.enter_context(
                    Loader(
                        stream(case, tokenizer, r, world_size, cursors),
                        workers=workers,
                        depth=depth,
                    )
                )
                for r in range(world_size)
            ]
            for _ in range(wanted):
                batches = [next(rank) for rank in ranks]
                yield as_bytes(batches, world_size)
        merged = {lane: cursor for batch in batches for lane, cursor in batch.stats.cursors.items()}
        cursors = json.loads(json.dumps(merged))
        done += wanted


def check_rows(case: Case, generator: Random, tokenizer: Tokenizer) -> None:
    """The interrupted run's rows are those of one rank without any interruption."""
    batches: list[Batch] = []
    ended = False
    try:
        for batch in islice(Loader(stream(case, tokenizer, 0, 1, None)), case.steps):
            batches.append(batch)
    except OutOfTextError:
        ended = True
    case = replace(case, steps=len(batches))
    whole = [as_bytes([batch], 1) for batch in batches]
    for step, (a, b) in enumerate(zip(whole, interrupted(case, generator, tokenizer), strict=True)):
        assert a == b, f"step {step}"
    if ended:
        check_all_was_read(case, batches, tokenizer)


def check_all_was_read(case: Case, batches: list[Batch], tokenizer: Tokenizer) -> None:
    """The targets of a run that came to the end of its text are all tokens of all its epochs."""
    documents = Documents(case.config)
    expected: Counter[int] = Counter()
    for name, source in case.config.sources.items():
        assert source.epochs
        for lane in range(case.config.lanes):
            for document, _ in documents.training(name, lane):
                for token in tokenizer.document_tokens(document).tolist():
                    expected[token] += source.epochs
    found: Counter[int] = Counter()
    for batch in batches:
        targets = batch.rows[:, 1:]
        found.update((targets.ravel() if batch.mask is None else targets[batch.mask]).tolist())
    if case.config.packing == "sequential":  # a lane's first token has nothing before it
        found.update(batches[0].rows[: case.config.lanes, 0].tolist())
    assert found == expected


def check_epochs(case: Case, tokenizer: Tokenizer) -> None:
    """Every document of an epoch comes once in it, in one lane."""
    documents = Documents(replace(case.config, phases={}))
    for name, texts in case.texts.items():
        if not case.config.sources[name].weight:
            continue
        expected = Counter(texts) - Counter(_texts(documents.held_out(name), tokenizer))
        epochs: list[Counter[str]] = [Counter(), Counter()]
        for number in range(case.config.lanes):
            lane = Lane(documents, tokenizer, case.seed, number)
            own = sum(1 for _ in documents.training(name, number))
            alone = replace(documents.config, sources={name: documents.config.sources[name]})
            lane = Lane(Documents(replace(alone, phases={})), tokenizer, case.seed, number)
            limit = documents.config.sources[name].epochs
            wanted = own * min(2, limit or 2)
            read = [tokenizer.decode(tokens) for tokens, _ in islice(lane.read(), wanted)]
            assert len(read) == wanted
            epochs[0] += Counter(read[:own])
            epochs[1] += Counter(read[own:])
        assert epochs[0] == expected
        assert epochs[1] in (expected, Counter())


def _texts(documents: Iterator[Any], tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.decode(tokenizer.document_tokens(d)) for d in documents]


@pytest.mark.parametrize("seed", range(FIRST, FIRST + CASES))
def test_rows_are_the_same_through_any_kills_and_changes(
    tmp_path: Path, tokenizer: Tokenizer, seed: int
) -> None:
    generator = Random(seed)
    case = draw_case(tmp_path, generator, tokenizer)
    check_rows(case, generator, tokenizer)
    check_epochs(case, tokenizer)


@pytest.mark.parametrize("seed", range(FIRST, FIRST + max(1, CASES // 5)))
def test_rows_are_the_same_over_a_faulty_network(
    tmp_path: Path, tokenizer: Tokenizer, fault_server: Callable[..., Any], seed: int
) -> None:
    generator = Random(f"network {seed}")
    server = fault_server(tmp_path, rate=0.05, seed=seed)
    case = draw_case(tmp_path, generator, tokenizer, server.url)
    check_rows(case, generator, tokenizer)
    check_epochs(case, tokenizer)
