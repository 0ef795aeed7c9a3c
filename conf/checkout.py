"""The checkout that the running code lies in, and its place on the path of imports.

An environment may hold this project already, often as an editable install of another checkout. A
command of a checkout must not run with the modules of another one: the first lines of each command
put its own checkout first on `sys.path`, and `claim` does the rest, before anything is run.
"""

import os
import sys
from pathlib import Path

from conf.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
SIGNS = ("pyproject.toml", "conf/config.yaml", "launch/__main__.py", "train/main.py")
"""Files that every checkout has."""


def checkout_of(path: Path) -> Path | None:
    """The checkout that a file or directory lies in; None if it lies in none."""
    for folder in (path.resolve(), *path.resolve().parents):
        if all((folder / sign).is_file() for sign in SIGNS):
            return folder
    return None


def claim() -> None:
    """Has every Python process that this one starts import this checkout's modules, too.

    The folder of the command's script leaves `sys.path`, where Python has put it: a module in it
    would hide a package of its name, as train/evaluate.py would that of Hugging Face.

    Raises:
        ConfigError: the command lies in another checkout than the modules that it has got, and
            `PYTHONPATH` does not say that this is meant; or there is no current directory.
    """
    try:
        os.getcwd()  # a command that was called in a deleted directory fails at any of its paths
    except FileNotFoundError as error:
        gone = "the current directory was deleted; change to one that exists"
        raise ConfigError([gone], "the environment") from error
    given = os.environ.get("PYTHONPATH", "")
    place = _place_of_command()
    other = checkout_of(place) if place else None
    if other and other != ROOT and str(ROOT) not in given.split(os.pathsep):
        raise ConfigError([_two_checkouts(place, other)], "the environment")
    sys.path[:] = [entry for entry in sys.path if not _is_train(entry)]
    if checkout_of(ROOT):
        os.environ["PYTHONPATH"] = lead(ROOT, given)


def lead(root: Path, given: str) -> str:
    """A `PYTHONPATH` that begins with `root`.

    >>> lead(Path("/b"), "/a:/b"), lead(Path("/b"), "")
    ('/b:/a', '/b')
    """
    others = [path for path in given.split(os.pathsep) if path and path != str(root)]
    return os.pathsep.join([str(root), *others])


def _is_train(entry: str) -> bool:
    """Whether an entry of `sys.path` is the folder in which the commands lie."""
    return entry != "" and Path(entry).resolve() == ROOT / "train"


def _place_of_command() -> Path | None:
    """The script that Python runs; for `python -m launch`, which names no file, the current
    directory; None in an interactive session, and for a tool of the environment."""
    command = sys.modules["__main__"]
    if command.__spec__ is not None:
        return Path.cwd()
    file = getattr(command, "__file__", None)
    # `make install` puts the environment into a checkout.
    return Path(file) if file and not Path(file).is_relative_to(sys.prefix) else None


def _two_checkouts(path: Path | None, other: Path) -> str:
    return (
        f"{path} lies in the checkout {other}, but Python has found the modules of {ROOT}; "
        f"PYTHONPATH={other} takes those of the former, PYTHONPATH={ROOT} those of the latter"
    )
