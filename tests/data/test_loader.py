import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conf.errors import ConfigError, DataError, Problem, TransientError
from data.batch import Batch
from data.config import CacheConfig, DataConfig, FilesSource, RemoteConfig
from data.loader import Loader
from data.prefetch import WaitEndedError
from data.sources.documents import Documents
from data.storage.transport import ShardUnavailableError
from data.stream import BatchShape, OutOfTextError, TokenStream
from data.tokenizer import Tokenizer
from tests.data.storage.fault_server import FaultServer

DocumentsOf = Callable[..., Documents]
Made = Callable[..., Loader]


@pytest.fixture
def loader(documents_of: DocumentsOf, tokenizer: Tokenizer) -> Iterator[Made]:
    made = []

    def build(
        *, workers: int, depth: int = 2, rank: int = 0, world_size: int = 1, **settings: object
    ) -> Loader:
        shape = BatchShape(global_batch=8, seq_len=11, rank=rank, world_size=world_size)
        documents = documents_of(**settings)
        made.append(
            Loader(TokenStream(documents, tokenizer, shape, seed=0), workers=workers, depth=depth)
        )
        return made[-1]

    yield build
    for one in made:
        one.close()


def threads() -> int:
    return sum(thread.name == "prefetch" for thread in threading.enumerate())


@pytest.mark.parametrize("workers", [0, 1, 2, 4, 7])
def test_there_are_as_many_threads_as_workers_but_no_more_than_lanes(
    loader: Made, workers: int
) -> None:
    before = threads()
    made = loader(workers=workers)
    next(made)
    assert threads() == before + min(workers, 4)
    made.close()
    made.close()
    assert threads() == before


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_ranks_with_workers_share_one_stream(loader: Made, workers: int) -> None:
    whole = list(islice(loader(workers=0), 8))
    ranks = [list(islice(loader(workers=workers, rank=r, world_size=2), 8)) for r in range(2)]
    for step, batch in enumerate(whole):
        for rank in range(2):
            assert np.array_equal(ranks[rank][step].rows, batch.rows[rank::2])


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_the_end_of_the_text_is_known_with_the_last_batch(loader: Made, workers: int) -> None:
    made = loader(workers=workers, epochs=2)
    batches: list[Batch] = []
    while made.failure is None:
        batches.append(next(made))
    assert isinstance(made.failure, OutOfTextError)
    with pytest.raises(OutOfTextError, match=r"data\.sources\.\*\.epochs=\{'text': 2\}"):
        next(made)
    endless = list(islice(loader(workers=0), len(batches)))
    assert np.array_equal(batches[5].rows, endless[5].rows)
    assert batches[-1].stats.epoch("text") == 2


@pytest.mark.parametrize("packing", ["sequential", "best_fit"])
@pytest.mark.parametrize("block_documents", [3, 256])
def test_to_the_end_of_the_text_every_token_is_a_target_once(
    loader: Made, packing: str, block_documents: int
) -> None:
    made = loader(workers=2, epochs=2, packing=packing, block_documents=block_documents)
    stream = made.stream
    targets = 0
    while made.failure is None:
        targets += next(made).stats.targets
    documents, encode = stream.documents, stream.tokenizer.document_tokens
    lanes = [[encode(d) for d, _ in documents.training("text", lane)] for lane in range(4)]
    total = 2 * sum(len(tokens) for lane in lanes for tokens in lane)
    # The first token of a lane has nothing before it, but for the separator that best-fit adds.
    assert targets == total - (4 if packing == "sequential" else 0)


