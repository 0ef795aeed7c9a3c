"""The runs of a sweep, of which some may fail."""

import gc
import os
import sys
import traceback
from collections.abc import Callable
from typing import NamedTuple

from conf.errors import USER_ERRORS, report
from conf.exit_codes import ExitCode
from train.distributed.dist_env import DistEnv

ENDING = (ExitCode.INTERRUPTED, ExitCode.REQUEUE)
"""Results of a run after which its sweep ends: it was told to end, by a signal or by its time."""


class Failure(NamedTuple):
    """A run that failed, its exit code, and why in one line."""

    name: str
    code: int
    reason: str


class Sweep:
    """Runs one run after another, whatever becomes of each.

    Args:
        runs: how many there are.
    """

    def __init__(self, runs: int) -> None:
        self.runs = runs
        self.failures: list[Failure] = []
        self._process = os.getpid()

    @property
    def code(self) -> int:
        """The exit code of the sweep: that of its failures if they have one in common.

        Otherwise a crash counts first, as a restart may help, and then what a later start may mend.
        """
        codes = {failure.code for failure in self.failures}
        if len(codes) < 2:
            return max(codes, default=ExitCode.FINISHED)
        return next((c for c in (ExitCode.CRASHED, ExitCode.REQUEUE) if c in codes), min(codes))

    def run(self, name: str, run: Callable[[], int]) -> None:
        """Run one of them; a failure is told at once, and kept for the end.

        Raises:
            SystemExit: the run was told to end, and so is the sweep. Or it crashed on one of many
                ranks, which cannot go on without each other: their launcher starts all of them
                again, and the runs that are done pass quickly.
        """
        try:
            code = run()
            reason = "it ended"
        except USER_ERRORS as error:
            text, code = report(error)
            reason = " ".join(text.partition("\n")[2].split()) or text
            _print(f"{name} failed: {text}")
        except Exception as error:
            code = ExitCode.CRASHED
            reason = "".join(traceback.format_exception_only(error)).partition("\n")[0]
            _print(f"{name} crashed:\n{traceback.format_exc().rstrip()}", everywhere=True)
        else:
            if code in ENDING:
                sys.exit(code)
            if code:
                _print(f"{name} ended with exit code {code}")
        if not code:
            return
        self.failures.append(Failure(name, code, reason))
        gc.collect()  # what the traceback held, such as the model
        several = DistEnv.from_environment().world_size > 1
        # A launcher of Hydra's that starts each run in a process of its own has nothing more to do.
        if (several and code == ExitCode.CRASHED) or os.getpid() != self._process:
            sys.exit(code)

    def tell_failures(self) -> None:
        """List the runs that failed."""
        if self.failures:
            lines = [
                f"  {name}: {reason} (exit code {code:d})" for name, code, reason in self.failures
            ]
            _print("\n".join([f"{len(lines)} of {self.runs} runs of this sweep failed:", *lines]))


def _print(text: str, *, everywhere: bool = False) -> None:
    """Print on rank 0, as all ranks fail alike; a crash is told where it happens."""
    if everywhere or not DistEnv.from_environment().rank:
        print(text, file=sys.stderr, flush=True)
