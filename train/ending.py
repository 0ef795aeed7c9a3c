"""Why a run ends, and the exit code that follows from it."""

from enum import StrEnum
from signal import Signals

from conf.exit_codes import ExitCode


class Ending(StrEnum):
    """Why a step is the last one of this start.

    Attributes:
        FINISHED: the run is as long as the configuration asks for.
        OUT_OF_TEXT: every source has been read as often as its `epochs` allow.
        MAX_TIME: `train.max_time` is over.
        DATA_FAILED: the next batch cannot be had; an error says why.
        SIGINT, SIGTERM, SIGHUP, SIGUSR1, SIGUSR2: the signal came, on any rank.
    """

    FINISHED = "finished"
    OUT_OF_TEXT = "out_of_text"
    MAX_TIME = "max_time"
    DATA_FAILED = "data_failed"
    SIGINT = "SIGINT"
    SIGTERM = "SIGTERM"
    SIGHUP = "SIGHUP"
    SIGUSR1 = "SIGUSR1"
    SIGUSR2 = "SIGUSR2"

    @classmethod
    def of_signal(cls, signal: int) -> "Ending":
        """The ending that a signal asks for."""
        return cls(Signals(signal).name)

    @property
    def by_signal(self) -> bool:
        """Whether somebody waits for the process to end, so that it only does what it must."""
        return self.startswith("SIG")

    def is_complete(self, *, timed: bool) -> bool:
        """Whether the same command would not go on; a `timed` run has no length but its time."""
        if self in (Ending.FINISHED, Ending.OUT_OF_TEXT):
            return True
        return self == Ending.MAX_TIME and timed

    def exit_code(self, *, saved: bool, timed: bool) -> ExitCode:
        """The exit code of a run that ends so.

        Args:
            saved: whether the last step's checkpoint is complete.
            timed: see `is_complete`.
        """
        if self == Ending.SIGINT:
            return ExitCode.INTERRUPTED
        if not saved:
            return ExitCode.CRASHED
        return ExitCode.FINISHED if self.is_complete(timed=timed) else ExitCode.REQUEUE
