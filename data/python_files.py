"""The corpus that is on every machine already: Python's own source files."""

import os
import sysconfig
from pathlib import Path

from data.files import CorpusFile, FileCorpus
from data.formats import PythonFile

# Tests are the larger half of a full installation, much of it tables and deliberate nonsense, and
# many systems leave them out: without them the corpus is better text and more nearly the same.
PASSED_OVER = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages"})


def python_corpus(*, packages: bool) -> FileCorpus:
    """The standard library's `.py` files without its tests, and those of installed packages."""
    paths = ["stdlib", *(["purelib", "platlib"] if packages else [])]
    roots = dict.fromkeys(Path(sysconfig.get_path(path)) for path in paths)
    return FileCorpus(tuple(file for root in roots for file in source_files(root)))


def source_files(root: Path) -> list[CorpusFile]:
    """The `.py` files under a directory, tests and packages below it left out, sorted by name."""
    names = []
    for directory, below, files in os.walk(root):
        below[:] = [name for name in below if name not in PASSED_OVER]
        paths = (Path(directory, name) for name in files if name.endswith(".py"))
        names += [p.relative_to(root.parent).as_posix() for p in paths if p.is_file()]
    return [CorpusFile(root.parent / name, name, PythonFile()) for name in sorted(names)]
