"""Where shards lie: on this machine, on the web, or in any other store that fsspec knows."""

import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from fsspec.asyn import AsyncFileSystem
from fsspec.core import url_to_fs

from conf.errors import DataError, reason_of
from conf.extras import pip_command
from data.storage.retry import PermanentError, http_status, is_temporary

READ_BYTES = 1 << 20
"""Bytes that one read of a local file asks for."""

REQUEST_BYTES = 8 << 20
"""Bytes that one request to fsspec asks for. Its stores answer with all of them or none, so what is
lost by a failure is at most this."""

# The names that file systems have for what changes whenever a file does, the most reliable first.
TAGS = (
    *("ETag", "etag", "xet_hash", "blob_id", "sha256", "md5Hash", "checksum"),
    *("LastModified", "last_modified", "modified", "mtime", "created"),
)


class Shard(NamedTuple):
    """One file of a corpus.

    Attributes:
        url: its absolute path on this machine, or its URL.
        name: its path within the corpus, the same wherever that lies: `en/part-01.jsonl.gz`.
        size: in bytes, as it is stored.
        tag: changes when the contents do, as far as the store can tell; "" if it cannot.
    """

    url: str
    name: str
    size: int
    tag: str


class Entry(NamedTuple):
    """A file or folder in a store; `size` is None where only `Store.info` tells it."""

    url: str
    name: str
    is_folder: bool
    size: int | None = None
    tag: str = ""


class Store(ABC):
    """Files that can be listed and read, by any number of threads at a time.

    An OSError may go away by itself, except for a PermissionError. A `PermanentError` does not.
    """

    @abstractmethod
    def info(self, url: str) -> Entry:
        """What is at a URL, with its size if it is a file."""

    @abstractmethod
    def ls(self, url: str) -> list[Entry]:
        """What is in a folder."""

    @abstractmethod
    def read(self, shard: Shard, start: int, stop: int, *, skip: bool) -> Iterator[bytes]:
        """Bytes from `start` on, as they arrive: at least one, and none from `stop` on.

        Args:
            skip: let a store that sends only whole files send this one, and drop what comes before
                `start`.

        Raises:
            DataError: the file is not the one that was listed.
        """

    def fill(self, shard: Shard, start: int, view: memoryview) -> Iterator[memoryview]:
        """Fill a view with the bytes from `start` on; yields each part of it that is filled."""
        for piece in self.read(shard, start, start + len(view), skip=False):
            filled, view = view[: len(piece)], view[len(piece) :]
            filled[:] = piece
            yield filled


class LocalStore(Store):
    """The file systems of this machine.

    No file stays open between two calls, so that a file which is replaced is noticed, and many
    lanes can read thousands of files.
    """

    def info(self, url: str) -> Entry:
        return _local_entry(url, os.stat(url))

    def ls(self, url: str) -> list[Entry]:
        above = os.path.realpath(url)
        with os.scandir(url) as items:
            found = [_local_child(item) for item in items]
        # A link to a folder that contains it would be followed without end.
        return [e for e in found if not (e.is_folder and _contains(e.url, above))]

    def read(self, shard: Shard, start: int, stop: int, *, skip: bool) -> Iterator[bytes]:  # noqa: ARG002 - a Store's signature
        while start < stop:
            piece = bytearray(min(READ_BYTES, stop - start))
            for filled in self.fill(shard, start, memoryview(piece)):
                yield bytes(filled)
                start += len(filled)

    def fill(self, shard: Shard, start: int, view: memoryview) -> Iterator[memoryview]:
        file = os.open(shard.url, os.O_RDONLY)
        try:
            status = os.fstat(file)
            # It may be one that is being copied there, so this is worth another try.
            if status.st_size < shard.size:
                raise OSError(f"only {status.st_size} of its {shard.size} bytes are there")
            check_same(shard, status.st_size, _local_tag(status))
            # Straight into the caller's buffer, without a copy.
            count = os.preadv(file, [view], start)
        finally:
            os.close(file)
        if not count:
            raise OSError(f"it ends at byte {start} of {shard.size}")
        yield view[:count]


