"""Pretrain a PHD model; the same command goes on where the run ended.

python train/main.py model=phd_cswa model.K=3 size=tiny data=python
"""

from signal import Signals

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from data.stream import OutOfTextError
from train import command_line
from train.config import Config
from train.loop import train, user_error
from train.plan import make_plan, print_plan
from train.report import print_report
from train.run import open_run
from train.sinks import warn

KILLED = 128  # what a shell adds to a signal's number for the exit code of who died of it


def main(config: Config) -> int:
    """Plan, train and report; returns 0, or 128 + the number of the signal that ended the run."""
    console = Console(soft_wrap=True, highlight=False)
    print_plan(make_plan(config), console)
    with open_run(config, console) as run:
        if run.finished:
            console.print(f"nothing to train: {run.step} steps are done")
            print_report(run, run.finish(), console, complete=True)
            return 0
        try:
            with _progress(console) as progress:
                record, metrics = train(run, progress)
        except OutOfTextError as error:
            console.print(f"nothing to train: {run.step} steps are done. {error}", markup=False)
            print_report(run, run.finish(), console, complete=True)
            return 0
        failure = metrics.get("checkpoint/error")
        if failure and not config.hooks.console:  # else it has been told
            warn(console, str(failure))
        if record.ending == "no_data":
            raise user_error(record.failure)
        if record.ending == "out_of_text":
            warn(console, f"ended after step {record.step}: {record.failure}")
        if record.interrupted:
            saved = "not saved" if failure else "saved"
            console.print(f"{record.ending}: {saved} after step {record.step}")
            return KILLED + Signals[str(record.ending)]
        complete = record.ending in ("finished", "out_of_text")
        print_report(run, metrics, console, complete=complete)
    return 0


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


if __name__ == "__main__":
    command_line.run(main)
