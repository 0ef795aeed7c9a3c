"""What every source of text gives: documents that lanes can read, each its own part."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

Position = Any
"""A small JSON value from which a corpus goes on exactly; None is its beginning."""


class Document(NamedTuple):
    """One text and where it came from, such as `books.jsonl:17`."""

    text: str
    origin: str


class Corpus(Protocol):
    """Documents in a fixed order, dealt out to lanes."""

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the documents and their order, by setting: if equal, so are they."""

    def documents(
        self, lane: int, lanes: int, position: Position = None
    ) -> Iterator[tuple[Document, Position]]:
        """One pass over a lane's documents from `position` on, each with the position after it.

        Every document of the corpus belongs to exactly one lane.
        """


def text_of(record: Mapping[str, Any], field: str, origin: str) -> str | None:
    """The text of a record of JSON or a table; None where it is null.

    Raises:
        ValueError: the record has no such field, or something else than text in it.
    """
    if field not in record:
        raise no_such_field(field, origin, record)
    text = record[field]
    if text is None or isinstance(text, str):
        return text
    raise ValueError(
        f"data.source.text_field={field!r}: {origin} holds {type(text).__name__} there; "
        "choose a field that holds text"
    )


def no_such_field(field: str, origin: str, known: Iterable[str]) -> ValueError:
    """The error for a `text_field` that is not among the `known` ones."""
    return ValueError(
        f"data.source.text_field={field!r}: {origin} has no such field; it has "
        f"{', '.join(known) or 'none at all'}"
    )
