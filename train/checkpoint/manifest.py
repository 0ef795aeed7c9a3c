"""A directory that proves it is whole: every file's hash in a manifest, the manifest's in a marker.

    COMPLETE       the hash of manifest.json; written last, removed first
    manifest.json  {file name: {"bytes": size, "xxh3_128": hash}} of every other file

A cut, changed or lost file, the manifest and the marker included, no longer fits the others. The
hashes are taken of what is written, on its way to the disk, so they also tell of a disk that keeps
something else. They find damage, not malice: whoever can write the directory can also write a
fitting manifest.
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

from data.storage.atomic import file_xxh3_128

MANIFEST = "manifest.json"
MARKER = "COMPLETE"


class Entry(TypedDict):
    """A file's size and hash."""

    bytes: int
    xxh3_128: str


Entries = dict[str, Entry]
"""By the file's name."""


class HashedFile:
    """A file that is being written, and its entry so far."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.hash = xxhash.xxh3_128()

    def write(self, data: bytes | memoryview) -> int:
        """Write and hash all of `data`."""
        self.hash.update(data)
        return self.file.write(data)

    def tell(self) -> int:
        """How many bytes have been written."""
        return self.file.tell()

    def flush(self) -> None:
        """Hand everything to the operating system."""
        self.file.flush()

    def close(self) -> None:
        """Nothing, for DCP calls it: what opened the file makes sure of it and closes it."""

    @property
    def entry(self) -> Entry:
        """The entry of what has been written."""
        return {"bytes": self.tell(), "xxh3_128": self.hash.hexdigest()}


@contextmanager
def new_file(path: Path, entries: Entries) -> Iterator[HashedFile]:
    """Write a new file, which at the end is on the disk, out of the cache, and in `entries`."""
    with path.open("xb") as file:
        hashed = HashedFile(file)
        yield hashed
        _to_disk(file)
        if sys.platform == "linux":  # or what is read back would not come from the disk
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        entries[path.name] = hashed.entry


def seal(directory: Path, entries: Entries) -> None:
    """Write the manifest and then the marker of a flat `directory` whose files are on the disk."""
    manifest = json.dumps(dict(sorted(entries.items())), indent=1)
    _write_durably(directory / MANIFEST, manifest)
    _write_durably(directory / MARKER, _marker_of(manifest.encode()))
    flush_directory(directory)


def damage(
    directory: Path, *, contents: bool = True, share: tuple[int, int] = (0, 1)
) -> str | None:
    """Return what is wrong with a sealed `directory`, or None if it is whole.

    Args:
        directory: what `seal` has sealed.
        contents: whether hashes are compared; else sizes alone, which reads two small files.
        share: (r, n) looks at the r-th of n equal shares of the files.
    """
    try:
        return _first_flaw(directory, contents, share)
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"it cannot be read: {error}"


def remove(directory: Path) -> None:
    """Delete a sealed `directory` so that a crash half-way leaves nothing that looks whole."""
    (directory / MARKER).unlink(missing_ok=True)
    flush_directory(directory)
    shutil.rmtree(directory)


def flush_directory(directory: Path) -> None:
    """Return once the disk has the names in `directory`: a file's own fsync does not cover them."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _first_flaw(directory: Path, contents: bool, share: tuple[int, int]) -> str | None:
    marker = (directory / MARKER).read_bytes()
    manifest = (directory / MANIFEST).read_bytes()
    if marker != _marker_of(manifest).encode():
        return f"{MARKER} does not fit {MANIFEST}"
    first, step = share
    for name, entry in [*json.loads(manifest).items()][first::step]:
        size = (directory / name).stat().st_size
        if size != entry["bytes"]:
            return f"{name} has {size:,} bytes instead of {entry['bytes']:,}"
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
