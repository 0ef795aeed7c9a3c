"""Files and directories that appear whole or not at all, and the hash that proves it.

    write_atomic("a.json", text)     .a.json.3f9c.partial   written
                                     .a.json.3f9c.partial   fsynced
                                     a.json                 renamed: readers see the old file
                                                            before this, and the new one after
                                     the directory          fsynced, so that the name stays

A rename is atomic only within one file system, so the unfinished file lies beside the final one.
Without the fsync before the rename, a loss of power may leave the new name with an empty file. A
flush takes from a millisecond on an SSD to seconds on a busy file server.
"""

import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import xxhash


def write_atomic(path: Path, content: bytes | str, *, private: bool = False) -> None:
    """Write a file, or replace it, so that nobody ever sees a part of it.

    When it returns, the disk has the file.

    Args:
        path: its directory has to exist.
        content: text is written as UTF-8.
        private: only its owner can read it.

    Raises:
        OSError: the disk refuses; the file is as it was before.
    """
    with open_atomic(path) as file:
        if private:
            os.fchmod(file.fileno(), 0o600)  # while it is empty
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def open_atomic(path: Path, *, partial: Path | None = None) -> Iterator[IO[bytes]]:
    """A file to write; it gets its name at the end of the block, or is removed if the block fails.

    Args:
        path: as for `write_atomic`.
        partial: the unfinished file; None: one that no other process writes.
    """
    partial = partial or _partial(path)
    try:
        with partial.open("wb") as file:
            yield file
            flush_to_disk(file)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    flush_names(path.parent)


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A directory to fill; it gets its name at the end of the block, or is removed if that fails.

    Args:
        path: does not exist yet, or is an empty directory; its parents are made.

    Yields:
        the unfinished directory, beside the final one. The disk has all its files when it gets its
        name.
    """
    partial = _partial(path)
    partial.mkdir(parents=True)
    try:
        yield partial
        for written in partial.rglob("*"):
            if written.is_file():
                with written.open("rb") as file:
                    flush_to_disk(file)
            elif written.is_dir():
                flush_names(written)
        flush_names(partial)
        partial.replace(path)
    except BaseException:
        shutil.rmtree(partial)
        raise
    flush_names(path.parent)


def flush_to_disk(file: IO[bytes]) -> None:
    """Return when the disk has what was written to an open file."""
    file.flush()
    os.fsync(file.fileno())


def flush_names(directory: Path) -> None:
    """Return when the disk has the names in a directory, which a file's own fsync leaves out.

    See fsync(2): it "does not necessarily ensure that the entry in the directory has also reached
    disk".
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_xxh3_128(path: Path) -> str:
    """The xxh3_128 hash of a file's bytes, in hexadecimal.

    It finds accidents of disks and copies, at several GB/s; it does not stop an attacker.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def _partial(path: Path) -> Path:
    # By chance, since processes on several hosts, with equal process ids, may share a directory.
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
