"""Runs a program that dies together with its parent process.

    python parent_death.py PARENT SIGNALS COMMAND...

PARENT is the process id of the parent. A killed agent cannot end its processes. They would go on
without it, hold the devices, and write to a run that other processes have taken over. So Linux is
told to kill them when their parent dies.

With SIGNALS=hold, signals that ask for an end wait until the program unblocks them. The program
needs seconds to load its libraries before it can handle a signal; one that comes earlier would kill
it, which looks like a crash. With SIGNALS=deliver they come at once.
"""

import ctypes
import os
import signal
import sys

SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of linux/prctl.h; it survives exec, but not fork
HELD = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def main(parent: int, signals: str, command: list[str]) -> None:
    """Runs `command` in this process, which dies with the process `parent` (on Linux)."""
    if signals == "hold":
        signal.pthread_sigmask(signal.SIG_BLOCK, HELD)
    if sys.platform == "linux":
        prctl = ctypes.CDLL(None, use_errno=True).prctl
        if prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL):
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # it died before the call above
        sys.exit(f"process {parent}, which started this one, is gone")
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
