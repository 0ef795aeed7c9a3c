"""The accuracy in downstream tasks."""

from collections.abc import Callable, Sequence
from statistics import fmean

from train.experiments.document import Note, Section, missing
from train.experiments.experiment import Experiment
from train.experiments.groups import Group, source_of_groups
from train.experiments.result import Estimate, TaskScore
from train.experiments.tables import MISSING, Cell, Column, Table, number, text

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
        task: s for group in groups for run in group.runs for task, s in run.tasks.items() if of(s)
    }
    if not found:
        return None
    columns = [Column("group", "runs", numeric=False)]
    columns += [Column(task, task, _asked(score)) for task, score in found.items()]
    columns += [Column("average", "average", "%")] if len(found) > 1 else []
    rows = []
    for group in groups:
        values = {task: _estimates(group, task, of) for task in found}
        row = [text(group.label, group.style), *(_cell(estimates) for estimates in values.values())]
        if len(found) > 1:
            whole = all(values.values())
            means = [fmean(e.value for e in estimates) for estimates in values.values() if whole]
            row.append(number(100 * fmean(means) if whole else None, "{:.1f}"))
        rows.append(tuple(row))
    chances = {task: score.chance for task, score in found.items() if score.chance is not None}
    note = "Means over the seeds; ± is the standard error over the questions."
    if chances:
        guessed = ", ".join(f"{task} {100 * chance:.1f}" for task, chance in chances.items())
        note += f" Guessing gives: {guessed}."
    return Table(name, f"{title} (%)", tuple(columns), tuple(rows), source_of_groups(groups), note)


def _asked(score: TaskScore) -> str:
    return f"{score.questions:,} questions, {score.shots} shots"


def _estimates(group: Group, task: str, of: Score) -> list[Estimate]:
    scores = [of(run.tasks[task]) for run in group.runs if task in run.tasks]
    return [estimate for estimate in scores if estimate is not None]


def _cell(estimates: Sequence[Estimate]) -> Cell:
    """The mean over seeds. All seeds are asked the same questions: that error does not fall."""
    if not estimates:
        return Cell(MISSING, None)
    value = 100 * fmean(estimate.value for estimate in estimates)
    errors = [e.standard_error for e in estimates if e.standard_error is not None]
    error = f" ± {100 * fmean(errors):.1f}" if errors else ""
    return Cell(f"{value:.1f}{error}", value)
