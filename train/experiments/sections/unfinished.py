"""The runs that are not in the comparisons, and why."""

from collections.abc import Sequence
from dataclasses import replace

from conf.wording import plural, short_count
from train.experiments.document import Note, Section, missing
from train.experiments.experiment import Experiment
from train.experiments.groups import twice
from train.experiments.result import Result, Unread
from train.experiments.source import source_of
from train.experiments.tables import Cell, Column, Table, number, text

COLUMNS = (
    Column("run", "run", numeric=False),
    Column("status", "what became of it", numeric=False),
    Column("reason", "why", numeric=False),
    Column("model", "variant", numeric=False),
    Column("seed", "seed"),
    Column("steps", "steps"),
    Column("tokens", "tokens"),
    Column("loss", "last loss", "nats per token"),
)


def unfinished(experiment: Experiment) -> Section | None:
    """The runs that failed, are unfinished, diverged, given twice or unreadable; and trunks.

    There is a sentence if all is well.
    """
    if not experiment.results:
        return None
    blocks = (_left(experiment), _unread(experiment.unread))
    title = "Failed, unfinished and diverged runs"
    return Section("unfinished", title, tuple(block for block in blocks if block))


def _left(experiment: Experiment) -> Note | Table:
    """The runs that have a result, and are in no comparison."""
    results = experiment.results
    left = [result for result in results if result.status != "finished"]
    doubles = [
        replace(result, reason=f"the seed and settings are those of {taken.name}, which counts")
        for result, taken in twice(results)
    ]
    left += doubles
    reason = "a trunk at its peak learning rate: what counts are its decays, runs of their own"
    trunks = [replace(r, reason=reason) for r in results if r.is_trunk and r.status == "finished"]
    left += trunks
    if not left:
        words = (
            "There is none: the only run has"
            if len(results) == 1
            else f"There are none: all {len(results)} runs have"
        )
        return Note((f"{words} finished.",))
    rows = tuple(
        (
            text(result.name),
            text(_status(result, doubles, trunks)),
            text(result.reason or ""),
            text(result.model),
            Cell(str(result.seed), result.seed),
            number(result.steps, "{:,}"),
            Cell(short_count(result.tokens), result.tokens),
            number(result.loss, "{:.3f}"),
        )
        for result in sorted(left, key=lambda result: (result.status, result.name))
    )
    note = "They are in no other figure or table of this page, but for their settings."
    head = f"{plural(len(left), 'run')} of {len(results)}"
    return Table("unfinished", head, COLUMNS, rows, source_of(left), note)


def _status(result: Result, doubles: Sequence[Result], trunks: Sequence[Result]) -> str:
    if any(result is one for one in doubles):
        return "given twice"
    return "trunk" if any(result is one for one in trunks) else result.status


def _unread(runs: Sequence[Unread]) -> Note | None:
    """The runs that cannot be read, with the reasons; None if there is none."""
    if not runs:
        return None
    taken = "; the rest of this page has what it had written as its result"
    lines = tuple(f"{name}: {reason}{taken if kept else ''}" for name, reason, kept in runs)
    return missing(f"{plural(len(runs), 'run')} cannot be read:", bullets=lines)
