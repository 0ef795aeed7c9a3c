"""Local copies of the shards that cannot be read in place: compressed ones, and remote ones.

A lane begins in the middle of a file and goes on anywhere after a restart. Gzip and its like can
only be read from the beginning, so a compressed shard is unpacked once, for all lanes and ranks of
this machine.
"""

import errno
import fcntl
import io
import json
import os
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow
from xxhash import xxh3_128, xxh3_128_hexdigest

from conf.errors import ConfigError, DataError, Problem, reason_of
from conf.redaction import redacted
from data.config import CacheConfig, RemoteConfig
from data.storage.atomic import file_xxh3_128, open_atomic, write_atomic
from data.storage.shards import compression_of
from data.storage.stores import Shard
from data.storage.transport import (
    LOCAL_BUFFER_BYTES,
    ShardUnavailableError,
    is_local,
    open_shard,
    shard_bytes,
)

UNPACKED_BYTES = 1 << 20
"""Bytes that are unpacked, hashed and written at a time."""

WRONG_DIRECTORY = (errno.EEXIST, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EROFS)
"""What says that a directory can never hold copies; a full disk may have room again."""


class CopyInfo(NamedTuple):
    """What is written beside a copy and makes it valid; it stays when the copy is removed.

    The URL is there for a reader, without secrets.
    """

    url: str
    stored_size: int
    size: int
    xxh3_128: str
    created: float


class CopyReader(io.FileIO):
    """A copy as a file; a disk that fails is an error of the environment, not of the data."""

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer, as far as there are bytes."""
        try:
            return super().readinto(buffer) or 0
        except OSError as error:
            raise self._unavailable(error) from error

    def readall(self) -> bytes:
        """All that is left."""
        try:
            return super().readall()
        except OSError as error:
            raise self._unavailable(error) from error

    def _unavailable(self, error: OSError) -> ShardUnavailableError:
        return ShardUnavailableError(
            f"{self.name}: a copy of a shard cannot be read ({reason_of(error)}); "
            "make sure that its disk works, and start the run again"
        )


class CachedCopy:
    """The files of one shard in the cache.

    <key>.shard   the uncompressed bytes; whoever reads them holds a shared lock
    <key>.json    the `CopyInfo`, written last; its modification time is that of the last use
    <key>.part    the bytes while they are written
    <key>.lock    locked while any of these is made, checked or removed
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.key = key
        self.content = folder / f"{key}.shard"
        self.sidecar = folder / f"{key}.json"
        self.part = folder / f"{key}.part"
        self.lock = folder / f"{key}.lock"

    def info(self) -> CopyInfo | None:
        """What the sidecar says; None if it is missing or damaged."""
        try:
            return CopyInfo(**json.loads(self.sidecar.read_bytes()))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    @contextmanager
    def locked(self, *, wait: bool = True) -> Iterator[None]:
        """Keep other threads and processes out; without `wait`, a BlockingIOError if one is in."""
        with self.lock.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            yield

    @property
    def bytes_used(self) -> int:
        """Bytes of disk that it takes."""
        return sum(status.st_size for p in (self.content, self.part) if (status := _status(p)))

    @property
    def last_use(self) -> float:
        """When it was opened last, in seconds since 1970; 0 if it was never whole."""
        status = _status(self.sidecar)
        return status.st_mtime if status else 0.0

    @property
    def version(self) -> tuple[str, int, int]:
        """Changes whenever the content is written anew."""
        status = self.content.stat()
        return self.key, status.st_ino, status.st_mtime_ns

    def open(self) -> BinaryIO:
        """The bytes; the copy is not removed as long as they are open."""
        file = io.BufferedReader(CopyReader(self.content), LOCAL_BUFFER_BYTES)
        fcntl.flock(file, fcntl.LOCK_SH)
        # The cache removes what was used least recently; access times are often switched off.
        os.utime(self.sidecar)
        return file

    def remove(self) -> bool:
        """Free its space; returns False, and does nothing, if it is in use."""
        try:
            with self.locked(wait=False):
                if self.content.exists():
                    # A reader's shared lock makes this one fail, in this process or in any other.
                    with self.content.open("r+b") as file:
                        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        self.content.unlink()
                self.part.unlink(missing_ok=True)
        except BlockingIOError:
            return False
        return True


