"""A table of a report, as HTML with columns that can be sorted, as Markdown and as CSV."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import NamedTuple

from train.experiments.source import Source
from train.experiments.theme import Style, swatch

MISSING = "\N{EN DASH}"
"""Stands where nothing was measured."""
MINUS = "\N{MINUS SIGN}"


class Cell(NamedTuple):
    """What a reader sees, and the value behind it, by which rows are sorted and which CSV has.

    The value is a number with all its digits, or a text; None where nothing was measured. A group
    of runs has its style as well, as in the legends of charts.
    """

    text: str
    value: float | int | str | None
    style: Style | None = None


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        key: its name in CSV, with the unit: `bits_per_byte`, `train_s`.
        title: its head, a word or two.
        unit: written below the head; may be empty.
        numeric: whether it is aligned to the right.
    """

    key: str
    title: str
    unit: str = ""
    numeric: bool = True


@dataclass(frozen=True)
class Table:
    """A table of a report.

    Attributes:
        name: of its file; of letters, digits and hyphens, unlike any other of the report.
        title: a short sentence.
        columns: from left to right.
        rows: from top to bottom, each with a cell for each column.
        note: what a reader has to know to read it right; may be empty.
        source: the runs that it is made of.
    """

    name: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    source: Source
    note: str = ""

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.columns) for row in self.rows), self.name


# Cells


def text(words: str, style: Style | None = None) -> Cell:
    """A cell of words.

    >>> text("phd-2")
    Cell(text='phd-2', value='phd-2', style=None)
    """
    return Cell(words, words, style)


def number(value: float | None, form: str = "{:.3g}") -> Cell:
    """A cell of a number as it is to be read; a dash for None.

    >>> number(2.34567, "{:.3f}").text, number(2.34567).value, number(None).text == MISSING
    ('2.346', 2.34567, True)
    """
    return Cell(MISSING, None) if value is None else Cell(form.format(value), value)


def signed(value: float, form: str = "{:+.3f}") -> str:
    """A difference with its sign, which is a minus sign and no hyphen.

    >>> signed(0.5), signed(-0.0001), signed(-0.5) == f"{MINUS}0.500"
    ('+0.500', '0.000', True)
    """
    written = form.format(value)
    return written.replace("-", MINUS) if written.strip("+-0.") else written[1:]


def difference(value: float | None) -> Cell:
    """A cell of a difference, with its sign; a dash for None."""
    return Cell(MISSING, None) if value is None else Cell(signed(value), value)


def without_empty_columns(table: Table) -> Table:
    """The table without the columns that have no value; a sentence of the note says which.

    >>> heads = (Column("run", "run", numeric=False), Column("mfu", "MFU"))
    >>> full = Table("t", "a", heads, ((text("b"), number(None)),), Source(("b",), 1, 1), "A note.")
    >>> found = without_empty_columns(full)
    >>> [column.title for column in found.columns], found.rows[0][0].text, found.note
    (['run'], 'b', 'A note. Not known for any of the runs: MFU.')
    """
    values = [[row[place].value for row in table.rows] for place in range(len(table.columns))]
    kept = [place for place, found in enumerate(values) if any(x is not None for x in found)]
    empty = [c.title for place, c in enumerate(table.columns) if place not in kept]
    if not empty:
        return table
    note = f"{table.note} Not known for any of the runs: {', '.join(dict.fromkeys(empty))}."
    columns = tuple(table.columns[place] for place in kept)
    rows = tuple(tuple(row[place] for place in kept) for row in table.rows)
    return replace(table, columns=columns, rows=rows, note=note.strip())


# Forms


def as_html(table: Table) -> str:
    """A `<table>` whose heads sort it. All that comes from runs is escaped."""
    heads = "".join(_head(column) for column in table.columns)
    rows = "".join(f"<tr>{_row(table.columns, row)}</tr>\n" for row in table.rows)
    return (
        f'<table id="table-{table.name}" aria-label="{escape(table.title)}">\n'
        f"<thead><tr>{heads}</tr></thead>\n<tbody>\n{rows}</tbody>\n</table>"
    )


def _head(column: Column) -> str:
    unit = f'<span class="unit">{escape(column.unit)}</span>' if column.unit else ""
    number = ' class="number"' if column.numeric else ""
    title = f'<span class="title">{escape(column.title)}</span>'
    button = f'<button type="button">{title}{unit}</button>'
    return f'<th scope="col" aria-sort="none"{number}>{button}</th>'


def _row(columns: Sequence[Column], row: Sequence[Cell]) -> str:
    return "".join(
        _cell(cell, "th" if place == 0 else "td", numeric=column.numeric)
        for place, (column, cell) in enumerate(zip(columns, row, strict=True))
    )


def _cell(cell: Cell, tag: str, *, numeric: bool) -> str:
    value = "" if cell.value is None else f' data-value="{escape(str(cell.value))}"'
    kind = (' scope="row"' if tag == "th" else "") + (' class="number"' if numeric else "")
    mark = swatch(cell.style) if cell.style else ""
    return f"<{tag}{kind}{value}>{mark}{escape(cell.text)}</{tag}>"


def as_markdown(table: Table) -> str:
    """A table of Markdown.

    >>> heads = (Column("run", "run", numeric=False), Column("loss", "loss", "nats"))
    >>> rows = ((text("a|b"), number(2.5)),)
    >>> print(as_markdown(Table("t", "a", heads, rows, Source(("a",), 1, 1))))
    | run | loss (nats) |
    | --- | ---: |
    | a\\|b | 2.5 |
    """
    heads = [f"{c.title} ({c.unit})" if c.unit else c.title for c in table.columns]
    lines = [heads, ["---:" if column.numeric else "---" for column in table.columns]]
    lines += [[cell.text for cell in row] for row in table.rows]
    return "\n".join(f"| {' | '.join(map(in_markdown, cells))} |" for cells in lines)


def in_markdown(words: str) -> str:
    for character in "\\|<[":
        words = words.replace(character, f"\\{character}")
    return " ".join(words.split())


def as_csv(table: Table) -> str:
    """CSV (RFC 4180) with the values in full; an empty field where nothing was measured."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\r\n")
    writer.writerow(column.key for column in table.columns)
    writer.writerows(
        ["" if cell.value is None else cell.value for cell in row] for row in table.rows
    )
    return file.getvalue()
