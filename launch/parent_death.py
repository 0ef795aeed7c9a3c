"""Runs a program that dies together with its parent process.

    python parent_death.py PARENT SIGNALS LOG STREAMS COMMAND...

PARENT is the process id of the parent. A killed agent cannot end its processes. They would go on
without it, hold the devices, and write to a run that other processes have taken over. So Linux is
told to kill them when their parent dies.

With SIGNALS=hold, signals that ask for an end wait until the program unblocks them. The program
needs seconds to load its libraries before it can handle a signal; one that comes earlier would kill
it, which looks like a crash. With SIGNALS=deliver they come at once.

The program writes to the file LOG, where %t is its rank: with STREAMS=both its stdout and stderr,
with STREAMS=stderr the latter alone. If the file cannot be written, the program writes where its
parent does.
"""

import ctypes
import os
import signal
import sys
import time

SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of linux/prctl.h; it survives exec, but not fork
HELD = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def main(parent: int, signals: str, log: str, streams: str, command: list[str]) -> None:
    """Runs `command` in this process, which dies with the process `parent` (on Linux)."""
    if signals == "hold":
        signal.pthread_sigmask(signal.SIG_BLOCK, HELD)
    _redirect(log.replace("%t", os.environ.get("RANK", "0")), streams)
    if sys.platform == "linux":
        prctl = ctypes.CDLL(None, use_errno=True).prctl
        if prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL):
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # it died before the call above
        sys.exit(f"process {parent}, which started this one, is gone")
    os.execvp(command[0], command)


def _redirect(path: str, streams: str) -> None:
    """Makes a file of stderr, and of stdout if `streams` is both; lines are added to it."""
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        # Each write goes to the end, because the file is that of two streams and of all starts.
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        if streams == "both":
            start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            now = time.strftime("%Y-%m-%d %H:%M:%S")
            here = f"{os.uname().nodename}, process {os.getpid()}"
            os.write(file, f"--- start {start}, {now}, {here}\n".encode())
    except OSError as error:
        # Not `reason_of`: this file runs alone, and imports nothing of the project.
        print(f"launch: no log of this rank: {type(error).__name__}: {error}", file=sys.stderr)
        return
    os.dup2(file, 2)
    if streams == "both":
        os.dup2(file, 1)
    os.close(file)


if __name__ == "__main__":
    signals, log, streams, *command = sys.argv[2:]
    main(int(sys.argv[1]), signals, log, streams, command)
