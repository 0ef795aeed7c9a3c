"""The watchdog: a process that hangs writes down where it hangs, and ends."""

import faulthandler
import os
import socket
import sys
from contextlib import suppress
from math import inf
from pathlib import Path
from threading import Condition, Thread
from time import monotonic, strftime
from typing import IO

LINGER_S = 5.0
"""Seconds between the writing of stacks and the end of the process. The first rank that ends breaks
the collectives that the others wait in; by then each has written its own stacks, even if their
deadlines are a few seconds apart."""

STARTED = "started; without stacks below, it still runs or was killed"

TRACEBACK_END = "(most recent call first):"
"""How `faulthandler` ends the first line of each stack."""


class Watchdog:
    """Within this context, the process ends with code 1 when a deadline has passed.

     heartbeat heartbeat heartbeat           stacks      stacks again, end with code 1
         |---------|---------|- step_timeout --|-- LINGER_S --|

    The stacks of all threads go to `<directory>/stacks/rank_<rank>.txt`, after those of earlier
    starts. A process that is killed leaves its first line there, which says so; the next one that
    ends well deletes what is no stacks. The first stacks are written by a Python thread. The second
    ones, and the end, come from a thread in C, which also works if the main thread is stuck in C
    and holds the interpreter's lock.

    Args:
        directory: the run's.
        rank: of this process.
        step_timeout: seconds that a step may take, with what is measured after it.
        exit_timeout: seconds that the process may take to leave once it has to.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(
        self, directory: Path, rank: int, step_timeout: float, exit_timeout: float = inf
    ) -> None:
        self.path = directory / "stacks" / f"rank_{rank}.txt"
        self.step_timeout = step_timeout
        self.exit_timeout = exit_timeout
        self._who = f"rank {rank}, process {os.getpid()} on {socket.gethostname()}"
        self._changed = Condition()
        self._waited_for = ""
        self._over = True  # no deadline: not entered, left, or expired

    def __enter__(self) -> "Watchdog":
        self._over = False
        self._deadline = self._leave_at = inf
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[str] = self.path.open("a", encoding="utf-8")
        self._size = self._file.tell()
        self._write(STARTED)
        self.heartbeat()
        self._thread = Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def heartbeat(self) -> None:
        """A step begins: it has `step_timeout` seconds, or fewer if the process has to leave."""
        with self._changed:
            self._arm(monotonic() + self.step_timeout, f"no step for {self.step_timeout:g} s")

    def begin_exit(self) -> None:
        """The process has to leave, within `exit_timeout` seconds; from any thread."""
        if self.exit_timeout < inf:
            self.exit_within(self.exit_timeout)

    def exit_within(self, seconds: float) -> None:
        """The process has to leave within so many seconds; the earliest deadline counts."""
        with self._changed:
            if monotonic() + seconds < self._leave_at:
                self._leave_at = monotonic() + seconds
                self._write(f"has {seconds:g} s to leave")
                self._arm(self._leave_at, f"still there {seconds:g} s after it had to leave")
                self._changed.notify()

    def _arm(self, deadline: float, waited_for: str) -> None:
        """Set the deadline, unless the process has to leave before it anyway."""
        if self._over or deadline > self._leave_at:
            return
        self._deadline, self._waited_for = deadline, waited_for
        left = max(deadline - monotonic(), 0) + LINGER_S
        faulthandler.dump_traceback_later(left, exit=True, file=self._file)

    def _watch(self) -> None:
        with self._changed:
            while not self._over and (left := self._deadline - monotonic()) > 0:
                self._changed.wait(left)
            if self._over:
                return
            self._over = True
            print(f"{self._who}: {self._waited_for}; see {self.path}", file=sys.stderr, flush=True)
            self._write(self._waited_for)
            faulthandler.dump_traceback(self._file)

    def _write(self, event: str) -> None:
        print(strftime("%Y-%m-%d %H:%M:%S %z"), self._who, event, file=self._file, flush=True)

    def __exit__(self, *error: object) -> None:
        with self._changed:
            if self._over:
                return  # the stacks are written already: the process ends
            self._over = True
            self._changed.notify()
        faulthandler.cancel_dump_traceback_later()
        self._thread.join()
        self._file.truncate(self._size)
        self._file.close()
        with suppress(OSError):  # somebody removed it; another rank's file is in the folder
            if not _has_stacks(self.path):
                self.path.unlink()
                self.path.parent.rmdir()


def _has_stacks(path: Path) -> bool:
    """Whether a file holds stacks, and not only the lines of starts that were killed."""
    with path.open(encoding="utf-8", errors="replace") as file:
        return any(line.rstrip().endswith(TRACEBACK_END) for line in file)
