"""Scores in downstream tasks: by which names they are kept and logged, and which of several counts.

eval/<name>/acc, acc_stderr              the right choice has the greatest log-likelihood
eval/<name>/acc_norm, acc_norm_stderr    the same of log-likelihoods by length
eval/<name>/shots, questions, ...        how it was asked
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from train.experiments.result import EVAL, Estimate, TaskScore

ACCURACY, NORM, ERROR = "acc", "acc_norm", "_stderr"
ASKED = ("shots", "questions", "all_questions", "chance")


def score_name(task: str, shots: int) -> str:
    """The name of a task's score, unlike that of the same task with other examples.

    >>> score_name("olmo_piqa", 0), score_name("olmo_piqa", 5)
    ('olmo_piqa', 'olmo_piqa_5shot')
    """
    return f"{task}_{shots}shot" if shots else task


def task_of(name: str, score: TaskScore) -> str:
    """The task of a score by its name, which earlier versions gave to all its scores."""
    return name.removesuffix(score_name("", score.shots)) if score.shots else name


def named(scores: Mapping[str, TaskScore]) -> dict[str, TaskScore]:
    """Scores by their names, where they may have those of earlier versions."""
    return {score_name(task_of(n, score), score.shots): score for n, score in scores.items()}


def joined(first: Mapping[str, TaskScore], other: Mapping[str, TaskScore]) -> dict[str, TaskScore]:
    """Of each name the score of more questions; of as many, the first one."""
    found = dict(first)
    for name, score in other.items():
        if name not in found or score.questions > found[name].questions:
            found[name] = score
    return found


def asked_of(score: TaskScore) -> dict[str, float]:
    """How a task was asked, by the last parts of the names of metrics."""
    values = asdict(score)
    return {name: values[name] for name in ASKED if values[name] is not None}


def scores_in(line: Mapping[str, Any]) -> dict[str, TaskScore]:
    """The scores that a line of `metrics.jsonl` tells.

    Those of earlier versions, which did not log how the task was asked, are none.
    """
    found = {}
    for key, value in line.items():
        name = key.removeprefix(EVAL).removesuffix(f"/{ACCURACY}")
        if key != f"{EVAL}{name}/{ACCURACY}" or value is None:
            continue
        asked: dict[str, Any] = {what: line.get(f"{EVAL}{name}/{what}") for what in ASKED}
        if asked["shots"] is None or asked["questions"] is None:
            continue
        accuracy, norm = (_estimate(line, f"{EVAL}{name}/{what}") for what in (ACCURACY, NORM))
        assert accuracy
        found[name] = TaskScore(accuracy=accuracy, accuracy_norm=norm, **asked)
    return found


def _estimate(line: Mapping[str, Any], key: str) -> Estimate | None:
    value = line.get(key)
    return None if value is None else Estimate(value=value, standard_error=line.get(key + ERROR))
