import asyncio
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from random import Random
from threading import Timer
from types import SimpleNamespace

import fsspec
import pytest
from fsspec.asyn import AsyncFileSystem
from pyarrow.parquet import ParquetFile

from conf.errors import ConfigError, DataError
from data.config import RemoteConfig
from data.storage.shards import Shard, list_shards
from data.storage.stores import FsspecStore
from data.storage.transport import (
    LOCAL_BUFFER_BYTES,
    REMOTE_BUFFER_BYTES,
    ShardUnavailableError,
    open_shard,
    shard_bytes,
)
from tests.data.storage.fault_server import FAULTS, FaultServer

PATIENT = RemoteConfig(timeout_s=0.2, retry_s=20.0)
IMPATIENT = RemoteConfig(timeout_s=0.2, retry_s=0.5)
SIZE = 2 * REMOTE_BUFFER_BYTES + 12_345


@pytest.fixture(scope="module")
def content() -> bytes:
    """Lines of many lengths, more than two requests' worth."""
    random = Random(0)
    lines = b"".join(random.randbytes(random.randrange(5000)) + b"\n" for _ in range(4000))
    return lines[:SIZE]


@pytest.fixture
def file(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "web" / "a.txt"
    path.parent.mkdir()
    path.write_bytes(content)
    return path


@pytest.fixture
def in_memory(content: bytes) -> Iterator[str]:
    fsspec.filesystem("memory").pipe("/transport/a.txt", content)
    yield "memory://transport/a.txt"
    fsspec.filesystem("memory").rm("/transport", recursive=True)


def listed(url: str | Path) -> Shard:
    return list_shards(str(url), (".txt",))[0]


@pytest.fixture(params=["local", "web", "memory"])
def shard(
    request: pytest.FixtureRequest,
    file: Path,
    in_memory: str,
    fault_server: Callable[..., FaultServer],
) -> Shard:
    match request.param:
        case "local":
            return listed(file)
        case "web":
            return listed(f"{fault_server(file.parent).url}/a.txt")
        case _:
            return listed(in_memory)


def check_random_access(shard: Shard, remote: RemoteConfig, content: bytes, seed: int) -> None:
    """Seeks and reads anywhere, and compares."""
    random = Random(seed)
    with open_shard(shard, remote) as stream:
        for _ in range(15):
            place = random.randrange(len(content) + 100)
            assert stream.seek(place) == place
            if random.random() < 0.5:
                line = stream.readline()
                end = content.find(b"\n", place) + 1 or len(content)
                assert line == content[place:end]
            else:
                count = random.choice([1, 1000, LOCAL_BUFFER_BYTES + 1, REMOTE_BUFFER_BYTES + 1])
                assert stream.read(count) == content[place : place + count]
            assert stream.tell() == max(place, min(stream.tell(), len(content)))


def test_a_shard_reads_as_the_file_does(shard: Shard, content: bytes) -> None:
    with open_shard(shard, PATIENT) as stream:
        assert stream.read() == content
        assert stream.seek(-10, os.SEEK_END) == len(content) - 10
        assert list(stream) == content[-10:].splitlines(keepends=True)
    check_random_access(shard, PATIENT, content, seed=0)
    assert b"".join(shard_bytes(shard, 5, 10, PATIENT)) == content[5:10]


def test_an_empty_shard_reads_as_nothing(
    tmp_path: Path, fault_server: Callable[..., FaultServer]
) -> None:
    (tmp_path / "a.txt").write_bytes(b"")
    for url in (tmp_path / "a.txt", f"{fault_server(tmp_path).url}/a.txt"):
        with open_shard(listed(url), PATIENT) as stream:
            assert stream.read() == b""


@pytest.mark.parametrize("fault", [*FAULTS, None])
def test_no_fault_of_a_server_changes_what_is_read(
    fault: str | None, file: Path, content: bytes, fault_server: Callable[..., FaultServer]
) -> None:
    server = fault_server(file.parent)
    shard = listed(f"{server.url}/a.txt")
    server.behaviour.rate = 0.3
    server.behaviour.faults = (fault,) if fault else FAULTS
    check_random_access(shard, PATIENT, content, seed=1)
    assert server.faults.total() >= 3


def test_threads_may_read_one_shard_each_through_its_own_reader(
    file: Path, content: bytes, fault_server: Callable[..., FaultServer]
) -> None:
    server = fault_server(file.parent)
    shard = listed(f"{server.url}/a.txt")
    server.behaviour.rate = 0.2
    with ThreadPoolExecutor(4) as pool:
        for done in [
            pool.submit(check_random_access, shard, PATIENT, content, seed) for seed in range(4)
        ]:
            done.result()


def test_requests_ask_for_megabytes(
    file: Path, content: bytes, fault_server: Callable[..., FaultServer]
) -> None:
    server = fault_server(file.parent)
    shard = listed(f"{server.url}/a.txt")
    for read, requests in (("read", 1), ("readlines", 3)):
        server.served.clear()
        with open_shard(shard, PATIENT) as stream:
            getattr(stream, read)()
        assert server.requests("/a.txt") == requests
        assert server.sent("/a.txt") == len(content)


@pytest.mark.parametrize("fault", ["truncated", "short", "stall"])
def test_only_what_did_not_come_is_asked_for_again(
    fault: str, file: Path, content: bytes, fault_server: Callable[..., FaultServer]
) -> None:
    server = fault_server(file.parent)
    shard = listed(f"{server.url}/a.txt")
    server.served.clear()
    server.behaviour.rate = 0.5
    server.behaviour.faults = (fault,)
    server.behaviour.stall_s = PATIENT.timeout_s + 0.1
    with open_shard(shard, PATIENT) as stream:
        assert stream.read() == content
    assert server.faults.total() >= 2
    asked = sorted((s.start, s.start + s.sent) for s in server.served if s.sent)
    assert asked[0][0] == 0
    assert all(before[1] == after[0] for before, after in pairwise(asked))
    assert server.sent("/a.txt") == len(content)


@pytest.mark.parametrize("fault", ["busy", "missing", "reset", "truncated", "stall"])
def test_a_spent_budget_is_an_error_that_names_the_shard(
    fault: str, tmp_path: Path, fault_server: Callable[..., FaultServer]
) -> None:
    (tmp_path / "a.txt").write_bytes(b"1")
    server = fault_server(tmp_path)
    shard = listed(f"{server.url}/a.txt")
    server.behaviour.rate = 1.0
    server.behaviour.faults = (fault,)
    begin = time.monotonic()
    with (
        open_shard(shard, IMPATIENT) as stream,
        pytest.raises(
            ShardUnavailableError, match=r"tries in \d+ s without progress.*retry_s=0.5"
        ) as error,
    ):
        stream.read(1)
    assert str(error.value).startswith(f"{shard.url}: cannot be read from byte 0 on")
    assert time.monotonic() - begin > 0.4
    assert 2 < server.requests("/a.txt") < 15


def test_time_without_progress_counts_and_not_time(
    tmp_path: Path, fault_server: Callable[..., FaultServer]
) -> None:
    (tmp_path / "a.txt").write_bytes(bytes(1 << 10))
    server = fault_server(tmp_path)
    shard = listed(f"{server.url}/a.txt")
    server.behaviour.rate = 1.0
    server.behaviour.faults = ("stall",)
    begin = time.monotonic()
    with (
        open_shard(shard, IMPATIENT) as stream,
        pytest.raises(ShardUnavailableError, match="byte 1023"),
    ):
        stream.read()
    assert time.monotonic() - begin > 10 * IMPATIENT.timeout_s


def test_a_server_without_ranges_is_noticed_but_can_be_copied_from(
    file: Path, content: bytes, fault_server: Callable[..., FaultServer]
) -> None:
    server = fault_server(file.parent, ranges=False)
    shard = listed(f"{server.url}/a.txt")
    assert shard.size == len(content)
    with open_shard(shard, PATIENT) as stream:
        for place in (0, 7, len(content) - 7):
            stream.seek(place)
            with pytest.raises(ConfigError, match=r"data\.cache\.remote=false: .*whole files only"):
                stream.read(1)
    server.behaviour.rate = 0.5
    for _ in range(5):
        assert b"".join(shard_bytes(shard, 0, shard.size, PATIENT, skip=True)) == content
    assert server.faults.total() > 1


@pytest.mark.parametrize("change", ["longer", "shorter", "other"])
def test_a_shard_that_changed_is_noticed(shard: Shard, file: Path, change: str) -> None:
    if shard.url.startswith("memory"):
        new = {"longer": b"x" * (SIZE + 1), "shorter": b"x", "other": b"x" * SIZE}[change]
        fsspec.filesystem("memory").pipe("/transport/a.txt", new)
    else:
        os.truncate(file, {"longer": SIZE + 1, "shorter": 1, "other": SIZE}[change])
        os.utime(file, (0, 0))
    # A local file that is too short may be one that is being copied there.
    being_copied = "://" not in shard.url and change == "shorter"
    kind, said = (
        (ShardUnavailableError, "only 1 of its") if being_copied else (DataError, "changed since")
    )
    with open_shard(shard, IMPATIENT) as stream:
        stream.seek(100)
        with pytest.raises(kind, match=f"{shard.url}: .*{said}"):
            stream.read(1)


def test_a_change_in_the_middle_of_reading_is_noticed_where_there_are_tags(
    file: Path, content: bytes, fault_server: Callable[..., FaultServer]
) -> None:
    for tags in (True, False):
        shard = listed(f"{fault_server(file.parent, tags=tags).url}/a.txt")
        with open_shard(shard, IMPATIENT) as stream:
            assert stream.read(9) == content[:9]
            os.utime(file, (1, 1))
            if tags:
                with pytest.raises(DataError, match="changed since"):
                    stream.read()
            else:
                assert stream.read() == content[9:]


@pytest.mark.parametrize("failure", ["vanished", "truncated"])
def test_a_local_file_that_comes_back_is_read_on(file: Path, content: bytes, failure: str) -> None:
    shard = listed(file)
    status = file.stat()

    def restore() -> None:
        other = file.with_suffix(".new")
        other.write_bytes(content)
        os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
        other.replace(file)

    with open_shard(shard, PATIENT) as stream:
        assert stream.read(9) == content[:9]
        file.unlink() if failure == "vanished" else os.truncate(file, 1)
        timer = Timer(0.4, restore)
        timer.start()
        assert stream.read() == content[9:]
        timer.join()


def test_a_local_file_that_is_gone_is_an_error_that_names_it(file: Path) -> None:
    shard = listed(file)
    file.unlink()
    with (
        open_shard(shard, IMPATIENT) as stream,
        pytest.raises(ShardUnavailableError, match=f"^{file}: .*No such file"),
    ):
        stream.read(1)


def test_a_server_that_refuses_is_not_asked_again(
    file: Path, fault_server: Callable[..., FaultServer]
) -> None:
    server = fault_server(file.parent)
    shard = listed(f"{server.url}/a.txt")
    server.behaviour.rate, server.behaviour.faults = 1.0, ("forbidden",)
    with open_shard(shard, PATIENT) as stream, pytest.raises(DataError, match="HTTP 403"):
        stream.read(1)
    assert server.faults.total() == 1


class Distant(AsyncFileSystem):
    """An asynchronous store of one file, which may take its time."""

    protocol = "distant"
    content = b""
    delay_s = 0.0

    async def _info(self, path: str, **_: object) -> dict[str, object]:
        return {"name": path, "type": "file", "size": len(self.content)}

    async def _cat_file(
        self,
        path: str,  # noqa: ARG002 - a file system's signature
        start: int | None = None,
        end: int | None = None,
        **_: object,
    ) -> bytes:
        await asyncio.sleep(self.delay_s)
        return self.content[start:end]


def test_requests_to_other_stores_are_given_up_in_time(
    content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsspec.register_implementation("distant", Distant, clobber=True)
    monkeypatch.setattr(Distant, "content", content)
    store = FsspecStore(0.3)
    shard = Shard("distant://a.txt", "a.txt", len(content), "")
    assert b"".join(store.read(shard, 5, len(content), skip=False)) == content[5:]
    monkeypatch.setattr(Distant, "delay_s", 20.0)
    with pytest.raises(TimeoutError):
        next(store.read(shard, 0, 9, skip=False))


class HttpError(OSError):
    """An error as those of the libraries below fsspec: with the answer that it is about."""

    def __init__(self, status: int) -> None:
        super().__init__(f"HTTP {status}")
        self.response = SimpleNamespace(status_code=status)


class Refusing(Distant):
    """A store that answers with an HTTP status."""

    protocol = "refusing"
    statuses: list[int] = []  # noqa: RUF012 - filled by the test

    async def _info(self, path: str, **_: object) -> dict[str, object]:
        if self.statuses:
            raise HttpError(self.statuses.pop(0))
        return await super()._info(path)


def test_an_answer_that_time_does_not_change_is_not_asked_for_again_in_other_stores(
    content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsspec.register_implementation("refusing", Refusing, clobber=True)
    monkeypatch.setattr(Distant, "content", content)
    shard = Shard("refusing://a.txt", "a.txt", len(content), "")
    Refusing.statuses = [503, 429, 404]
    assert b"".join(shard_bytes(shard, 0, 9, PATIENT)) == content[:9]
    Refusing.statuses = [403, 403]
    with pytest.raises(DataError, match="HTTP 403"):
        next(shard_bytes(shard, 0, 9, PATIENT))
    assert Refusing.statuses == [403]


def test_a_parquet_file_is_read_through_a_faulty_server(
    tmp_path: Path,
    texts: list[str],
    write_file: Callable[[Path, list[str]], None],
    fault_server: Callable[..., FaultServer],
) -> None:
    write_file(tmp_path / "a.parquet", texts)
    server = fault_server(tmp_path)
    shard = listed(f"{server.url}/a.parquet")
    server.behaviour.rate = 0.5
    with open_shard(shard, PATIENT) as stream, ParquetFile(stream) as table:
        assert table.read()["text"].to_pylist() == texts
