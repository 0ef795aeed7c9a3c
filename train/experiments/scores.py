"""What `evaluate.py` has found, in `scores.json` of the run's directory.

It is a file of its own, so that the result of a run can be made anew without losing it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from conf.errors import DataError, reason_of
from conf.validation import as_dict
from data.storage.atomic import write_atomic
from train.experiments.result import Heldout, TaskScore
from train.experiments.task_scores import joined, named

FILE = "scores.json"


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The scores of a run's checkpoint.

    Attributes:
        step: optimizer steps of the checkpoint.
        heldout: by the name of the source or file.
        tasks: by the name of the task and its shots; see `train.experiments.task_scores`.
    """

    step: int
    heldout: Mapping[str, Heldout] = field(default_factory=dict)
    tasks: Mapping[str, TaskScore] = field(default_factory=dict)


def write_scores(directory: Path, new: Scores) -> None:
    """Add scores to those of the run's directory; those of another step are dropped.

    A score of a task stays where the new one is of fewer questions.

    Raises:
        OSError: they cannot be written.
    """
    before = read_scores(directory)
    if before is not None and before.step == new.step:
        new = replace(
            new,
            heldout={**before.heldout, **new.heldout},
            tasks=joined(new.tasks, before.tasks),
        )
    write_atomic(directory / FILE, json.dumps(as_dict(new), indent=1, allow_nan=False) + "\n")


def read_scores(directory: Path) -> Scores | None:
    """The scores of a run; None if it has none.

    Raises:
        DataError: the file is damaged.
    """
    path = directory / FILE
    try:
        found = _adapter().validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise DataError(
            f"{path}: is damaged ({reason_of(error)}); delete it and evaluate again"
        ) from None
    return replace(found, tasks=named(found.tasks))


@cache
def _adapter() -> TypeAdapter[Scores]:
    return TypeAdapter(Scores)
