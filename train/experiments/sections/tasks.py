"""The accuracy in downstream tasks."""

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import NamedTuple

from train.experiments.document import Note, Section, missing
from train.experiments.experiment import Experiment
from train.experiments.groups import Group, source_of_groups
from train.experiments.result import Estimate, TaskScore
from train.experiments.tables import (
    MISSING,
    Cell,
    Column,
    Table,
    number,
    text,
    without_empty_columns,
)

NOT_EVALUATED = (
    "No run was evaluated on tasks. `python train/evaluate.py run=... tasks=paper` does it."
)

Score = Callable[[TaskScore], Estimate | None]


def tasks(experiment: Experiment) -> Section | None:
    """Tables of the accuracy, and of that by log-likelihoods divided by the answers' lengths."""
    if not experiment.groups:
        return None
    title = "Downstream tasks"
    groups = [group for group in experiment.groups if any(run.tasks for run in group.runs)]
    if not groups:
        return Section("tasks", title, (missing(NOT_EVALUATED),))
    plain = _table("tasks", "Accuracy", groups, lambda score: score.accuracy)
    norm = _table(
        "tasks-norm",
        "Accuracy by log-likelihood per length",
        groups,
        lambda score: score.accuracy_norm,
    )
    left = [group.label for group in experiment.groups if group not in groups]
    notes = (Note((f"Not evaluated: {', '.join(left)}.",)),) if left else ()
    return Section("tasks", title, (*filter(None, (plain, norm)), *notes))


def _table(name: str, title: str, groups: Sequence[Group], of: Score) -> Table | None:
    found = {
        _asked(task, score): score
        for group in groups
        for run in group.runs
        for task, score in run.tasks.items()
        if of(score)
    }
    if not found:
        return None
    tasks = [asked.task for asked in found]
    columns = [Column("group", "runs", numeric=False)]
    columns += [_column(asked, alone=tasks.count(asked.task) == 1) for asked in found]
    columns += [Column("average", "average", "%")] if len(found) > 1 else []
    rows = []
    for group in groups:
        values = {asked: _estimates(group, asked, of) for asked in found}
        row = [text(group.label, group.style), *(_cell(estimates) for estimates in values.values())]
        if len(found) > 1:
            whole = all(values.values())
            means = [fmean(e.value for e in estimates) for estimates in values.values() if whole]
            row.append(number(100 * fmean(means) if whole else None, "{:.1f}"))
        rows.append(tuple(row))
    chances = {x.task: score.chance for x, score in found.items() if score.chance is not None}
    note = "Means over the seeds; ± is the standard error over the questions."
    if chances:
        guessed = ", ".join(f"{task} {100 * chance:.1f}" for task, chance in chances.items())
        note += f" Guessing gives: {guessed}."
    source = source_of_groups(groups)
    table = Table(name, f"{title} (%)", tuple(columns), tuple(rows), source, note)
    return without_empty_columns(table)


class Asked(NamedTuple):
    """A task as it was asked: accuracies of other questions or shots are no comparison."""

    task: str
    questions: int
    shots: int


def _asked(task: str, score: TaskScore) -> Asked:
    return Asked(task, score.questions, score.shots)


def _column(asked: Asked, *, alone: bool) -> Column:
    """The column of a task, whose key tells also how it was asked where that is not all alike."""
    task, questions, shots = asked
    key = task if alone else f"{task}_{questions}_questions_{shots}_shots"
    return Column(key, task, f"{questions:,} questions, {shots} shots")


def _estimates(group: Group, asked: Asked, of: Score) -> list[Estimate]:
    found = [run.tasks[asked.task] for run in group.runs if asked.task in run.tasks]
    scores = [of(score) for score in found if _asked(asked.task, score) == asked]
    return [estimate for estimate in scores if estimate is not None]


def _cell(estimates: Sequence[Estimate]) -> Cell:
    """The mean over seeds. All seeds are asked the same questions: that error does not fall."""
    if not estimates:
        return Cell(MISSING, None)
    value = 100 * fmean(estimate.value for estimate in estimates)
    errors = [e.standard_error for e in estimates if e.standard_error is not None]
    error = f" ± {100 * fmean(errors):.1f}" if errors else ""
    return Cell(f"{value:.1f}{error}", value)
