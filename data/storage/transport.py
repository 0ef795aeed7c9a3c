"""Reading shards, whatever befalls the way to them."""

import io
from collections.abc import Callable, Generator, Iterator
from typing import Any, TypeVar

from data.config import RemoteConfig
from data.storage.retry import FINAL, Backoff
from data.storage.stores import LocalStore, OtherStore, Shard, Store
from data.storage.web import WebStore

LOCAL_BUFFER = 1 << 20
REMOTE_BUFFER = 4 << 20  # also what one request asks for: some 40 times what comes in its 1st trip

Piece = TypeVar("Piece", bytes, memoryview)


class ShardError(ValueError):
    """A shard that cannot be read, why, and what to do."""


def is_local(url: str) -> bool:
    """Whether it is a path on this machine.

    >>> is_local("/data/a.txt"), is_local("https://host/a.txt")
    (True, False)
    """
    return "://" not in url


def store_of(url: str, timeout_s: float) -> Store:
    """Where a URL points to."""
    if is_local(url):
        return LocalStore()
    if url.startswith(("http://", "https://")):
        return WebStore(timeout_s)
    return OtherStore(timeout_s)


def shard_bytes(
    shard: Shard, start: int, stop: int, remote: RemoteConfig, *, skip: bool = False
) -> Generator[bytes]:
    """A shard's bytes from `start` to `stop`, in pieces; what came is never asked for again.

    Args:
        skip: servers that send whole files only may send it from its beginning every time.

    Raises:
        ShardError: it is not what was listed, or nothing came for `remote.retry_s` seconds.
    """
    store = store_of(shard.url, remote.timeout_s)
    return _persist(
        shard, start, stop, remote, lambda place: store.read(shard, place, stop, skip=skip)
    )


def _persist(
    shard: Shard,
    start: int,
    stop: int,
    remote: RemoteConfig,
    attempt: Callable[[int], Iterator[Piece]],
) -> Generator[Piece]:
    """The pieces of as many attempts as it takes, each from the byte that is to come next."""
    backoff = Backoff(remote.retry_s)
    while start < stop:
        try:
            for piece in attempt(start):
                yield piece
                start += len(piece)
                backoff.progress()
        except FINAL as error:
            raise ShardError(f"{shard.url}: {error}") from error
        except OSError as error:
            if not backoff.wait():
                raise ShardError(
                    f"{shard.url}: cannot be read from byte {start} on: "
                    f"{str(error) or type(error).__name__} "
                    f"({backoff.failures} tries in {backoff.waited_s:.0f} s without progress, "
                    f"data.remote.retry_s={remote.retry_s:g}); see that it can be, and start the "
                    "run again"
                ) from error


class ShardReader(io.RawIOBase):
    """A shard as a file; it holds nothing but its place, so that nothing can break in between."""

    def __init__(self, shard: Shard, remote: RemoteConfig) -> None:
        self.shard = shard
        self.remote = remote
        self._store = store_of(shard.url, remote.timeout_s)
        self._place = 0

    def readinto(self, buffer: Any) -> int:
        """Fills the buffer, or as much of it as there is left to read."""
        start, stop = self._place, min(self._place + len(buffer), self.shard.size)
        view = memoryview(buffer)[: max(0, stop - start)]

        def fill(place: int) -> Iterator[memoryview]:
            return self._store.fill(self.shard, place, view[place - start :])

        for filled in _persist(self.shard, start, stop, self.remote, fill):
            self._place += len(filled)
        return self._place - start

    def readall(self) -> bytes:
        """All that is left, in one request; the inherited one would ask for 8 KiB at a time."""
        rest = b"".join(shard_bytes(self.shard, self._place, self.shard.size, self.remote))
        self._place += len(rest)
        return rest

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Moves to a place, counted from the beginning, from here or from the end."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self.shard.size}[whence]
        self._place = base + offset
        return self._place

    def tell(self) -> int:
        """The place of the next byte."""
        return self._place

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


def open_shard(shard: Shard, remote: RemoteConfig) -> io.BufferedReader:
    """A shard's bytes as they are stored; reading them raises a `ShardError` at worst."""
    buffer = LOCAL_BUFFER if is_local(shard.url) else REMOTE_BUFFER
    return io.BufferedReader(ShardReader(shard, remote), buffer)
