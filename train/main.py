"""Pretrain a PHD model; the same command goes on where the run ended.

python train/main.py model=phd_cswa model.K=3 size=tiny data=python
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # first of all: the imports below take seconds
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # see conf/checkout.py
    from train import compose
    from train.inputs import check_inputs
    from train.sweeps.finished import finished
    from train.sweeps.table import print_comparison

    compose.run("train.main", before=check_inputs, finished=finished, compare=print_comparison)

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from rich.console import Console

from conf.exit_codes import ExitCode
from conf.wording import plural
from data.stream import OutOfTextError
from train.anomalies.policy import BadStepError, RollBackError
from train.compose import other_runs
from train.config import Config
from train.console import training_progress, warn
from train.costs.plan_table import print_plan
from train.costs.text import look_at_text
from train.distributed.dist_env import DistEnv
from train.distributed.process_groups import (
    ProcessGroups,
    init_process_groups,
    raise_on_all_ranks,
)
from train.distributed.signals import StopSignal, exit_immediately
from train.ending import Ending
from train.experiments.ledger import Ended, forget_end
from train.experiments.recorder import failures_recorded, record_complete, record_end
from train.inputs import check_inputs
from train.loop import StoppedEarlyError, train
from train.metrics.record import Hook, Metrics, StepRecord
from train.plan import make_plan
from train.run import Run, open_run, smallest_memory
from train.run_dir.lock import hold_run_dir
from train.run_summary import print_summary
from train.start.trunk import decays_of
from train.sweeps.finished import finished_itself
from train.sweeps.sweep import ENDING

MakeHook = Callable[[Run], Hook]


def main(config: Config, hooks: Sequence[MakeHook] = ()) -> int:
    """Plan, train and report; returns an `ExitCode`. After a trunk, its decays follow.

    Args:
        config: of the run.
        hooks: functions that make hooks of the user's own from the opened run; see
            `train.metrics.record`.
    """
    if not (config.schedule.is_trunk and config.run.decays):
        return _plan_train_and_report(config, hooks)
    return _trunk_and_decays(config, hooks)


def _trunk_and_decays(config: Config, hooks: Sequence[MakeHook]) -> int:
    """A trunk, and then its decays; what has finished already is passed over.

    A decay that diverges does not take the others along. One that was told to end does.
    """
    worst: int = ExitCode.FINISHED
    # Ranks may see different files for a while, and must not part.
    alone = DistEnv.from_environment().world_size == 1
    for one in (config, *decays_of(config)):
        if alone and (done := finished_itself(one)):
            print(f"{one.name}: finished already, {done}", flush=True)
            continue
        code = _plan_train_and_report(one, hooks)
        gc.collect()  # as between attempts
        if code and (code in ENDING or one.schedule.is_trunk):
            return code
        worst = worst or code
    return worst


def _plan_train_and_report(config: Config, hooks: Sequence[MakeHook]) -> int:
    """One run from its plan to its report; returns an `ExitCode`."""
    stop_signal = StopSignal()
    # One of several ranks may not leave at once: the others would wait for it.
    alone = DistEnv.from_environment().world_size == 1
    with (
        exit_immediately() if alone else stop_signal,
        init_process_groups(config.engine.device) as groups,
    ):
        console = Console(soft_wrap=True, highlight=False, quiet=not groups.is_rank_zero)
        # Each rank has looked at its own view of a shared disk to find the run's directory.
        config = replace(config, run=groups.broadcast(config.run))
        # From here on, and not only from `open_run` on: it is told before anything else, and no
        # other process can come between two attempts.
        with (
            hold_run_dir(config.run_dir, groups, console),
            failures_recorded(config, groups, console),
        ):
            return _plan_and_train(config, console, groups, stop_signal, hooks)


def _plan_and_train(
    config: Config,
    console: Console,
    groups: ProcessGroups,
    stop_signal: StopSignal,
    hooks: Sequence[MakeHook],
) -> int:
    """The whole start of a run whose directory is held."""
    raise_on_all_ranks(groups, lambda: check_inputs(config))
    text = look_at_text(config) if groups.is_rank_zero else None
    memory = smallest_memory(config, groups)
    plan = make_plan(config, groups.world_size, text=text, memory=memory)
    print_plan(plan, console)
    if config.run.resume == "never" and groups.greatest(groups.dist_env.restarts):
        config = _resuming(config)  # it was this very run that began anew
    return train_to_the_end(config, console, groups, stop_signal, hooks)


def train_to_the_end(
    config: Config,
    console: Console,
    groups: ProcessGroups,
    stop_signal: StopSignal,
    hooks: Sequence[MakeHook] = (),
) -> int:
    """Open and train the run, again after each rollback; all ranks return the same code."""
    skipped: frozenset[int] = frozenset()
    rollbacks, begun = 0, -1
    limit = config.faults.most_in_a_row
    while True:
        attempt = _attempt(config, console, groups, stop_signal, skipped, hooks)
        gc.collect()  # FSDP's modules and their state refer to each other in circles
        rollback = attempt.rollback
        if rollback is None:
            return attempt.code
        rollbacks = rollbacks + 1 if attempt.begun == begun else 1
        begun = attempt.begun
        if rollbacks > limit:
            why = f"{rollback}; faults.most_in_a_row={limit}: too many rollbacks in a row"
            warn(console, why)
            record_end(config, groups, console, Ended(status="diverged", reason=why))
            return ExitCode.CRASHED
        warn(console, f"{rollback}; going back to the last checkpoint")
        skipped |= {rollback.batch}
        config = _resuming(config)


class _Attempt(NamedTuple):
    """How training from one checkpoint went: the exit code, or why to roll back.

    `begun` is the step of the checkpoint.
    """

    code: ExitCode
    begun: int
    rollback: RollBackError | None = None


def _attempt(
    config: Config,
    console: Console,
    groups: ProcessGroups,
    stop_signal: StopSignal,
    skipped: frozenset[int],
    hooks: Sequence[MakeHook],
) -> _Attempt:
    """Open the run and train it; nothing of it is left in memory afterwards."""
    with open_run(config, console, groups, stop_signal, skipped, hooks) as run:
        try:
            return _Attempt(_train(run, console), run.step)
        except BadStepError as error:
            warn(console, str(error))
            record_end(config, groups, console, Ended(status="diverged", reason=str(error)))
            return _Attempt(ExitCode.CRASHED, run.step)
        except RollBackError as error:
            return _Attempt(ExitCode.CRASHED, run.step, error.with_traceback(None))


def _train(run: Run, console: Console) -> ExitCode:
    """An opened run from its last checkpoint to its end; all ranks return the same code."""
    if run.finished:
        return _report_complete(run, console, f"nothing to train: {_steps_done(run)}")
    if run.groups.is_rank_zero:
        forget_end(run.directory)
    try:
        with training_progress(console) as progress:
            record, metrics = train(run, progress)
    except OutOfTextError as error:
        why = f"nothing to train: {_steps_done(run)}. {error}"
        return _report_complete(run, console, why)
    except StoppedEarlyError:
        assert run.stop_sync.signal is not None
        ending = Ending.of_signal(run.stop_sync.signal)
        why = f"{ending}: ended before step {run.step + 1}; nothing to save"
        console.print(why)
        record_end(run.config, run.groups, console, Ended(status="unfinished", reason=why))
        return ending.exit_code(saved=True, timed=run.timed)
    return _report(run, record, metrics, console)


def _steps_done(run: Run) -> str:
    return f"{plural(run.step, 'step')} {'is' if run.step == 1 else 'are'} done"


def _report_complete(run: Run, console: Console, why: str) -> ExitCode:
    console.print(why, markup=False)
    others = other_runs(run.config) if run.groups.is_rank_zero else []
    metrics = run.measure()
    record_complete(run.config, run.groups, console, run.step, metrics)
    print_summary(run, metrics, console, complete=True, others=others)
    return ExitCode.FINISHED


def _report(run: Run, record: StepRecord, metrics: Metrics, console: Console) -> ExitCode:
    """Print how training ended and what came of it; returns the exit code.

    Raises:
        DataError, TransientError: the run was saved because its data failed.
    """
    ending = record.ending
    assert ending is not None
    if run.save.error and (ending.by_signal or not run.config.hooks.console):
        warn(console, run.save.error)  # else the console's line of this step has said it
    if ending == Ending.DATA_FAILED:
        assert record.failure is not None
        raise record.failure
    if ending == Ending.OUT_OF_TEXT:
        warn(console, f"ended after step {record.step}: {record.failure}")
    saved = run.save.saved_step == record.step
    complete = ending.is_complete(timed=run.timed)
    ended = Ended(status="finished")
    if not complete:
        why = "train.max_time is over" if ending == Ending.MAX_TIME else ending
        told = f"{why}: {'saved' if saved else 'not saved'} after step {record.step}"
        console.print(told)
        ended = Ended(status="unfinished", reason=told)
    elif not saved:
        ended = Ended(status="failed", reason=run.save.error or "its last step is not saved")
    record_end(run.config, run.groups, console, ended)
    if not ending.by_signal:
        shown = {"sample/text"} if run.config.hooks.console else set()  # by the console's line
        left = {key: value for key, value in metrics.items() if key not in shown}
        others = other_runs(run.config) if complete and run.groups.is_rank_zero else []
        print_summary(run, left, console, complete=complete, others=others)
    return ending.exit_code(saved=saved, timed=run.timed)


def _resuming(config: Config) -> Config:
    """The configuration of a run that goes on with what this very run has done."""
    return replace(config, run=replace(config.run, resume="auto"))
