"""`make train` installs what training needs and no more; the rest is named where it is missing."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from conf import extras
from conf.extras import not_installed, pip_command
from data.storage import stores

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PYTHON = sys.executable
EVAL = "phd-transformer[eval]"


def with_dependencies(requirements: list[str]) -> set[str]:
    """The canonical names of distributions and of all that they require on this machine."""
    found: set[str] = set()
    wanted = [(Requirement(text), "") for text in requirements]
    while wanted:
        requirement, extra = wanted.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        if name not in found:
            found.add(name)
            below = [Requirement(text) for text in requires(name) or []]
            wanted += [(r, extra) for extra in ("", *requirement.extras) for r in below]
    return found


# Runs `train/main.py` where some packages are not installed, for all that Python can tell.
ISOLATED = """
import json, runpy, sys
from importlib.metadata import PackageNotFoundError
from importlib.machinery import PathFinder

hidden = set(json.loads(sys.argv.pop(1)))

class Without:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] not in hidden:
            return PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Without
sys.argv.pop(0)
sys.path.insert(0, "train")
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.process
def test_training_needs_only_what_make_train_installs(tmp_path: Path) -> None:
    installed = {PROJECT["name"], *with_dependencies(PROJECT["dependencies"])}
    theirs = {
        module: {canonicalize_name(name) for name in names}
        for module, names in packages_distributions().items()
    }
    hidden = [module for module, names in theirs.items() if not names & installed]
    assert {"pytest", "transformers", "matplotlib", "deepspeed", "datasets"} <= set(hidden)
    settings = ["experiment=smoke", "train.max_steps=1", f"run.dir={tmp_path / 'run'}"]
    done = subprocess.run(
        [PYTHON, "-c", ISOLATED, json.dumps(hidden), str(ROOT / "train/main.py"), *settings],
        env=os.environ | {"PYTHONPATH": str(ROOT), "WANDB_MODE": "offline"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "run" / "checkpoints" / "step_00000001").is_dir()


def test_everything_is_installed_for_the_tests() -> None:
    """Each extra is part of `dev`."""
    extras = PROJECT["optional-dependencies"]
    reached, wanted = set(), ["dev"]
    while wanted:
        extra = wanted.pop()
        reached.add(extra)
        for requirement in map(Requirement, extras[extra]):
            if requirement.name == PROJECT["name"]:
                wanted += requirement.extras
    assert set(extras) == reached


def made(folder: Path, target: str, *arguments: str) -> str:
    """What `make` would run for a target."""
    command = ["make", "--dry-run", "-C", str(folder), target, *arguments]
    environment = {k: v for k, v in os.environ.items() if k not in ("UV", "MAKEFLAGS")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


@pytest.mark.process
@pytest.mark.parametrize(
    ("uv", "installs"), [("", "-m pip install"), ("/x/uv", "/x/uv pip install")]
)
def test_make_train_installs_the_project_alone_and_make_test_the_rest(
    uv: str, installs: str, clone: Path
) -> None:
    for target, what in (("train", "--editable .\n"), ("test", '--editable ".[dev]"\n')):
        [line] = [s for s in made(clone, target, f"UV={uv}").splitlines(True) if "--editable" in s]
        assert installs in line
        assert line.endswith(what)
        assert "--constraint constraints.txt" in line


@pytest.mark.process
def test_what_is_installed_is_not_installed_again(clone: Path) -> None:
    python = clone / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.touch()
    os.utime(clone / "pyproject.toml", (1, 1))
    os.utime(clone / "constraints.txt", (1, 1))
    (clone / ".venv/.training").touch()
    assert "--editable" not in made(clone, "train")
    assert "--editable" in made(clone, "test")
    (clone / ".venv/.installed").touch()
    assert "--editable" not in made(clone, "test")
    os.utime(clone / "pyproject.toml")
    os.utime(clone / ".venv/.training", (2, 2))
    assert "--editable" in made(clone, "train")


@pytest.mark.process
def test_half_an_environment_is_not_kept(clone: Path) -> None:
    broken = clone / "python3"
    broken.write_text("#!/bin/sh\nmkdir -p .venv/bin; touch .venv/bin/python; exit 1\n", "utf-8")
    broken.chmod(0o755)
    command = ["make", "-C", str(clone), "train", f"PYTHON={broken}", "UV="]
    assert subprocess.run(command, capture_output=True, check=False).returncode != 0
    assert not (clone / ".venv").exists()


def test_uv_is_taken_where_it_is_installed(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("uv", "python3"):
        (clone / "bin").mkdir(exist_ok=True)
        (clone / "bin" / name).write_text("#!/bin/sh\n", encoding="utf-8")
        (clone / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{clone / 'bin'}:{os.environ['PATH']}")
    assert f"{clone / 'bin/uv'} pip install" in made(clone, "train")
    assert "-m pip install" in made(clone, "train", "UV=")


@pytest.mark.parametrize(
    ("requirement", "said"),
    [
        ("phd-transformer[hf]", f'{PYTHON} -m pip install "phd-transformer[hf]"'),
        ("s3fs", f"{PYTHON} -m pip install s3fs"),
    ],
)
def test_what_is_missing_is_added_to_the_environment_that_runs(
    requirement: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pip_command(requirement) == said

    def not_installed(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(extras.metadata, "version", not_installed)
    uv = said.replace(f"{PYTHON} -m pip install", f"uv pip install --python {PYTHON}")
    assert pip_command(requirement) == uv


def test_every_extra_that_an_error_names_exists() -> None:
    named = {
        word.partition("]")[0]
        for path in [*ROOT.glob("*/**/*.py"), *ROOT.glob("docs/*.md"), ROOT / "README.md"]
        if ".venv" not in path.parts and path != Path(__file__)
        for word in path.read_text(encoding="utf-8").split(f"{PROJECT['name']}[")[1:]
    }
    assert {"hf", "hub", "deepspeed", "slurm", "bench"} <= named
    assert named <= set(PROJECT["optional-dependencies"])


@pytest.mark.parametrize(
    ("package", "added"),
    [("s3fs", "s3fs"), ("gcsfs.core", "gcsfs"), ("huggingface_hub", '"phd-transformer[hub]"')],
)
def test_a_file_system_whose_package_is_missing_names_it(package: str, added: str) -> None:
    error = ImportError("Install something")
    error.__cause__ = ModuleNotFoundError(f"No module named {package!r}", name=package)
    with pytest.raises(stores.PermanentError) as refused, stores._translated():
        raise error
    assert str(refused.value).endswith(f"is not installed: {PYTHON} -m pip install {added}")


def test_the_project_is_installed_under_the_name_that_the_errors_give() -> None:
    assert distribution("phd-transformer").metadata["Name"] == PROJECT["name"]


def test_a_package_that_is_not_installed_is_named_with_the_command_that_adds_it() -> None:
    assert not_installed("pytest", EVAL, "eval.tasks", ("paper",)) == []
    [problem] = not_installed("no-such-package", EVAL, "eval.tasks", ("paper",))
    assert str(problem).startswith("eval.tasks=['paper']: the package no-such-package is not")
    assert problem.hint == pip_command(EVAL)
