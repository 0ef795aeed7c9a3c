"""In which settings the runs differ, and which all of them share."""

from train.experiments.document import Block, Fold, Section
from train.experiments.experiment import Experiment
from train.experiments.groups import START, spelled
from train.experiments.result import Result
from train.experiments.source import source_of
from train.experiments.tables import MISSING, Cell, Column, Table, text

UNSAID = ("run.name", "run.dir", "run.resume", "seed")
"""How the settings begin that every run has for itself."""


def settings(experiment: Experiment) -> Section | None:
    """A table of the settings that differ, and those that all runs share, folded away."""
    results = experiment.results
    if not results:
        return None
    keys = sorted({key for result in results for key in result.settings})
    keys = [key for key in keys if not key.startswith(UNSAID)]
    values = {key: [_value(result, key) for result in results] for key in keys}
    differing = [key for key in keys if len(set(values[key])) > 1]
    common = [key for key in keys if key not in differing]
    columns = [Column("run", "run", numeric=False), Column("seed", "seed")]
    columns += [Column(key, key, numeric=False) for key in differing]
    styles = {run.name: group.style for group in experiment.groups for run in group.runs}
    rows = tuple(
        (
            text(result.name, styles.get(result.name)),
            Cell(str(result.seed), result.seed),
            *(text(values[key][place]) for key in differing),
        )
        for place, result in enumerate(results)
    )
    source = source_of(results)
    blocks: list[Block] = [Table("settings", "Settings that differ", tuple(columns), rows, source)]
    names = (Column("setting", "setting", numeric=False), Column("value", "value", numeric=False))
    shared = tuple((text(key), text(values[key][0])) for key in common)
    table = Table("common-settings", "Settings of all runs", names, shared, source)
    blocks.append(Fold(f"{len(common)} settings that all runs share", table))
    blocks.append(Fold("What was typed, and with which versions", _origins(experiment)))
    return Section("settings", "How the runs were configured", tuple(blocks))


def _value(result: Result, key: str) -> str:
    """A setting of a run as it is typed; of the weights it began with, also which these were."""
    value = spelled(result.settings.get(key, MISSING))
    beginning = {START: result.began_with, "run.decay_of": result.trunk}.get(key)
    if beginning is None:
        return value
    told = []
    if (step := beginning.step) is not None:
        told.append(f"step {step:,}")
    if seal := beginning.manifest:
        told.append(f"seal {seal[:12]}")
    return f"{value} ({', '.join(told)})" if told else value


def _origins(experiment: Experiment) -> Table:
    heads = ("run", "command", "commit", "device", "versions")
    rows = tuple(
        (
            text(result.name),
            text(result.command),
            text(_commit(result.commit, result.changed)),
            text(f"{result.devices} x {result.device}"),
            text(", ".join(f"{name} {v}" for name, v in sorted(result.versions.items()) if v)),
        )
        for result in experiment.results
    )
    columns = tuple(Column(head, head, numeric=False) for head in heads)
    return Table(
        "origins", "Where the runs come from", columns, rows, source_of(experiment.results)
    )


def _commit(commit: str | None, changed: bool | None) -> str:
    if commit is None:
        return "not known"
    return commit[:12] + (" with changes" if changed else "")
