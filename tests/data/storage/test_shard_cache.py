import bz2
import fcntl
import gzip
import json
import lzma
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import pytest
import zstandard

from conf.errors import ConfigError, DataError
from data.config import CacheConfig, RemoteConfig
from data.storage.shard_cache import CopyReader, ShardCache
from data.storage.shards import Shard, list_shards
from data.storage.transport import ShardUnavailableError
from tests.data.storage.fault_server import FaultServer
from tests.patience import PATIENCE_S

PACK: Mapping[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
}
REMOTE = RemoteConfig(timeout_s=0.2, retry_s=20.0)
CONTENT = Random(0).randbytes(300_000)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A folder with the same content in every form, and three times in `.gz`."""
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/plain.txt").write_bytes(CONTENT)
    for name in ("a.txt.gz", "b.txt.gz", "c.txt.gz", "a.txt.bz2", "a.txt.zst", "a.txt.xz"):
        (tmp_path / "corpus" / name).write_bytes(PACK[Path(name).suffix](CONTENT))
    return tmp_path / "corpus"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def cache_in(folder: Path, **settings: Any) -> ShardCache:
    return ShardCache(CacheConfig(dir=str(folder), **settings), REMOTE)


def listed(url: str | Path) -> Shard:
    return list_shards(str(url), (".txt",))[0]


def read(cache: ShardCache, shard: Shard) -> bytes:
    with cache.open(shard) as stream:
        return stream.read()


def copies(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.shard"))


def whole(folder: Path) -> int:
    """How many entries look whole."""
    return sum(path.with_suffix(".shard").exists() for path in folder.glob("*.json"))


@pytest.mark.parametrize("suffix", PACK)
def test_a_compressed_shard_is_read_from_anywhere(corpus: Path, folder: Path, suffix: str) -> None:
    cache, shard = cache_in(folder), listed(corpus / f"a.txt{suffix}")
    assert cache.size(shard) == len(CONTENT) != shard.size
    with cache.open(shard) as stream:
        for place in (200_000, 5, 0, len(CONTENT)):
            assert stream.seek(place) == place
            assert stream.read(70_000) == CONTENT[place : place + 70_000]
    assert len(copies(folder)) == 1


@pytest.mark.parametrize("suffix", PACK)
def test_every_member_of_a_compressed_shard_is_read(
    tmp_path: Path, folder: Path, suffix: str
) -> None:
    parts = [CONTENT[:1], CONTENT[1:200_000], CONTENT[200_000:]]
    path = tmp_path / f"many.txt{suffix}"
    path.write_bytes(b"".join(map(PACK[suffix], parts)))
    assert read(cache_in(folder), listed(path)) == CONTENT


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("members", [1, 2])
def test_a_truncated_shard_is_an_error_that_names_it(
    tmp_path: Path, folder: Path, suffix: str, members: int
) -> None:
    path = tmp_path / f"cut.txt{suffix}"
    path.write_bytes((PACK[suffix](CONTENT) * members)[:-9])
    cache = cache_in(folder)
    for ask in (cache.open, cache.size):
        with pytest.raises(DataError, match=f"{path}: damaged or truncated"):
            ask(listed(path))
    assert list(folder.glob("*.part")) == copies(folder) == []


@pytest.mark.parametrize("suffix", PACK)
def test_what_is_not_compressed_as_its_name_says_is_an_error(
    tmp_path: Path, folder: Path, suffix: str
) -> None:
    path = tmp_path / f"wrong.txt{suffix}"
    path.write_bytes(b"plain text " * 1000)
    with pytest.raises(DataError, match=f"{path}: damaged"):
        cache_in(folder).open(listed(path))


def test_a_plain_local_shard_is_not_copied(corpus: Path, folder: Path) -> None:
    cache, shard = cache_in(folder, remote=True), listed(corpus / "plain.txt")
    assert read(cache, shard) == CONTENT
    (corpus / "plain.txt").unlink()
    assert cache.size(shard) == len(CONTENT)
    assert not folder.exists()


def test_a_remote_shard_is_copied_only_if_asked_for(
    corpus: Path, folder: Path, fault_server: Callable[..., FaultServer]
) -> None:
    server = fault_server(corpus)
    shard = listed(f"{server.url}/plain.txt")
    assert read(cache_in(folder), shard) == CONTENT
    assert not folder.exists()
    cache = cache_in(folder, remote=True)
    assert cache.size(shard) == len(CONTENT)
    asked = server.requests("/plain.txt")
    assert [read(cache, shard) for _ in range(3)] == [CONTENT] * 3
    assert server.requests("/plain.txt") == asked + 1


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("name", ["plain.txt", "a.txt.gz"])
def test_a_remote_shard_is_copied_whatever_the_server_does(
    corpus: Path,
    folder: Path,
    fault_server: Callable[..., FaultServer],
    name: str,
    ranges: bool,
) -> None:
    server = fault_server(corpus, ranges=ranges)
    shard = listed(f"{server.url}/{name}")
    server.behaviour.rate = 0.7
    for seed in range(3):
        server.behaviour.seed = seed
        assert read(cache_in(folder / f"{seed}", remote=True), shard) == CONTENT
    assert server.faults.total() >= 2


def test_a_remote_shard_that_cannot_be_had_is_an_error_that_names_it(
    corpus: Path, folder: Path, fault_server: Callable[..., FaultServer]
) -> None:
    shard = listed(f"{fault_server(corpus).url}/a.txt.gz")
    (corpus / "a.txt.gz").write_bytes(b"")
    with pytest.raises(DataError, match=f"{shard.url}: changed since"):
        cache_in(folder).open(shard)


def test_threads_that_want_the_same_shard_make_it_once(
    corpus: Path, folder: Path, fault_server: Callable[..., FaultServer]
) -> None:
    server = fault_server(corpus)
    shard = listed(f"{server.url}/a.txt.gz")
    server.served.clear()
    cache = cache_in(folder)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda _: read(cache, shard), range(8))) == [CONTENT] * 8
    assert server.requests("/a.txt.gz") == 1


@pytest.mark.process
def test_processes_that_want_the_same_shard_make_it_once(
    corpus: Path, folder: Path, fault_server: Callable[..., FaultServer]
) -> None:
    server = fault_server(corpus)
    shard = listed(f"{server.url}/a.txt.gz")
    server.served.clear()
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        done = [pool.submit(read, cache_in(folder), shard) for _ in range(4)]
        assert [d.result() for d in done] == [CONTENT] * 4
    assert server.requests("/a.txt.gz") == 1


def test_a_copy_is_used_again_and_its_shard_not_read(corpus: Path, folder: Path) -> None:
    shard = listed(corpus / "a.txt.gz")
    assert read(cache_in(folder), shard) == CONTENT
    (corpus / "a.txt.gz").unlink()
    again = pickle.loads(pickle.dumps(cache_in(folder)))
    assert read(again, shard) == CONTENT
    assert again.size(shard) == len(CONTENT)


def test_a_changed_shard_is_another_one_to_the_cache(corpus: Path, folder: Path) -> None:
    path, cache = corpus / "a.txt.gz", cache_in(folder)
    assert read(cache, listed(path)) == CONTENT
    path.write_bytes(gzip.compress(b"new"))
    assert read(cache, listed(path)) == b"new"


@pytest.mark.parametrize("damage", ["flip", "truncate", "sidecar"])
def test_a_damaged_copy_is_made_again(corpus: Path, folder: Path, damage: str) -> None:
    shard = listed(corpus / "a.txt.gz")
    assert read(cache_in(folder), shard) == CONTENT
    (copy,) = copies(folder)
    match damage:
        case "flip":
            copy.write_bytes(CONTENT[:-1] + bytes([CONTENT[-1] ^ 1]))
        case "truncate":
            os.truncate(copy, 7)
        case "sidecar":
            copy.with_suffix(".json").write_bytes(b"{}")
            copy.write_bytes(b"damage")
    cache = cache_in(folder)
    assert read(cache, shard) == read(cache, shard) == CONTENT
    assert cache.repaired == ([] if damage == "sidecar" else ["a.txt.gz"])


def test_a_copy_is_repaired_even_while_it_is_read(corpus: Path, folder: Path) -> None:
    shard = listed(corpus / "a.txt.gz")
    with cache_in(folder).open(shard) as stream:
        assert stream.read(1) == CONTENT[:1]
        (copy,) = copies(folder)
        with copy.open("r+b") as file:
            file.write(b"damage")
        assert read(cache_in(folder), shard) == CONTENT


def test_the_checksum_is_verified_once_in_a_process(corpus: Path, folder: Path) -> None:
    shard = listed(corpus / "a.txt.gz")
    cache = cache_in(folder)
    assert read(cache, shard) == CONTENT
    (copy,) = copies(folder)
    times = copy.stat().st_atime_ns, copy.stat().st_mtime_ns
    with copy.open("r+b") as file:
        file.write(b"damage")
    os.utime(copy, ns=times)
    assert read(cache, shard)[:6] == b"damage"
    assert read(cache_in(folder), shard) == CONTENT


def test_the_least_recently_used_copies_make_room(corpus: Path, folder: Path) -> None:
    cache = cache_in(folder, max_gb=2.5 * len(CONTENT) / 1e9)
    a, b, c = (listed(corpus / f"{name}.txt.gz") for name in "abc")
    sources = []
    for shard in (a, b, a, c):
        assert read(cache, shard) == CONTENT
        time.sleep(0.01)  # clocks of file systems tick in milliseconds
    for sidecar in folder.glob("*.json"):
        if sidecar.with_suffix(".shard").exists():
            sources.append(json.loads(sidecar.read_bytes())["url"])
    assert sorted(sources) == [a.url, c.url]
    Path(b.url).unlink()
    assert cache.size(b) == len(CONTENT)
    with pytest.raises(ShardUnavailableError, match="No such file"):
        ShardCache(cache.config, RemoteConfig(retry_s=0.1)).open(b)


def test_the_limit_holds_for_what_was_unpacked(tmp_path: Path, folder: Path) -> None:
    cache = cache_in(folder, max_gb=2.5 * len(CONTENT) / 1e9)
    for name in "abc":
        path = tmp_path / f"{name}.txt.gz"
        path.write_bytes(gzip.compress(bytes(len(CONTENT))))
        assert read(cache, listed(path)) == bytes(len(CONTENT))
    assert len(copies(folder)) == 2


def test_copies_in_use_are_never_removed(corpus: Path, folder: Path) -> None:
    cache = cache_in(folder, max_gb=0)
    a, b, c = (listed(corpus / f"{name}.txt.gz") for name in "abc")
    with cache.open(a) as first, cache.open(b) as second:
        assert len(copies(folder)) == 2
        assert (first.read(), second.read()) == (CONTENT, CONTENT)
    assert read(cache, c) == CONTENT
    assert len(copies(folder)) == 1


def test_nothing_else_in_the_folder_is_touched(corpus: Path, folder: Path) -> None:
    folder.mkdir()
    for name in ("theirs.txt", "theirs.shard", "theirs.lock"):
        (folder / name).write_bytes(CONTENT)
    cache = cache_in(folder, max_gb=0)
    for name in "abc":
        assert read(cache, listed(corpus / f"{name}.txt.gz")) == CONTENT
    assert len(list(folder.glob("theirs.*"))) == 3


# Makes a copy from a pipe that never ends, so that it is killed in the middle.
INTERRUPTED = """
import sys
from data.storage.shard_cache import ShardCache
from data.config import CacheConfig, RemoteConfig
from data.storage.shards import Shard
folder, url, size, tag = sys.argv[1:]
remote = RemoteConfig(timeout_s=60)
ShardCache(CacheConfig(dir=folder), remote).open(Shard(url, "a.txt.gz", int(size), tag))
"""


@pytest.mark.process
def test_killing_it_in_the_making_leaves_nothing_that_looks_whole(
    tmp_path: Path, folder: Path, fault_server: Callable[..., FaultServer]
) -> None:
    big = CONTENT * 40
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(big, 1))
    server = fault_server(tmp_path, stall_s=60)
    shard = listed(f"{server.url}/a.txt.gz")
    server.behaviour.faults, server.behaviour.rate = ("stall",), 1.0
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(folder), shard.url, str(shard.size), shard.tag]
    )
    deadline = time.monotonic() + PATIENCE_S
    while not any(part.stat().st_size for part in folder.glob("*.part")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert whole(folder) == 0
    assert len(list(folder.glob("*.part"))) == 1
    server.behaviour.rate = 0.0
    assert read(cache_in(folder), shard) == big
    assert list(folder.glob("*.part")) == []


# The kernel refuses to let files grow beyond a size, as it does when a disk is full.
CONFINED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
from conf.errors import TransientError
from data.storage.shard_cache import ShardCache
from data.config import CacheConfig, RemoteConfig
from data.storage.shards import list_shards
(shard,) = list_shards(sys.argv[2], (".txt",))
try:
    ShardCache(CacheConfig(dir=sys.argv[1]), RemoteConfig()).open(shard)
except TransientError as error:
    print(error)
"""


