"""How documents lie in files: Python source, plain text, JSON lines and Parquet."""

import io
import json
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import pyarrow
from pyarrow.parquet import ParquetFile

from data.source import no_such_field, text_of

COMPRESSED = (".gz", ".zst", ".bz2")
CHUNK = 1 << 20  # of a file, in bytes or characters, that is read at a time


class Format(Protocol):
    """Reads a file in two stages, so that what another lane reads is skipped at little cost."""

    def records(self, path: Path) -> Iterator[Any]:
        """The file's records, unread as far as possible. Blank ones count."""

    def text(self, record: Any, origin: str) -> str | None:
        """A record's text; None if it has none."""


def opened(path: Path) -> BinaryIO:
    """The file's bytes, decompressed if its name ends as a compressed file's does."""
    # Arrow's streams notice a truncated file, which others of Zstandard take for a shorter one.
    return io.BufferedReader(pyarrow.input_stream(path, compression="detect"), CHUNK)


@dataclass(frozen=True)
class PythonFile:
    """A `.py` file is one document, decoded as it declares (PEP 263).

    A file that declares a coding it does not keep to, as a few that exist to be broken do, is
    passed over: the interpreter would not read it either.
    """

    def records(self, path: Path) -> Iterator[Path]:
        yield path

    def text(self, record: Path, origin: str) -> str | None:  # noqa: ARG002 - a Format's signature
        source = record.read_bytes()
        try:
            encoding, _ = tokenize.detect_encoding(io.BytesIO(source).readline)
            return source.decode(encoding)
        except (SyntaxError, UnicodeDecodeError):
            return None


@dataclass(frozen=True)
class TextFile:
    """A text file is one document."""

    def records(self, path: Path) -> Iterator[Path]:
        yield path

    def text(self, record: Path, origin: str) -> str:
        with opened(record) as stream:
            content = stream.read()
        try:
            return content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise _not_utf8(origin, error) from None


@dataclass(frozen=True)
class SeparatedText:
    """A text file holds documents with `separator` between them."""

    separator: str

    def records(self, path: Path) -> Iterator[str]:
        rest = ""
        with io.TextIOWrapper(opened(path), encoding="utf-8-sig", newline="") as stream:
            try:
                while chunk := stream.read(CHUNK):
                    *whole, rest = (rest + chunk).split(self.separator)
                    yield from whole
            except UnicodeDecodeError as error:
                raise _not_utf8(str(path), error) from None
        yield rest

    def text(self, record: str, origin: str) -> str:  # noqa: ARG002 - a Format's signature
        return record


@dataclass(frozen=True)
class JsonLines:
    """Each line is a JSON object with a document in its `field`."""

    field: str

    def records(self, path: Path) -> Iterator[bytes]:
        with opened(path) as lines:
            yield from lines

    def text(self, record: bytes, origin: str) -> str | None:
        if not record.strip():
            return None
        try:
            value = json.loads(record)
        except ValueError as error:
            raise ValueError(f"{origin}: not a line of JSON ({error}); mend or remove it") from None
        if not isinstance(value, dict):
            raise ValueError(f"{origin}: expected a JSON object such as {{{self.field!r}: ...}}")
        text = text_of(value, self.field, origin)
        # JSON can spell half of a surrogate pair, UTF-8 cannot: it becomes a question mark.
        return text and text.encode(errors="replace").decode()


@dataclass(frozen=True)
class Parquet:
    """Each row has a document in its column `field`."""

    field: str

    def records(self, path: Path) -> Iterator[dict[str, Any]]:
        with ParquetFile(path) as table:
            if self.field not in (names := table.schema_arrow.names):
                raise no_such_field(self.field, str(path), names)
            for batch in table.iter_batches(batch_size=256, columns=[self.field]):
                yield from batch.to_pylist()

    def text(self, record: dict[str, Any], origin: str) -> str | None:
        return text_of(record, self.field, origin)


def _not_utf8(origin: str, error: UnicodeDecodeError) -> ValueError:
    return ValueError(f"{origin}: not UTF-8 at byte {error.start} ({error.reason}); convert it")
