"""The end of each group of runs, and its difference to vanilla."""

from statistics import fmean

from train.experiments.comparison import FinalRow, final_table, notes_at_end
from train.experiments.document import Section
from train.experiments.experiment import Experiment
from train.experiments.groups import source_of_groups
from train.experiments.source import seeds_in_words
from train.experiments.tables import (
    MISSING,
    Cell,
    Column,
    Table,
    difference,
    number,
    text,
    without_empty_columns,
)


def final(experiment: Experiment) -> Section | None:
    """The table of all groups at their ends."""
    if not experiment.groups:
        return None
    rows = final_table(experiment)
    return Section("final", "The end of the runs", (_table(experiment, rows),))


def _table(experiment: Experiment, rows: list[FinalRow]) -> Table:
    unit = experiment.measure.unit
    shared = experiment.at_shared_seeds()
    seeds = seeds_in_words(shared.seeds) if shared.note and shared.seeds else ""
    columns = (
        Column("group", "runs", numeric=False),
        Column("seeds", "seeds"),
        Column("tokens", "tokens"),
        *((Column("mean_of_shared_seeds", "mean", seeds),) if seeds else ()),
        Column("mean", "mean", f"{unit}, all seeds" if seeds else unit),
        Column("deviation", "± seeds"),
        Column("text_error", "± text"),
        Column("difference", "difference"),
        Column("low", "interval", "from"),
        Column("high", "interval", "to"),
        Column("base", "compared with", numeric=False),
        Column("loss_ema", "training", "loss, smoothed"),
    )
    note = (
        f"The {experiment.measure.words} of the last step. ± seeds is the standard deviation over "
        "the seeds, ± text the standard error over the held-out documents, which are the same for "
        "all runs. Below 0 a group is better than vanilla; the interval is one of 95 %. Where "
        "there are equal seeds, which saw the same text in the same order, a difference is theirs."
    )
    note = " ".join([note, *notes_at_end(experiment)])
    cells = tuple(_row(row, at_shared_seeds=bool(seeds)) for row in rows)
    source = source_of_groups(experiment.groups)
    title = f"The {experiment.measure.words} at the end of the runs"
    return without_empty_columns(Table("final", title, columns, cells, source, note))


def _row(row: FinalRow, *, at_shared_seeds: bool) -> tuple[Cell, ...]:
    runs, value, found = row.group.runs, row.value, row.difference
    at_shared = row.at_shared.mean if row.at_shared else None
    losses = [run.loss_ema for run in runs if run.loss_ema is not None]
    return (
        text(row.group.label, row.group.style),
        Cell("one seed" if len(runs) == 1 else str(len(runs)), len(runs)),
        Cell(row.group.length, fmean(run.tokens for run in runs)),
        *((number(at_shared, "{:.4f}"),) if at_shared_seeds else ()),
        number(value.mean if value else None, "{:.4f}"),
        number(value.deviation if value else None, "{:.4f}"),
        number(row.text_error, "{:.3f}"),
        difference(found.mean if found else None),
        difference(found.low if found else None),
        difference(found.high if found else None),
        text(row.base.label) if row.base else Cell(MISSING, None),
        number(sum(losses) / len(losses) if losses else None, "{:.3f}"),
    )
