"""What two descriptions of the same data differ in."""

from collections.abc import Mapping
from typing import Any

from conf.errors import ConfigError, Problem, spelled


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """A sentence for each setting that has changed, by the setting.

    >>> changed_settings({"seed": 0, "data.lanes": 8}, {"seed": 0, "data.lanes": 4})
    {'data.lanes': 'data.lanes was 8 and is now 4'}
    """
    return {
        key: f"{key} was {before.get(key)!r} and is now {now.get(key)!r}"
        for key in dict.fromkeys([*before, *now])
        if before.get(key) != now.get(key)
    }


def check_fingerprint(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Make sure that cursors which were saved with one fingerprint are valid with another.

    Raises:
        ConfigError: they differ; each problem is a setting.
    """
    problems = [
        Problem(
            key,
            now.get(key),
            f"was {spelled(saved.get(key))} when this run began",
            "restore it, or start a new run with another run.name",
        )
        for key in changed_settings(saved, now)
    ]
    if problems:
        raise ConfigError(problems, "the data of a run that goes on")
