"""A sealed directory: a manifest has the hash of every file, and a marker that of the manifest.

    COMPLETE       the hash of manifest.json; written last, removed first
    manifest.json  {file name: {"bytes": size, "xxh3_128": hash}} of every other file

So a truncated, changed or missing file is found, also if it is the manifest or the marker. The
hashes are computed from the bytes in memory before they are written. So they also reveal a disk
that stores other bytes. They protect from damage and not from an attacker, who could write a
matching manifest; xxh3 is no cryptographic hash, but it is as fast as memory.
"""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO, TypedDict

import xxhash

from conf.errors import reason_of
from conf.wording import plural
from data.storage.atomic import file_xxh3_128, flush_names

MANIFEST = "manifest.json"
MARKER = "COMPLETE"


class Entry(TypedDict):
    """A file's size and hash."""

    bytes: int
    xxh3_128: str


Entries = dict[str, Entry]
"""The entries of a directory, by file name."""


class HashedFile:
    """A file that hashes the bytes that are written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.hash = xxhash.xxh3_128()

    def write(self, data: bytes | memoryview) -> int:
        """Write and hash all of `data`."""
        self.hash.update(data)
        return self.file.write(data)

    def tell(self) -> int:
        """The number of bytes written so far."""
        return self.file.tell()

    def flush(self) -> None:
        """Flush Python's buffer to the operating system."""
        self.file.flush()

    def close(self) -> None:
        """Do nothing. DCP calls this, but `new_file` still has to fsync the file, and closes it."""

    @property
    def entry(self) -> Entry:
        """Size and hash of the bytes written so far."""
        return {"bytes": self.tell(), "xxh3_128": self.hash.hexdigest()}


@contextmanager
def new_file(path: Path, entries: Entries) -> Iterator[HashedFile]:
    """A new file to write. At the end it is fsynced, dropped from the page cache, and in `entries`.

    Raises:
        OSError: the disk refuses, or the file exists.
    """
    # "x": a file that exists belongs to another save, and must not be overwritten.
    with path.open("xb") as file:
        hashed = HashedFile(file)
        yield hashed
        _to_disk(file)
        # The file is read back and hashed before the checkpoint is published. Without this, the
        # page cache would answer, and a damaged disk would go unnoticed.
        if sys.platform == "linux":
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        entries[path.name] = hashed.entry


def seal(directory: Path, entries: Entries) -> None:
    """Write the manifest of a directory, and then its marker.

    Args:
        directory: a directory without subdirectories, whose files have been fsynced.
        entries: sizes and hashes of all its files.
    """
    manifest = json.dumps(dict(sorted(entries.items())), indent=1)
    # The marker is written only when the manifest is on the disk: without it nothing counts.
    _write_durably(directory / MANIFEST, manifest)
    _write_durably(directory / MARKER, _marker_of(manifest.encode()))
    flush_names(directory)


def damage(
    directory: Path, *, contents: bool = True, shard: tuple[int, int] = (0, 1)
) -> str | None:
    """Return what is wrong with a sealed directory, or None if it is complete.

    Args:
        directory: a directory that `seal` was called on.
        contents: whether hashes are compared. If not, only sizes are, and only the manifest and
            the marker are read.
        shard: (rank, world size): check every world-size-th file, beginning with the rank-th.
    """
    try:
        return _first_flaw(directory, contents, shard)
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"it cannot be read: {reason_of(error)}"


def remove(directory: Path) -> None:
    """Delete a sealed directory. After a crash half-way it does not look complete."""
    # The disk may delete the files in any order, so the marker's removal is flushed first.
    (directory / MARKER).unlink(missing_ok=True)
    flush_names(directory)
    shutil.rmtree(directory)


def _first_flaw(directory: Path, contents: bool, shard: tuple[int, int]) -> str | None:
    marker = (directory / MARKER).read_bytes()
    manifest = (directory / MANIFEST).read_bytes()
    if marker != _marker_of(manifest).encode():
        return f"{MARKER} does not fit {MANIFEST}"
    first, step = shard
    for name, entry in [*json.loads(manifest).items()][first::step]:
        size = (directory / name).stat().st_size
        if size != entry["bytes"]:
            return f"{name} has {plural(size, 'byte')} instead of {entry['bytes']:,}"
        if contents and file_xxh3_128(directory / name) != entry["xxh3_128"]:
            return f"{name} has changed since it was written: its hash differs"
    return None


def _write_durably(path: Path, text: str) -> None:
    with path.open("x", encoding="utf-8") as file:
        file.write(text)
        _to_disk(file)


def _to_disk(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _marker_of(manifest: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(manifest) + "\n"
