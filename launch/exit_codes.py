"""The exit code of one machine, combined from those of its processes."""

from collections.abc import Iterable
from signal import SIGHUP, SIGINT, SIGKILL, SIGTERM, SIGUSR1, SIGUSR2

from conf.exit_codes import ExitCode

FINAL = set(ExitCode) - {ExitCode.CRASHED}
"""Exit codes after which the launcher does not restart the processes, which would end the same way.

REQUEUE is one of them, for both of its reasons. A run that was saved because the scheduler asked
for it would be told to end again. A server, disk or network that failed (`TransientError`) has been
tried again by the run for minutes; the scheduler may wait longer, or choose another machine.
"""


def combine_exit_codes(codes: Iterable[int], *, signalled: bool = False) -> ExitCode:
    """The exit code of processes that ended with these codes.

    When one process ends, the launcher sends SIGTERM to the others, which save or die of it. So
    only the other exit codes count beside a death by SIGTERM.

    >>> [int(combine_exit_codes(codes)) for codes in ([75, -15], [1, 75], [2, -15], [-9, -15])]
    [75, 1, 2, 1]

    Args:
        codes: as `subprocess.Popen.returncode` gives them; -15 is a death by signal 15.
        signalled: the processes were sent a signal to end. Then it is no crash if they die of it,
            or are killed because they took too long.
    """
    found = set(codes)
    if found == {ExitCode.FINISHED}:
        return ExitCode.FINISHED
    if ExitCode.MISUSED in found:
        return ExitCode.MISUSED
    if found & {ExitCode.INTERRUPTED, -SIGINT}:
        return ExitCode.INTERRUPTED
    excused = {ExitCode.FINISHED, ExitCode.REQUEUE, -SIGTERM}
    if signalled:
        killed = {-SIGKILL, -SIGHUP, -SIGUSR1, -SIGUSR2}
        return ExitCode.REQUEUE if found <= excused | killed else ExitCode.CRASHED
    early = ExitCode.REQUEUE in found and found <= excused
    return ExitCode.REQUEUE if early else ExitCode.CRASHED