class ShardCache:
    """Opens shards anywhere, in whatever form they are stored; for any number of threads.

    Attributes:
        repaired: names of the shards whose copies were damaged and have been made again.
    """

    def __init__(self, config: CacheConfig, remote: RemoteConfig) -> None:
        self.config = config
        self.remote = remote
        self.repaired: list[str] = []
        # Versions whose hash was compared in this process: once, since hashing reads it all.
        self._checked: set[tuple[str, int, int]] = set()

    @property
    def folder(self) -> Path:
        """The directory of the copies."""
        if self.config.dir is not None:
            return Path(self.config.dir).expanduser()
        return Path(os.environ.get("PHD_CACHE", "~/.cache/phd")).expanduser() / "shards"

    def open(self, shard: Shard) -> BinaryIO:
        """A shard's uncompressed bytes, which can be read from anywhere.

        Raises:
            ShardUnavailableError: it cannot be read at present, or the disk has no room for a copy.
            DataError: it is damaged, or not the one that was listed.
            ConfigError: `data.cache.dir` cannot hold copies.
        """
        if not self._is_copied(shard):
            return open_shard(shard, self.remote)
        with self._locked_copy(shard) as copy:
            self._ensure(shard, copy)
            return copy.open()

    def size(self, shard: Shard) -> int:
        """A shard's uncompressed size in bytes; a compressed one is unpacked once to learn it.

        Raises:
            As `open`.
        """
        if compression_of(shard.name) is None:
            return shard.size
        with self._locked_copy(shard) as copy:
            return (copy.info() or self._ensure(shard, copy)).size

    def _is_copied(self, shard: Shard) -> bool:
        is_remote = not is_local(shard.url)
        return compression_of(shard.name) is not None or (is_remote and self.config.remote)

    @contextmanager
    def _locked_copy(self, shard: Shard) -> Iterator[CachedCopy]:
        """A shard's copy, locked, to be looked at, made or opened."""
        # A shard that changes has another size or tag, and so another copy.
        key = xxh3_128_hexdigest(f"{shard.url}\n{shard.size}\n{shard.tag}".encode())
        copy = CachedCopy(self.folder, key)
        try:
            # All ranks of a machine come here; the first one makes the copy, the others wait.
            self.folder.mkdir(parents=True, exist_ok=True)
            with copy.locked():
                yield copy
        except OSError as error:
            found = f"cannot hold a copy of {shard.url} ({reason_of(error)})"
            if error.errno in WRONG_DIRECTORY or not self.folder.is_dir():
                hint = "choose a directory that can be written"
                problem = Problem("data.cache.dir", str(self.folder), found, hint)
                raise ConfigError([problem]) from error
            raise ShardUnavailableError(
                f"data.cache.dir={str(self.folder)!r}: {found}; make room there, or choose another "
                "directory or a lower data.cache.max_gb"
            ) from error

    def _ensure(self, shard: Shard, copy: CachedCopy) -> CopyInfo:
        """Check the copy, the first time in this process, and make it where that is needed."""
        info = copy.info()
        if info and copy.content.exists():
            if copy.version in self._checked:
                return info
            if file_xxh3_128(copy.content) == info.xxh3_128:
                self._checked.add(copy.version)
                return info
            self.repaired.append(shard.name)
        self._make_room(shard.size)
        info = self._make(shard, copy)
        self._checked.add(copy.version)
        # Unpacked, it may be several times larger than the room that was made for it.
        self._make_room(0)
        return info

    def _make(self, shard: Shard, copy: CachedCopy) -> CopyInfo:
        digest = xxh3_128()
        # The name of the unfinished file is fixed, so that what a killed process leaves is found
        # again, counted and removed.
        with open_atomic(copy.content, partial=copy.part) as file:
            for block in _unpacked(shard, self.remote):
                file.write(block)
                digest.update(block)
            size = file.tell()
        info = CopyInfo(redacted(shard.url), shard.size, size, digest.hexdigest(), time.time())
        write_atomic(copy.sidecar, json.dumps(info._asdict()))
        return info

    def _make_room(self, needed: int) -> None:
        """Remove the least recently used copies until `needed` more bytes fit within `max_gb`."""
        # Only files with a name of this cache's kind: a user may point it at any folder.
        paths = self.folder.glob("?" * 32 + ".lock")
        copies = [CachedCopy(self.folder, path.stem) for path in paths]
        total = needed + sum(copy.bytes_used for copy in copies)
        for copy in sorted(copies, key=lambda copy: copy.last_use):
            if total <= self.config.max_gb * 1e9:
                return
            used = copy.bytes_used
            if used and copy.remove():
                total -= used


class _IteratorReader(io.RawIOBase):
    """An iterator of bytes as a stream."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._rest = memoryview(b"")  # of the last piece

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._rest:
            self._rest = memoryview(next(self._pieces, b""))
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count


def _unpacked(shard: Shard, remote: RemoteConfig) -> Iterator[bytes]:
    """A shard's uncompressed bytes, from its beginning to its end."""
    with closing(shard_bytes(shard, 0, shard.size, remote, skip=True)) as pieces:
        compression = compression_of(shard.name)
        if compression is None:
            yield from pieces
            return
        try:
            if compression == "xz":
                yield from _unpacked_xz(pieces)
                return
            # Arrow's streams notice a truncated file, which Zstandard's own take for a shorter
            # one, and read on where one compressed stream ends and another follows.
            with pyarrow.input_stream(_IteratorReader(pieces), compression=compression) as stream:
                while block := stream.read(UNPACKED_BYTES):
                    yield block
        except (OSError, pyarrow.ArrowException, CorruptXzError) as error:
            raise DataError(
                f"{shard.url}: damaged or truncated ({reason_of(error)}); get it again, or leave "
                "it out"
            ) from error


class CorruptXzError(Exception):
    """A `.xz` file that is damaged or truncated."""


def _unpacked_xz(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """The uncompressed bytes of `.xz`, which Arrow does not read.

    Like Arrow's streams it notices a truncated file, and reads all streams that follow each other.

    Raises:
        CorruptXzError: the file is damaged or truncated.
    """
    # Imported here, because a Python that was built without liblzma has no such module.
    from lzma import FORMAT_XZ, LZMADecompressor, LZMAError

    stream = LZMADecompressor(FORMAT_XZ)
    begun = False
    try:
        for piece in pieces:
            rest = piece
            while rest:
                if stream.eof:
                    # Between streams there may be zeros, in fours.
                    if not (rest := rest.lstrip(b"\0")):
                        break
                    stream = LZMADecompressor(FORMAT_XZ)
                begun = True
                # Bounded, since a small file of zeros can unpack to gigabytes.
                block = stream.decompress(rest, UNPACKED_BYTES)
                while block:
                    yield block
                    if stream.eof or stream.needs_input:
                        break
                    block = stream.decompress(b"", UNPACKED_BYTES)
                rest = stream.unused_data if stream.eof else b""
    except LZMAError as error:
        raise CorruptXzError(reason_of(error)) from error
    if begun and not stream.eof:
        raise CorruptXzError("it ends within a compressed stream")


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None
