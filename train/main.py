"""Pretrain a PHD model; the same command goes on where the run ended.

python train/main.py model=phd_cswa model.K=3 size=tiny data=python
"""

import gc
from dataclasses import replace
from signal import SIGINT

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
from launch.ending import CRASHED, FINISHED, INTERRUPTED, SAVED
from launch.place import Place
from train import command_line
from train.config import Config
from train.interruption import Interruption, leaving_at_once
from train.loop import LeftEarlyError, train, user_error
from train.plan import make_plan, print_plan
from train.ranks import Ranks, open_ranks
from train.report import print_report
from train.run import Run, open_run
from train.sinks import warn
from train.verdicts import BadStepError, RollBackError


def main(config: Config) -> int:
    """Plan, train and report; returns an exit code of `launch.ending`."""
    interruption = Interruption()
    # One of several ranks may not leave at once: the others would wait for it.
    early = leaving_at_once() if Place.from_environment().world == 1 else interruption
    with early, open_ranks(config.engine.device) as ranks:
        console = Console(soft_wrap=True, highlight=False, quiet=not ranks.first)
        print_plan(make_plan(config, ranks.world), console)
        if config.run.resume == "never" and any(ranks.gather(ranks.place.restarts)):
            config = _resuming(config)  # it was this very run that began anew
        return train_to_the_end(config, console, ranks, interruption)


def train_to_the_end(
    config: Config, console: Console, ranks: Ranks, interruption: Interruption
) -> int:
    """Open and train the run, again after each rollback; all ranks return the same code."""
    passed_over: frozenset[int] = frozenset()
    rollbacks, begun = 0, -1
    most = config.faults.most_in_a_row
    while True:
        code, step, back = _attempt(config, console, ranks, interruption, passed_over)
        gc.collect()  # a sharded model holds references to itself
        if back is None:
            return code
        rollbacks, begun = (rollbacks + 1 if step == begun else 1), step
        if rollbacks > most:
            warn(console, f"{back}; no more than faults.most_in_a_row={most} rollbacks in a row")
            return CRASHED
        warn(console, f"{back}; going back to the last checkpoint")
        passed_over |= {back.batch}
        config = _resuming(config)


def _attempt(
    config: Config,
    console: Console,
    ranks: Ranks,
    interruption: Interruption,
    passed_over: frozenset[int],
) -> tuple[int, int, RollBackError | None]:
    """(exit code, step that it began from, why it is to be opened again) of a run; nothing of it
    is left in memory."""
    with open_run(config, console, ranks, interruption, passed_over) as run:
        try:
            return _train(run, console), run.step, None
        except BadStepError as error:
            warn(console, str(error))
            return CRASHED, run.step, None
        except RollBackError as error:
            return CRASHED, run.step, error.with_traceback(None)


def _train(run: Run, console: Console) -> int:
    """An opened run from its last checkpoint to its end; all ranks return the same code."""
    config = run.config
    if run.finished:
        console.print(f"nothing to train: {run.step} steps are done")
        print_report(run, run.finish(), console, complete=True)
        return FINISHED
    try:
        with _progress(console) as progress:
            record, metrics = train(run, progress)
    except OutOfTextError as error:
        console.print(f"nothing to train: {run.step} steps are done. {error}", markup=False)
        print_report(run, run.finish(), console, complete=True)
        return FINISHED
    except LeftEarlyError:
        ending = run.agreement.signal
        assert ending is not None
        console.print(f"{ending.name}: ended before step {run.step + 1}; nothing to save")
        return INTERRUPTED if ending == SIGINT else SAVED
    failure = metrics.get("checkpoint/error")
    if failure and (record.interrupted or not config.hooks.console):  # else it has been told
        warn(console, str(failure))
    if record.ending == "no_data":
        raise user_error(record.failure)
    if record.ending == "out_of_text":
        warn(console, f"ended after step {record.step}: {record.failure}")
    saved = metrics.get("checkpoint/step") == record.step
    timed = config.train.total_steps is None  # then its time is the run's whole length
    complete = record.ending in ("finished", "out_of_text") or timed
    if record.interrupted or not complete:
        why = "train.max_time is over" if record.ending == "max_time" else record.ending
        console.print(f"{why}: {'saved' if saved else 'not saved'} after step {record.step}")
    if not record.interrupted:
        print_report(run, metrics, console, complete=complete)
    if record.ending == "SIGINT":
        return INTERRUPTED
    if not saved:
        return CRASHED
    return FINISHED if complete and not record.interrupted else SAVED


def _resuming(config: Config) -> Config:
    """The configuration of a run that goes on with what this very run has done."""
    return replace(config, run=replace(config.run, resume="auto"))


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