@pytest.mark.process
def test_a_disk_that_takes_no_more_is_an_error_that_names_the_setting(
    corpus: Path, folder: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CONFINED, str(folder), str(corpus / "a.txt.gz")],
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.startswith(f"data.cache.dir='{folder}': cannot hold a copy of {corpus}/a")
    assert copies(folder) == list(folder.glob("*.part")) == []


def test_a_folder_that_cannot_be_made_is_an_error_that_names_the_setting(
    corpus: Path, folder: Path
) -> None:
    folder.write_bytes(b"")
    with pytest.raises(ConfigError, match=f"data.cache.dir='{folder}/in'"):
        cache_in(folder / "in").open(listed(corpus / "a.txt.gz"))


@pytest.mark.parametrize("place", ["/proc/1/none", "/dev/null/none"])
def test_a_place_where_no_folder_can_ever_be_is_no_passing_failure(
    place: str, corpus: Path
) -> None:
    with pytest.raises(ConfigError, match=f"data.cache.dir='{place}'"):
        cache_in(Path(place)).open(listed(corpus / "a.txt.gz"))


@pytest.mark.parametrize("read", [CopyReader.readall, lambda file: file.readinto(bytearray(9))])
def test_a_copy_on_a_disk_that_fails_is_no_damage(read: Callable[[CopyReader], object]) -> None:
    # A process has no memory at its first bytes, and reading it there is an I/O error.
    with (
        CopyReader("/proc/self/mem") as file,
        pytest.raises(ShardUnavailableError, match=r"/proc/self/mem: .*Input/output error"),
    ):
        read(file)


def test_copies_are_kept_where_the_environment_says(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PHD_CACHE", str(tmp_path / "mine"))
    cache = ShardCache(CacheConfig(), REMOTE)
    assert read(cache, listed(corpus / "a.txt.gz")) == CONTENT
    assert len(copies(tmp_path / "mine/shards")) == 1


def test_an_open_copy_is_locked_for_as_long_as_it_is_open(corpus: Path, folder: Path) -> None:
    stream = cache_in(folder).open(listed(corpus / "a.txt.gz"))
    with copies(folder)[0].open("r+b") as file:
        with pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        stream.close()
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
