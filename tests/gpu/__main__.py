"""`python -m tests.gpu`, which `make gpu` runs; see tests/gpu/command.py."""

import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[2]


def missing() -> list[str]:
    """The packages without which nothing of this runs, and which this Python lacks."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = [*project["dependencies"], "pytest", "pytest-xdist", "hypothesis"]
    installed = {_plain(str(found.name)) for found in metadata.distributions()}
    names = [re.split(r"[^\w.-]", text)[0] for text in needed]
    return [name for name in names if _plain(name) not in installed]


def _plain(name: str) -> str:
    return re.sub("[-_.]+", "-", name).lower()


if __name__ == "__main__":
    if lacks := missing():  # before the imports that need them
        sys.exit(
            f"{sys.executable} lacks {', '.join(lacks)}: install them, or bring their wheels: "
            "make gpu WHEELS=<folder>"
        )
    from conf import arguments
    from tests.gpu.command import GpuArguments, main

    arguments.run(GpuArguments, main)
