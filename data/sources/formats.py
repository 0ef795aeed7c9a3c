"""How documents lie in files: Python source, plain text, JSON lines and Parquet.

A format counts a file in units of its own (bytes, rows, or the file as one) and reads the records
that begin in any range of them, without what lies before. What cannot be a document becomes a
`BadRecord`, and its neighbours are none the worse for it.
"""

import io
import json
import sys
import tokenize
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, BinaryIO, NamedTuple, Protocol
from weakref import WeakValueDictionary

import pyarrow as pa
from pyarrow.parquet import ParquetFile

from data.source import BadRecord, Document, Record, no_such_field
from data.storage.transport import ShardError

BOM = "\ufeff"
"""The byte order mark, no part of the text that it stands before."""

EXCERPT = 200
"""Characters that are shown of a bad record."""

CHUNK = 1 << 18
"""Bytes of a text file that are read and cut at a time."""

REACH = 1024
"""Lengths of a mark that are read at a time to find out where overlapping ones begin."""

TEXT = (pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.null())
"""Arrow's types that hold text: old files have it as bytes, and one without any text as nulls."""


class Share(NamedTuple):
    """The stored bytes [start, stop) of a file of `size` bytes, from the unit `resume` on."""

    start: int
    stop: int
    size: int
    resume: int = 0

    def of(self, units: int) -> range:
        """The units in the share of a file that has so many, all of equal length.

        Of shares side by side, one has each unit: that in which the unit begins.

            8 bytes    |0 1 2 3|4 5 6 7|    two shares
            5 rows     |0  |1  |2  |3  |4  |

        >>> Share(0, 4, size=8).of(5), Share(4, 8, size=8).of(5)
        (range(0, 3), range(3, 5))
        """
        first, last = (-(-place * units // self.size) for place in (self.start, self.stop))
        return range(max(first, self.resume), last)


class Format(Protocol):
    """Reads the files of one kind."""

    def records(self, file: BinaryIO, url: str, share: Share) -> Iterator[tuple[Record, int]]:
        """The records that begin in a share of a file, each with the unit after it.

        Raises:
            ShardError: the file is damaged.
        """


class RecordError(Exception):
    """Why a record is no document: a phrase that is always the same, then details."""


def _record(
    content: bytes, origin: str, text_of: Callable[[bytes], str], limit: int = sys.maxsize
) -> Record:
    """The document, or the fault, that `content` is; no more than `limit` + 1 bytes are held of
    a longer one."""
    try:
        if len(content) > limit:
            raise RecordError(f"too long: more than {limit} bytes")
        return Document(text_of(content), origin)
    except RecordError as error:
        beginning = content[: 4 * EXCERPT]  # a character has 4 bytes at most
        return BadRecord(str(error), origin, beginning.decode(errors="replace")[:EXCERPT])


def _decoded(content: bytes) -> str:
    try:
        return content.decode().removeprefix(BOM)
    except UnicodeDecodeError as error:
        raise RecordError(f"not UTF-8 at byte {error.start}: {error.reason}") from None


@dataclass(frozen=True)
class PythonFile:
    """A `.py` file is one document, decoded as it declares (PEP 263)."""

    def records(self, file: BinaryIO, url: str, share: Share) -> Iterator[tuple[Record, int]]:
        if share.of(1):
            yield _record(file.read(), url, self._text), 1

    def _text(self, content: bytes) -> str:
        try:
            encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
            return content.decode(encoding)
        except (SyntaxError, LookupError, UnicodeError) as error:
            raise RecordError(f"not in the encoding that it declares: {error}") from None


@dataclass(frozen=True)
class TextFile:
    """A text file is one document of at most `limit` bytes."""

    limit: int = field(repr=False)

    def records(self, file: BinaryIO, url: str, share: Share) -> Iterator[tuple[Record, int]]:
        if share.of(1):
            yield _record(file.read(self.limit + 1), url, _decoded, self.limit), 1


@dataclass(frozen=True)
class SeparatedText:
    """A text file holds documents of at most `limit` bytes with `separator` between them."""

    separator: str
    limit: int = field(repr=False)

    def records(self, file: BinaryIO, url: str, share: Share) -> Iterator[tuple[Record, int]]:
        return _cut(file, url, share, self.separator.encode(), _decoded, self.limit)


@dataclass(frozen=True)
class JsonLines:
    """Each line of at most `limit` bytes is a JSON object with a document in `text_field`."""

    text_field: str
    limit: int = field(repr=False)

    def records(self, file: BinaryIO, url: str, share: Share) -> Iterator[tuple[Record, int]]:
        return _cut(file, url, share, b"\n", self._text, self.limit)

    def _text(self, line: bytes) -> str:
        try:
            value = json.loads(_decoded(line))
        except (ValueError, RecursionError) as error:
            raise RecordError(f"not JSON: {error}") from None
        if not isinstance(value, dict):
            raise RecordError(f"not a JSON object but {_kind(value)}")
        if self.text_field not in value:
            # A bad record's names may be as long and as odd as a text.
            names = ", ".join(value)[:EXCERPT].encode(errors="replace").decode()
            raise RecordError(f"no field {self.text_field!r}; it has {names or 'none at all'}")
        text = value[self.text_field]
        if not isinstance(text, str):
            raise RecordError(f"field {self.text_field!r} holds {_kind(text)}, not text")
        return text


def _kind(value: Any) -> str:
    """What JSON calls a value."""
    kinds = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list"}
    return "null" if value is None else kinds.get(type(value), "an object")


def _cut(
    file: BinaryIO,
    url: str,
    share: Share,
    mark: bytes,
    text_of: Callable[[bytes], str],
    limit: int,
) -> Iterator[tuple[Record, int]]:
    """The records of a share of a file that marks cut into pieces; a blank piece is no record."""
    span = share.of(file.seek(0, io.SEEK_END))
    for start, content, after in pieces(file, mark, span, limit):
        if content.removeprefix(BOM.encode()).strip():
            yield _record(content, f"{url}@{start}", text_of, limit), after


def pieces(
    file: BinaryIO, mark: bytes, span: range, limit: int
) -> Iterator[tuple[int, bytes, int]]:
    """The pieces of a file that begin in a span of its bytes, cut as `bytes.split` cuts all of it.

    Yields (first byte, content, byte after the mark that ends it); of a piece of more than `limit`
    bytes the content is the first `limit` + 1. What lies before the span is not read, but for as
    many bytes as decide where its first piece begins.

        mark `::`    a a : : b b : : : c      pieces 0 `aa`, 4 `bb`, 8 `:c`
                     0 1 2 3 4 5 6 7 8 9      range(1, 8) has 4, range(8, 9) has 8

    >>> list(pieces(io.BytesIO(b"aa::bb:::c"), b"::", range(1, 8), limit=99))
    [(4, b'bb', 8)]
    """
    if not span:
        return
    start, size = _settled(file, mark, span.start), 0
    held: list[bytes] = []
    for part, ends in _parts(file, mark, start):
        foreign = start < span.start  # the end of a piece that begins before the span
        if size <= limit:
            held.append(part[: limit + 1 - size])
        size += len(part)
        if ends:
            after = start + size + len(mark)
            if not foreign:
                yield start, b"".join(held), after
            start, size, held = after, 0, []
            if start >= span.stop:
                return
        elif foreign and start + size >= span.stop:
            return
    if start in span:
        yield start, b"".join(held), start + size


def _parts(file: BinaryIO, mark: bytes, place: int) -> Iterator[tuple[bytes, bool]]:
    """A file from a place on without its marks, in parts, each with whether a mark ends it."""
    file.seek(place)
    doubtful = b""  # what may be the beginning of a mark
    while chunk := file.read(CHUNK):
        *ended, rest = (doubtful + chunk).split(mark)
        for part in ended:
            yield part, True
        sure = max(0, len(rest) - len(mark) + 1)
        yield rest[:sure], False
        doubtful = rest[sure:]
    yield doubtful, False


def _settled(file: BinaryIO, mark: bytes, first: int) -> int:
    """A place from which on marks are found as from the file's beginning, before any piece that
    begins at byte `first` or later.

    Where a mark overlaps itself, as `::` does in `:::`, the one on the left counts. So the place
    must not lie within what could be a mark: from there it moves to the left until it does not.

        a : : : : : : b      from the middle of the row of colons to its beginning
          ^     <-
    """
    place = max(0, first - len(mark))
    across = len(mark) - 1
    while True:
        low = max(0, place - REACH * across)
        file.seek(low)
        window = file.read(place + across - low)
        while (at := window.find(mark, max(0, place - across - low), place + across - low)) >= 0:
            place = low + at
        if low == 0 or place - low >= across:
            return place


class _RowGroup:
    """The texts of a row group, once somebody has decoded them."""

    def __init__(self) -> None:
        self.lock = Lock()
        self.texts: pa.ChunkedArray | None = None


class _RowGroups:
    """The row groups that are being read, each decoded once for all lanes that are in it."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._groups: WeakValueDictionary[tuple[str, int], _RowGroup] = WeakValueDictionary()

    def get(self, url: str, number: int, decode: Callable[[], pa.ChunkedArray]) -> _RowGroup:
        """A row group; the caller holds it as long as others shall find it."""
        with self._lock:
            group = self._groups.setdefault((url, number), _RowGroup())
        with group.lock:
            if group.texts is None:
                group.texts = decode()
        return group


@dataclass(frozen=True)
class Parquet:
    """Each row has a document in the column `text_field`; `source` has the setting's name."""

    text_field: str
    source: str = field(repr=False)
    _groups: _RowGroups = field(default_factory=_RowGroups, repr=False, compare=False)

    def records(self, file: BinaryIO, url: str, share: Share) -> Iterator[tuple[Record, int]]:
        with _damage_named(url):
            table = ParquetFile(file, pre_buffer=False, page_checksum_verification=True)
            schema = table.schema_arrow
        self._check_column(schema, url)
        span = share.of(table.metadata.num_rows)
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
        group = self._groups.get(url, number, lambda: self._texts(table, url, number))
        assert group.texts is not None
        for row, value in enumerate(group.texts.slice(rows.start - first, len(rows)), rows.start):
            origin = f"{url}#{row}"
            if value.is_valid:
                yield _record(value.as_py(), origin, _decoded), row + 1
            else:
                yield BadRecord(f"field {self.text_field!r} holds null, not text", origin), row + 1

    def _texts(self, table: ParquetFile, url: str, number: int) -> pa.ChunkedArray:
        with _damage_named(url):
            column = table.read_row_group(number, columns=[self.text_field], use_threads=False)
            # As bytes: Arrow does not look whether text is UTF-8.
            return column.column(0).cast(pa.large_binary())

    def _check_column(self, schema: pa.Schema, url: str) -> None:
        if self.text_field not in schema.names:
            raise no_such_field(self.source, self.text_field, url, schema.names)
        kind = schema.field(self.text_field).type
        if (kind.value_type if pa.types.is_dictionary(kind) else kind) not in TEXT:
            raise ValueError(
                f"data.sources.{self.source}.text_field={self.text_field!r}: {url} holds {kind} "
                f"there; choose a column that holds text"
            )


@contextmanager
def _damage_named(url: str) -> Iterator[None]:
    """Makes what Arrow says of a damaged file an error that names it."""
    try:
        yield
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        said = " ".join(str(error).split())
        raise ShardError(
            f"{url}: damaged, Parquet cannot be read ({said}); mend it or leave it out"
        ) from error
