"""What the runs of a sweep have come to: a small table, and the command that reports on them."""

import json
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from conf.errors import DataError
from conf.extras import pip_command
from conf.wording import plural
from train.config import Config
from train.console import script_command
from train.experiments.result import FILE, Result, read_result
from train.start.trunk import decays_of

if TYPE_CHECKING:
    from train.experiments.comparison import Difference
    from train.experiments.spread import Spread

COLUMNS = ("", "seeds", "tokens", "training FLOPs", "KV bytes")


def print_comparison(configs: Sequence[Config]) -> None:
    """Print what runs have come to, as far as they have a result; of trunks, their decays."""
    configs = [run for config in configs for run in decays_of(config) or [config]]
    directories = [config.run_dir for config in configs]
    results = [result for path in directories if (result := _result(path)) is not None]
    finished = sum(result.status == "finished" for result in results)
    # In a file nothing is too wide.
    width = None if sys.stdout.isatty() else 200
    console = Console(soft_wrap=True, highlight=False, width=width)
    console.print()
    if finished < len(configs):
        console.print(f"{plural(len(configs) - finished, 'run')} of {len(configs)} not finished")
    if finished and find_spec("scipy") is None:
        extra = pip_command("phd-transformer[report]")
        console.print(f"a comparison needs scipy: {extra}", markup=False)
    elif finished:
        console.print(comparison(results))
    if results:
        arguments = (f"runs={runs_argument(directories)}", "out=report")
        command = script_command("report.py", *arguments)
        console.print("\n[bold]next[/]")
        console.print(f"  {command}", markup=False)


def comparison(results: Sequence[Result]) -> Table:
    """The end of each group of runs that differ in nothing but their seed, as the report has it.

    Where groups have different seeds, the values are means over those that all of them have.
    """
    from train.experiments.comparison import final_table, notes_at_end  # needs scipy
    from train.experiments.experiment import experiment_of
    from train.experiments.source import seeds_in_words

    experiment = experiment_of(results)
    rows, shared = final_table(experiment), experiment.at_shared_seeds()
    bases = {row.base.key: row.base.label for row in rows if row.base is not None}
    to = f"to {next(iter(bases.values()))}" if len(bases) == 1 else "to vanilla of its size"
    title = f"{experiment.measure.words} ({experiment.measure.unit})"
    table = Table(
        title=f"{title}, and 95 % intervals over seeds",
        title_justify="left",
        caption=escape(" ".join(notes_at_end(experiment))) or None,
        caption_justify="left",
    )
    of = f", {seeds_in_words(shared.seeds)}" if shared.note and shared.seeds else ""
    for column in (*COLUMNS, f"{experiment.measure.unit}{of}", to):
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        first = row.group.runs[0]
        table.add_row(
            escape(row.group.label),
            str(len(row.group.runs)),
            row.group.length,
            f"{first.train_flops:.3g}",
            f"{first.kv_bytes:,}",
            spelled(row.at_shared),
            spelled(row.difference, sign="+") + other_seeds(row.difference),
        )
    return table


def other_seeds(difference: "Difference | None") -> str:
    """A remark where a difference is between runs of other seeds, some of which are easier."""
    return " (other seeds)" if difference is not None and not difference.paired else ""


def spelled(value: "Spread | Difference | None", sign: str = "") -> str:
    """A mean, with half of its interval if there are several seeds; empty if there is no value."""
    if value is None:
        return ""
    mean = f"{value.mean:{sign}.4f}"
    if value.low is None or value.high is None:
        return mean
    return f"{mean} ± {(value.high - value.low) / 2:.4f}"


def runs_argument(directories: Sequence[Path]) -> str:
    """The runs as `report.py` takes them: a pattern that fits no other run, or all of them."""
    parents = {path.parent for path in directories}
    if len(parents) == 1:
        [parent] = parents
        if {path.parent for path in parent.glob("*/config.yaml")} <= set(directories):
            return f"{parent}/*"
    return json.dumps([str(path) for path in directories])


def _result(directory: Path) -> Result | None:
    """What a run has come to; None if it has no result that can be read."""
    try:
        return read_result(directory / FILE)
    except (OSError, DataError):
        return None
