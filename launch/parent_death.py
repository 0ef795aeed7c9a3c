"""Becomes another program that dies with the process which started it.

    python tether.py PARENT SIGNALS COMMAND...

A killed agent cannot end its workers. Without a tether they would go on: they would hold the
devices, and write to a run that other processes have taken over.

With SIGNALS=hold, those that ask for an end wait until the program, which may first have to load
its libraries, unblocks them: it would die of one else, and look as if it had crashed.
"""

import ctypes
import os
import signal
import sys

SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of linux/prctl.h; it outlives exec, but not fork


HELD = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def main(parent: int, signals: str, command: list[str]) -> None:
    """Ties this process to `parent` where the system can (Linux), and runs `command` in it."""
    if signals == "hold":
        signal.pthread_sigmask(signal.SIG_BLOCK, HELD)
    if sys.platform == "linux":
        prctl = ctypes.CDLL(None, use_errno=True).prctl
        if prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL):
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # it died before the tether held
        sys.exit(f"process {parent}, which started this one, is gone")
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
