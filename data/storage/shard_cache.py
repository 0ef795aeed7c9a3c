"""Local copies of shards that cannot be read in place: compressed ones, unpacked, or far ones."""

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

from data.config import CacheConfig, RemoteConfig
from data.storage.shards import compression_of
from data.storage.stores import Shard
from data.storage.transport import LOCAL_BUFFER, ShardError, is_local, open_shard, shard_bytes

BLOCK = 1 << 20  # bytes that are unpacked, hashed and written at a time


class About(NamedTuple):
    """What is written beside a copy, and makes it valid; it outlives the copy."""

    url: str
    stored_size: int
    size: int
    xxh3_128: str
    created: float


class Copy:
    """The files of one shard in the cache.

    <key>.shard   the uncompressed bytes; locked (shared) by whoever reads them
    <key>.json    `About` them, written last; its time is that of the last use
    <key>.part    the bytes in the making
    <key>.lock    locked while any of these is made, checked or removed
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.key = key
        self.content = folder / f"{key}.shard"
        self.sidecar = folder / f"{key}.json"
        self.part = folder / f"{key}.part"
        self.lock = folder / f"{key}.lock"

    def about(self) -> About | None:
        """What its sidecar says, if it says anything."""
        try:
            return About(**json.loads(self.sidecar.read_bytes()))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    @contextmanager
    def locked(self, *, wait: bool = True) -> Iterator[None]:
        """Keeps other threads and processes out; BlockingIOError if one is in, unless `wait`."""
        with self.lock.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            yield

    @property
    def space(self) -> int:
        """Bytes that it takes up."""
        return sum(status.st_size for p in (self.content, self.part) if (status := _status(p)))

    @property
    def last_use(self) -> float:
        """When it was opened last, in seconds since 1970; 0 if it is no whole copy."""
        status = _status(self.sidecar)
        return status.st_mtime if status else 0.0

    def open(self) -> BinaryIO:
        """The bytes; as long as they are open, they are not removed."""
        file = io.open(self.content, "rb", LOCAL_BUFFER)  # noqa: SIM115, UP020 - for the caller
        fcntl.flock(file, fcntl.LOCK_SH)
        os.utime(self.sidecar)
        return file

    def remove(self) -> bool:
        """Frees its space, unless it is in use."""
        try:
            with self.locked(wait=False):
                if self.content.exists():
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
        repaired: names of the shards whose copies were found damaged and made again.
    """

    def __init__(self, config: CacheConfig, remote: RemoteConfig) -> None:
        self.config = config
        self.remote = remote
        self.repaired: list[str] = []
        self._checked: set[tuple[str, int, int]] = set()

    @property
    def folder(self) -> Path:
        """Where the copies are."""
        if self.config.dir is not None:
            return Path(self.config.dir).expanduser()
        return Path(os.environ.get("PHD_CACHE", "~/.cache/phd")).expanduser() / "shards"

    def open(self, shard: Shard) -> BinaryIO:
        """A shard's uncompressed bytes, which can be read from anywhere.

        Raises:
            ShardError: it cannot be had, is damaged, or does not fit on the disk.
        """
        if not self._is_copied(shard):
            return open_shard(shard, self.remote)
        with self._copy(shard) as copy:
            self._ensure(shard, copy)
            return copy.open()

    def size(self, shard: Shard) -> int:
        """A shard's uncompressed size in bytes; of a compressed one, found by unpacking it once.

        Raises:
            ShardError: as `open`.
        """
        if compression_of(shard.name) is None:
            return shard.size
        with self._copy(shard) as copy:
            return (copy.about() or self._ensure(shard, copy)).size

    def _is_copied(self, shard: Shard) -> bool:
        is_far = not is_local(shard.url)
        return compression_of(shard.name) is not None or (is_far and self.config.remote)

    @contextmanager
    def _copy(self, shard: Shard) -> Iterator[Copy]:
        """A shard's copy, to be looked at, made or opened by nobody else meanwhile."""
        key = xxh3_128_hexdigest(f"{shard.url}\n{shard.size}\n{shard.tag}".encode())
        copy = Copy(self.folder, key)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with copy.locked():
                yield copy
        except OSError as error:
            raise ShardError(
                f"data.cache.dir={str(self.folder)!r}: cannot hold a copy of {shard.url} "
                f"({error.strerror}); make room there, or choose another directory or a lower "
                "data.cache.max_gb"
            ) from error

    def _ensure(self, shard: Shard, copy: Copy) -> About:
        """Checks the copy, the first time in this process, and makes it if need be."""
        about = copy.about()
        if about and copy.content.exists():
            if self._identity(copy) in self._checked:
                return about
            if _digest(copy.content) == about.xxh3_128:
                self._checked.add(self._identity(copy))
                return about
            self.repaired.append(shard.name)
        self._make_room(shard.size)
        about = self._make(shard, copy)
        self._checked.add(self._identity(copy))
        self._make_room(0)
        return about

    def _identity(self, copy: Copy) -> tuple[str, int, int]:
        status = copy.content.stat()
        return copy.key, status.st_ino, status.st_mtime_ns

    def _make(self, shard: Shard, copy: Copy) -> About:
        digest = xxh3_128()
        try:
            with copy.part.open("wb") as file:
                for block in _unpacked(shard, self.remote):
                    file.write(block)
                    digest.update(block)
                size = file.tell()
                _flush(file)
            os.replace(copy.part, copy.content)
            about = About(shard.url, shard.size, size, digest.hexdigest(), time.time())
            with copy.part.open("wb") as file:
                file.write(json.dumps(about._asdict()).encode())
                _flush(file)
            os.replace(copy.part, copy.sidecar)
        finally:
            copy.part.unlink(missing_ok=True)
        return about

    def _make_room(self, coming: int) -> None:
        """Removes the copies that were not used for longest until `coming` bytes fit in, too."""
        copies = [Copy(self.folder, path.stem) for path in self.folder.glob("?" * 32 + ".lock")]
        total = coming + sum(copy.space for copy in copies)
        for copy in sorted(copies, key=lambda copy: copy.last_use):
            if total <= self.config.max_gb * 1e9:
                return
            space = copy.space
            if space and copy.remove():
                total -= space


class _Pieces(io.RawIOBase):
    """Pieces of bytes as a stream; what one read leaves of a piece is the next one's."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._piece = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._piece:
            self._piece = memoryview(next(self._pieces, b""))
        count = min(len(buffer), len(self._piece))
        buffer[:count] = self._piece[:count]
        self._piece = self._piece[count:]
        return count


def _unpacked(shard: Shard, remote: RemoteConfig) -> Iterator[bytes]:
    """A shard's uncompressed bytes, read in one go."""
    with closing(shard_bytes(shard, 0, shard.size, remote, skip=True)) as pieces:
        compression = compression_of(shard.name)
        if compression is None:
            yield from pieces
            return
        try:
            # Arrow's streams notice a truncated file, which Zstandard's own take for a shorter
            # one, and read on where one compressed stream ends and another follows.
            with pyarrow.input_stream(_Pieces(pieces), compression=compression) as stream:
                while block := stream.read(BLOCK):
                    yield block
        except (OSError, pyarrow.ArrowException) as error:
            raise ShardError(
                f"{shard.url}: damaged or truncated ({error}); get it again, or leave it out"
            ) from error


def _digest(path: Path) -> str:
    digest = xxh3_128()
    with path.open("rb", 0) as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None
