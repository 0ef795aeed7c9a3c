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
from train import compose
from train.anomalies.policy import BadStepError, RollBackError
from train.config import Config
from train.distributed.dist_env import DistEnv
from train.distributed.process_groups import ProcessGroups, init_process_groups
from train.distributed.signals import StopSignal, exit_immediately
from train.exit_codes import ExitCode
from train.loop import StoppedEarlyError, train, user_error
from train.metrics.sinks import warn
from train.plan import make_plan, print_plan
from train.report import print_report
from train.run import Run, open_run


def main(config: Config) -> int:
    """Plan, train and report; returns an exit code of `launch.exit_codes`."""
    stop_signal = StopSignal()
    # One of several ranks may not leave at once: the others would wait for it.
    early = exit_immediately() if DistEnv.from_environment().world_size == 1 else stop_signal
    with early, init_process_groups(config.engine.device) as groups:
        console = Console(soft_wrap=True, highlight=False, quiet=not groups.first)
        print_plan(make_plan(config, groups.world_size), console)
        if config.run.resume == "never" and any(groups.gather(groups.place.restarts)):
            config = _resuming(config)  # it was this very run that began anew
        return train_to_the_end(config, console, groups, stop_signal)


def train_to_the_end(
    config: Config, console: Console, groups: ProcessGroups, stop_signal: StopSignal
) -> int:
    """Open and train the run, again after each rollback; all ranks return the same code."""
    skipped: frozenset[int] = frozenset()
    rollbacks, begun = 0, -1
    most = config.faults.most_in_a_row
    while True:
        code, step, back = _attempt(config, console, groups, stop_signal, skipped)
        gc.collect()  # a sharded model holds references to itself
        if back is None:
            return code
        rollbacks, begun = (rollbacks + 1 if step == begun else 1), step
        if rollbacks > most:
            warn(console, f"{back}; no more than faults.most_in_a_row={most} rollbacks in a row")
            return ExitCode.CRASHED
        warn(console, f"{back}; going back to the last checkpoint")
        skipped |= {back.batch}
        config = _resuming(config)


def _attempt(
    config: Config,
    console: Console,
    groups: ProcessGroups,
    stop_signal: StopSignal,
    skipped: frozenset[int],
) -> tuple[int, int, RollBackError | None]:
    """(exit code, step that it began from, why it is to be opened again) of a run; nothing of it
    is left in memory."""
    with open_run(config, console, groups, stop_signal, skipped) as run:
        try:
            return _train(run, console), run.step, None
        except BadStepError as error:
            warn(console, str(error))
            return ExitCode.CRASHED, run.step, None
        except RollBackError as error:
            return ExitCode.CRASHED, run.step, error.with_traceback(None)


def _train(run: Run, console: Console) -> int:
    """An opened run from its last checkpoint to its end; all ranks return the same code."""
    config = run.config
    if run.finished:
        console.print(f"nothing to train: {run.step} steps are done")
        print_report(run, run.finish(), console, complete=True)
        return ExitCode.FINISHED
    try:
        with _progress(console) as progress:
            record, metrics = train(run, progress)
    except OutOfTextError as error:
        console.print(f"nothing to train: {run.step} steps are done. {error}", markup=False)
        print_report(run, run.finish(), console, complete=True)
        return ExitCode.FINISHED
    except StoppedEarlyError:
        ending = run.stop_sync.signal
        assert ending is not None
        console.print(f"{ending.name}: ended before step {run.step + 1}; nothing to save")
        return ExitCode.INTERRUPTED if ending == SIGINT else ExitCode.REQUEUE
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
        return ExitCode.INTERRUPTED
    if not saved:
        return ExitCode.CRASHED
    return ExitCode.FINISHED if complete and not record.interrupted else ExitCode.REQUEUE


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
    compose.run(main)
