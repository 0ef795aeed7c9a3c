"""The accuracy in downstream tasks."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean
from typing import NamedTuple

from conf.wording import plural
from train.experiments.document import Note, Section, missing
from train.experiments.experiment import Experiment
from train.experiments.groups import Group, source_of_groups
from train.experiments.result import Estimate, TaskScore
from train.experiments.source import seeds_in_words
from train.experiments.tables import (
    MISSING,
    Cell,
    Column,
    Table,
    number,
    text,
    without_empty_columns,
)
from train.experiments.task_scores import task_of

NOT_EVALUATED = (
    "No run was evaluated on tasks. `python train/evaluate.py run=... tasks=paper` does it."
)

SEEDS = "Where groups have scores of different seeds, means are of {seeds}, which all of them have."
NO_SEEDS = "Groups have scores of different seeds and none in common, so that they tell little."

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
    found: dict[Asked, TaskScore] = {}
    for name_of_score, score in (x for g in groups for run in g.runs for x in run.tasks.items()):
        asked = _asked(name_of_score, score)
        if of(score) and (asked not in found or found[asked].all_questions is None):
            found[asked] = score
    if not found:
        return None
    tasks = [asked.task for asked in found]
    averages = _averages(tuple(found))
    shared = {asked: _seeds(groups, asked, of) for asked in found}
    columns = [Column("group", "runs", numeric=False)]
    columns += [_column(x, score, alone=tasks.count(x.task) == 1) for x, score in found.items()]
    columns += [Column(_key(words), "average", words or "%") for words in averages]
    rows = []
    for group in groups:
        values = {asked: _estimates(group, asked, of, shared[asked]) for asked in found}
        row = [text(group.label, group.style), *(_cell(estimates) for estimates in values.values())]
        row += [_average([values[asked] for asked in each]) for each in averages.values()]
        rows.append(tuple(row))
    chances = {x.task: score.chance for x, score in found.items() if score.chance is not None}
    note = "Means over the seeds; ± is the standard error over the questions."
    if chances:
        guessed = ", ".join(f"{task} {100 * chance:.1f}" for task, chance in chances.items())
        note += f" Guessing gives: {guessed}."
    if any(asked.questions < (score.all_questions or 0) for asked, score in found.items()):
        note += " Where not all questions of a task were asked, it is always the same part of them."
    for seeds in sorted({seeds for seeds in shared.values() if seeds is not None}):
        note += f" {SEEDS.format(seeds=seeds_in_words(seeds)) if seeds else NO_SEEDS}"
    source = source_of_groups(groups)
    table = Table(name, f"{title} (%)", tuple(columns), tuple(rows), source, note)
    return without_empty_columns(table)


class Asked(NamedTuple):
    """A task as it was asked: accuracies of other questions or shots are no comparison."""

    task: str
    questions: int
    shots: int


def _asked(name: str, score: TaskScore) -> Asked:
    return Asked(task_of(name, score), score.questions, score.shots)


def _column(asked: Asked, score: TaskScore, *, alone: bool) -> Column:
    """The column of a task, whose key tells also how it was asked where that is not all alike."""
    task, questions, shots = asked
    key = task if alone else f"{task}_{questions}_questions_{shots}_shots"
    of = f"{questions:,}"
    if questions < (score.all_questions or 0):
        of += f" of {score.all_questions:,}"
    return Column(key, task, f"{of} questions, {plural(shots, 'shot')}")


def _averages(columns: Sequence[Asked]) -> dict[str, list[Asked]]:
    """The columns of each average, by its words: of all, or of each number of examples.

    There is none over columns of which two are of one task, which would count twice.

    >>> one, two, both = Asked("a", 9, 0), Asked("a", 9, 5), Asked("b", 9, 5)
    >>> [len(each) for each in _averages([one, both]).values()]
    [2]
    >>> {words: len(each) for words, each in _averages([one, two, both]).items()}
    {'5 shots': 2}
    >>> _averages([two, both, Asked("b", 7, 5)])
    {}
    """
    ways = Counter(asked.task for asked in columns)
    found = {"": list(columns)}
    if len({asked.shots for asked in columns if ways[asked.task] > 1}) > 1:
        numbers = sorted({asked.shots for asked in columns})
        found = {plural(n, "shot"): [x for x in columns if x.shots == n] for n in numbers}
    once = {words: each for words, each in found.items() if _differ(asked.task for asked in each)}
    return {words: each for words, each in once.items() if len(each) > 1}


def _differ(tasks: Iterable[str]) -> bool:
    return max(Counter(tasks).values()) == 1


def _key(words: str) -> str:
    return "_".join(["average", *words.split()])


def _average(values: Sequence[Sequence[Estimate]]) -> Cell:
    """The mean over tasks; a dash where one is missing."""
    means = [fmean(e.value for e in estimates) for estimates in values if estimates]
    whole = len(means) == len(values)
    return number(100 * fmean(means) if whole else None, "{:.1f}")


def _seeds(groups: Sequence[Group], asked: Asked, of: Score) -> tuple[int, ...] | None:
    """The seeds that all groups have which were asked a task so; None if all have the same.

    A seed may be easier than another by more than groups differ.
    """
    own = [{seed for seed, _ in _scores(group, asked, of)} for group in groups]
    own = [seeds for seeds in own if seeds]
    shared = set.intersection(*own)
    return None if all(seeds == shared for seeds in own) else tuple(sorted(shared))


def _estimates(
    group: Group, asked: Asked, of: Score, seeds: tuple[int, ...] | None
) -> list[Estimate]:
    """The scores of the runs of a group; of some seeds alone, if any are given."""
    return [found for seed, found in _scores(group, asked, of) if not seeds or seed in seeds]


def _scores(group: Group, asked: Asked, of: Score) -> list[tuple[int, Estimate]]:
    """The seed and score of each run of a group that was asked a task so."""
    return [
        (run.seed, estimate)
        for run in group.runs
        for name, score in run.tasks.items()
        if _asked(name, score) == asked and (estimate := of(score)) is not None
    ]


def _cell(estimates: Sequence[Estimate]) -> Cell:
    """The mean over seeds. All seeds are asked the same questions: that error does not fall."""
    if not estimates:
        return Cell(MISSING, None)
    value = 100 * fmean(estimate.value for estimate in estimates)
    errors = [e.standard_error for e in estimates if e.standard_error is not None]
    error = f" ± {100 * fmean(errors):.1f}" if errors else ""
    return Cell(f"{value:.1f}{error}", value)
