"""A chart follows the page: its colours are variables, its text is text, its ids are its own."""

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from matplotlib.axes import Axes

from tests.train.experiments.made_up import HOSTILE
from train.experiments.charts import Chart, Panel, figure_of, panel_svg, write_png
from train.experiments.drawings import Axis, Curve, Mark, after_the_start, draw_curves, draw_marks
from train.experiments.source import Source
from train.experiments.theme import PALETTE, Style, styles

STYLES = list(styles({"a": "vanilla", "b": "phd-2"}).values())
SOURCE = Source(("a run",), 1, 1)


def draw(axes: Axes) -> None:
    lines = [Curve(style, [1.0, 2.0], [2.0, 1.0], [1.9, 0.9], [2.1, 1.1]) for style in STYLES]
    draw_curves(axes, lines, Axis(HOSTILE), Axis("loss"), after_the_start(lines))


CHART = Chart("a-chart", HOSTILE, (Panel("all", HOSTILE, draw),), SOURCE, ((HOSTILE, STYLES[0]),))


@pytest.fixture(scope="module")
def svg() -> str:
    return panel_svg(CHART, CHART.panels[0])


def test_all_colors_are_variables_of_the_page(svg: str) -> None:
    assert re.findall(r"#[0-9a-fA-F]{3,8}\b", re.sub(r'href="#[^"]*"|url\(#[^)]*\)', "", svg)) == []
    assert {"vanilla", "hue-1", "ink"} <= set(re.findall(r"var\(--([\w-]+)\)", svg)) <= set(PALETTE)


def test_text_is_text_in_the_font_of_the_page(svg: str) -> None:
    root = ET.fromstring(svg)
    texts = {"".join(element.itertext()) for element in root.iter("text")}
    assert {HOSTILE, "loss"} <= texts
    assert root.attrib["aria-label"] == HOSTILE
    assert "DejaVu" not in ET.tostring(root, encoding="unicode")


def test_what_belongs_to_a_group_can_be_found(svg: str) -> None:
    root = ET.fromstring(svg)
    found = [element.get("data-series") for element in root.iter() if element.get("data-series")]
    assert sorted(set(found)) == sorted(style.key for style in STYLES)


def test_two_figures_of_a_page_share_no_id(svg: str) -> None:
    other = Chart("another", "a title", CHART.panels, SOURCE)
    figures = (svg, panel_svg(other, other.panels[0]))
    elements = [element for figure in figures for element in ET.fromstring(figure).iter()]
    ids = [element.get("id") for element in elements if element.get("id")]
    assert len(set(ids)) == len(ids)


def test_a_reference_within_a_figure_is_kept(svg: str) -> None:
    root = ET.fromstring(svg)
    ids = {element.get("id") for element in root.iter()}
    references = {element.get("href") for element in root.iter() if element.get("href")}
    clips = re.findall(r"url\(#([^)]+)\)", ET.tostring(root, encoding="unicode"))
    assert references
    assert {reference[1:] for reference in references if reference} | set(clips) <= ids


def test_a_figure_is_the_same_each_time(svg: str) -> None:
    assert panel_svg(CHART, CHART.panels[0]) == svg


def test_a_picture_is_written(tmp_path: Path) -> None:
    write_png(CHART, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_the_start_of_a_curve_does_not_choose_the_range() -> None:
    falling = Curve(Style("hue-1", (), "o"), range(10), [9.0, 5.0, 3.0, 2.4, *[2.2] * 5, 2.0])
    low, high = after_the_start([falling])
    assert 1.9 < low < 2.0
    assert 2.4 < high < 2.5


def test_values_stand_below_each_other_in_their_order() -> None:
    def marks(axes: Axes) -> None:
        draw_marks(
            axes,
            [Mark(n, STYLES[0], 0.0, -1.0, 1.0) for n in "ab"],
            Axis("x"),
            (-1.0, 1.0),
            zero="vanilla",
        )

    root = ET.fromstring(panel_svg(CHART, Panel("all", "", marks)))
    texts = ["".join(element.itertext()) for element in root.iter("text")]
    heights = {
        text: float(element.attrib["y"])
        for text, element in zip(texts, root.iter("text"), strict=True)
        if text in ("a", "b")
    }
    assert heights["a"] < heights["b"]


@pytest.mark.parametrize("panels", [1, 2, 4, 5])
def test_a_picture_has_no_empty_panel(panels: int) -> None:
    chart = Chart("a-chart", "a title", (Panel("one", "one", draw),) * panels, SOURCE)
    assert len(figure_of(chart).axes) == panels
