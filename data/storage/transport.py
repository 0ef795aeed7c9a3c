"""Reading the bytes of a shard in spite of servers and disks that fail now and then."""

import io
from collections.abc import Callable, Generator, Iterator
from typing import Any, TypeVar

from conf.errors import DataError, TransientError, reason_of
from data.config import RemoteConfig
from data.storage.retry import NOT_RETRIED, Backoff
from data.storage.stores import FsspecStore, LocalStore, Shard, Store
from data.storage.web import WebStore

LOCAL_BUFFER_BYTES = 1 << 20
REMOTE_BUFFER_BYTES = 4 << 20
"""The buffer of a remote shard, which is also what one request asks for. It is about 40 times the
100 kB or so that arrive in a connection's first round trips, so that waiting costs little."""

Piece = TypeVar("Piece", bytes, memoryview)


class ShardUnavailableError(TransientError):
    """A shard that cannot be read at present; says why, and what to do."""


def is_local(url: str) -> bool:
    """Whether it is a path on this machine.

    >>> is_local("/data/a.txt"), is_local("https://host/a.txt")
    (True, False)
    """
    return "://" not in url


def store_of(url: str, timeout_s: float) -> Store:
    """The store that a URL points to."""
    if is_local(url):
        return LocalStore()
    if url.startswith(("http://", "https://")):
        return WebStore(timeout_s)
    return FsspecStore(timeout_s)


def shard_bytes(
    shard: Shard, start: int, stop: int, remote: RemoteConfig, *, skip: bool = False
) -> Generator[bytes]:
    """A shard's bytes from `start` to `stop`, in pieces; after a failure it asks for the rest only.

    Args:
        skip: let a server that sends only whole files send the file from its beginning every time.

    Raises:
        ShardUnavailableError: nothing came for `remote.retry_s` seconds.
        DataError: the shard is not the one that was listed, or its server refuses to send it.
        ConfigError: the server sends whole files only, and `skip` is false.
    """
    store = store_of(shard.url, remote.timeout_s)
    return _read_with_retries(
        shard, start, stop, remote, lambda position: store.read(shard, position, stop, skip=skip)
    )


def _read_with_retries(
    shard: Shard,
    start: int,
    stop: int,
    remote: RemoteConfig,
    read_from: Callable[[int], Iterator[Piece]],
) -> Generator[Piece]:
    """The pieces of as many tries as it takes, each from the first byte that has not come yet."""
    backoff = Backoff(remote.retry_s)
    while start < stop:
        try:
            for piece in read_from(start):
                yield piece
                start += len(piece)
                # A slow server that sends a little each time never runs out of tries.
                backoff.reset()
        # The run stops, since the next try, and the next start, would end in the same way.
        except NOT_RETRIED as error:
            raise DataError(f"{shard.url}: cannot be read ({reason_of(error)})") from error
        except OSError as error:
            if not backoff.pause():
                raise ShardUnavailableError(
                    f"{shard.url}: cannot be read from byte {start} on: "
                    f"{reason_of(error)} "
                    f"({backoff.failures} tries in {backoff.waited_s:.0f} s without progress, "
                    f"data.remote.retry_s={remote.retry_s:g}); make sure that it can be read, and "
                    "start the run again"
                ) from error


class ShardReader(io.RawIOBase):
    """A shard as a file.

    It holds a position and no connection, so that nothing can break between two reads.
    """

    def __init__(self, shard: Shard, remote: RemoteConfig) -> None:
        self.shard = shard
        self.remote = remote
        self._store = store_of(shard.url, remote.timeout_s)
        self._position = 0

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer, or as much of it as there are bytes left."""
        # BufferedReader asks for a whole buffer; a store may answer in several pieces.
        start, stop = self._position, min(self._position + len(buffer), self.shard.size)
        view = memoryview(buffer)[: max(0, stop - start)]

        def fill_from(position: int) -> Iterator[memoryview]:
            return self._store.fill(self.shard, position, view[position - start :])

        for filled in _read_with_retries(self.shard, start, stop, self.remote, fill_from):
            self._position += len(filled)
        return self._position - start

    def readall(self) -> bytes:
        """All that is left, in one request; the inherited method would ask for 8 KiB at a time."""
        rest = b"".join(shard_bytes(self.shard, self._position, self.shard.size, self.remote))
        self._position += len(rest)
        return rest

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a byte, counted from the beginning, from here or from the end."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.shard.size}[whence]
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        """The number of the next byte."""
        return self._position

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


def open_shard(shard: Shard, remote: RemoteConfig) -> io.BufferedReader:
    """A shard's bytes as they are stored; reading them raises the errors of `shard_bytes`."""
    buffer_bytes = LOCAL_BUFFER_BYTES if is_local(shard.url) else REMOTE_BUFFER_BYTES
    return io.BufferedReader(ShardReader(shard, remote), buffer_bytes)
