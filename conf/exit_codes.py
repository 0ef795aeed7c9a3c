"""What the exit code of a training process tells whoever started it."""

from enum import IntEnum
from signal import SIGINT


class ExitCode(IntEnum):
    """The contract between a training process and its launcher or scheduler.

    Attributes:
        FINISHED: nothing is left to do.
        CRASHED: an error of the program; a restart may help.
        MISUSED: the configuration or the data is wrong, which no restart puts right.
        REQUEUE: the run was saved and ended early, or something around it failed for now; the same
            command goes on (EX_TEMPFAIL of sysexits.h).
        INTERRUPTED: Ctrl-C, as a shell counts it: 128 + SIGINT.
    """

    FINISHED = 0
    CRASHED = 1
    MISUSED = 2
    REQUEUE = 75
    INTERRUPTED = 128 + SIGINT
