"""The house: imports point down, folders are small, and a chain of imports is short."""

import ast
import re
from collections import Counter
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("conf", "phd", "data", "train", "launch")
MOST_MODULES = 25  # of a folder
MOST_FLOORS = {"train": 8}

FILES = {
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
    if path.name != "__init__.py"
}


@cache
def imports(module: str) -> frozenset[str]:
    """The project's modules that a module imports, also within functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module))
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return frozenset(found & FILES.keys() - {module})


def room(module: str) -> str:
    """The folder below a package that a module lies in, or the module itself.

    >>> room("data.sources.files"), room("data.stream")
    ('data.sources', 'data.stream')
    """
    package, *below = module.split(".")
    return f"{package}.{below[0]}"


def floor(module: str) -> int:
    """The length of the longest chain of imports that starts with a module, in its package."""

    @cache
    def height(name: str) -> int:
        below = [n for n in imports(name) if n.split(".")[0] == name.split(".")[0]]
        return 1 + max(map(height, below), default=0)

    return height(module)


def assert_no_circle(graph: dict[str, set[str]]) -> None:
    TopologicalSorter(graph).prepare()  # raises a CycleError that names the circle


def test_files_import_no_circle() -> None:
    assert_no_circle({module: set(imports(module)) for module in FILES})


def test_packages_import_no_circle() -> None:
    graph: dict[str, set[str]] = {package: set() for package in PACKAGES}
    for module in FILES:
        graph[module.split(".")[0]] |= {name.split(".")[0] for name in imports(module)}
    assert_no_circle({package: below - {package} for package, below in graph.items()})


def test_folders_import_no_circle() -> None:
    """A folder below a package counts as one, and so does each file beside it."""
    graph: dict[str, set[str]] = {}
    for module in FILES:
        below = {room(name) for name in imports(module)} - {room(module)}
        graph.setdefault(room(module), set()).update(below)
    assert_no_circle(graph)


@pytest.mark.parametrize("package", MOST_FLOORS)
def test_a_chain_of_imports_is_short(package: str) -> None:
    floors = {name: floor(name) for name in FILES if name.startswith(f"{package}.")}
    assert {n: f for n, f in floors.items() if f > MOST_FLOORS[package]} == {}


def test_a_folder_can_be_overlooked() -> None:
    modules = Counter(path.parent.relative_to(ROOT).as_posix() for path in FILES.values())
    assert {folder: n for folder, n in modules.items() if n > MOST_MODULES} == {}


def test_every_folder_of_a_package_says_what_it_is_for() -> None:
    for folder in {path.parent for path in FILES.values()}:
        assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))


def test_no_test_bounds_wall_time() -> None:
    """A busy machine would fail it. A hang is ended by `tests.patience`, which is no claim."""
    bound = re.compile(
        r"assert .*\b(monotonic|perf_counter|time)\(\) - \w+ <|< \w+\(\) - \w+ <"
        r"|assert .*\.wait\(\d+\)|communicate\(\d|\btimeout=\d|deadline_s=\d"
    )
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in sorted((ROOT / "tests").rglob("*.py"))
        if path.name != "test_layout.py"
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if bound.search(line) and "process_time()" not in line
    ]
    assert found == []
