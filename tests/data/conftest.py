"""A small corpus in every form that it can be read from, and a small tokenizer."""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data.config import CacheConfig, DataConfig, DatasetsSource, FilesSource
from data.sources.documents import Documents
from data.tokenizer import Tokenizer
from data.tokenizer_training import LOSSLESS, train
from tests.data.storage.fault_server import FaultServer, serving

KINDS = (
    "txt",
    "separated",
    "jsonl",
    "jsonl.gz",
    "jsonl.zst",
    "parquet",
    "datasets-jsonl",
    "datasets-parquet",
)
PHRASE = "the parallel hidden decoding transformer keeps only\nits  original\ttokens é 😀 12 </s>"


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """41 different documents of 1 to 60 words; 41 divides by no number of lanes or files."""
    random = Random(0)
    words = PHRASE.split(" ")
    return [f"{i} " + " ".join(random.choices(words, k=random.randint(1, 60))) for i in range(41)]


@pytest.fixture(scope="session")
def tokenizer(texts: list[str]) -> Tokenizer:
    return train(iter(texts), {**LOSSLESS, "model_type": "bpe", "vocab_size": 400})


def write_texts(path: Path, texts: list[str]) -> None:
    lines = "".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in enumerate(texts)).encode()
    match path.name.split(".", 1)[1]:
        case "txt":
            path.write_bytes(texts[0].encode())
        case "txt.gz":
            path.write_bytes(gzip.compress(texts[0].encode()))
        case "separated":
            path.with_suffix(".txt").write_bytes("<|end|>".join(texts).encode())
        case "jsonl" | "JSONL" | "ndjson" | "json":
            path.write_bytes(lines)
        case "jsonl.xz":
            path.write_bytes(lzma.compress(lines))
        case "jsonl.gz":
            path.write_bytes(gzip.compress(lines))
        case "jsonl.bz2":
            path.write_bytes(bz2.compress(lines))
        case "jsonl.zst":
            path.write_bytes(zstandard.compress(lines))
        case "parquet":
            table = pa.table({"id": list(range(len(texts))), "text": texts})
            pq.write_table(table, path, row_group_size=5)


@pytest.fixture(scope="session")
def write_file() -> Callable[[Path, list[str]], None]:
    """Writes texts to a file, in the form that its name says."""
    return write_texts


@pytest.fixture(scope="session")
def source_of(
    texts: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., FilesSource | DatasetsSource]:
    """Writes the texts in one of KINDS, in some number of files, and returns their source."""

    def write(kind: str, files: int = 3) -> FilesSource | DatasetsSource:
        folder = tmp_path_factory.mktemp("corpus")
        form = kind.removeprefix("datasets-")
        cut = [len(texts) * i // files for i in range(files + 1)]
        if form == "txt":
            cut = list(range(len(texts) + 1))
        for number, (start, stop) in enumerate(pairwise(cut)):
            write_texts(folder / f"{number:02}.{form}", texts[start:stop])
        if form == kind:
            return FilesSource(
                kind="files",
                paths=str(folder),
                separator="<|end|>" if form == "separated" else None,
            )
        return DatasetsSource(
            kind="datasets",
            path={"jsonl": "json", "parquet": "parquet"}[form],
            data_files=tuple(sorted(map(str, folder.iterdir()))),
        )

    return write


@pytest.fixture(scope="session")
def documents_of(
    source_of: Callable[..., FilesSource | DatasetsSource],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Documents]:
    """The texts as documents, by kind of source and whatever settings a test needs."""

    cache = CacheConfig(dir=str(tmp_path_factory.mktemp("cache")))

    def build(kind: str = "jsonl", files: int = 3, **settings: object) -> Documents:
        defaults = {"lanes": 4, "block_documents": 3, "holdout": 0.0, "cache": cache}
        sources = {"text": replace(source_of(kind, files), epochs=settings.pop("epochs", None))}
        return Documents(DataConfig(sources=sources, **{**defaults, **settings}))

    return build


@pytest.fixture
def fault_server() -> Iterator[Callable[..., FaultServer]]:
    """Serves a folder on the web until the test's end, with whatever `Behaviour` it needs."""
    with ExitStack() as servers:
        yield lambda folder, **behaviour: servers.enter_context(serving(folder, **behaviour))
