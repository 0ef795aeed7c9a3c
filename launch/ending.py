"""What the exit code of a training process says, and what those of one machine say together."""

from collections.abc import Iterable
from signal import SIGINT, SIGKILL, SIGTERM, SIGUSR1, SIGUSR2

FINISHED = 0
CRASHED = 1
MISUSED = 2  # a wrong configuration, which no restart puts right
SAVED = 75  # saved and ended early; the same command goes on (EX_TEMPFAIL of sysexits.h)
INTERRUPTED = 130  # Ctrl-C, as a shell counts it: 128 + SIGINT

FINAL = {FINISHED, MISUSED, SAVED, INTERRUPTED}  # what a restart would only repeat


def joint(codes: Iterable[int], *, asked: bool = False) -> int:
    """The one ending of processes that ended with these codes, negative ones by a signal.

    What the others end with after the first is our own doing: they are sent a SIGTERM, and save or
    die of it. So a crash beside them counts, and they do not.

    >>> joint([75, -15]), joint([1, 75]), joint([2, -15]), joint([-9, -15])
    (75, 1, 2, 1)

    Args:
        codes: as `subprocess.Popen.returncode` gives them.
        asked: they had been sent a signal to end; then dying of it, or of being late, is no crash.
    """
    told = set(codes)
    if told == {FINISHED}:
        return FINISHED
    if MISUSED in told:
        return MISUSED
    if told & {INTERRUPTED, -SIGINT}:
        return INTERRUPTED
    excused = {FINISHED, SAVED, -SIGTERM}
    if asked:
        return SAVED if told <= excused | {-SIGKILL, -SIGUSR1, -SIGUSR2} else CRASHED
    return SAVED if SAVED in told and told <= excused else CRASHED
