"""Colours can be told from the page, and groups of runs from each other."""

from itertools import combinations

import pytest

from train.experiments.theme import GRID, MARKERS, PALETTE, SURFACE, styles


def luminance(color: str) -> float:
    """Of WCAG 2.2, of a colour such as `#1b1d21`."""
    parts = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return sum(weight * x for weight, x in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(a: str, b: str) -> float:
    dark, light = sorted((luminance(a), luminance(b)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("role", sorted(PALETTE.keys() - {SURFACE, GRID}))
def test_lines_and_words_stand_out_from_the_page(role: str, theme: str) -> None:
    surface = getattr(PALETTE[SURFACE], theme)
    least = 3 if role.startswith("hue") else 4.5  # WCAG 2.2, 1.4.11 and 1.4.3
    assert contrast(getattr(PALETTE[role], theme), surface) >= least


def test_a_color_of_a_figure_tells_its_role() -> None:
    assert len({color.light for color in PALETTE.values()}) == len(PALETTE)


def test_no_two_groups_look_alike() -> None:
    models = {f"vanilla {n}": "vanilla" for n in range(3)}
    models |= {f"phd-{n}": f"phd-{n}" for n in range(2, 14)}
    models |= {f"phd-2 {n}": "phd-2" for n in range(4)}
    for (_, a), (_, b) in combinations(styles(models).items(), 2):
        assert a != b
    assert {a.marker for a in styles(models).values()} == set(MARKERS)
