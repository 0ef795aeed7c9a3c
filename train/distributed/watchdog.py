"""An end to waiting: a process that hangs writes down where, and ends."""

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
"""Seconds between the writing of stacks and the end. The first rank to end breaks what the others
wait in; each has written its own stacks by then, however far apart their deadlines are."""


class Watchdog:
    """While it is entered, the process ends with code 1 when a deadline has passed.

        pet     pet     pet                  stacks     stacks again, end with code 1
         |-------|-------|------ step_timeout ---|-- LINGER_S --|

    The stacks of all threads go to `<directory>/stacks/rank_<rank>.txt`, after those of earlier
    starts. The first ones need Python; the second ones and the end come from a thread in C, also
    if the main thread is stuck in C and holds the interpreter's lock.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, directory: Path, rank: int, step_timeout: float) -> None:
        self.path = directory / "stacks" / f"rank_{rank}.txt"
        self.step_timeout = step_timeout
        self._who = f"rank {rank}, process {os.getpid()} on {socket.gethostname()}"
        self._changed = Condition()
        self._waited_for = ""
        self._over = True  # nothing is awaited: not entered, left, or expired

    def __enter__(self) -> "Watchdog":
        self._over = False
        self._deadline = self._leave_at = inf
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[str] = self.path.open("a", encoding="utf-8")
        self._size = self._file.tell()
        self._write("started")
        self.heartbeat()
        self._thread = Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def heartbeat(self) -> None:
        """Begin a step: it has `step_timeout` seconds, or less if the process is to leave."""
        with self._changed:
            self._arm(monotonic() + self.step_timeout, f"no step for {self.step_timeout:g} s")

    def exit_within(self, seconds: float) -> None:
        """Leave the process so many seconds from now on at most; from any thread."""
        with self._changed:
            if monotonic() + seconds < self._leave_at:
                self._leave_at = monotonic() + seconds
                self._write(f"has {seconds:g} s to leave")
                self._arm(self._leave_at, f"not gone {seconds:g} s after it had to leave")
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
                return  # what has begun to end does end
            self._over = True
            self._changed.notify()
        faulthandler.cancel_dump_traceback_later()
        self._thread.join()
        self._file.truncate(self._size)
        self._file.close()
        if not self._size:
            self.path.unlink()
            with suppress(OSError):  # another rank's file is there
                self.path.parent.rmdir()
