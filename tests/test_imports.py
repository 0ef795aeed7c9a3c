"""The packages know of each other only what the layout allows, and importing them does nothing."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OWN = {"phd", "data", "train", "launch", "conf", "tests"}

# What a package may import besides itself and the standard library; `train` may import anything.
ALLOWED = {
    "conf": {"pydantic"},
    "phd": {"conf", "torch"},
    "data": {"conf", "numpy", "pyarrow", "sentencepiece", "xxhash", "zstandard"}
    | {"datasets", "fsspec", "pydantic"},
    "launch": {"conf", "train", "torch", "yaml"},
}

# What only some users of a module have: they import it where they need it.
OPTIONAL = {
    "phd/attention/fused.py": {"triton"},
    "phd/cross_entropy.py": {"triton"},
    **{
        path.relative_to(ROOT).as_posix(): {"triton"}
        for path in (ROOT / "phd/inference/kernels").glob("*.py")
    },
    "phd/hf/modeling.py": {"transformers"},
}

# The launcher checks the settings of the training that it starts, as train/main.py does. The page
# of all settings names those of every command.
LAUNCH_IMPORTS = {"train.compose", "train.config"}
SETTINGS_PAGE = "launch/settings_page.py"

RUNS_WHEN_IMPORTED = "launch/__main__.py"

# The front of the commands; train/main.py and the like get Hydra through it.
HYDRA_IN = {"train/compose.py", "train/overrides.py"}


def modules(*packages: str) -> list[Path]:
    return [path for package in packages for path in sorted((ROOT / package).rglob("*.py"))]


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, also within functions, by its full name."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield str(node.module)


def packages(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(path)}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_there_are_modules_to_look_at() -> None:
    for package in ("phd", "data", "train", "launch"):
        assert len(modules(package)) > 1
    assert "torch" in packages(ROOT / "phd/model.py")
    assert "data" in packages(ROOT / "train/run.py")


@pytest.mark.parametrize("package", ALLOWED)
def test_a_package_imports_what_it_may_and_nothing_else(package: str) -> None:
    allowed = ALLOWED[package] | {package} | sys.stdlib_module_names
    found = {
        name_of(path): packages(path) - allowed - OPTIONAL.get(name_of(path), set())
        for path in modules(package)
    }
    assert {name: extra for name, extra in found.items() if extra} == {}


def test_only_the_launcher_imports_train_and_only_its_configuration() -> None:
    found = {
        name
        for path in modules("conf", "phd", "data", "launch")
        for name in imports(path)
        if name.partition(".")[0] == "train" and name_of(path) != SETTINGS_PAGE
    }
    assert found == LAUNCH_IMPORTS


def test_no_package_imports_the_tests() -> None:
    found = [name_of(path) for path in modules(*OWN - {"tests"}) if "tests" in packages(path)]
    assert found == []


def test_only_the_front_of_the_commands_imports_hydra() -> None:
    found = {name_of(path) for path in modules(*OWN - {"tests"}) if "hydra" in packages(path)}
    assert found == HYDRA_IN


def test_only_entry_points_import_the_front_of_the_commands() -> None:
    front = {"train.compose"}
    entries = {name_of(p) for p in modules("train") if 'if __name__ == "__main__"' in p.read_text()}
    for path in modules("train"):
        by_name = {
            f"{node.module}.{alias.name}"
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        if front & (by_name | set(imports(path))):
            assert name_of(path) in entries


# lm-evaluation-harness imports the package `evaluate` after `conf.checkout.claim` has taken train/
# off the path, and nothing does so before.
IMPORTED_LATER = {"evaluate"}


def test_no_module_hides_one_of_somebody_else() -> None:
    """`python train/main.py` puts train/ first on the path of the imports before `claim`."""
    elsewhere = [p for p in sys.path if p and not Path(p).resolve().is_relative_to(ROOT)]
    for path in modules("train"):
        name = path.stem
        if name != "__init__":
            assert name not in sys.stdlib_module_names, path
            if name not in IMPORTED_LATER:
                assert PathFinder.find_spec(name, elsewhere) is None, path


def test_configuration_holds_no_code() -> None:
    files = sorted((ROOT / "conf").rglob("*.yaml"))
    assert len(files) > 20
    assert [name_of(path) for path in files if "_target_" in path.read_text()] == []


# What an import does, told by Python's own audit events.
WATCHED = """
import json, os, sys, threading
seen = []

def watch(event, arguments):
    if event in ("os.fork", "subprocess.Popen", "socket.connect", "os.mkdir", "os.rename"):
        seen.append(event)
    elif event == "open":
        path, mode, flags = arguments
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            seen.append(f"open {path}")

import torch
import datasets, numpy, pyarrow, sentencepiece, xxhash, zstandard
before = (torch.get_num_threads(), threading.active_count(), torch.get_rng_state().tolist())
before += (torch.get_default_dtype(), torch.is_grad_enabled(), dict(os.environ))
sys.addaudithook(watch)
for name in sys.argv[1:]:
    __import__(name)
after = (torch.get_num_threads(), threading.active_count(), torch.get_rng_state().tolist())
after += (torch.get_default_dtype(), torch.is_grad_enabled(), dict(os.environ))
print(json.dumps([seen, before == after, torch.distributed.is_initialized()]))
"""


@pytest.mark.process
def test_importing_a_package_does_no_work() -> None:
    names = [
        name.removesuffix(".py").replace("/", ".")
        for name in map(name_of, modules("conf", "phd", "data", "launch"))
        if name not in (RUNS_WHEN_IMPORTED, SETTINGS_PAGE, *OPTIONAL)
    ]
    done = subprocess.run(
        [sys.executable, "-B", "-c", WATCHED, *names],
        # Given, the variable is not set by train/__init__.py, which does it for all of OpenMP.
        env=os.environ | {"PYTHONPATH": str(ROOT), "GOMP_SPINCOUNT": "10000"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == [[], True, False]


@pytest.mark.process
def test_a_model_needs_nothing_but_torch() -> None:
    """`phd` is imported without any package that other parts need, installed or not."""
    hidden = [
        "transformers",
        "triton",
        "hydra",
        "omegaconf",
        "pydantic",
        "datasets",
        "wandb",
        "sentencepiece",
        "rich",
    ]
    script = (
        f"import sys; sys.modules.update(dict.fromkeys({hidden!r})); "
        "import phd.model, phd.inference.generator, phd.flops, phd.hf.convert"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)


@pytest.mark.process
def test_commands_without_a_model_do_not_wait_for_torch() -> None:
    """It takes seconds, in each process that makes tokens, too."""
    commands = "train.pretokenize, train.inspect_data, train.tokenizer, launch.__main__"
    script = f"import sys; sys.modules['torch'] = None; import {commands}"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)
