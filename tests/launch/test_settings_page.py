"""docs/settings.md is what the docstrings say, and the docstrings describe every setting."""

import re
from pathlib import Path
from typing import Any

import pytest

from conf.descriptions import descriptions
from conf.validation import keys, settings_of
from launch.config import LAUNCHERS
from launch.settings_page import COMMAND_ARGUMENTS, SettingsArguments, main, page
from train.conf_files import CLUSTERS, choices, groups
from train.config import Config

PAGE = Path(__file__).resolve().parents[2] / "docs" / "settings.md"


def classes(cls: Any) -> list[Any]:
    """A dataclass and all that its fields hold."""
    inner = [section for setting in settings_of(cls) for section in setting.sections]
    return [cls, *(each for section in inner for each in classes(section))]


CLASSES = [
    *classes(Config),
    *LAUNCHERS.values(),
    *COMMAND_ARGUMENTS.values(),
]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_setting_has_a_description_and_every_description_a_setting(cls: Any) -> None:
    told = descriptions(cls)
    assert set(told) == {setting.name for setting in settings_of(cls)}
    assert all(text.endswith(".") for text in told.values())


def test_the_page_is_what_the_command_writes(tmp_path: Path) -> None:
    assert main(SettingsArguments(out=str(tmp_path / "docs" / "settings.md"))) == 0
    written = (tmp_path / "docs" / "settings.md").read_text(encoding="utf-8")
    assert written == PAGE.read_text(encoding="utf-8"), "run: python -m launch.settings_page"


def test_the_page_has_every_setting_and_every_choice() -> None:
    text = page()
    for key in keys(Config):
        assert f"\n| `{key.replace('*', 'NAME')}` | " in text
    for group in groups():
        assert f"\n### {group}=\n" in text
        for choice in choices(group):
            assert f"\n| [`{choice}`](../conf/{group}/{choice}.yaml)" in text


def test_the_cells_of_a_table_are_as_many_as_its_head() -> None:
    for table in re.findall(r"(?:^\|.*\n)+", page(), flags=re.MULTILINE):
        counts = {len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}
        assert len(counts) == 1


def test_every_choice_says_what_it_is() -> None:
    rows = re.findall(r"^\| \[`.*?\| (.*) \|$", page(), flags=re.MULTILINE)
    assert len(rows) == sum(len(choices(group)) for group in [*groups(), CLUSTERS])
    assert all(len(row) > 20 and row.endswith(".") for row in rows)
