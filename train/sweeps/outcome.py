"""What became of one run of a sweep, also as a file, for runs in processes of their own."""

import json
from pathlib import Path
from typing import NamedTuple

from data.storage.atomic import write_atomic


class Outcome(NamedTuple):
    """How a run has ended.

    Attributes:
        name: of the run.
        code: its exit code.
        reason: why it failed, in one line.
        ended: it was told to end, by a signal or by its time; that is no failure.
    """

    name: str
    code: int
    reason: str
    ended: bool = False


def write_outcome(folder: Path, outcome: Outcome) -> None:
    """Write it into a folder, for `read_outcomes`."""
    write_atomic(folder / f"{outcome.name}.json", json.dumps(outcome))


def has_outcome(folder: Path, name: str) -> bool:
    """Whether a run's outcome is in a folder."""
    return (folder / f"{name}.json").exists()


def read_outcomes(folder: Path) -> list[Outcome]:
    """All outcomes in a folder, by the names of the runs."""
    return [Outcome(*json.loads(path.read_bytes())) for path in sorted(folder.glob("*.json"))]
