"""Corpora of files, of which each lane reads its own part: the user's, and Python's own."""

import os
import sysconfig
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from xxhash import xxh3_64_intdigest, xxh3_128_hexdigest

from conf.errors import ConfigError, Problem
from conf.text import BOM
from data.config import FilesSource
from data.source import Position, Record
from data.sources.formats import (
    ByteRange,
    Format,
    JsonLines,
    Parquet,
    PythonFile,
    SeparatedText,
    TextFile,
)
from data.storage.shard_cache import ShardCache
from data.storage.shards import (
    COMPRESSED,
    LISTING,
    Listing,
    compression_of,
    counted,
    ending_of,
    list_shards,
)
from data.storage.stores import LocalStore, Shard
from data.storage.transport import shard_bytes

SUFFIXES = (".txt", ".jsonl", ".ndjson", ".json", ".parquet")
"""What is read of a folder, also compressed. Of plain `.json` files only those that hold JSON
lines: others are metadata. Compressed ones hold JSON lines, as those of C4 do."""

NO_LINES = ".json that hold no JSON lines"
"""What is told of the `.json` files in a folder that are passed over."""

LOOK_BYTES = 4096
"""Bytes at the beginning of a `.json` file in a folder from which its kind is told."""

SHOWN_FILES = 3
"""Files that a remark names."""

EXPANSION = 3
"""Bytes of text that a byte of a compressed file counts for when lanes get equal parts; web pages
have 2.5 (Parquet with Snappy) to 4 (Zstandard)."""

# Tests are the larger half of a full installation, much of it tables and deliberate nonsense, and
# many systems leave them out. Without them the text is better, and closer to the same everywhere.
LEFT_OUT = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages"})


class CorpusFile(NamedTuple):
    """A shard, and how it is read."""

    shard: Shard
    format: Format


@dataclass(frozen=True)
class FileCorpus:
    """The documents of files, in their order; a position is (file, unit of its format).

    Attributes:
        passed_over: the endings of the files that lie beside them and are not read.
    """

    name: str
    files: tuple[CorpusFile, ...]
    cache: ShardCache
    passed_over: tuple[str, ...] = ()

    @property
    def remarks(self) -> list[str]:
        """What the user should know of the files: those that are not read, and empty ones."""
        found = []
        if self.passed_over:
            count = len(self.files)
            found.append(
                f"data.sources.{self.name}: {count:,} file{'s are' if count > 1 else ' is'} read; "
                f"passed over in the same folders: {counted(self.passed_over)}"
            )
        if empty := [file.shard.name for file in self.files if not file.shard.size]:
            are = "file has" if len(empty) == 1 else "files have"
            shown = ", ".join(empty[:SHOWN_FILES]) + (", ..." if len(empty) > SHOWN_FILES else "")
            found.append(
                f"data.sources.{self.name}: {len(empty):,} {are} 0 bytes, as an interrupted "
                f"download leaves: {shown}"
            )
        return found

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """The files' names, sizes and formats; where they lie does not matter."""
        listing = "\n".join(f"{f.shard.name} {f.shard.size} {f.format}" for f in self.files)
        contents = f"{len(self.files)} files {xxh3_128_hexdigest(listing.encode())}"
        return {f"data.sources.{self.name}": contents}

    @property
    def text_bytes(self) -> int:
        """About how many bytes of text there are, from the files' sizes."""
        return sum(_text_bytes(file) for file in self.files if file.shard.size)

    @cached_property
    def is_seekable(self) -> bool:
        """Whether no file has to be unpacked before it can be read."""
        return not any(compression_of(file.shard.name) for file in self.files)

    def documents(
        self, lane: int, lanes: int, position: Position = None
    ) -> Iterator[tuple[Record, Position]]:
        """One pass over a lane's records; see `Corpus`.

        Raises:
            ShardUnavailableError: a file cannot be read at present.
            DataError: a file is damaged, or a table has no such column as the settings say.
        """
        # A position is a list in JSON: [file, unit].
        first, first_unit = position or (0, 0)
        for number, byte_range in lane_byte_ranges(self._borders, lane, lanes):
            if number < first:
                continue
            if number == first:
                byte_range = byte_range._replace(first_unit=first_unit)
            shard, form = self.files[number]
            with self.cache.open(shard) as file:
                for record, after in form.records(file, shard.url, byte_range):
                    yield record, [number, after]

    @cached_property
    def _borders(self) -> list[int]:
        return [*accumulate(map(_text_bytes, self.files), initial=0)]


def _text_bytes(file: CorpusFile) -> int:
    """About how many bytes of text a file has; at least 1, so that an empty file is some lane's."""
    packed = compression_of(file.shard.name) is not None or isinstance(file.format, Parquet)
    return max(1, file.shard.size * (EXPANSION if packed else 1))


