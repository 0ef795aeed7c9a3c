"""The table that `make gpu` writes: what was measured, on which device, with which versions."""

from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from time import strftime
from typing import Any

from tests.gpu.lines import FAIL, Row

VERSIONS = ("torch", "triton", "transformers", "deepspeed", "torchao")


@dataclass
class Section:
    """What a part has come to.

    Attributes:
        title: of the part.
        result: in one line; that of a part that has not begun says so.
        rows: what it has measured so far.
        seconds: how long it took.
    """

    title: str
    result: str = "not begun: out of time"
    rows: list[Row] = field(default_factory=list)
    seconds: float | None = None

    @property
    def failed(self) -> bool:
        """Whether the part failed, or one of its rows says so."""
        results = [self.result, *(str(row.get("result", "")) for row in self.rows)]
        return any(result.startswith(FAIL) for result in results)


@dataclass(frozen=True)
class Report:
    """The page, which is written anew whenever a part ends: a run that is cut off leaves the rest.

    Attributes:
        path: of the page.
        machine: as `train.run_dir.environment.environment` tells it.
        sections: of all parts, in the order of the page.
    """

    path: Path
    machine: dict[str, Any]
    sections: dict[str, Section]

    def write(self) -> None:
        """Write the page as it is now."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(self.page(), encoding="utf-8")

    def page(self) -> str:
        """The page, in Markdown."""
        summary = [
            {"part": section.title, "result": section.result, "seconds": section.seconds}
            for section in self.sections.values()
        ]
        parts = [f"# {self.machine['device']}, {strftime('%Y-%m-%d')}", self._machine()]
        parts.append(table(summary))
        for section in self.sections.values():
            if section.rows:
                parts += [f"## {section.title}", *map(table, kinds(section.rows))]
        return "\n\n".join(parts) + "\n"

    def _machine(self) -> str:
        machine = self.machine
        changed = " with uncommitted changes" if machine["changed"] else ""
        packages = [f"{name} {machine['packages'][name] or 'not installed'}" for name in VERSIONS]
        versions = (
            f"Driver {machine['driver']}, CUDA {machine['cuda']}, cuDNN {machine['cudnn']}, "
            f"NCCL {machine['nccl']}; Python {machine['python']}, {', '.join(packages)}."
        )
        lines = [
            f"Written by `make gpu` at {machine['time']}, commit {machine['revision']}{changed}.",
            versions,
            f"{machine['processor']}, {machine['cores']} cores.",
        ]
        return "\n".join(lines)


def kinds(rows: list[Row]) -> list[list[Row]]:
    """The rows by what they begin with, each of which gets a table of its own.

    >>> kinds([{"work": "a", "ms": 1.0}, {"work": "b"}, {"ratio": "a/b"}])
    [[{'work': 'a', 'ms': 1.0}, {'work': 'b'}], [{'ratio': 'a/b'}]]
    """
    return [list(group) for _, group in groupby(rows, key=lambda row: next(iter(row)))]


def table(rows: list[Row]) -> str:
    """A table of Markdown, with a column for each key of any row.

    >>> print(table([{"what": "copy", "ms": 1234.5678}, {"what": "a|b", "result": "pass"}]))
    | what | ms | result |
    | --- | --- | --- |
    | copy | 1,235 |  |
    | a\\|b |  | pass |
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---"] * len(columns)]
    lines += [[cell(row.get(column)) for column in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(value: object) -> str:
    """A value as a cell: four digits of a number, the first 200 characters of a text.

    >>> cell(0.012345), cell(98765.4), cell(3), cell(None)
    ('0.01235', '98,765', '3', '')
    """
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return " ".join(str(value).split())[:200].replace("|", "\\|")
