"""A page as a real browser lays it out: Chromium without a window, where there is one."""

import html
import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)

OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--hide-scrollbars",
)

# Chromium makes no window narrower than 500 pixels, but a frame can be. A frame is also light or
# dark by the `color-scheme` of its element, so that one start of the browser shows all of them.
FRAME = (
    '<iframe srcdoc="{page}" style="border: 0; width: {width}px; color-scheme: {theme}"></iframe>'
)

ASK = """
<script>
addEventListener("load", () => {
  const ask = (window, document) => { %s };
  const answers = [...document.querySelectorAll("iframe")].map(
    (frame) => ask(frame.contentWindow, frame.contentDocument));
  document.documentElement.dataset.answers = JSON.stringify(answers);
});
</script>
"""


class View(NamedTuple):
    """A window: its width in pixels, and whether the user prefers `light` or `dark` pages."""

    width: int
    theme: str


def ask(page: str, script: str, views: Sequence[View], folder: Path) -> list[Any]:
    """Open a page in some views at once; what a script returns in each of them.

    Args:
        page: the HTML.
        script: the body of a function of the `window` and the `document`; returns what JSON knows.
        views: of the page.
        folder: for files of the browser; empty.
    """
    assert CHROMIUM
    escaped = html.escape(page)
    frames = "".join(FRAME.format(page=escaped, width=v.width, theme=v.theme) for v in views)
    outer = folder / "frames.html"
    outer.write_text(f"<!doctype html><meta charset='utf-8'>{frames}{ASK % script}")
    command = [CHROMIUM, *OPTIONS, f"--user-data-dir={folder / 'browser'}", "--dump-dom"]
    dom = subprocess.run(
        [*command, outer.as_uri()], capture_output=True, text=True, check=True
    ).stdout
    found = re.search(r'data-answers="([^"]*)"', dom)
    assert found, dom[:2000]
    return json.loads(html.unescape(found[1]))
