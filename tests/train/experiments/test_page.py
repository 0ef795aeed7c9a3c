"""The page of a report: all runs are on it, nothing is loaded, and a browser shows it well."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from tests.train.experiments.browser import CHROMIUM, View, ask
from tests.train.experiments.made_up import HOSTILE, a_run, an_experiment
from train.experiments.contents import report_of
from train.experiments.document import charts, tables
from train.experiments.page import Report, html, markdown, write_report

VIEWS = [View(width, theme) for width in (390, 1280) for theme in ("light", "dark")]


class Elements(HTMLParser):
    """Collects the elements of a page with their attributes, and its texts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture(scope="module")
def report() -> Report:
    return report_of(an_experiment(), "An experiment")


@pytest.fixture(scope="module")
def page(report: Report) -> str:
    return html(report)


def test_every_run_is_on_the_page(page: str) -> None:
    texts = set(Elements(page).texts)
    assert {run.name for run in an_experiment()} <= texts
    assert HOSTILE in texts


def test_nothing_is_loaded_and_no_run_adds_an_element(page: str) -> None:
    elements = Elements(page).found
    assert [tag for tag, _ in elements if tag in ("link", "img", "iframe", "object")] == []
    assert [attrs for tag, attrs in elements if tag == "script"] == [{}]
    for _, attrs in elements:
        assert attrs.get("src") is None
        assert re.match(r"#[\w-]+$", attrs.get("href") or "#a")
    assert re.findall(r"https?:|@import|url\((?!#)", page) == []
    ids = [attrs["id"] for _, attrs in elements if "id" in attrs]
    assert len(set(ids)) == len(ids)


def test_every_figure_names_its_runs_and_says_where_it_is_of_one_seed(report: Report) -> None:
    names = {run.name for run in an_experiment()}
    for block in [*charts(report.sections), *tables(report.sections)]:
        assert set(block.source.runs) <= names
        assert block.source.runs
    runs = [a_run("phd-2", 0, gain=0.0)]
    alone = report_of([a_run("vanilla", 0, gain=0.0), *runs], "One seed")
    assert "made of 2 runs, one seed each" in markdown(alone)
    mixed = report_of([*(a_run("vanilla", seed, gain=0.0) for seed in range(2)), *runs], "Seeds")
    assert "made of 3 runs, 1 to 2 seeds each" in markdown(mixed)
    assert "vanilla-micro-seed_1, phd-2-micro-seed_0 (one seed)" in markdown(mixed)


def test_what_was_not_measured_is_said_in_words() -> None:
    report = report_of([a_run("vanilla", 0, gain=0.0, heldout={}, heldout_curves={})], "A run")
    words = markdown(report)
    for sentence in (
        "No run was evaluated on held-out text while it trained",
        "The time of prefill and decode was not measured",
        "No run was evaluated on tasks",
        "There are no runs that differ in nothing but the copies of each token, K",
    ):
        assert sentence in words


def test_a_report_of_nothing_that_has_finished_says_so() -> None:
    failed = a_run("phd-2", 0, gain=0.0, status="failed", reason="it is out of memory")
    words = markdown(report_of([failed], "A run"))
    assert "it is out of memory" in words


def test_files_lie_beside_the_page(report: Report, tmp_path: Path) -> None:
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "of-an-earlier-report.png").write_bytes(b"")
    some = tuple(s for s in report.sections if s.name in ("ablations", "unfinished"))
    small = Report(report.title, report.subject, some)
    write_report(small, tmp_path)
    figures = {f"{chart.name}.png" for chart in charts(small.sections)}
    assert {path.name for path in (tmp_path / "figures").iterdir()} == figures
    assert {path.stem for path in (tmp_path / "tables").iterdir()} == {"unfinished"}
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert all((tmp_path / file).is_file() for file in re.findall(r"\]\(([^)]+)\)", text))


# A function of the window and the document. A column is sorted by a click on its head.
LOOK = """
const column = (table, place) => [...document.querySelector(table).tBodies[0].rows].map(
  (row) => row.children[place].dataset.value);
const sort = (table, place) => {
  document.querySelector(table).tHead.rows[0].children[place].querySelector("button").click();
  return column(table, place);
};
const color = (selector, property) =>
  window.getComputedStyle(document.querySelector(selector))[property];
const table = "#table-latency, #table-costs";
const width = document.documentElement.clientWidth;
return {
  width,
  overflow: [...document.body.querySelectorAll("*")]
    .filter((e) => !e.closest(".scroll > *") && e.getBoundingClientRect().right > width + 0.5)
    .map((e) => e.outerHTML.slice(0, 200)),
  page: document.documentElement.scrollWidth,
  dark: window.matchMedia("(prefers-color-scheme: dark)").matches,
  background: color("body", "backgroundColor"),
  text: color(".panels text", "fill"),
  font: color(".panels text", "fontFamily") === color("body", "fontFamily"),
  size: Math.min(...[...document.querySelectorAll(".panels text")].map(
    (e) => parseFloat(window.getComputedStyle(e).fontSize) * e.ownerSVGElement.getScreenCTM().a)),
  upwards: sort("#table-costs", 2),
  downwards: sort("#table-costs", 2),
  words: sort("#table-unfinished", 1),
  dimmed: (() => {
    const chart = document.querySelector("figure.chart:has(.legend)");
    const series = new Set([...chart.querySelectorAll("svg [data-series]")].map(
      (e) => e.dataset.series));
    const entry = chart.querySelector(".legend button");
    const dimmed = () => [...series].filter(
      (key) => chart.querySelector(`svg [data-series="${key}"]`).classList.contains("dimmed"));
    entry.click();
    const left = [...series].filter((key) => !dimmed().includes(key));
    entry.click();
    return { series: series.size, left, pressed: entry.value, after: dimmed() };
  })(),
};
"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the PATH")
@pytest.mark.process
def test_a_browser_shows_it_well_in_all_widths_and_themes(page: str, tmp_path: Path) -> None:
    for view, seen in zip(VIEWS, ask(page, LOOK, VIEWS, tmp_path), strict=True):
        assert seen["width"] == view.width
        assert seen["page"] == view.width, "the page scrolls sideways"
        assert seen["overflow"] == []
        assert seen["dark"] is (view.theme == "dark")
        light = view.theme == "light"
        assert seen["background"] == ("rgb(255, 255, 255)" if light else "rgb(21, 23, 27)")
        assert seen["text"] == ("rgb(27, 29, 33)" if light else "rgb(236, 238, 241)")
        assert seen["font"]
        assert seen["size"] >= 9, "text of a figure is too small to be read"
        numbers = list(map(float, seen["upwards"]))
        assert len(set(numbers)) > 2
        assert numbers == sorted(numbers)
        assert seen["downwards"] == seen["upwards"][::-1]
        assert seen["words"] == sorted(seen["words"])
        legend = seen["dimmed"]
        assert legend["left"] == [legend["pressed"]], "a click on a legend points out its group"
        assert legend["series"] > 2
        assert legend["after"] == []
