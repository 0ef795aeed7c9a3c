"""A report as one HTML page that needs nothing else, and as Markdown; files of its figures beside.

out/
    report.html     opens without a network: its style, script and figures are inside
    report.md       the same, with the figures of the folder below
    figures/        each figure as PNG
    tables/         each table as CSV, with all digits
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import singledispatch
from html import escape
from pathlib import Path

from data.storage.atomic import write_atomic
from train.arguments import REPORT_PAGE
from train.experiments.charts import Chart, panel_svg, write_png
from train.experiments.document import Block, Fold, Note, Section, charts, tables
from train.experiments.tables import Table, as_csv, as_html, as_markdown, in_markdown
from train.experiments.theme import PALETTE, swatch

MARKDOWN, FIGURES, TABLES = "report.md", "figures", "tables"
HERE = Path(__file__).parent

# The page may load nothing at all; a browser enforces it.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


@dataclass(frozen=True)
class Report:
    """All of a report.

    Attributes:
        title: of the page.
        subject: what it is made of, in a line below the title.
        sections: from top to bottom; the first one is the answer, without a head of its own.
    """

    title: str
    subject: str
    sections: tuple[Section, ...]


def write_report(report: Report, out: Path) -> None:
    """Write all files of a report into a directory, in place of those of an earlier one.

    Raises:
        OSError: a file cannot be written.
    """
    for folder, suffix in ((FIGURES, "png"), (TABLES, "csv")):
        (out / folder).mkdir(parents=True, exist_ok=True)
        for old in (out / folder).glob(f"*.{suffix}"):
            old.unlink()
    for chart in charts(report.sections):
        write_png(chart, out / FIGURES / f"{chart.name}.png")
    for table in tables(report.sections):
        write_atomic(out / TABLES / f"{table.name}.csv", as_csv(table))
    write_atomic(out / MARKDOWN, markdown(report))
    write_atomic(out / REPORT_PAGE, html(report))


# HTML


def html(report: Report) -> str:
    """The page."""
    first, *others = report.sections
    links = "".join(f'<li><a href="#{s.name}">{escape(s.title)}</a></li>' for s in others)
    sections = "".join(
        f'<section id="{s.name}">\n<h2>{escape(s.title)}</h2>\n{_blocks(s.blocks)}</section>\n'
        for s in others
    )
    return f"""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{escape(report.title)}</title>
