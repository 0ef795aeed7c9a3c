"""What a run prints at its end."""

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

from conf.errors import DataError
from conf.redaction import redacted_argument
from train.console import script_command
from train.costs.kv_cache import kv_rows
from train.experiments.result import FILE as RESULT
from train.metrics.record import Metrics
from train.metrics.sinks import accuracy_lines
from train.run import Run


def print_summary(
    run: Run,
    metrics: Metrics,
    console: Console,
    *,
    complete: bool,
    others: Iterable[Sequence[str]] = (),
) -> None:
    """Print the held-out loss, a sample, the size of the KV cache, and commands to run next.

    Args:
        run: the run that has ended.
        metrics: of its last step.
        console: to print on.
        complete: whether the run has reached its last step. If not, the same command resumes it.
        others: the arguments of runs to compare it with.
    """
    for key, value in metrics.items():
        if key.startswith("eval/") and key.endswith("/loss"):
            name = key.removesuffix("/loss")
            bits = f"{metrics[f'{name}/bits_per_byte']:.3f}"
            if (error := metrics.get(f"{name}/bits_per_byte_stderr")) is not None:
                bits += f" ± {error:.3f}"
            console.print(
                f"\n[bold]{name.removeprefix('eval/')}[/]: {bits} bits per byte, "
                f"loss {value:.3f} nats per token"
            )
    for line in accuracy_lines(metrics):
        console.print(line, markup=False)
    if text := metrics.get("sample/text"):
        console.print("\n[bold]a sample[/]")
        console.print(str(text), markup=False)
    console.print()
    console.print(kv_table(run))
    console.print(f"checkpoint: {_checkpoint(run)}", markup=False)
    console.print(f"metrics:    {run.directory / 'metrics.jsonl'}")
    console.print(f"result:     {run.directory / RESULT}")
    console.print("\n[bold]next[/]")
    for command in next_commands(run, others, complete=complete):
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


def next_commands(run: Run, others: Iterable[Sequence[str]], *, complete: bool) -> list[str]:
    """Commands to run next, quoted so that they can be pasted into a shell."""
    generate = script_command("generate.py", f"run={run.directory}", f"prompt={run.sample.prompt}")
    if not complete:
        return ["run the same command again to continue the training", generate]
    # Settings such as engine.tensor=2 need as many ranks. Several machines have a launcher, which
    # this process does not know.
    place = run.groups.dist_env
    processes = place.world_size if place.world_size == place.local_world_size else 1
    return [
        generate,
        *(
            script_command("main.py", *map(redacted_argument, arguments), processes=processes)
            for arguments in others
        ),
        script_command("bench.py", "attention", "out=bench"),
    ]
