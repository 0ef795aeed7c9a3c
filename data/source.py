"""What every source of text gives: records that lanes can read, each its own part."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from conf.errors import DataError

Position = Any
"""A small JSON value from which a corpus is read on exactly; None is its beginning."""


class Document(NamedTuple):
    """One text and where it came from, such as `books.jsonl@1702` (a byte) or `a.parquet#17`
    (a row)."""

    text: str
    origin: str


class TokenDocument(NamedTuple):
    """A document that is tokens already.

    Attributes:
        tokens: [n] unsigned integers, the separator that ends a document included.
        digest: xxh3_64 of the text that they were made of.
        origin: as a `Document`'s.
    """

    tokens: np.ndarray
    digest: int
    origin: str


class BadRecord(NamedTuple):
    """A record that is no document, for a reason; `excerpt` shows its beginning."""

    reason: str
    origin: str
    excerpt: str = ""


Record = Document | TokenDocument | BadRecord


class Corpus(Protocol):
    """Records in a fixed order, dealt out to lanes."""

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What decides the documents and their order, by setting; equal ones mean equal text."""

    @property
    def is_seekable(self) -> bool:
        """Whether reading can begin anywhere without reading what lies before."""

    def documents(
        self, lane: int, lanes: int, position: Position = None
    ) -> Iterator[tuple[Record, Position]]:
        """One pass over a lane's records from `position` on, each with the position after it.

        Every record of the corpus belongs to exactly one lane. Any number of passes, of any lanes,
        may be under way at a time, in any threads.
        """


MISSING: Any = object()
"""Stands for the value of a field that a record does not have."""


def field_of(record: Mapping[str, Any], name: str) -> Any:
    """What a record holds under a name, in which dots lead into records within it.

    A field whose name has dots itself comes first.

    >>> field_of({"data": {"text": "a"}}, "data.text"), field_of({"data.text": "b"}, "data.text")
    ('a', 'b')

    Returns:
        the value; `MISSING` if there is none.
    """
    if name in record:
        return record[name]
    value: Any = record
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return MISSING
        value = value[part]
    return value


def no_such_field(name: str, field: str, origin: str, fields: Iterable[str]) -> DataError:
    """The error for a `text_field` of the source `name` that is not among a file's `fields`."""
    return DataError(
        f"data.sources.{name}.text_field={field!r}: {origin} has no such field; it has "
        f"{', '.join(fields) or 'none at all'}"
    )
