"""What two descriptions of the same data differ in."""

from collections.abc import Mapping
from typing import Any


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """A sentence for each setting that has changed, by the setting.

    >>> changes({"seed": 0, "data.lanes": 8}, {"seed": 0, "data.lanes": 4})
    {'data.lanes': 'data.lanes was 8 and is now 4'}
    """
    return {
        key: f"{key} was {before.get(key)!r} and is now {now.get(key)!r}"
        for key in dict.fromkeys([*before, *now])
        if before.get(key) != now.get(key)
    }


def check_fingerprint(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Makes sure that cursors which were saved with one fingerprint are valid with another.

    Raises:
        ValueError: they differ; it says in what.
    """
    if changed := changes(saved, now):
        raise ValueError(
            f"this run cannot go on with other data: {'; '.join(changed.values())}. Restore what "
            "changed, or start a new run with another run.name"
        )
