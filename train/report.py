"""What a run says when it ends."""

import os
import shlex
import shutil
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from conf.errors import DataError
from train.metrics.record import Metrics
from train.plan import kv_rows
from train.run import Run


def print_report(run: Run, metrics: Metrics, console: Console, *, complete: bool) -> None:
    """The held-out result, a sample, the price of the KV cache, and what to do next.

    A run is `complete` if the same command would not go on with it.
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
    try:
        newest = run.store.newest()
    except DataError as error:
        return str(error)
    return str(newest.path) if newest else "none could be saved"


def kv_table(run: Run) -> Table:
    """Bytes of one sequence in the KV cache, for this variant and its rivals."""
    context = run.config.hooks.kv.context
    table = Table(title=f"KV cache of one sequence of {context} tokens", title_justify="left")
    for column in ("variant", "bytes", "of hidden copies", "x vanilla"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for row in kv_rows(run.config.model, context, run.engine.dtype):
        table.add_row(row.name, f"{row.total:,}", f"{row.hidden:,}", f"{row.ratio:.3f}")
    return table


def next_commands(run: Run, *, complete: bool) -> list[str]:
    """Commands that go on from here, as they can be pasted into this shell."""
    generate = _command(
        "generate.py", f"run={run.directory}", f"prompt={run.config.hooks.sample.prompt}"
    )
    if not complete:
        return ["the same command again goes on with the training", generate]
    return [
        generate,
        _command("main.py", "model=vanilla", *_own_data()),
        _command("main.py", "-m", "+sweep=k", *_own_data()),
        _command("bench.py", "attention", "out=bench"),
    ]


def _own_data() -> list[str]:
    """What this command line says of the text, which another run should share to compare."""
    said = (argument for argument in sys.argv[1:] if "=" in argument)
    plain = (argument.lstrip("+") for argument in said)
    return [a for a in plain if a.lstrip("~").startswith(("data", "tokenizer", "size=", "train."))]


def _command(script: str, *arguments: str) -> str:
    """A command of this folder, by the interpreter that runs now."""
    python = shutil.which("python")
    same = python is not None and os.path.samefile(python, sys.executable)
    interpreter = "python" if same else os.path.relpath(sys.executable)
    return shlex.join([interpreter, os.path.relpath(Path(__file__).with_name(script)), *arguments])
