"""The charts of the benchmarks show every bar whole, with its number."""

from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imread

from train.benchmarks.charts import COLORS, chart, draw
from train.benchmarks.timing import Bar, Kind, Panel

PANELS = [
    Panel(
        "times",
        "time / vanilla's",
        [
            Bar("vanilla (torch's choice)", 1.0, Kind.BASE, 0.9, 1.3),
            Bar("phd cswa K2, with a name that takes much room", 2.1, Kind.OURS, 2.0, 2.6),
            Bar("naive repeat", 0.0123, Kind.PEER),
        ],
        {"K": 2.0},
    ),
    Panel("speed", "TFLOP/s", [Bar("product", 744.2, Kind.CEILING)]),
]


def lengths(axes: Axes) -> list[float]:
    return [patch.get_width() for patch in axes.patches]


def test_every_bar_has_its_length_its_label_and_its_number() -> None:
    figure = chart(PANELS, "a device")
    first, second = figure.axes
    assert lengths(first) == [1.0, 2.1, 0.0123]
    assert lengths(second) == [744.2]
    assert [text.get_text() for text in first.get_yticklabels()] == [
        b.label for b in PANELS[0].bars
    ]
    assert [text.get_text() for text in first.texts] == ["1", "2.1", "0.0123", "K"]
    assert [text.get_text() for text in second.texts] == ["744"]
    told = [text.get_text() for text in figure.legends[0].get_texts()]
    assert told == [kind.value for kind in COLORS]


def test_nothing_is_clipped_and_numbers_stand_beside_their_bars() -> None:
    figure = chart(PANELS, "a device")
    FigureCanvasAgg(figure).draw()
    for axes in figure.axes:
        frame = axes.get_window_extent()
        for text in axes.texts:
            box = text.get_window_extent()
            assert frame.x0 <= box.x0, text
            assert box.x1 <= frame.x1, text
        for label in axes.get_yticklabels():
            assert label.get_window_extent().x0 >= 0
    assert_nothing_is_covered(figure)


def assert_nothing_is_covered(figure: Figure) -> None:
    """No two texts of the figure lie over each other."""
    texts = [t for axes in figure.axes for t in (*axes.texts, axes.title, axes.xaxis.label)]
    boxes = [text.get_window_extent() for text in texts]
    assert not any(
        one.overlaps(other) for place, one in enumerate(boxes) for other in boxes[place + 1 :]
    )


def test_the_chart_is_written(tmp_path: Path) -> None:
    draw(PANELS, "a device", tmp_path / "chart.png")
    assert imread(tmp_path / "chart.png").shape[1] == 9 * 150
