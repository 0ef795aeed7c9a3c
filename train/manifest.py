"""A directory that proves it is whole: every file's hash in a manifest, the manifest's in a marker.

    COMPLETE       the hash of manifest.json; written last, removed first
    manifest.json  {file name: {"bytes": size, "xxh3_128": hash}} of every other file

A cut, changed or lost file, the manifest and the marker included, no longer fits the others. The
hashes find damage, not malice: whoever can write the directory can also write a fitting manifest.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

import xxhash

MANIFEST = "manifest.json"
MARKER = "COMPLETE"


def seal(directory: Path) -> None:
    """Flush every file of a flat `directory` to the disk, write its manifest, then its marker."""
    entries = {path.name: _flushed_entry(path) for path in sorted(directory.iterdir())}
    manifest = json.dumps(entries, indent=1)
    write_durably(directory / MANIFEST, manifest)
    write_durably(directory / MARKER, _marker_of(manifest.encode()))
    flush_directory(directory)


def damage(directory: Path, *, contents: bool = True) -> str | None:
    """Return what is wrong with a sealed `directory`, or None if it is whole.

    With `contents=False` sizes are compared but not hashes: that reads two small files, not all.
    """
    try:
        return _first_flaw(directory, contents)
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"it cannot be read: {error}"


def remove(directory: Path) -> None:
    """Delete a sealed `directory` so that a crash half-way leaves nothing that looks whole."""
    (directory / MARKER).unlink(missing_ok=True)
    flush_directory(directory)
    shutil.rmtree(directory)


def write_durably(path: Path, text: str) -> None:
    """Write `text` to `path` and return once the disk has it."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def flush_directory(directory: Path) -> None:
    """Return once the disk has the names in `directory`: a file's own fsync does not cover them."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _first_flaw(directory: Path, contents: bool) -> str | None:
    marker = (directory / MARKER).read_bytes()
    manifest = (directory / MANIFEST).read_bytes()
    if marker != _marker_of(manifest).encode():
        return f"{MARKER} does not fit {MANIFEST}"
    for name, entry in json.loads(manifest).items():
        size = (directory / name).stat().st_size
        if size != entry["bytes"]:
            return f"{name} has {size:,} bytes instead of {entry['bytes']:,}"
        if contents and _file_hash(directory / name) != entry["xxh3_128"]:
            return f"{name} has changed since it was written: its hash differs"
    return None


def _flushed_entry(path: Path) -> dict[str, int | str]:
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "xxh3_128": _file_hash(path)}


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def _marker_of(manifest: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(manifest) + "\n"
