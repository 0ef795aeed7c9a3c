"""What the runs of a sweep have come to: a small table, and the command that reports on them."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

from rich.console import Console
from rich.table import Table

from conf.errors import DataError
from conf.wording import plural, short_count
from train.config import Config
from train.console import script_command
from train.experiments.result import FILE, Result, read_result

COLUMNS = ("run", "seeds", "tokens", "training FLOPs", "KV bytes", "bits per byte")


def print_comparison(configs: Sequence[Config]) -> None:
    """Print what a sweep's runs have come to, as far as they have a result."""
    directories = [config.run_dir for config in configs]
    results = [result for path in directories if (result := _result(path)) is not None]
    # In a file nothing is too wide.
    width = None if sys.stdout.isatty() else 200
    console = Console(soft_wrap=True, highlight=False, width=width)
    console.print()
    if any(result.heldout for result in results):
        console.print(comparison(results))
    if missing := len(configs) - len(results):
        console.print(f"{plural(missing, 'run')} of {len(configs)} without a result")
    if results:
        arguments = (f"runs={runs_argument(directories)}", "out=report")
        command = script_command("report.py", *arguments)
        console.print(f"\n[bold]next[/]\n  {command}")


def comparison(results: Sequence[Result]) -> Table:
    """A row for each group of runs that differ in nothing but their seed, in their order.

    Held-out bits per byte are the mean over the seeds and its spread, which is the standard
    deviation. So is the difference to the first vanilla group, or where there is none to the
    first group: that of runs with equal seeds.
    """
    groups: dict[str, list[Result]] = {}
    for result in results:
        if result.heldout:
            groups.setdefault(result.group, []).append(result)
    vanilla = [group for group in groups.values() if group[0].model == "vanilla"]
    base = (vanilla or list(groups.values()))[0]
    several = any(len(group) > 1 for group in groups.values())
    spread = "± is the standard deviation over seeds" if several else "one seed each"
    table = Table(title=f"held-out text, {spread}", title_justify="left")
    for column in (*COLUMNS, f"to {base[0].name}"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for group in groups.values():
        first = group[0]
        own = "" if group is base else _spelled(differences(group, base), sign="+")
        table.add_row(
            first.name,
            str(len(group)),
            short_count(first.tokens),
            f"{first.train_flops:.2e}",
            f"{first.kv_bytes:,}",
            _spelled([bits_per_byte(result) for result in group]),
            own,
        )
    return table


def bits_per_byte(result: Result) -> float:
    """Held-out bits per byte, the mean over the sources."""
    return fmean(heldout.bits_per_byte.value for heldout in result.heldout.values())


def differences(group: Sequence[Result], base: Sequence[Result]) -> list[float]:
    """How much more bits per byte runs take than those of another group with the same seeds."""
    theirs = {result.seed: bits_per_byte(result) for result in base}
    return [bits_per_byte(run) - theirs[run.seed] for run in group if run.seed in theirs]


def runs_argument(directories: Sequence[Path]) -> str:
    """The runs as `report.py` takes them: a pattern that fits no other run, or all of them."""
    parents = {path.parent for path in directories}
    if len(parents) == 1:
        [parent] = parents
        if {path.parent for path in parent.glob("*/config.yaml")} <= set(directories):
            return f"{parent}/*"
    return json.dumps([str(path) for path in directories])


def _spelled(values: Sequence[float], sign: str = "") -> str:
    """The mean of values, and their standard deviation if there are several.

    >>> _spelled([1.0, 2.0], sign="+"), _spelled([1.0]), _spelled([])
    ('+1.5000 ± 0.7071', '1.0000', '')
    """
    if not values:
        return ""
    mean = f"{fmean(values):{sign}.4f}"
    return f"{mean} ± {stdev(values):.4f}" if len(values) > 1 else mean


def _result(directory: Path) -> Result | None:
    """What a run has come to; None if it has no result that can be read."""
    try:
        return read_result(directory / FILE)
    except (OSError, DataError):
        return None
