"""The Tab key completes settings: bash is asked what it would put on the line."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conf.completion import candidates, completion
from conf.descriptions import entries
from conf.errors import ConfigError
from train.conf_files import choices, groups
from train.config import Config

ROOT = Path(__file__).parents[2]
GROUPS = {group: choices(group) for group in groups()}

# What readline does: it sets the variables, calls the function, and takes the array.
TAB = """
eval "$(python {command} -sc install=bash)"
complete -p python | grep -q _phd_complete || exit 3
COMP_LINE={line!r}
COMP_POINT=${{#COMP_LINE}}
compopt() {{ :; }}
_phd_complete
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("mod", ["model.", "model="]),
        ("model=phd_", ["model=phd_cswa", "model=phd_swa"]),
        ("model.chunk", ["model.chunk="]),
        ("engine.comp", ["engine.compile="]),
        ("engine.compile=", [f"engine.compile={x}" for x in ("auto", "false", "true")]),
        ("run.resume=", ["run.resume=auto", "run.resume=must", "run.resume=never"]),
        ("hooks.wandb.m", ["hooks.wandb.mode="]),
        ("train.max_steps=", ["train.max_steps=null"]),
        ("zzz", []),
    ],
)
def test_a_word_is_completed_by_one_more_level_or_a_value(word: str, expected: list[str]) -> None:
    assert candidates(word, entries(Config), GROUPS) == expected


def test_nothing_of_hydras_own_is_offered() -> None:
    offered = candidates("", entries(Config), GROUPS)
    assert {f"{group}=" for group in GROUPS} <= set(offered)
    assert not any("/" in text or text.startswith(("hydra", "schema")) for text in offered)


def test_other_shells_are_told() -> None:
    with pytest.raises(ConfigError, match=r"-sc install=fish: expected install=bash"):
        completion(["-sc", "install=fish"], [], {})
    with pytest.raises(ConfigError, match=r"-sc: expected install=bash"):
        completion(["-sc"], [], {})
    assert completion(["model=phd"], [], {}) is None


@pytest.mark.process
@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("python train/main.py model.K=3 siz", ["size="]),
        ("python train/main.py size=55", ["550m"]),
        ("python train/main.py size=t", [name for name in choices("size") if name[0] == "t"]),
        ("python train/export.py dty", ["dtype="]),
        ("python train/main.py --help", []),
    ],
)
def test_bash_completes_what_the_command_knows(line: str, expected: list[str]) -> None:
    command = line.split()[1]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", TAB.format(command=command, line=line)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == expected
