"""What a report is made of: sections of notes, charts and tables, independent of its form."""

from dataclasses import dataclass

from train.experiments.charts import Chart
from train.experiments.tables import Table


@dataclass(frozen=True)
class Note:
    """Sentences in a report, as plain text.

    Attributes:
        paragraphs: one below the other.
        kind: `answer` stands out at the top of the page, `missing` says what could not be shown,
            and `plain` is all else.
        bullets: a list below the paragraphs.
    """

    paragraphs: tuple[str, ...]
    kind: str = "plain"
    bullets: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fold:
    """Something long that is folded away until a reader opens it."""

    title: str
    content: Note | Table


Block = Note | Chart | Table | Fold


@dataclass(frozen=True)
class Section:
    """A section of a report.

    Attributes:
        name: its anchor in the page; of letters, digits and hyphens.
        title: what it answers.
        blocks: from top to bottom.
    """

    name: str
    title: str
    blocks: tuple[Block, ...]


def missing(*sentences: str, bullets: tuple[str, ...] = ()) -> Note:
    """Says what is not there, and what would bring it."""
    return Note(sentences, "missing", bullets)


def charts(sections: tuple[Section, ...]) -> list[Chart]:
    """All charts of a report, in their order."""
    return [block for block in _blocks(sections) if isinstance(block, Chart)]


def tables(sections: tuple[Section, ...]) -> list[Table]:
    """All tables of a report, in their order, also those that are folded away."""
    return [block for block in _blocks(sections) if isinstance(block, Table)]


def _blocks(sections: tuple[Section, ...]) -> list[object]:
    blocks = [block for section in sections for block in section.blocks]
    return [block.content if isinstance(block, Fold) else block for block in blocks]
