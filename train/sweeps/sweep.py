"""The runs of a sweep, of which some may fail."""

import gc
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from enum import Enum
from functools import partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from conf.errors import USER_ERRORS, Problem, report
from conf.exit_codes import ExitCode
from train.config import Config
from train.distributed.dist_env import DistEnv
from train.sweeps.outcome import Outcome, has_outcome, read_outcomes, write_outcome
from train.sweeps.side_by_side import (
    as_member,
    at_work,
    is_stopped,
    leave_alone,
    passing_on_signals,
)

ENDING = (ExitCode.INTERRUPTED, ExitCode.REQUEUE)
"""Results of a run after which its sweep ends: it was told to end, by a signal or by its time."""


class Launcher(Enum):
    """Who runs the runs of a sweep: `NONE`: this process. `POOL`: processes on this machine, as
    joblib has them. `JOBS`: jobs, as those of submitit, which may be on other machines."""

    NONE = "none"
    POOL = "pool"
    JOBS = "jobs"

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "Launcher":
        """That of Hydra's settings `hydra.launcher`."""
        target = str(settings.get("_target_", ""))
        if "basic_launcher" in target:
            return cls.NONE
        if "joblib" not in target:
            return cls.JOBS
        from joblib import effective_n_jobs  # comes with the launcher

        # joblib has no pool of one process; it runs them in this one.
        processes = settings["n_jobs"]
        return cls.NONE if processes and effective_n_jobs(processes) == 1 else cls.POOL

    def problems(self, world_size: int) -> list[Problem]:
        """Why a command of several ranks cannot have this launcher."""
        if self == Launcher.NONE or world_size == 1:
            return []
        reason = "starts runs of one process, and this command has several"
        hint = "leave it out, and the runs follow each other on all processes"
        return [Problem("hydra/launcher", expected=reason, hint=hint)]