<style>
{_variables()}{(HERE / "page.css").read_text(encoding="utf-8")}</style>
</head>
<body>
<header>
<h1>{escape(report.title)}</h1>
<p class="lead">{escape(report.subject)}</p>
</header>
<main>
<section id="{first.name}" aria-label="{escape(first.title)}">
{_blocks(first.blocks)}</section>
<nav aria-label="sections"><ul>{links}</ul></nav>
{sections}</main>
<footer class="small">
<p>The figures are in {FIGURES}/ as PNG, and the tables in {TABLES}/ as CSV with all digits. A click
on the head of a column sorts a table, and one on an entry of a legend points out its runs.</p>
</footer>
<script>
{(HERE / "page.js").read_text(encoding="utf-8")}</script>
</body>
</html>
"""


def _variables() -> str:
    """The colours, as CSS variables of a light page and of a dark one."""
    light = " ".join(f"--{role}: {color.light};" for role, color in PALETTE.items())
    dark = " ".join(f"--{role}: {color.dark};" for role, color in PALETTE.items())
    return (
        f":root {{ {light} }}\n"
        f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n"
    )


def _blocks(blocks: Sequence[Block]) -> str:
    return "".join(_html(block) + "\n" for block in blocks)


@singledispatch
def _html(block: Block) -> str:
    raise TypeError(type(block))


@_html.register
def _(note: Note) -> str:
    paragraphs = "".join(f"<p>{_with_code(words)}</p>" for words in note.paragraphs)
    bullets = "".join(f"<li>{_with_code(words)}</li>" for words in note.bullets)
    bullets = f"<ul>{bullets}</ul>" if bullets else ""
    return f'<div class="note {note.kind}">{paragraphs}{bullets}</div>'


@_html.register
def _(fold: Fold) -> str:
    return f"<details><summary>{escape(fold.title)}</summary>\n{_html(fold.content)}\n</details>"


@_html.register
def _(chart: Chart) -> str:
    entries = "".join(
        f'<li><button type="button" value="{style.key}" aria-pressed="false">'
        f"{swatch(style)}{escape(label)}</button></li>"
        for label, style in chart.legend
    )
    legend = f'<ul class="legend" aria-label="legend">{entries}</ul>\n' if entries else ""
    panels = "".join(f"<div>{panel_svg(chart, panel)}</div>\n" for panel in chart.panels)
    columns = f"panels columns-{chart.columns}"
    return (
        f'<figure class="chart" id="figure-{chart.name}">\n<h3>{escape(chart.title)}</h3>\n'
        f'{legend}<div class="{columns}">\n{panels}</div>\n{_caption(chart)}</figure>'
    )


@_html.register
def _(table: Table) -> str:
    title = escape(table.title)
    return (
        f'<figure class="table">\n<h3>{title}</h3>\n'
        f'<div class="scroll" role="region" tabindex="0" aria-label="{title}">\n'
        f"{as_html(table)}\n</div>\n{_caption(table)}</figure>"
    )


def _with_code(words: str) -> str:
    """Text of a note, where what stands between backticks is to be typed."""
    kept = escape(words).replace(" %", "\N{NO-BREAK SPACE}%")
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", kept)


def _caption(block: Chart | Table) -> str:
    note = f'<p class="small">{_with_code(block.note)}</p>' if block.note else ""
    source = block.source
    names = "".join(
        f"<li><span>{escape(name)}</span>{', one seed' if name in source.alone else ''}</li>"
        for name in source.runs
    )
    return (
        f"<figcaption>{note}"
        f'<details class="runs"><summary>made of {escape(str(source))}</summary>'
        f"<ul>{names}</ul></details></figcaption>\n"
    )


# Markdown


def markdown(report: Report) -> str:
    """The same as the page, for where Markdown is shown."""
    parts = [f"# {in_markdown(report.title)}", in_markdown(report.subject)]
    for place, section in enumerate(report.sections):
        parts += [f"## {in_markdown(section.title)}"] if place else []
        parts += [_markdown(block) for block in section.blocks]
    return "\n\n".join(parts) + "\n"


@singledispatch
def _markdown(block: Block) -> str:
    raise TypeError(type(block))


@_markdown.register
def _(note: Note) -> str:
    bullets = "\n".join(f"- {in_markdown(words)}" for words in note.bullets)
    return "\n\n".join([*map(in_markdown, note.paragraphs), *filter(None, [bullets])])


@_markdown.register
def _(fold: Fold) -> str:
    return (
        f"<details><summary>{escape(fold.title)}</summary>\n\n{_markdown(fold.content)}\n\n"
        "</details>"
    )


@_markdown.register
def _(chart: Chart) -> str:
    alt = in_markdown(" ".join(panel.alt for panel in chart.panels))
    picture = f"![{alt}]({FIGURES}/{chart.name}.png)"
    return f"### {in_markdown(chart.title)}\n\n{picture}\n\n{_source(chart)}"


@_markdown.register
def _(table: Table) -> str:
    return f"### {in_markdown(table.title)}\n\n{as_markdown(table)}\n\n{_source(table)}"


def _source(block: Chart | Table) -> str:
    note = in_markdown(block.note) + "\n\n" if block.note else ""
    source = block.source
    names = ", ".join(
        in_markdown(name) + (" (one seed)" if name in source.alone else "") for name in source.runs
    )
    summary = f"<summary>made of {escape(str(block.source))}</summary>"
    return f"{note}<details>{summary}\n\n{names}\n\n</details>"