class FsspecStore(Store):
    """Any file system that fsspec knows, such as `s3://` or `hf://`.

    Args:
        timeout_s: seconds that a request may take, where fsspec can limit them.
    """

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s

    def info(self, url: str) -> Entry:
        with _translated():
            system, path = url_to_fs(url)
            return _fsspec_entry(system, system.info(path))

    def ls(self, url: str) -> list[Entry]:
        with _translated():
            system, path = url_to_fs(url)
            found = [_fsspec_entry(system, info) for info in system.ls(path, detail=True)]
        # Object stores may list a folder as an object in itself.
        return [entry for entry in found if entry.url.rstrip("/") != url.rstrip("/")]

    def read(self, shard: Shard, start: int, stop: int, *, skip: bool) -> Iterator[bytes]:  # noqa: ARG002 - a Store's signature
        while start < stop:
            with _translated():
                system, path = url_to_fs(shard.url)
                entry = _fsspec_entry(system, system.info(path))
            check_same(shard, entry.size, entry.tag)
            with _translated():
                # Systems that are not asynchronous open a file for it, which would read ahead.
                is_async = isinstance(system, AsyncFileSystem)
                options = {"timeout": self.timeout_s} if is_async else {"cache_type": "none"}
                piece = system.cat_file(path, start, min(stop, start + REQUEST_BYTES), **options)
            if not piece:
                raise OSError(f"nothing came at byte {start} of {shard.size}")
            yield piece
            start += len(piece)


def check_same(shard: Shard, size: int | None, tag: str) -> None:
    """Make sure that a file is the one that was listed; an unknown size or tag says nothing.

    Raises:
        DataError: it is another one.
    """
    if size is not None and size != shard.size:
        raise changed(shard, f"it has {size} bytes now and had {shard.size}")
    if tag and shard.tag and tag != shard.tag:
        raise changed(shard, f"its tag is {tag} now and was {shard.tag}")


def changed(shard: Shard, how: str) -> DataError:
    """The error for a file that is not the one that was listed."""
    return DataError(
        f"{shard.url}: changed since it was listed ({how}); if that is right, start the run again, "
        "which lists it anew"
    )


def _local_entry(path: str, status: os.stat_result) -> Entry:
    """What is at a path; PermanentError for a pipe or a device.

    These have no size, and cannot be read again or from the middle, as lanes and resumed runs do.
    """
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        raise PermanentError(f"{path} is no file but a pipe, a socket or a device: copy it to one")
    is_folder = stat.S_ISDIR(status.st_mode)
    return Entry(path, os.path.basename(path), is_folder, status.st_size, _local_tag(status))


def _local_child(item: os.DirEntry[str]) -> Entry:
    try:
        return _local_entry(item.path, item.stat())
    # A link to nothing, or a pipe; it matters only if the file is wanted.
    except (FileNotFoundError, PermanentError):
        return Entry(item.path, item.name, is_folder=False)


def _local_tag(status: os.stat_result) -> str:
    return f"{status.st_mtime_ns}-{status.st_size}"


def _contains(folder: str, path: str) -> bool:
    folder = os.path.realpath(folder)
    return os.path.commonpath([folder, path]) == folder


def _fsspec_entry(system: Any, info: dict[str, Any]) -> Entry:
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
    """Turns the errors of any file system into those of a `Store`."""
    try:
        yield
    except PermanentError:
        raise
    except OSError as error:
        status = http_status(error)
        if status in (None, 404) or is_temporary(status):
            raise
        raise PermanentError(reason_of(error)) from error
    except ImportError as error:
        raise PermanentError(_missing_package(error)) from error
    except ValueError as error:  # no such protocol
        raise PermanentError(reason_of(error)) from error
    except Exception as error:  # the libraries behind fsspec have errors of their own
        raise OSError(f"{type(error).__name__}: {error}") from error


def _missing_package(error: ImportError) -> str:
    """Why a file system cannot be used, with the command that installs what it needs."""
    # fsspec raises an error with a sentence of its own from that of the import.
    name = getattr(error.__cause__, "name", None) or error.name
    if name is None:
        return reason_of(error)
    package = name.partition(".")[0]
    add = pip_command("phd-transformer[hub]" if package == "huggingface_hub" else package)
    return f"the package {package} is not installed: {add}"
