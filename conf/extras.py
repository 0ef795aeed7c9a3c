"""Optional packages: what some commands need and the default training does not.

pyproject.toml lists them as extras of this project, such as `phd-transformer[hf]`.
"""

import shlex
import sys
from importlib import metadata
from typing import Any

from conf.errors import UNSET, Problem


def pip_command(requirement: str) -> str:
    """The command that adds a package, or an extra, to the environment of this Python.

    An environment that uv made has no pip; the command is uv's then.

    Args:
        requirement: as pip takes it: `phd-transformer[hf]` or `s3fs`.
    """
    quoted = f'"{requirement}"' if "[" in requirement else requirement
    python = shlex.quote(sys.executable)
    try:
        metadata.version("pip")  # not `find_spec`, which a hook of setuptools answers with warnings
    except metadata.PackageNotFoundError:
        return f"uv pip install --python {python} {quoted}"
    return f"{python} -m pip install {quoted}"


def not_installed(
    package: str, requirement: str, setting: str, value: Any = UNSET
) -> list[Problem]:
    """A problem if a package is not installed; `[]` if it is.

    >>> not_installed("pydantic", "pydantic", "run")
    []

    Args:
        package: the name that pip knows.
        requirement: by which it is added, as `pip_command` takes it.
        setting: what needs it, with its value.
    """
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        reason = f"the package {package} is not installed"
        return [Problem(setting, value, reason, pip_command(requirement))]
    return []