class Sweep:
    """Runs one run after another, whatever becomes of each.

    A launcher of Hydra's may start the runs in other processes. Each of them has a copy of this
    object, and leaves the outcome of its run in a folder that all of them see.

    Args:
        names: of the runs.
        launcher: in which processes they run.
        folder: of the sweep, which other machines see as well.
        finished: tells of a run that it has finished, and how long it was; it is passed over.
    """

    def __init__(
        self,
        names: Sequence[str],
        launcher: Launcher = Launcher.NONE,
        folder: Path | None = None,
        *,
        finished: Callable[[Config], str | None] | None = None,
    ) -> None:
        self.names, self.launcher = tuple(names), launcher
        self.failures: list[Outcome] = []
        self._ended: list[Outcome] = []
        self._here: set[str] = set()  # the runs of this process
        self._finished = finished
        self._process = os.getpid()
        self._folder: Path | None = None
        if launcher != Launcher.NONE:
            shared = None if folder is None or launcher == Launcher.POOL else folder
            if shared is not None:
                shared.mkdir(parents=True, exist_ok=True)
            self._folder = Path(mkdtemp(prefix=".sweep-", dir=shared)).resolve()

    @property
    def ended(self) -> bool:
        """Whether the sweep was told to end, so that somebody waits for that."""
        return bool(self._ended)

    @property
    def code(self) -> int:
        """The exit code of the sweep: that of its failures if they have one in common.

        Otherwise a crash counts first, as a restart may help, and then what a later start may mend.
        A sweep that was told to end says so.
        """
        if self._ended:
            return max(outcome.code for outcome in self._ended)
        codes = {failure.code for failure in self.failures}
        if len(codes) < 2:
            return max(codes, default=ExitCode.FINISHED)
        return next((c for c in (ExitCode.CRASHED, ExitCode.REQUEUE) if c in codes), min(codes))

    def run(self, config: Config, run: Callable[[], int]) -> None:
        """Run one of them; a failure is told at once, and kept for the end.

        Raises:
            SystemExit: the run was told to end, and so is the sweep. Or it crashed on one of many
                ranks, which cannot go on without each other: their launcher starts all of them
                again, and the runs that are done pass quickly.
        """
        # Ranks may see different files for a while, and must not part.
        alone = DistEnv.from_environment().world_size == 1
        if self._finished and alone and (done := self._finished(config)):
            print(f"{config.name}: finished already, {done}", flush=True)
            if self._folder is not None:
                write_outcome(self._folder, Outcome(config.name, ExitCode.FINISHED, "finished"))
        elif os.getpid() != self._process:
            self._run_elsewhere(config, run)
        else:
            self._run_here(config, run, alone=alone)

    def _run_here(self, config: Config, run: Callable[[], int], *, alone: bool) -> None:
        outcome = outcome_of(config.name, run)
        self._here.add(config.name)
        if outcome.ended:
            sys.exit(outcome.code)
        if outcome.code:
            self.failures.append(outcome)
            gc.collect()  # what the traceback held, such as the model
            if not alone and outcome.code == ExitCode.CRASHED:
                sys.exit(outcome.code)

    def _run_elsewhere(self, config: Config, run: Callable[[], int]) -> None:
        """Run it in this process of a launcher, which goes on whatever the outcome is."""
        assert self._folder is not None
        if has_outcome(self._folder, config.name):
            return  # the pool was begun again
        attempt = partial(outcome_of, config.name, run)
        pool = self.launcher == Launcher.POOL
        outcome = as_member(config, self._folder, attempt) if pool else attempt()
        if outcome is not None:
            write_outcome(self._folder, outcome)

    def launch(self, start: Callable[[], object]) -> None:
        """Have Hydra's launcher run all runs; `start` begins it, once more if its pool breaks."""
        if self.launcher != Launcher.POOL:
            start()
            return
        from joblib.externals.loky.process_executor import TerminatedWorkerError

        for left in reversed(range(2 * len(self.names) + 1)):
            try:
                with _errors_of_hydra():
                    start()
                return
            except TerminatedWorkerError:
                assert self._folder is not None
                if is_stopped(self._folder):
                    return
                if not left:
                    raise
                self._take_up(at_work(self._folder))

    def _take_up(self, names: Sequence[str]) -> None:
        """Say what becomes of the runs that were at work when a process of the pool died."""
        assert self._folder is not None
        if len(names) == 1:
            reason = "its process was killed, as happens when the memory is full"
            write_outcome(self._folder, Outcome(names[0], ExitCode.CRASHED, reason))
            _print(f"{names[0]} crashed: {reason}")
        elif names:
            told = "a run's process was killed, and the others with it; one at a time go on"
            _print(f"{told}: {', '.join(names)}")
        for name in names:
            leave_alone(self._folder, name)

    @contextmanager
    def launching(self) -> Iterator[None]:
        """Within this context Hydra's launcher is at work; afterwards all outcomes are known."""
        if self._folder is None:
            yield
            return
        pool = self.launcher == Launcher.POOL
        try:
            with passing_on_signals(self._folder) if pool else nullcontext():
                yield
        finally:
            outcomes = read_outcomes(self._folder)
            self._ended = [outcome for outcome in outcomes if outcome.ended]
            if not self._ended and is_stopped(self._folder):
                self._ended = [Outcome("", ExitCode.REQUEUE, "it was told to end", ended=True)]
            self.failures += [outcome for outcome in outcomes if outcome.code and not outcome.ended]
            if not self._ended:
                told = self._here | {outcome.name for outcome in outcomes}
                reason = "it left no outcome: its process died, or does not answer"
                self.failures += [
                    Outcome(name, ExitCode.CRASHED, reason)
                    for name in self.names
                    if name not in told
                ]
            shutil.rmtree(self._folder, ignore_errors=True)

    def tell_failures(self) -> None:
        """List the runs that failed."""
        if self.failures:
            lines = [
                f"  {failure.name}: {failure.reason} (exit code {failure.code:d})"
                for failure in self.failures
            ]
            _print(
                "\n".join([f"{len(lines)} of {len(self.names)} runs of this sweep failed:", *lines])
            )


@contextmanager
def _errors_of_hydra() -> Iterator[None]:
    """Within this context Hydra raises the errors of its launchers, and does not print them."""
    key = "HYDRA_FULL_ERROR"
    before = os.environ.get(key)
    os.environ[key] = "1"
    try:
        yield
    finally:
        os.environ.pop(key)
        if before is not None:
            os.environ[key] = before


def outcome_of(name: str, run: Callable[[], int]) -> Outcome:
    """Run one of the runs, and tell a failure."""
    try:
        code = run()
    except USER_ERRORS as error:
        text, code = report(error)
        _print(f"{name} failed: {text}")
        return Outcome(name, code, " ".join(text.partition("\n")[2].split()) or text)
    except SystemExit as end:  # `exit_immediately`: before there was anything to save
        if end.code not in ENDING:
            raise
        return Outcome(name, int(end.code), "it was told to end", ended=True)
    except Exception as error:
        reason = "".join(traceback.format_exception_only(error)).partition("\n")[0]
        _print(f"{name} crashed:\n{traceback.format_exc().rstrip()}", everywhere=True)
        return Outcome(name, ExitCode.CRASHED, reason)
    if code in ENDING:
        return Outcome(name, code, "it was told to end", ended=True)
    if code:
        _print(f"{name} ended with exit code {code}")
    return Outcome(name, code, "it ended")


def _print(text: str, *, everywhere: bool = False) -> None:
    """Print on rank 0, as all ranks fail alike; a crash is told where it happens."""
    if everywhere or not DistEnv.from_environment().rank:
        print(text, file=sys.stderr, flush=True)
