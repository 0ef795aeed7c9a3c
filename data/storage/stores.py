"""Where shards lie: on this machine, on the web, or in any other store that fsspec knows."""

import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from fsspec.asyn import AsyncFileSystem
from fsspec.core import url_to_fs

from data.storage.retry import PermanentError

PIECE = 1 << 20  # bytes that are read from a local file at a time
BLOCK = 8 << 20  # bytes that fsspec is asked for at a time

# How file systems call what changes whenever a file does, the surest first.
TAGS = (
    *("ETag", "etag", "xet_hash", "blob_id", "sha256", "md5Hash", "checksum"),
    *("LastModified", "last_modified", "modified", "mtime", "created"),
)


class Shard(NamedTuple):
    """One file of a corpus.

    Attributes:
        url: its absolute path on this machine, or its URL.
        name: what it is called within the corpus, wherever that lies: `en/part-01.jsonl.gz`.
        size: in bytes, as it is stored.
        tag: changes when the contents do, as far as the store can tell; "" if it cannot.
    """

    url: str
    name: str
    size: int
    tag: str


class Entry(NamedTuple):
    """A file or folder in a store; `size` is None where finding it out takes a `info`."""

    url: str
    name: str
    is_folder: bool
    size: int | None = None
    tag: str = ""


class Store(ABC):
    """Files that can be listed and read; it may be used by any number of threads.

    What may go better the next time is an OSError, what will not one of `FINAL`.
    """

    @abstractmethod
    def info(self, url: str) -> Entry:
        """What is at a URL, with its size if it is a file."""

    @abstractmethod
    def ls(self, url: str) -> list[Entry]:
        """What is in a folder."""

    @abstractmethod
    def read(self, shard: Shard, start: int, stop: int, *, skip: bool) -> Iterator[bytes]:
        """Bytes from `start` on, as they come, to `stop` at most and at least one.

        With `skip`, a store that can only send files as a whole is asked to, and what comes
        before `start` is passed over.
        """

    def fill(self, shard: Shard, start: int, view: memoryview) -> Iterator[memoryview]:
        """Puts the bytes from `start` on into a view, and gives what it has filled of it so far."""
        for piece in self.read(shard, start, start + len(view), skip=False):
            filled, view = view[: len(piece)], view[len(piece) :]
            filled[:] = piece
            yield filled


class LocalStore(Store):
    """The file systems of this machine; nothing stays open between two calls."""

    def info(self, url: str) -> Entry:
        return _local_entry(url, os.stat(url))

    def ls(self, url: str) -> list[Entry]:
        above = os.path.realpath(url)
        with os.scandir(url) as items:
            found = [_local_child(item) for item in items]
        # A link to a folder that it lies in would be followed for ever.
        return [e for e in found if not (e.is_folder and _contains(e.url, above))]

    def read(self, shard: Shard, start: int, stop: int, *, skip: bool) -> Iterator[bytes]:  # noqa: ARG002 - a Store's signature
        while start < stop:
            piece = bytearray(min(PIECE, stop - start))
            for filled in self.fill(shard, start, memoryview(piece)):
                yield bytes(filled)
                start += len(filled)

    def fill(self, shard: Shard, start: int, view: memoryview) -> Iterator[memoryview]:
        file = os.open(shard.url, os.O_RDONLY)
        try:
            status = os.fstat(file)
            if status.st_size < shard.size:
                raise OSError(f"only {status.st_size} of its {shard.size} bytes are there")
            check_same(shard, status.st_size, _local_tag(status))
            count = os.preadv(file, [view], start)
        finally:
            os.close(file)
        if not count:
            raise OSError(f"it ends at byte {start} of {shard.size}")
        yield view[:count]


class OtherStore(Store):
    """Whatever fsspec has a file system for.

    Args:
        timeout_s: seconds that a request may take, where fsspec can limit them.
    """

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s

    def info(self, url: str) -> Entry:
        with _translated():
            system, path = url_to_fs(url)
            return _other_entry(system, system.info(path))

    def ls(self, url: str) -> list[Entry]:
        with _translated():
            system, path = url_to_fs(url)
            found = [_other_entry(system, info) for info in system.ls(path, detail=True)]
        # Object stores may list a folder as an object in itself.
        return [entry for entry in found if entry.url.rstrip("/") != url.rstrip("/")]

    def read(self, shard: Shard, start: int, stop: int, *, skip: bool) -> Iterator[bytes]:  # noqa: ARG002 - a Store's signature
        while start < stop:
            with _translated():
                system, path = url_to_fs(shard.url)
                entry = _other_entry(system, system.info(path))
                check_same(shard, entry.size, entry.tag)
                # Other than asynchronous ones open a file for it, which would read ahead.
                is_async = isinstance(system, AsyncFileSystem)
                options = {"timeout": self.timeout_s} if is_async else {"cache_type": "none"}
                piece = system.cat_file(path, start, min(stop, start + BLOCK), **options)
            if not piece:
                raise OSError(f"nothing came at byte {start} of {shard.size}")
            yield piece
            start += len(piece)


def check_same(shard: Shard, size: int | None, tag: str) -> None:
    """Refuses a file that is not what was listed; an unknown size or tag says nothing."""
    if size is not None and size != shard.size:
        raise changed(f"{size} bytes now, {shard.size} then")
    if tag and shard.tag and tag != shard.tag:
        raise changed(f"its tag is {tag} now, {shard.tag} then")


def changed(how: str) -> PermanentError:
    """The error for a file that is not what was listed."""
    return PermanentError(
        f"changed since it was listed ({how}); if that is right, start the run again, which lists "
        "it anew"
    )


def _local_entry(path: str, status: os.stat_result) -> Entry:
    is_folder = stat.S_ISDIR(status.st_mode)
    return Entry(path, os.path.basename(path), is_folder, status.st_size, _local_tag(status))


def _local_child(item: os.DirEntry[str]) -> Entry:
    try:
        return _local_entry(item.path, item.stat())
    except FileNotFoundError:  # a link to nothing, told when it is looked at
        return Entry(item.path, item.name, is_folder=False)


def _local_tag(status: os.stat_result) -> str:
    return f"{status.st_mtime_ns}-{status.st_size}"


def _contains(folder: str, path: str) -> bool:
    folder = os.path.realpath(folder)
    return os.path.commonpath([folder, path]) == folder


def _other_entry(system: Any, info: dict[str, Any]) -> Entry:
    url = system.unstrip_protocol(info["name"])
    name = url.rstrip("/").rsplit("/", 1)[1]
    if info["type"] == "directory":
        return Entry(url, name, is_folder=True)
    if info["size"] is None:
        raise PermanentError(f"{url}: its store does not tell its size")
    tag = next((str(info[key]) for key in TAGS if info.get(key)), "")
    return Entry(url, name, False, info["size"], tag)


@contextmanager
def _translated() -> Iterator[None]:
    """Makes the errors of any file system those of a `Store`."""
    try:
        yield
    except (OSError, PermanentError):
        raise
    except (ImportError, ValueError) as error:  # no such protocol, or its package is missing
        raise PermanentError(str(error)) from error
    except Exception as error:  # the libraries behind fsspec have errors of their own
        raise OSError(f"{type(error).__name__}: {error}") from error
