"""The report that a run prints at its end."""

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from conf.errors import ConfigError, DataError
from conf.redaction import redacted_argument
from train.compose import check, overrides_of_another_model, own_overrides
from train.metrics.record import Metrics
from train.plan import kv_rows
from train.run import Run

OF_PHD = (
    *("variant", "K", "window", "chunk", "span_unit"),
    *("copy_positions", "copy_embedding"),
)
"""The model's settings that a vanilla model does not have."""


def print_report(run: Run, metrics: Metrics, console: Console, *, complete: bool) -> None:
    """Print the held-out loss, a sample, the size of the KV cache, and commands to run next.

    Args:
        run: the run that has ended.
        metrics: of its last step.
        console: to print on.
        complete: whether the run has reached its last step. If not, the same command resumes it.
    """
    for key, value in metrics.items():
        if key.startswith("eval/") and key.endswith("/loss"):
            name = key.removesuffix("/loss")
            bits = metrics[f"{name}/bits_per_byte"]
            console.print(
                f"\n[bold]{name.removeprefix('eval/')}[/]: {bits:.3f} bits per byte, "
                f"loss {value:.3f} nats per token"
            )
    if text := metrics.get("sample/text"):
        console.print("\n[bold]a sample[/]")
        console.print(str(text), markup=False)
    console.print()
    console.print(kv_table(run))
    console.print(f"checkpoint: {_checkpoint(run)}", markup=False)
    console.print(f"metrics:    {run.directory / 'metrics.jsonl'}")
    console.print("\n[bold]next[/]")
    for command in next_commands(run, complete=complete):
        console.print(f"  {command}", markup=False)


def _checkpoint(run: Run) -> str:
    # Read from the disk: what counts is what a resume would find.
    try:
        newest = run.store.newest()
    except DataError as error:
        return str(error)
    return str(newest.path) if newest else "none could be saved"


def kv_table(run: Run) -> Table:
    """A table of the KV bytes of one sequence, for this variant, vanilla and naive repetition."""
    context = run.config.hooks.kv.context
    table = Table(title=f"KV cache of one sequence of {context} tokens", title_justify="left")
    for column in ("variant", "bytes", "of hidden copies", "x vanilla"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for row in kv_rows(run.config.model, context, run.engine.dtype):
        table.add_row(row.name, f"{row.total:,}", f"{row.hidden:,}", f"{row.ratio:.3f}")
    return table


def next_commands(run: Run, *, complete: bool) -> list[str]:
    """Commands to run next, quoted so that they can be pasted into a shell."""
    generate = _command("generate.py", f"run={run.directory}", f"prompt={run.sample.prompt}")
    if not complete:
        return ["run the same command again to continue the training", generate]
    return [
        generate,
        *(
            _command("main.py", *map(redacted_argument, arguments))
            for arguments in other_runs(run, own_overrides())
        ),
        _command("bench.py", "attention", "out=bench"),
    ]


def other_runs(run: Run, overrides: Sequence[str]) -> list[list[str]]:
    """The arguments of runs to compare this one with: its own, with another model.

    Args:
        run: that has ended.
        overrides: its own; see `train.compose.own_overrides`.
    """
    other = "phd_cswa" if run.config.model.variant == "vanilla" else "vanilla"
    candidates = [
        [[f"model={other}", *overrides_of_another_model(overrides, OF_PHD, other)]],
        # W and C stay, unless the vanilla run of the sweep refuses them.
        [
            ["-m", "+sweep=k", *overrides_of_another_model(overrides, changed)]
            for changed in (("variant", "K"), OF_PHD)
        ],
    ]
    possible = (filter(_is_possible, versions) for versions in candidates)
    return [found for found in (next(versions, None) for versions in possible) if found]


def _is_possible(arguments: Sequence[str]) -> bool:
    """Whether these arguments of main.py are accepted."""
    try:
        check([text for text in arguments if text != "-m"], multirun="-m" in arguments)
    except ConfigError:
        return False
    return True


def _command(script: str, *arguments: str) -> str:
    """The shell command that runs a script of this folder with this interpreter."""
    # `python` where that is this interpreter; otherwise the path, as in a virtual environment that
    # is not activated.
    python = shutil.which("python")
    same = python is not None and os.path.samefile(python, sys.executable)
    interpreter = "python" if same else os.path.relpath(sys.executable)
    return shlex.join([interpreter, os.path.relpath(Path(__file__).with_name(script)), *arguments])
