"""How documents lie in files: Python source, plain text, JSON lines and Parquet.

A format counts a file in units of its own: bytes, rows, or the file as one. It reads the records
that begin in any range of units, without reading what lies before. A record that cannot be a
document becomes a `BadRecord`, and the records beside it are read as if it were not there.
"""

import io
import json
import sys
import tokenize
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, BinaryIO, NamedTuple, Protocol
from weakref import WeakValueDictionary

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow.parquet import ParquetFile

from conf.errors import DataError, reason_of
from conf.text import BOM, NotUtf8Error, decoded
from data.source import MISSING, BadRecord, Document, Record, field_of, no_such_field

EXCERPT_CHARACTERS = 200
"""Characters that are shown of a bad record."""

READ_BYTES = 1 << 18
"""Bytes of a text file that are read and cut at a time."""

SCAN_SEPARATORS = 1024
"""Lengths of a separator that are read at a time to find where overlapping ones begin."""

TEXT_TYPES = (
    *(pa.string(), pa.large_string(), pa.string_view()),
    *(pa.binary(), pa.large_binary(), pa.null()),
)
"""Arrow's types that hold text: old files have it as bytes, and one without any text as nulls."""


class ByteRange(NamedTuple):
    """The stored bytes [start, stop) of a file of `size` bytes, from the unit `first_unit` on."""

    start: int
    stop: int
    size: int
    first_unit: int = 0

    def units(self, count: int) -> range:
        """The units in this range of a file that has `count` of them, all of equal length.

        A unit belongs to the range in which it begins, so that of ranges side by side exactly one
        has it:

            8 bytes    |0 1 2 3|4 5 6 7|    two ranges
            5 rows     |0  |1  |2  |3  |4  |

        >>> ByteRange(0, 4, size=8).units(5), ByteRange(4, 8, size=8).units(5)
        (range(0, 3), range(3, 5))
        """
        # Rounded up: unit u begins at byte u * size / count, which lies in [start, stop).
        first, last = (-(-byte * count // self.size) for byte in (self.start, self.stop))
        return range(max(first, self.first_unit), last)


class Format(Protocol):
    """Reads the files of one kind."""

    def records(
        self, file: BinaryIO, url: str, byte_range: ByteRange
    ) -> Iterator[tuple[Record, int]]:
        """The records that begin in a range of a file, each with the unit after it.

        Raises:
            DataError: the file is damaged, or has no text where the settings say.
            ShardUnavailableError: it cannot be read at present.
        """


class RecordError(Exception):
    """Why a record is no document: a phrase that is always the same, then details."""


def _record(
    content: bytes, origin: str, text_of: Callable[[bytes], str], limit: int = sys.maxsize
) -> Record:
    """The document or the bad record that `content` is.

    Of a record of more than `limit` bytes, `content` is the first `limit` + 1.
    """
    try:
        if len(content) > limit:
            raise RecordError(f"too long: more than {limit} bytes")
        return Document(text_of(content), origin)
    except RecordError as error:
        beginning = content[: 4 * EXCERPT_CHARACTERS]  # a character has 4 bytes at most
        return BadRecord(
            str(error), origin, beginning.decode(errors="replace")[:EXCERPT_CHARACTERS]
        )


def _decoded(content: bytes) -> str:
    try:
        return decoded(content)
    except NotUtf8Error as error:
        raise RecordError(reason_of(error)) from None


@dataclass(frozen=True)
class PythonFile:
    """A `.py` file is one document, decoded as it declares (PEP 263)."""

    def records(
        self, file: BinaryIO, url: str, byte_range: ByteRange
    ) -> Iterator[tuple[Record, int]]:
        if byte_range.units(1):
            yield _record(file.read(), url, self._text), 1

    def _text(self, content: bytes) -> str:
        try:
            # Python reads its own files so, by a BOM or a `coding:` line; else they are UTF-8.
            encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
            return content.decode(encoding)
        except (SyntaxError, LookupError, UnicodeError) as error:
            raise RecordError(f"not in the encoding that it declares: {reason_of(error)}") from None


@dataclass(frozen=True)
class TextFile:
    """A text file is one document of at most `limit` bytes."""

    limit: int = field(repr=False)

    def records(
        self, file: BinaryIO, url: str, byte_range: ByteRange
    ) -> Iterator[tuple[Record, int]]:
        if byte_range.units(1):
            yield _record(file.read(self.limit + 1), url, _decoded, self.limit), 1


@dataclass(frozen=True)
class SeparatedText:
    """A text file holds documents of at most `limit` bytes with `separator` between them."""

    separator: str
    limit: int = field(repr=False)

    def records(
        self, file: BinaryIO, url: str, byte_range: ByteRange
    ) -> Iterator[tuple[Record, int]]:
        return _cut(file, url, byte_range, self.separator.encode(), _decoded, self.limit)


@dataclass(frozen=True)
class JsonLines:
    """Each line of at most `limit` bytes is a JSON object with a document in `text_field`."""

    text_field: str
    limit: int = field(repr=False)

    def records(
        self, file: BinaryIO, url: str, byte_range: ByteRange
    ) -> Iterator[tuple[Record, int]]:
        return _cut(file, url, byte_range, b"\n", self._text, self.limit)

    def _text(self, line: bytes) -> str:
        try:
            value = json.loads(_decoded(line))
        # Brackets nested 1000 deep exhaust the parser; such a line must not end the run.
        except (ValueError, RecursionError) as error:
            raise RecordError(f"not JSON: {reason_of(error)}") from None
        if not isinstance(value, dict):
            raise RecordError(f"not a JSON object but {_kind(value)}")
        text = field_of(value, self.text_field)
        if text is MISSING:
            # The names of a bad record may be megabytes, or hold half a surrogate pair.
            names = ", ".join(value)[:EXCERPT_CHARACTERS].encode(errors="replace").decode()
            raise RecordError(f"no field {self.text_field!r}; it has {names or 'none at all'}")
        if not isinstance(text, str):
            raise RecordError(f"field {self.text_field!r} holds {_kind(text)}, not text")
        return text.removeprefix(BOM)


def _kind(value: Any) -> str:
    """What JSON calls a value."""
    kinds = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list"}
    return "null" if value is None else kinds.get(type(value), "an object")


def _cut(
    file: BinaryIO,
    url: str,
    byte_range: ByteRange,
    separator: bytes,
    text_of: Callable[[bytes], str],
    limit: int,
) -> Iterator[tuple[Record, int]]:
    """The records of a range of a file that separators cut; blank pieces are no records."""
    span = byte_range.units(file.seek(0, io.SEEK_END))
    for start, content, after in pieces(file, separator, span, limit):
        if content.removeprefix(BOM.encode()).strip():
            yield _record(content, f"{url}@{start}", text_of, limit), after


def pieces(
    file: BinaryIO, separator: bytes, span: range, limit: int
) -> Iterator[tuple[int, bytes, int]]:
    """The pieces of a file that begin in a span of its bytes, cut as `bytes.split` cuts all of it.

    Yields (first byte, content, byte after the separator that ends it). Of a piece of more than
    `limit` bytes the content is the first `limit` + 1, so that memory is bounded. Before the span,
    only the bytes are read that decide where its first piece begins.

        separator `::`    a a : : b b : : : c      pieces 0 `aa`, 4 `bb`, 8 `:c`
                          0 1 2 3 4 5 6 7 8 9      range(1, 8) has 4, range(8, 9) has 8

    >>> list(pieces(io.BytesIO(b"aa::bb:::c"), b"::", range(1, 8), limit=99))
    [(4, b'bb', 8)]
    """
    if not span:
        return
    # `size` counts the present piece in bytes, `held` keeps what is needed of it.
    start, size = _scan_start(file, separator, span.start), 0
    held: list[bytes] = []
    for part, ends in _parts(file, separator, start):
        before_span = start < span.start  # the end of a piece that another span has
        if size <= limit:
            held.append(part[: limit + 1 - size])
        size += len(part)
        if ends:
            after = start + size + len(separator)
            if not before_span:
                yield start, b"".join(held), after
            start, size, held = after, 0, []
            if start >= span.stop:
                return
        elif before_span and start + size >= span.stop:
            return
    if start in span:
        yield start, b"".join(held), start + size


def _parts(file: BinaryIO, separator: bytes, start: int) -> Iterator[tuple[bytes, bool]]:
    """A file from byte `start` on without separators: parts, each with whether one ends it."""
    file.seek(start)
    unsure = b""  # may be the beginning of a separator
    while block := file.read(READ_BYTES):
        *ended, rest = (unsure + block).split(separator)
        for part in ended:
            yield part, True
        # A separator may lie across two blocks, so the last bytes wait for the next one.
        sure = max(0, len(rest) - len(separator) + 1)
        yield rest[:sure], False
        unsure = rest[sure:]
    yield unsure, False


def _scan_start(file: BinaryIO, separator: bytes, first: int) -> int:
    """A byte from which a scan finds the same separators as a scan of the whole file.

    It lies before any piece that begins at byte `first` or later. Where a separator can overlap
    itself, as `::` does in `:::`, the one on the left counts. So the scan must not begin within
    what could be a separator: the start moves to the left until it does not.

        a : : : : : : b      from the middle of the row of colons to its beginning
          ^     <-
    """
    start = max(0, first - len(separator))
    # Two separators overlap in at most this many bytes.
    overlap = len(separator) - 1
    while True:
        low = max(0, start - SCAN_SEPARATORS * overlap)
        file.seek(low)
        window = file.read(start + overlap - low)
        while (
            at := window.find(separator, max(0, start - overlap - low), start + overlap - low)
        ) >= 0:
            start = low + at
        if low == 0 or start - low >= overlap:
            return start


class _RowGroup:
    """The texts of a row group; None until they are decoded."""

    def __init__(self) -> None:
        self.lock = Lock()
        self.texts: pa.ChunkedArray | None = None


class _RowGroups:
    """The row groups that are being read, each decoded once for all lanes that read it.

    A file with fewer row groups than lanes would otherwise be decoded by each of its lanes.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        # Weak: a decoded group of 100 MB is freed with the last lane that reads it.
        self._groups: WeakValueDictionary[tuple[str, int], _RowGroup] = WeakValueDictionary()

    def get(self, url: str, number: int, decode: Callable[[], pa.ChunkedArray]) -> _RowGroup:
        """A row group; it is forgotten when the last caller drops it."""
        with self._lock:
            group = self._groups.setdefault((url, number), _RowGroup())
        with group.lock:
            if group.texts is None:
                group.texts = decode()
        return group


@dataclass(frozen=True)
class Parquet:
    """Each row has a document in the column `text_field`; `source` is the source's name."""

    text_field: str
    source: str = field(repr=False)
    _groups: _RowGroups = field(default_factory=_RowGroups, repr=False, compare=False)

    def records(
        self, file: BinaryIO, url: str, byte_range: ByteRange
    ) -> Iterator[tuple[Record, int]]:
        with _naming_damage(url):
            # No read-ahead of whole row groups, of which a lane may need a few rows only.
            table = ParquetFile(file, pre_buffer=False, page_checksum_verification=True)
            schema = table.schema_arrow
        self._check_column(schema, url)
        span = byte_range.units(table.metadata.num_rows)
        first = 0
        for number in range(table.num_row_groups):
            count = table.metadata.row_group(number).num_rows
            rows = range(max(span.start, first), min(span.stop, first + count))
            if rows:
                yield from self._rows(table, url, number, first, rows)
            first += count

    def _rows(
        self, table: ParquetFile, url: str, number: int, first: int, rows: range
    ) -> Iterator[tuple[Record, int]]:
        """Some rows of a row group whose first row is `first`."""
        # Held until the last row is given, so that other lanes find it decoded.
        group = self._groups.get(url, number, lambda: self._texts(table, url, number))
        assert group.texts is not None
        for row, value in enumerate(group.texts.slice(rows.start - first, len(rows)), rows.start):
            origin = f"{url}#{row}"
            if value.is_valid:
                yield _record(value.as_py(), origin, _decoded), row + 1
            else:
                yield BadRecord(f"field {self.text_field!r} holds null, not text", origin), row + 1

    def _texts(self, table: ParquetFile, url: str, number: int) -> pa.ChunkedArray:
        with _naming_damage(url):
            # A name with dots means a field in a structure, as it does for Arrow.
            columns = table.read_row_group(number, columns=[self.text_field], use_threads=False)
            column, parts = _column_and_parts(columns.schema, self.text_field)
            texts = columns.column(column)
            for part in parts:
                texts = pc.struct_field(texts, part)
            # As bytes, since Arrow does not check that text is UTF-8.
            return texts.cast(pa.large_binary())

    def _check_column(self, schema: pa.Schema, url: str) -> None:
        """Make sure that there is one column, or field in a column, of that name with text."""
        setting = f"data.sources.{self.source}.text_field={self.text_field!r}: {url}"
        column, parts = _column_and_parts(schema, self.text_field)
        if column >= 0 and (count := schema.names.count(schema.names[column])) > 1:
            name = schema.names[column]
            raise DataError(f"{setting} has {count} columns named {name!r}; rename one of them")
        texts = list(dict.fromkeys(_text_fields(schema)))
        kind = _type_of(schema, column, parts)
        if kind is None:
            nested = (text for text in texts if text not in schema.names)
            raise no_such_field(self.source, self.text_field, url, [*schema.names, *nested])
        if not _is_text(kind):
            choice = f"a column that holds text{': ' if texts else ''}{', '.join(texts)}"
            raise DataError(f"{setting} holds {kind} there; choose {choice}")


def _is_text(kind: pa.DataType) -> bool:
    return (kind.value_type if pa.types.is_dictionary(kind) else kind) in TEXT_TYPES


def _column_and_parts(schema: pa.Schema, name: str) -> tuple[int, list[str]]:
    """The number of the column that a name means, and the names of fields within it.

    A column that is called so itself is meant rather than a field in another one: `a.b` may be
    both. The number is -1 if there is no such column.
    """
    if name in schema.names:
        return schema.names.index(name), []
    first, *parts = name.split(".")
    return (schema.names.index(first) if first in schema.names else -1), parts


def _type_of(schema: pa.Schema, column: int, parts: Sequence[str]) -> pa.DataType | None:
    """The type of a field; None if there is none."""
    if column < 0:
        return None
    kind = schema.field(column).type
    for part in parts:
        if not pa.types.is_struct(kind) or kind.get_field_index(part) < 0:
            return None
        kind = kind.field(part).type
    return kind


def _text_fields(fields: Iterable[pa.Field], above: str = "") -> Iterator[str]:
    """The names of all columns that hold text, and of the fields in structures that do."""
    for field_ in fields:
        kind, name = field_.type, above + field_.name
        if _is_text(kind):
            yield name
        elif pa.types.is_struct(kind):
            yield from _text_fields(kind, f"{name}.")


@contextmanager
def _naming_damage(url: str) -> Iterator[None]:
    """Turns what Arrow says of a damaged file into an error that names the file.

    A file that cannot be read raises a `ShardUnavailableError`, which passes through Arrow as it
    is. So an OSError is Arrow's own, of which bytes it cannot decode.
    """
    try:
        yield
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        said = reason_of(error)
        raise DataError(
            f"{url}: damaged, Parquet cannot be read ({said}); mend it or leave it out"
        ) from error
