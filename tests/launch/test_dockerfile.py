"""The image's steps work and end with a tree in which `make test` has nothing to install.

There is no Docker here: the steps run in a folder, with stand-ins for what would install something.
"""

import os
import re
import shutil
import subprocess
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.patience import PATIENCE_S

ROOT = Path(__file__).parents[2]
FILE = ROOT / "launch" / "Dockerfile"

# `python -m venv DIRECTORY` makes the next stand-in. All of them write down how they were called.
PYTHON = """#!/bin/sh
echo "$0 $*" >>"$CALLS"
if [ "$2" = venv ]; then mkdir -p "$3/bin" && cp "$0" "$3/bin/python"; fi
"""


class Step(NamedTuple):
    """An instruction of the file."""

    name: str
    text: str


def steps() -> list[Step]:
    lines = [line for line in FILE.read_text().splitlines() if not line.startswith("#")]
    whole = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [Step(*line.split(maxsplit=1)) for line in whole.splitlines() if line.strip()]


def ignored(path: str) -> bool:
    """Whether the build leaves out a file; the patterns are those that the file has."""
    patterns = FILE.with_name("Dockerfile.dockerignore").read_text().splitlines()
    parts = path.split("/")
    for pattern in (line for line in patterns if line and not line.startswith("#")):
        anywhere = pattern.removeprefix("**/")
        places = parts if anywhere != pattern else parts[:1]
        if any(fnmatch(part, anywhere) for part in places):
            return True
    return False


def context() -> list[str]:
    """The files that the build can copy."""
    files = []
    for folder, folders, names in os.walk(ROOT):
        inside = Path(folder).relative_to(ROOT)
        folders[:] = [name for name in folders if not ignored((inside / name).as_posix())]
        files += [(inside / name).as_posix() for name in names]
    return [file for file in files if not ignored(file)]


class Image:
    """A folder that stands for the image's file system."""

    def __init__(self, directory: Path) -> None:
        self.tools = directory / "tools"
        self.calls = directory / "calls"
        self.root = directory / "image"
        self.workdir = self.root
        self.variables = {"PATH": f"{self.tools}:/usr/bin:/bin", "CALLS": str(self.calls)}
        self.variables["UV"] = ""  # the image has none
        self.tools.mkdir()
        self.root.mkdir()
        for name, text in {"python": PYTHON, "apt-get": PYTHON, "rm": PYTHON}.items():
            (self.tools / name).write_text(text)
            (self.tools / name).chmod(0o755)

    def do(self, step: Step) -> None:
        match step.name:
            case "WORKDIR":
                self.workdir = self.root / step.text.lstrip("/")
                self.workdir.mkdir(parents=True, exist_ok=True)
            case "COPY":
                *sources, target = step.text.split()
                files = context() if sources == ["."] else sources
                for file in files:
                    place = self.workdir / target / file
                    place.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(ROOT / file, place)
            case "ARG":
                name, _, value = step.text.partition("=")
                self.variables[name] = value.strip('"')
            case "RUN":
                self.run("sh", "-euc", step.text)
            case _:
                assert step.name in ("FROM", "ENV")

    def run(self, *command: str) -> str:
        done = subprocess.run(
            command,
            cwd=self.workdir,
            env=self.variables,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            timeout=PATIENCE_S,
        )
        return done.stdout


@pytest.mark.process
def test_the_steps_install_everything_once(tmp_path: Path) -> None:
    image = Image(tmp_path)
    for step in steps():
        image.do(step)
    calls = image.calls.read_text()
    assert re.search(r"/apt-get install .*\bg\+\+ git make", calls)
    [installation] = [line for line in calls.splitlines() if " pip install " in line]
    assert installation.endswith("--constraint constraints.txt --editable .[dev]")
    # What `make test` would do there: no installation, for which the image has no network.
    planned = image.run("make", "--dry-run", "test")
    assert "pytest" in planned
    assert "pip install" not in planned


@pytest.mark.process
def test_a_build_for_the_cpu_takes_pytorch_from_its_own_index(tmp_path: Path) -> None:
    image = Image(tmp_path)
    for step in steps():
        if step.name == "RUN" and "TORCH_INDEX" in step.text:
            image.variables["TORCH_INDEX"] = "https://example.org/cpu"
            image.do(step)
            break
        image.do(step)
    version = re.search(r"^torch==\S+$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert version
    calls = image.calls.read_text()
    assert f"pip install --index-url https://example.org/cpu {version[0]}\n" in calls


def test_the_image_has_every_file_of_the_project() -> None:
    command = ["git", "ls-files"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("this is no git repository")
    assert [file for file in listed.stdout.splitlines() if ignored(file)] == []


def test_the_image_has_the_python_that_the_project_needs() -> None:
    [base] = [step.text for step in steps() if step.name == "FROM"]
    image = re.fullmatch(r"python:3\.(\d+)-slim-\w+", base)
    least = re.search(r'requires-python = ">=3\.(\d+)"', (ROOT / "pyproject.toml").read_text())
    assert image
    assert least
    assert int(image[1]) >= int(least[1])


@pytest.mark.process
@pytest.mark.skipif(not shutil.which("shellcheck"), reason="needs shellcheck (in the dev extra)")
def test_shellcheck_has_no_objection_to_the_steps() -> None:
    script = "\n".join(step.text for step in steps() if step.name == "RUN")
    check = ["shellcheck", "--shell=sh", "--severity=style", "--exclude=SC2154", "-"]
    done = subprocess.run(check, input=script, text=True, capture_output=True, check=False)
    assert done.stdout == ""
