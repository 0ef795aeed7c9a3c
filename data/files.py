"""A corpus of files on this machine."""

import glob
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
from xxhash import xxh3_128_hexdigest

from data.config import FilesSource
from data.formats import COMPRESSED, Format, JsonLines, Parquet, SeparatedText, TextFile
from data.source import Document, Position

SUFFIXES = (".txt", ".jsonl", ".parquet")


class CorpusFile(NamedTuple):
    """A file, the name that it keeps when the corpus moves, and how it is read."""

    path: Path
    name: str
    format: Format


@dataclass(frozen=True)
class FileCorpus:
    """The documents of files, in their order."""

    files: tuple[CorpusFile, ...]

    @cached_property
    def identity(self) -> dict[str, Any]:
        """The files' names, sizes and formats; where they lie does not matter."""
        listing = "\n".join(f"{f.name} {f.path.stat().st_size} {f.format}" for f in self.files)
        return {"data.source": f"{len(self.files)} files {xxh3_128_hexdigest(listing.encode())}"}

    def documents(
        self, lane: int, lanes: int, position: Position = None
    ) -> Iterator[tuple[Document, Position]]:
        """One pass over a lane's documents; see `Corpus`."""
        start, skip = position or (0, 0)
        for number in range(start, len(self.files)):
            file = self.files[number]
            first = _first_record(number, skip, lane, lanes)
            try:
                for index, document in _read(file, first, lanes):
                    yield document, [number, index + 1]
            except (OSError, pyarrow.ArrowException) as error:
                raise ValueError(
                    f"{file.path}: cannot be read ({error}); mend it or leave it out"
                ) from error
            skip = 0


def _read(file: CorpusFile, first: int, step: int) -> Iterator[tuple[int, Document]]:
    """Every `step`th record's text, if it has one, from the `first` on, with its number."""
    records = enumerate(file.format.records(file.path))
    for index, record in islice(records, first, None, step):
        origin = f"{file.path}:{index + 1}"
        text = file.format.text(record, origin)
        if text is not None:
            yield index, Document(text, origin)


def _first_record(file: int, skip: int, lane: int, lanes: int) -> int:
    """The first record of a file, from `skip` on, that belongs to a lane.

    Records are dealt out like cards, and each file begins one lane further than the one before:
    lanes get equally many documents, be they in one file, in files of one each, or in between.

        lanes = 3    file 0: 0 1 2 0 1    file 1: 1 2 0 1    file 2: 2 0

    >>> [_first_record(file=1, skip=0, lane=lane, lanes=3) for lane in (0, 1, 2)]
    [2, 0, 1]
    """
    return skip + (lane - file - skip) % lanes


def local_corpus(source: FilesSource) -> FileCorpus:
    """The files that `data.source.paths` name, each path's in sorted order.

    Raises:
        ValueError: a path does not exist, matches no file, or is of no known format.
    """
    files: dict[Path, CorpusFile] = {}
    for pattern in source.patterns:
        for path, name in _matches(pattern):
            files.setdefault(path, CorpusFile(path, name, _format(source, path)))
    return FileCorpus(tuple(files.values()))


def _matches(pattern: str) -> list[tuple[Path, str]]:
    """The files that one of the paths means, in sorted order, with their lasting names."""
    path = Path(pattern).expanduser()
    if path.is_dir():
        inside = ((p, p.relative_to(path)) for p in path.rglob("*") if p.is_file())
        found = [
            (p, name.as_posix())
            for p, name in inside
            if _suffix(p) in SUFFIXES and not any(part.startswith(".") for part in name.parts)
        ]
    else:
        paths = [path] if path.is_file() else map(Path, glob.glob(str(path), recursive=True))
        found = [(p, p.name) for p in paths if p.is_file()]
    if not found:
        raise ValueError(
            f"data.source.paths={pattern!r}: no such file, no directory with "
            f"{', '.join(SUFFIXES)} files in it, and no glob that matches any; correct the path "
            f"(relative ones start at {Path.cwd()})"
        )
    return sorted(found)


def _suffix(path: Path) -> str:
    """The ending that tells the format.

    >>> _suffix(Path("a.jsonl.gz")), _suffix(Path("a.txt"))
    ('.jsonl', '.txt')
    """
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def _format(source: FilesSource, path: Path) -> Format:
    match _suffix(path):
        case ".txt":
            return SeparatedText(source.separator) if source.separator else TextFile()
        case ".jsonl":
            return JsonLines(source.text_field)
        case ".parquet":
            return Parquet(source.text_field)
        case _:
            raise ValueError(
                f"data.source.paths={source.paths!r}: cannot read {path.name}; expected "
                f"{', '.join(SUFFIXES)}, also with {', '.join(COMPRESSED)}"
            )