def lane_byte_ranges(
    borders: Sequence[int], lane: int, lanes: int
) -> Iterator[tuple[int, ByteRange]]:
    """The files that a lane reads, by number, and which bytes of each.

    All files end to end, each between two of the `borders`, are cut into equal lengths. A record
    belongs to the lane in whose length it begins:

        bytes    |0       |8 |10        |20    three files
        records  |a  |b   |c |d      |e |
        lane     |0    |1    |2    |3   |      a b to lane 0, c to 1, d to 2, e to 3

    >>> for found in lane_byte_ranges([0, 8, 10, 20], lane=1, lanes=4): print(found)
    (0, ByteRange(start=5, stop=8, size=8, first_unit=0))
    (1, ByteRange(start=0, stop=2, size=2, first_unit=0))
    """
    # In integers: lane i ends at the very byte at which lane i + 1 begins, for any sizes.
    start, stop = (borders[-1] * border // lanes for border in (lane, lane + 1))
    for number in range(bisect_right(borders, start) - 1, bisect_left(borders, stop)):
        low, high = borders[number], borders[number + 1]
        yield number, ByteRange(max(low, start) - low, min(high, stop) - low, high - low)


def file_corpus(
    name: str, source: FilesSource, cache: ShardCache, max_document_bytes: int
) -> FileCorpus:
    """The files that `data.sources.<name>.paths` name, each path's in sorted order.

    Raises:
        ConfigError: paths do not exist, match no file, or are of no known format.
        TransientError: the store of a path cannot be reached.
    """
    # JSON can spend six bytes (`\u0001`) on one of the text, and may hold more than the text.
    limit = 6 * max_document_bytes + 65536
    setting = f"data.sources.{name}.paths"
    files: dict[str, CorpusFile] = {}
    passed_over: dict[str, str] = {}
    problems: list[Problem | str] = []
    for pattern in source.patterns:
        try:
            listing = list_shards(pattern, SUFFIXES, setting=setting)
            others = dict.fromkeys(_without_lines(listing), NO_LINES)
            if len(others) == len(listing):
                only = f"no file in it can be read; there are only {counted(others.values())}"
                raise ConfigError([Problem(setting, pattern, only, "name the files themselves")])
            passed_over |= listing.passed_over | others
            for shard in listing:
                if shard.url in others:
                    continue
                form = _format(name, source, shard.name, limit)
                # A file that two paths name is read once, where the first one names it.
                files.setdefault(shard.url, CorpusFile(shard, form))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    endings = tuple(ending for url, ending in passed_over.items() if url not in files)
    return FileCorpus(name, tuple(files.values()), cache, endings)


def _without_lines(listing: Listing) -> list[str]:
    """The URLs of the plain `.json` files in folders that hold something else than JSON lines."""
    doubtful = [
        shard
        for shard in listing
        if shard.url in listing.in_folders and ending_of(shard.name) == ".json" and shard.size
    ]
    with ThreadPoolExecutor(8) as pool:
        return [
            shard.url
            for shard, holds in zip(doubtful, pool.map(_holds_lines, doubtful), strict=True)
            if not holds
        ]


def _holds_lines(shard: Shard) -> bool:
    """Whether a `.json` file looks like lines of JSON objects, and not like one value."""
    try:
        stop = min(shard.size, LOOK_BYTES)
        with closing(shard_bytes(shard, 0, stop, LISTING)) as pieces:
            beginning = b"".join(pieces)
    except ConfigError:
        return True  # its server sends whole files only; reading it tells what it is
    line = beginning.removeprefix(BOM.encode()).lstrip().partition(b"\n")[0].strip()
    # A value over several lines begins with a bracket alone, and a list with a square one. Bytes
    # that are no text are read, so that they are told of.
    return not line.startswith(b"[") and line != b"{"


def _format(name: str, source: FilesSource, file: str, limit: int) -> Format:
    plain = os.path.splitext(file)[0] if compression_of(file) else file
    match os.path.splitext(plain)[1].lower():
        case ".txt" if source.unescaped_separator:
            return SeparatedText(source.unescaped_separator, limit)
        case ".txt":
            return TextFile(limit)
        case ".jsonl" | ".ndjson" | ".json":
            return JsonLines(source.text_field, limit)
        case ".parquet":
            return Parquet(source.text_field, name)
        case _:
            expected = (
                f"cannot read {file}; expected {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}, also "
                f"with {', '.join(COMPRESSED)}"
            )
            raise ConfigError([Problem(f"data.sources.{name}.paths", source.paths, expected)])


def python_corpus(name: str, *, packages: bool, cache: ShardCache) -> FileCorpus:
    """The corpus that is on every machine: Python's own source files.

    It has the `.py` files of the standard library without its tests and, with `packages`, those of
    the installed packages, in an order by a hash of their names.
    """
    schemes = ["stdlib", *(["purelib", "platlib"] if packages else [])]
    roots = dict.fromkeys(Path(sysconfig.get_path(scheme)) for scheme in schemes)
    shards = [shard for root in roots for shard in python_files(root)]
    # Lanes read neighbours. In the order of the names, one lane would have the files of
    # `encodings/`, which are tables of characters, and nothing else.
    shards.sort(key=lambda shard: xxh3_64_intdigest(shard.name.encode()))
    return FileCorpus(name, tuple(CorpusFile(shard, PythonFile()) for shard in shards), cache)


def python_files(root: Path) -> list[Shard]:
    """The `.py` files under a directory, sorted by name.

    Tests, packages below the directory and empty files are left out; many packages have an empty
    `__init__.py`.
    """
    shards = []
    for directory, below, files in os.walk(root):
        # Changed in place, which is how os.walk is told not to go there.
        below[:] = [name for name in below if name not in LEFT_OUT]
        for path in (Path(directory, name) for name in files if name.endswith(".py")):
            if path.is_file() and path.stat().st_size:
                shards.append(_local_shard(path, path.relative_to(root.parent).as_posix()))
    return sorted(shards, key=lambda shard: shard.name)


def _local_shard(path: Path, name: str) -> Shard:
    entry = LocalStore().info(str(path))
    assert entry.size is not None
    return Shard(entry.url, name, entry.size, entry.tag)
