"""The files of conf/: groups, their choices, and what each of them sets."""

import re
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, cast

import yaml
from omegaconf import OmegaConf

from conf.text import read_text
from conf.validation import flatten_keys

CONF = Path(__file__).resolve().parent.parent / "conf"

CLUSTERS = "cluster"
"""The folder of conf/ that is no part of a run's configuration: `train/plan.py` reads it."""


def groups() -> list[str]:
    """The groups of files in conf/ that a command line can choose from: `model`, `size`, ..."""
    folders = (folder.name for folder in CONF.iterdir() if choices(folder.name))
    return sorted(name for name in folders if name != CLUSTERS)


def choices(group: str) -> list[str]:
    """The files of a group, without their ending."""
    folder = CONF / group
    try:
        changed = folder.stat().st_mtime_ns
    except OSError:
        return []  # there is no such group
    return list(_choices(folder, changed))


@lru_cache(maxsize=256)
def _choices(folder: Path, changed: int) -> list[str]:  # noqa: ARG001
    """The files of a folder, which is asked for hundreds of times in a command."""
    return sorted(file.stem for file in folder.glob("*.yaml"))


def default_choices() -> dict[str, str | None]:
    """The choice of each group, in the order in which the files are read: later ones win."""
    listing = yaml.safe_load((CONF / "config.yaml").read_text(encoding="utf-8"))["defaults"]
    pairs = [pair for entry in listing if isinstance(entry, dict) for pair in entry.items()]
    return {group: choice for group, choice in pairs if " " not in group}


def meaning_of(group: str, choice: str) -> str:
    """The first sentence of the comment with which a file begins."""
    comment = []
    for line in read_text(CONF / group / f"{choice}.yaml").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            comment.append(line.removeprefix("#").strip())
    return re.split(r"(?<=\.)\s", " ".join(comment))[0]


def settings_in(group: str, choice: str) -> dict[str, Any]:
    """What a file itself sets, by full names.

    >>> settings_in("model", "phd_cswa")
    {'model.variant': 'phd_cswa'}
    """
    text = read_text(CONF / group / f"{choice}.yaml")
    values = yaml.safe_load(text) or {}
    values.pop("defaults", None)
    path = "" if text.startswith("# @package _global_") else f"{group}."
    return flatten_keys(values, path)


class SizeRecipe(NamedTuple):
    """What a size sets besides the model.

    Attributes:
        name: the file of conf/recipe/ that the size chooses.
        settings: what this file and that of the size set, by full names.
    """

    name: str
    settings: dict[str, Any]


def recipe_of(size: str) -> SizeRecipe | None:
    """The recipe that a file of conf/size/ chooses; None if there is no such file or recipe."""
    if size not in choices("size"):
        return None
    own = load_yaml(f"size/{size}.yaml")
    names = [default.get("override /recipe") for default in own.pop("defaults", [])]
    name = next(filter(None, names), None)
    if name is None:
        return None
    both = {**flatten_keys(load_yaml(f"recipe/{name}.yaml")), **flatten_keys(own)}
    settings = {key: value for key, value in both.items() if not key.startswith("model.")}
    return SizeRecipe(name, settings)


def load_yaml(file: str) -> dict[str, Any]:
    """What a file of conf/ holds, its `defaults` included; numbers are read as Hydra reads them."""
    return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(CONF / file)))
