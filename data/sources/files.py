"""A corpus of files, here or elsewhere, of which each lane reads its own part."""

import os
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

from xxhash import xxh3_128_hexdigest

from data.config import FilesSource
from data.source import Position, Record
from data.sources.formats import Format, JsonLines, Parquet, SeparatedText, Share, TextFile
from data.storage.shard_cache import ShardCache
from data.storage.shards import COMPRESSED, compression_of, list_shards
from data.storage.stores import Shard

SUFFIXES = (".txt", ".jsonl", ".parquet", ".json.gz", ".json.zst")
"""What is read of a folder. A `.json` in it may be anything; compressed ones hold JSON lines."""


EXPANSION = 3
"""Bytes of text that a byte of a compressed file counts for when lanes are given equal parts; web
pages have 2.5 (Parquet with Snappy) to 4 (Zstandard)."""


class CorpusFile(NamedTuple):
    """A shard, and how it is read."""

    shard: Shard
    format: Format


@dataclass(frozen=True)
class FileCorpus:
    """The documents of files, in their order; a position is (file, unit of its format)."""

    name: str
    files: tuple[CorpusFile, ...]
    cache: ShardCache

    @cached_property
    def identity(self) -> dict[str, Any]:
        """The files' names, sizes and formats; where they lie does not matter."""
        listing = "\n".join(f"{f.shard.name} {f.shard.size} {f.format}" for f in self.files)
        contents = f"{len(self.files)} files {xxh3_128_hexdigest(listing.encode())}"
        return {f"data.sources.{self.name}": contents}

    @cached_property
    def is_seekable(self) -> bool:
        """No file has to be unpacked before it can be read."""
        return not any(compression_of(file.shard.name) for file in self.files)

    def documents(
        self, lane: int, lanes: int, position: Position = None
    ) -> Iterator[tuple[Record, Position]]:
        """One pass over a lane's records; see `Corpus`.

        Raises:
            ShardError: a file cannot be read, or is damaged.
            ValueError: a table has no such column as the settings say.
        """
        first, resume = position or (0, 0)
        for number, share in shares(self._borders, lane, lanes):
            if number < first:
                continue
            if number == first:
                share = share._replace(resume=resume)
            shard, form = self.files[number]
            with self.cache.open(shard) as file:
                for record, after in form.records(file, shard.url, share):
                    yield record, [number, after]

    @cached_property
    def _borders(self) -> list[int]:
        return [*accumulate(map(_weight, self.files), initial=0)]


def _weight(file: CorpusFile) -> int:
    """About how many bytes of text a file has, at least one: or no lane would see an empty file."""
    packed = compression_of(file.shard.name) is not None or isinstance(file.format, Parquet)
    return max(1, file.shard.size * (EXPANSION if packed else 1))


def shares(borders: Sequence[int], lane: int, lanes: int) -> Iterator[tuple[int, Share]]:
    """The files that a lane reads, by number, and what of each.

    All files end to end, each between two of the `borders`, are cut into equal lengths. A record
    belongs to the lane in whose length it begins:

        bytes    |0       |8 |10        |20    three files
        records  |a  |b   |c |d      |e |
        lane     |0    |1    |2    |3   |      a b to lane 0, c to 1, d to 2, e to 3

    >>> for share in shares([0, 8, 10, 20], lane=1, lanes=4): print(share)
    (0, Share(start=5, stop=8, size=8, resume=0))
    (1, Share(start=0, stop=2, size=2, resume=0))
    """
    start, stop = (borders[-1] * border // lanes for border in (lane, lane + 1))
    for number in range(bisect_right(borders, start) - 1, bisect_left(borders, stop)):
        low, high = borders[number], borders[number + 1]
        yield number, Share(max(low, start) - low, min(high, stop) - low, high - low)


def file_corpus(
    name: str, source: FilesSource, cache: ShardCache, max_document_bytes: int
) -> FileCorpus:
    """The files that `data.sources.<name>.paths` name, each path's in sorted order.

    Raises:
        ValueError: a path does not exist, matches no file, or is of no known format.
    """
    # JSON can spend six bytes on one of the text, and may hold more than the text.
    limit = 6 * max_document_bytes + 65536
    files: dict[str, CorpusFile] = {}
    for pattern in source.patterns:
        try:
            found = list_shards(pattern, SUFFIXES)
        except ValueError as error:
            raise ValueError(f"data.sources.{name}.paths={error}") from error
        for shard in found:
            form = _format(name, source, shard.name, limit)
            files.setdefault(shard.url, CorpusFile(shard, form))
    return FileCorpus(name, tuple(files.values()), cache)


def _format(name: str, source: FilesSource, file: str, limit: int) -> Format:
    plain = os.path.splitext(file)[0] if compression_of(file) else file
    match os.path.splitext(plain)[1]:
        case ".txt" if source.mark:
            return SeparatedText(source.mark, limit)
        case ".txt":
            return TextFile(limit)
        case ".jsonl" | ".json":
            return JsonLines(source.text_field, limit)
        case ".parquet":
            return Parquet(source.text_field, name)
        case _:
            raise ValueError(
                f"data.sources.{name}.paths={source.paths!r}: cannot read {file}; expected "
                f".txt, .jsonl, .json or .parquet, also with {', '.join(COMPRESSED)}"
            )
