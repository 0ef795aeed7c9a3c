"""Write the page of all settings, from the docstrings of the dataclasses that define them.

python -m launch.settings_page out=docs/settings.md
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf import arguments
from conf.descriptions import default_as_typed, descriptions, kind_of, summary
from conf.settings import Settings
from conf.validation import Setting, settings_of, type_in_words
from launch.config import LAUNCHERS
from train.arguments import (
    BenchArguments,
    EvaluateArguments,
    ExportArguments,
    GenerateArguments,
    PlanArguments,
    PretokenizeArguments,
    ReportArguments,
    TokenizerArguments,
)
from train.conf_files import CLUSTERS, choices, default_choices, groups, meaning_of
from train.config import Config
from train.costs.cluster import ClusterConfig

INTRODUCTION = """\
# Settings

This page is written by `python -m launch.settings_page`, from the docstrings of the dataclasses
that define the settings. A test checks that it is up to date.

`key=value` sets one setting (`model.K=3`), and `group=choice` takes all that a file in `conf/` sets
(`size=550m`). A single setting has precedence over a file. `null` means that there is no value; the
tables say what happens then. With `-m`, several values make a sweep:
`-m model.K=2,3 optim.lr=1e-3,3e-3`. `python train/main.py --cfg job ...` prints all settings of a
run without starting it, and `python train/plan.py ...` prints what the run will cost.
`python train/main.py --explain KEY ...` explains one of them, with its present value and where that
comes from.
"""

GROUPS = """\
## Groups

A group is a folder in `conf/`, and a choice is a file in it. A size from `151m` on also chooses
`recipe=olmo2`, which sets the learning rate, the batch and the length of the run.
"""

RUN = """\
## Settings of a run

`train/main.py`, `train/plan.py` and `train/inspect_data.py` take these settings, and so do
`train/tokenizer.py`, `train/pretokenize.py` and `python -m launch` besides their own. `NAME` stands
for a name of your choice.
"""

LAUNCHING = """\
## Settings of the launchers

`python -m launch LAUNCHER key=value ...` takes these settings, and passes all others on to the run.
"""

COMMANDS = """\
## Arguments of the other commands
"""

CLUSTER = """\
## Clusters

`python train/plan.py cluster=h100_64` reads a file of `conf/cluster/`, or a YAML file of your own
with these keys ([docs/planning.md](planning.md)).
"""


@dataclass(frozen=True, kw_only=True)
class SettingsArguments(Settings):
    """Arguments of `python -m launch.settings_page`, each as key=value.

    Attributes:
        out: the Markdown file that is written.
    """

    out: str = "docs/settings.md"


COMMAND_ARGUMENTS: dict[str, Any] = {
    "python train/plan.py": PlanArguments,
    "python train/generate.py": GenerateArguments,
    "python train/evaluate.py": EvaluateArguments,
    "python train/export.py": ExportArguments,
    "python train/report.py": ReportArguments,
    "python train/tokenizer.py": TokenizerArguments,
    "python train/pretokenize.py": PretokenizeArguments,
    "python train/bench.py": BenchArguments,
    "python -m launch.settings_page": SettingsArguments,
}


def page() -> str:
    """The whole page as Markdown."""
    commands = COMMAND_ARGUMENTS.items()
    parts = [
        INTRODUCTION,
        GROUPS,
        *(_group(group) for group in groups()),
        RUN,
        *_sections(Config, ""),
        LAUNCHING,
        *(_section(f"python -m launch {name}", cls, "") for name, cls in LAUNCHERS.items()),
        COMMANDS,
        *(_section(command, cls, "") for command, cls in commands),
        CLUSTER,
        _group(CLUSTERS),
        *_sections(ClusterConfig, "", "the file of a cluster"),
    ]
    return "\n".join(parts)


def _group(group: str) -> str:
    """The choices of a group, each with the first sentence of its file's comment."""
    chosen = default_choices().get(group)
    rows = []
    for choice in choices(group):
        mark = " (default)" if choice == chosen else ""
        file = f"{group}/{choice}.yaml"
        rows.append((f"[`{choice}`](../conf/{file}){mark}", meaning_of(group, choice)))
    return f"### {group}=\n\n" + _table(("choice", "meaning"), rows)


def _sections(cls: Any, path: str, whole: str = "the run") -> Iterator[str]:
    """A dataclass and all sections within it, as tables."""
    if any(not setting.sections for setting in settings_of(cls)):
        yield _section(path.removesuffix(".") or whole, cls, path)
    for setting in settings_of(cls):
        within = f"{path}{setting.name}.{'NAME.' if setting.named else ''}"
        if len(setting.sections) == 1:
            yield from _sections(setting.sections[0], within)
            continue
        for section in setting.sections:
            title = f"{within.removesuffix('.')}, kind={kind_of(section)}"
            yield _section(title, section, within)


def _section(title: str, cls: Any, path: str) -> str:
    """The table of a dataclass's own settings."""
    told = descriptions(cls)
    rows = [
        (f"`{path}{s.name}`", type_in_words(s.hint), _cell(s), told[s.name])
        for s in settings_of(cls)
        if not s.sections
    ]
    about = _markdown(summary(cls)).strip()
    return f"### {title}\n\n{about}\n\n" + _table(("key", "type", "default", "meaning"), rows)


def _cell(setting: Setting) -> str:
    default = default_as_typed(setting)
    return default if setting.required else f"`{default}`"


def _markdown(text: str) -> str:
    """A docstring as Markdown: lines that are indented are drawings, and become code."""
    return re.sub(
        r"((?:^    .*\n?)+)", lambda drawing: f"```\n{drawing[0].rstrip()}\n```\n", text, flags=re.M
    )


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table; a bar within a cell would end it."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (head, *rows)]
    cells.insert(1, ["---"] * len(cells[0]))
    return "".join(f"| {' | '.join(row)} |\n" for row in cells)


def main(given: SettingsArguments) -> int:
    """Write the page."""
    path = Path(given.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(), encoding="utf-8")
    print(f"{path}: {len(page().splitlines())} lines")
    return 0


if __name__ == "__main__":
    arguments.run(SettingsArguments, main)
