"""Charts for a page that is light or dark, wide or narrow, and for a picture file.

A chart is one or more panels with a common legend. On the page each panel is an SVG of its own, so
that they stand side by side or below each other as the window has room, and the legend is text. In
the PNG they are one figure.
"""

import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from train.experiments.drawings import SERIES, line
from train.experiments.source import Source
from train.experiments.theme import GRID, INK, MUTED, PALETTE, ROLE_OF, SURFACE, Style

WIDTH, HEIGHT = 400, 290
"""Of a panel in pixels. Its text has this size on a page where the panel has this width."""

PIXELS_PER_INCH = 72  # of matplotlib's SVG, whose unit is the point
PNG_DPI = 160

# matplotlib 3.11 writes the family by itself, earlier versions write `font: 12px 'DejaVu Sans'`.
_FONT = re.compile(r"font: (?P<size>[\d.]+px) [^;]*|font-family: [^;]*;? ?")
_HEX = re.compile(r"#[0-9a-fA-F]{6}\b")


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        name: of letters, digits and hyphens; unlike any other of the chart.
        alt: what is seen, in a sentence, for those who do not see it.
        draw: draws on the axes, in colours of `train.experiments.theme.PALETTE`.
        height: in pixels.
    """

    name: str
    alt: str
    draw: Callable[[Axes], None]
    height: int = HEIGHT


@dataclass(frozen=True)
class Chart:
    """A figure of a report.

    Attributes:
        name: of its files; of letters, digits and hyphens, unlike any other of the report.
        title: a short sentence.
        panels: at least one.
        legend: the label and style of each group of runs that is drawn.
        note: what a reader has to know to read it right; may be empty.
        source: the runs that it is made of.
    """

    name: str
    title: str
    panels: tuple[Panel, ...]
    source: Source
    legend: tuple[tuple[str, Style], ...] = ()
    note: str = ""

    @property
    def columns(self) -> int:
        """How many panels stand beside each other where there is room: three, but four in pairs."""
        return 2 if len(self.panels) == 4 else min(len(self.panels), 3)


# What is drawn


@contextmanager
def _look(name: str) -> Iterator[None]:
    """The look of all figures; `name` makes the ids of an SVG its own, and the same each time."""
    ink, muted = PALETTE[INK].light, PALETTE[MUTED].light
    settings: dict[str, Any] = {
        "font.family": "DejaVu Sans",
        "font.size": 12,
        "svg.fonttype": "none",  # text as text, in the page's font
        "svg.hashsalt": name,
        "text.parse_math": False,  # a dollar in the name of a run is a dollar
        "axes.edgecolor": muted,
        "axes.labelcolor": ink,
        "axes.titlecolor": ink,
        "text.color": ink,
        "xtick.color": muted,
        "ytick.color": muted,
        "xtick.labelcolor": ink,
        "ytick.labelcolor": ink,
        "xtick.labelsize": 11,
        "ytick.labelsize": 11,
        "axes.labelsize": 12,
        "axes.titlesize": 12,
        "axes.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.facecolor": PALETTE[SURFACE].light,
        "figure.facecolor": PALETTE[SURFACE].light,
        "axes.grid": True,
        "grid.color": PALETTE[GRID].light,
        "grid.linewidth": 0.8,
        "axes.axisbelow": True,
        "legend.frameon": False,
        "legend.fontsize": 10,
    }
    with mpl.rc_context(settings):  # type: ignore[arg-type]
        yield


# SVG


def panel_svg(chart: Chart, panel: Panel) -> str:
    """The panel as an SVG element of a page: colours are CSS variables, text is in its font."""
    prefix = f"{chart.name}-{panel.name}"
    size = (WIDTH / PIXELS_PER_INCH, panel.height / PIXELS_PER_INCH)
    with _look(prefix):
        figure = Figure(figsize=size, layout="constrained")
        panel.draw(figure.add_subplot())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    root = ET.fromstring(buffer.getvalue())
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": panel.alt}
    for element in root.iter():
        element[:] = [child for child in element if not child.tag.endswith(("metadata", "style"))]
        element.tag = element.tag.rpartition("}")[2]  # HTML knows SVG without its namespace
        element.attrib = dict(_for_page(element, prefix))
    return ET.tostring(root, encoding="unicode")


def _for_page(element: ET.Element, prefix: str) -> Iterator[tuple[str, str]]:
    """The attributes of an element, without what would meet those of another SVG of the page."""
    for key, value in element.attrib.items():
        name = key.rpartition("}")[2]
        if name == "id" and value.startswith(SERIES):
            yield "data-series", value.removeprefix(SERIES)
        elif name == "id":
            yield name, f"{prefix}-{value}"
        elif name == "href":
            yield name, f"#{prefix}-{value.removeprefix('#')}"
        elif name == "style":
            yield name, _HEX.sub(_variable, _FONT.sub(_size_alone, value))
        else:
            yield name, value.replace("url(#", f"url(#{prefix}-")


def _size_alone(font: re.Match[str]) -> str:
    return f"font-size: {font['size']}" if font["size"] else ""


def _variable(color: re.Match[str]) -> str:
    return f"var(--{ROLE_OF[color[0].lower()]})"


# PNG


def write_png(chart: Chart, path: Path) -> None:
    """Write the chart with its title and legend as one picture, in the light colours."""
    figure_of(chart).savefig(path, dpi=PNG_DPI, metadata={"Software": None})


def figure_of(chart: Chart) -> Figure:
    """All panels of a chart beside each other, at most three, with the legend below."""
    columns = chart.columns
    lines = -(-len(chart.panels) // columns)
    height = max(panel.height for panel in chart.panels) * lines
    per_line = max(1, columns * WIDTH // 200)
    legend_height = 20 * -(-len(chart.legend) // per_line)
    size = (columns * WIDTH / PIXELS_PER_INCH, (height + legend_height + 30) / PIXELS_PER_INCH)
    with _look(chart.name):
        figure = Figure(figsize=size, layout="constrained")
        figure.suptitle(chart.title, fontsize=13)
        grid = list(figure.subplots(lines, columns, squeeze=False).flat)
        for axes, panel in zip(grid, chart.panels, strict=False):
            panel.draw(axes)
        for axes in grid[len(chart.panels) :]:
            axes.remove()
        if chart.legend:
            handles = [line([], [], style, label) for label, style in chart.legend]
            figure.legend(handles=handles, loc="outside lower center", ncols=per_line)
    return figure
