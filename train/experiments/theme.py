"""The colours of a report, light and dark, and how each group of runs is drawn in all charts.

A figure is drawn once, in the light colours. In the SVG of the page each of them becomes a CSS
variable, which the page sets for light and dark.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple


class Color(NamedTuple):
    """A colour of the page: of a light page, and of a dark one."""

    light: str
    dark: str


SURFACE, INK, MUTED, GRID, VANILLA = "surface", "ink", "muted", "grid", "vanilla"

PALETTE: dict[str, Color] = {
    SURFACE: Color("#ffffff", "#15171b"),
    INK: Color("#1b1d21", "#eceef1"),
    MUTED: Color("#5b6068", "#a2a8b2"),
    GRID: Color("#e3e5e9", "#2c3037"),
    VANILLA: Color("#6b6f76", "#9aa0a9"),
    "hue-1": Color("#2166c4", "#5b9cf0"),
    "hue-2": Color("#d4541a", "#f2854f"),
    "hue-3": Color("#0b8a70", "#2fbf9f"),
    "hue-4": Color("#7a3fc0", "#ad84f0"),
    "hue-5": Color("#c9377f", "#ec6fae"),
    "hue-6": Color("#9a7000", "#d0a02c"),
    "hue-7": Color("#3d8a1f", "#79c257"),
    "hue-8": Color("#b3282d", "#f0696d"),
}
"""By the name of the CSS variable. No two light colours are equal: they are told apart by them."""

HUES = tuple(name for name in PALETTE if name.startswith("hue-"))
DASHES: tuple[tuple[float, ...], ...] = ((), (6, 2.5), (2, 2), (8, 2, 2, 2), (4, 1.5, 1, 1.5))

_SHAPES = {
    "o": "M15 2.5a3.5 3.5 0 1 0 .01 0z",
    "s": "M12 3h6v6h-6z",
    "^": "M15 2l4 7.5h-8z",
    "D": "M15 1.6l4.4 4.4-4.4 4.4-4.4-4.4z",
    "v": "M15 10l4-7.5h-8z",
    "P": "M13.5 2h3v2.5h2.5v3h-2.5v2.5h-3v-2.5h-2.5v-3h2.5z",
}
"""The markers as paths, within 30 x 12 pixels."""

MARKERS = tuple(_SHAPES)
ROLE_OF = {color.light: role for role, color in PALETTE.items()}


@dataclass(frozen=True)
class Style:
    """How a group of runs is drawn: the name of its colour, its dashes and its marker.

    The dashes are the lengths of strokes and gaps in pixels; `()` is a full line. Groups that share
    a colour differ in dashes and marker, so that nobody has to tell colours apart alone.
    """

    role: str
    dashes: tuple[float, ...]
    marker: str

    @property
    def color(self) -> str:
        """The colour as it is drawn, see `PALETTE`."""
        return PALETTE[self.role].light

    @property
    def key(self) -> str:
        """A name for it in the page.

        >>> Style("hue-1", (6, 2.5), "s").key
        'hue-1-s-6-2.5'
        """
        return "-".join([self.role, self.marker, *map(str, self.dashes)])


def styles(models: Mapping[str, str]) -> dict[str, Style]:
    """A style for each group of runs, by its variant: the same in all charts of a report.

    Vanilla is grey. Groups of one variant, such as `phd_cswa-2-16-32`, share its colour.

    >>> found = styles({"a": "vanilla", "b": "phd-2", "c": "phd-2", "d": "phd-3"})
    >>> {name: (style.role, style.dashes) for name, style in found.items()}
    {'a': ('vanilla', ()), 'b': ('hue-1', ()), 'c': ('hue-1', (6, 2.5)), 'd': ('hue-2', ())}

    Args:
        models: the variant of each group, by the group's name; in the order of the legend.
    """
    hues: dict[str, int] = {}
    used: dict[str, count[int]] = defaultdict(count)
    found = {}
    for name, model in models.items():
        if model == "vanilla":
            role, place = VANILLA, 0
        else:
            place = hues.setdefault(model, len(hues))
            role = HUES[place % len(HUES)]
        turn = next(used[role])
        marker = MARKERS[(place + turn) % len(MARKERS)]
        found[name] = Style(role, DASHES[turn % len(DASHES)], marker)
    return found


def swatch(style: Style) -> str:
    """A piece of a line in a style, as an SVG element of a page."""
    color = f"var(--{style.role})"
    dashes = " ".join(f"{length * 1.5:g}" for length in style.dashes)
    stroke = f' stroke-dasharray="{dashes}"' if dashes else ""
    return (
        '<svg class="swatch" viewBox="0 0 30 12" aria-hidden="true">'
        f'<path d="M1 6h28" style="stroke: {color}"{stroke}/>'
        f'<path d="{_SHAPES[style.marker]}" style="fill: {color}"/></svg>'
    )
