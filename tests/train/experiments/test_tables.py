"""A table says the same in all its forms, and shows what comes from a run as it is."""

import csv
from html.parser import HTMLParser

from tests.train.experiments.made_up import HOSTILE
from train.experiments.source import Source
from train.experiments.tables import Column, Table, as_csv, as_html, as_markdown, number, text

COLUMNS = (Column("run", "run", numeric=False), Column("loss", "loss", "nats"))
TABLE = Table(
    "t",
    "a title",
    COLUMNS,
    ((text(HOSTILE), number(2.0123456, "{:.2f}")), (text('a "b", c'), number(None))),
    Source(("a",), 1, 1),
)


class Texts(HTMLParser):
    """Collects the tags and the texts of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:  # noqa: ARG002
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_html_shows_what_comes_from_a_run_as_it_is() -> None:
    page = Texts()
    page.feed(as_html(TABLE))
    assert "script" not in page.tags
    assert {HOSTILE, "2.01", 'a "b", c'} <= set(page.texts)


def test_csv_has_all_digits_and_is_read_back() -> None:
    rows = list(csv.reader(as_csv(TABLE).splitlines()))
    assert rows == [["run", "loss"], [HOSTILE, "2.0123456"], ['a "b", c', ""]]


def test_a_cell_of_markdown_ends_no_column_and_is_no_html() -> None:
    line = as_markdown(TABLE).splitlines()[2]
    assert line.replace("\\|", "").count("|") == 3
    assert "\\<script>" in line
