"""The runs that are not in the comparisons, and why."""

from dataclasses import replace

from conf.wording import plural, short_count
from train.experiments.document import Note, Section
from train.experiments.experiment import Experiment
from train.experiments.groups import twice
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
    """The failed, unfinished and diverged runs and those given twice; a sentence if all is well."""
    results = experiment.results
    if not results:
        return None
    title = "Failed, unfinished and diverged runs"
    left = [result for result in results if result.status != "finished"]
    doubles = [
        replace(result, reason=f"the seed and settings are those of {taken.name}, which counts")
        for result, taken in twice(results)
    ]
    left += doubles
    if not left:
        words = (
            "There is none: the only run has"
            if len(results) == 1
            else f"There are none: all {len(results)} runs have"
        )
        return Section("unfinished", title, (Note((f"{words} finished.",)),))
    rows = tuple(
        (
            text(result.name),
            text("given twice" if result in doubles else result.status),
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
    return Section(
        "unfinished", title, (Table("unfinished", head, COLUMNS, rows, source_of(left), note),)
    )