def test_no_more_than_depth_batches_are_made_ahead(
    loader: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    encode = Tokenizer.document_tokens
    monkeypatch.setattr(
        Tokenizer, "document_tokens", lambda self, d: (made.append(1), encode(self, d))[1]
    )
    ahead = loader(workers=2, depth=2)
    next(ahead)
    before = -1
    while before != len(made) < 200:  # until nothing more is made
        before = len(made)
        time.sleep(0.5)
    assert len(made) < 200


def test_waiting_is_measured_and_workers_end_it(
    loader: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = Tokenizer.document_tokens
    monkeypatch.setattr(
        Tokenizer, "document_tokens", lambda self, d: (time.sleep(0.01), encode(self, d))[1]
    )
    inline = loader(workers=0)
    list(islice(inline, 20))
    assert inline.wait_s > 0.1
    ahead = loader(workers=4, depth=30)
    next(ahead)
    time.sleep(2.0)
    before = ahead.wait_s
    list(islice(ahead, 10))
    assert ahead.wait_s - before < inline.wait_s


def test_batches_that_are_left_out_are_read_and_counted(
    documents_of: DocumentsOf, tokenizer: Tokenizer
) -> None:
    stream = TokenStream(documents_of(), tokenizer, BatchShape(global_batch=8, seq_len=11), seed=0)
    with Loader(stream) as loader:
        whole = list(islice(loader, 6))
    with Loader(stream, batches_done=10, skip_batches=(12, 13)) as loader:
        numbers = [(loader.number, batch.rows) for batch in islice(loader, 4)]
    assert [number for number, _ in numbers] == [11, 14, 15, 16]
    for (_, rows), batch in zip(numbers, [whole[0], *whole[3:]], strict=True):
        assert np.array_equal(rows, batch.rows)


def test_a_stop_ends_the_batches_without_a_failure(
    loader: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = loader(workers=1)
    next(made)
    stalled = threading.Event()
    monkeypatch.setattr(Tokenizer, "document_tokens", lambda *_: stalled.wait())
    stopped = Loader(made.stream, workers=1, depth=1, stop_requested=lambda: True)
    assert stopped.peek() is None
    assert stopped.peek() is None
    assert stopped.failure is None
    with pytest.raises(WaitEndedError):
        next(stopped)
    stalled.set()
    stopped.close()


# What ends the batches, by kind


def reading(folder: Path, url: str, tokenizer: Tokenizer, **settings: Any) -> TokenStream:
    """A stream of JSON lines at a URL, with little patience."""
    sources = {"text": FilesSource(kind="files", paths=url)}
    remote = RemoteConfig(timeout_s=0.2, retry_s=0.3)
    cache = CacheConfig(dir=str(folder / "cache"))
    config = DataConfig(
        sources=sources, lanes=1, holdout=0.0, remote=remote, cache=cache, **settings
    )
    return TokenStream(Documents(config), tokenizer, BatchShape(global_batch=1, seq_len=64), seed=0)


def failure_of(stream: TokenStream, workers: int) -> Exception:
    with Loader(stream, workers=workers, depth=1) as loader, suppress(Exception):
        for _ in loader:
            pass
    assert loader.failure is not None
    return loader.failure


@pytest.fixture
def corpus(tmp_path: Path, write_file: Callable[[Path, list[str]], None]) -> Path:
    """Megabytes of JSON lines, so that they are read in several requests."""
    (tmp_path / "web").mkdir()
    write_file(tmp_path / "web/a.jsonl", [f"{i} {'text ' * 2000}" for i in range(900)])
    return tmp_path / "web"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_server_that_dies_in_training_is_a_failure_that_may_pass(
    workers: int,
    corpus: Path,
    tmp_path: Path,
    tokenizer: Tokenizer,
    fault_server: Callable[..., FaultServer],
) -> None:
    server = fault_server(corpus)
    stream = reading(tmp_path, f"{server.url}/a.jsonl", tokenizer, block_documents=1)
    with Loader(stream, workers=workers, depth=1) as loader:
        next(loader)
        server.behaviour.rate, server.behaviour.faults = 1.0, ("busy",)
        with pytest.raises(TransientError, match="cannot be read from byte"):
            for _ in loader:
                pass
        assert isinstance(loader.failure, ShardUnavailableError)
        assert not isinstance(loader.failure, ValueError)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", ["gz", "parquet", "changed", "quarantine", "none"])
def test_text_that_is_not_what_it_should_be_is_an_error_of_the_data(
    workers: int,
    damage: str,
    tmp_path: Path,
    tokenizer: Tokenizer,
    write_file: Callable[[Path, list[str]], None],
) -> None:
    texts = [f"{i} some text" for i in range(500)]
    name = {"gz": "a.jsonl.gz", "parquet": "a.parquet"}.get(damage, "a.jsonl")
    write_file(path := tmp_path / name, [] if damage == "none" else texts)
    if damage in ("gz", "parquet"):
        path.write_bytes(path.read_bytes()[:-9])
    if damage == "quarantine":
        path.write_text("no JSON\n" * 100)
    stream = reading(tmp_path, str(path), tokenizer)
    if damage == "changed":
        write_file(path, texts * 2)
    failure = failure_of(stream, workers)
    assert isinstance(failure, DataError)
    assert not isinstance(failure, OutOfTextError)
    assert str(path) in str(failure)


@pytest.mark.parametrize("url", ["{}/missing.jsonl", "{}/*.jsonl.zst"])
def test_what_a_server_does_not_have_is_an_error_of_the_settings(
    url: str,
    corpus: Path,
    tmp_path: Path,
    tokenizer: Tokenizer,
    fault_server: Callable[..., FaultServer],
) -> None:
    with pytest.raises(ConfigError) as error:
        reading(tmp_path, url.format(fault_server(corpus).url), tokenizer)
    [problem] = error.value.problems
    assert isinstance(problem, Problem)
    assert problem.key == "data.sources.text.paths"
