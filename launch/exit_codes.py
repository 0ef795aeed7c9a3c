"""The exit codes of one machine's processes, combined into one."""

from collections.abc import Iterable
from signal import SIGINT, SIGKILL, SIGTERM, SIGUSR1, SIGUSR2

from train.exit_codes import ExitCode

FINAL = set(ExitCode) - {ExitCode.CRASHED}
"""Exit codes that a restart would only repeat."""


def combine_exit_codes(codes: Iterable[int], *, asked: bool = False) -> ExitCode:
    """The exit code of processes that ended with these codes; negative ones died of a signal.

    When one process ends, the launcher sends SIGTERM to the others, which save or die of it. So a
    death by SIGTERM beside a crash does not count.

    >>> [int(combine_exit_codes(codes)) for codes in ([75, -15], [1, 75], [2, -15], [-9, -15])]
    [75, 1, 2, 1]

    Args:
        codes: as `subprocess.Popen.returncode` gives them.
        asked: the processes had been sent a signal to end; then dying of it, or being killed
            because they took too long, is no crash.
    """
    found = set(codes)
    if found == {ExitCode.FINISHED}:
        return ExitCode.FINISHED
    if ExitCode.MISUSED in found:
        return ExitCode.MISUSED
    if found & {ExitCode.INTERRUPTED, -SIGINT}:
        return ExitCode.INTERRUPTED
    excused = {ExitCode.FINISHED, ExitCode.REQUEUE, -SIGTERM}
    if asked:
        killed = {-SIGKILL, -SIGUSR1, -SIGUSR2}
        return ExitCode.REQUEUE if found <= excused | killed else ExitCode.CRASHED
    early = ExitCode.REQUEUE in found and found <= excused
    return ExitCode.REQUEUE if early else ExitCode.CRASHED
