"""The checkout that a command lies in is the one whose modules it runs, and nothing slow is
imported before its settings have been checked."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

from conf import checkout
from conf.checkout import ROOT, SIGNS, checkout_of, claim
from conf.errors import ConfigError

PACKAGES = ("conf", "data", "launch", "phd", "train")
COMMANDS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "train").glob("*.py")
    if 'if __name__ == "__main__":' in path.read_text()
)
MODULES = ("launch", "launch.settings_page")

SLOW = {"torch", "transformers", "wandb", "datasets", "deepspeed", "pandas", "sympy", "matplotlib"}
"""What takes from half a second on to import."""

# Python runs this first in every process. Any import of the packages beside it is a wrong one.
PROBE = """
import atexit, json, os, sys

def tell():
    files = {name: getattr(module, "__file__", None) for name, module in sys.modules.items()}
    with open(os.environ["PROBE"], "w") as file:
        json.dump(files, file)

atexit.register(tell)
"""


class Done(NamedTuple):
    """A command that has ended, and the files of the modules that it had imported."""

    code: int
    output: str
    modules: dict[str, str | None]


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Done]:
    """Runs Python in an environment that holds another checkout's packages."""
    installed = tmp_path / "installed"
    for package in PACKAGES:
        (installed / package).mkdir(parents=True)
        (installed / package / "__init__.py").write_text("raise SystemExit('not my modules')")
    (installed / "sitecustomize.py").write_text(PROBE)
    probe = tmp_path / "modules.json"

    def call(*arguments: str, cwd: Path = tmp_path, path: Path = installed) -> Done:
        environment = os.environ | {"PYTHONPATH": str(path), "PROBE": str(probe)}
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=cwd,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        return Done(done.returncode, done.stdout + done.stderr, json.loads(probe.read_text()))

    return call


@pytest.fixture
def second(tmp_path: Path) -> Path:
    """What makes a folder a checkout."""
    root = tmp_path / "second"
    for sign in SIGNS:
        (root / sign).parent.mkdir(parents=True, exist_ok=True)
        (root / sign).touch()
    return root


@pytest.mark.process
@pytest.mark.parametrize("arguments", [["--help"], ["modle.K=3"]], ids=["help", "mistake"])
@pytest.mark.parametrize("command", [*COMMANDS, *MODULES])
def test_a_command_answers_from_its_own_checkout_before_anything_slow_is_imported(
    run: Callable[..., Done], command: str, arguments: list[str]
) -> None:
    by_name = command in MODULES
    words = ["-m", command] if by_name else [str(ROOT / command)]
    launcher = ["local"] if command == "launch" else []
    code, output, modules = run(*words, *launcher, *arguments, cwd=ROOT if by_name else Path("/"))
    mistake = arguments != ["--help"]
    assert (code, "modle.K" in output) == (2 if mistake else 0, mistake), output
    files = [file for name, file in modules.items() if name.partition(".")[0] in PACKAGES]
    assert files
    assert [file for file in files if not Path(file or "/").is_relative_to(ROOT)] == []
    assert {name.partition(".")[0] for name in modules} & SLOW == set()


@pytest.mark.process
def test_a_wrong_path_is_told_before_anything_slow_is_imported(run: Callable[..., Done]) -> None:
    settings = ["data=files", "data.sources.files.paths=nosuch", "tokenizer.path=no.model"]
    code, output, modules = run(str(ROOT / "train/main.py"), *settings)
    assert (code, output.splitlines()[0]) == (2, "2 problems in the configuration:")
    assert {name.partition(".")[0] for name in modules} & SLOW == set()


def test_the_commands_are_known() -> None:
    assert {"train/main.py", "train/plan.py", "train/export.py"} <= set(COMMANDS)
    assert len(COMMANDS) >= 8


# A script of a user's own. It lies in a checkout, and Python finds the packages elsewhere.
OWN = """
import train
from train.compose import run

run(lambda config: print(train.__file__) or 0)
"""


@pytest.mark.process
def test_a_script_in_one_checkout_is_refused_the_modules_of_another(
    run: Callable[..., Done], second: Path, tmp_path: Path
) -> None:
    (second / "experiments").mkdir()
    script = second / "experiments" / "own.py"
    script.write_text(OWN)
    editable = tmp_path / "editable"
    editable.mkdir()
    (editable / "sitecustomize.py").write_text(f"{PROBE}\nsys.path.append({str(ROOT)!r})")
    refused = run(str(script), path=editable)
    assert refused.code == 2
    assert f"{script} lies in the checkout {second}, but Python has found" in refused.output
    assert f"PYTHONPATH={second} takes those of the former" in refused.output
    meant = run(str(script), path=Path(f"{editable}:{ROOT}"))
    assert (meant.code, meant.output.strip()) == (0, str(ROOT / "train/__init__.py"))


@pytest.mark.process
def test_the_processes_that_launch_starts_have_the_modules_of_their_script(
    run: Callable[..., Done], second: Path
) -> None:
    (second / "train/__init__.py").touch()
    script = second / "own.py"
    script.write_text("import train; print(train.__file__)")
    done = run("-m", "launch", "local", "processes=1", f"script={script}", cwd=ROOT)
    assert (done.code, done.output.strip()) == (0, str(second / "train/__init__.py"))


def test_a_checkout_is_found_from_any_place_in_it(second: Path, tmp_path: Path) -> None:
    assert checkout_of(ROOT / "tests/conf") == ROOT
    assert checkout_of(second / "train/main.py") == second
    assert checkout_of(tmp_path) is None


@pytest.mark.parametrize("given", ["", "/elsewhere", f"/elsewhere:{ROOT}"])
def test_processes_of_any_kind_get_this_checkout_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, given: str
) -> None:
    monkeypatch.setitem(sys.modules, "__main__", ModuleType("__main__"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", given)
    claim()
    first, *others = os.environ["PYTHONPATH"].split(":")
    assert (first, others) == (str(ROOT), ["/elsewhere"] if given else [])


def test_a_module_of_train_hides_no_package_of_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the command's settings are looked at: `evaluate` is not train/evaluate.py."""
    monkeypatch.setattr(sys, "path", [str(ROOT), str(ROOT / "train"), "", *sys.path])
    assert PathFinder.find_spec("evaluate").origin == str(ROOT / "train/evaluate.py")
    before = [entry for entry in sys.path if entry != str(ROOT / "train")]
    claim()
    assert sys.path == before
    found = PathFinder.find_spec("evaluate")
    assert found is None or not Path(found.origin).is_relative_to(ROOT / "train")


def test_a_module_run_by_name_is_that_of_the_current_directory(
    monkeypatch: pytest.MonkeyPatch, second: Path
) -> None:
    command = ModuleType("__main__")
    command.__spec__ = ModuleSpec("launch.__main__", None)
    monkeypatch.setitem(sys.modules, "__main__", command)
    monkeypatch.chdir(second / "conf")
    monkeypatch.setenv("PYTHONPATH", "")
    with pytest.raises(ConfigError, match=f"{second / 'conf'} lies in the checkout {second}, but"):
        claim()
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    claim()
    assert os.environ["PYTHONPATH"] == checkout.lead(ROOT, "")


def test_a_deleted_current_directory_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(ConfigError, match="the current directory was deleted"):
        claim()
