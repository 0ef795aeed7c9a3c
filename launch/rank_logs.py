"""What the ranks of this machine write: a log for each, and what of it the console shows.

The processes write to files, and the agent reads those. So a console that is slow or gone stops no
process, the log is whole when the agent is killed, and the agent can leave tracebacks out.

    rank_log=FILE   stdout and stderr of each rank go to its file; the console shows rank 0's
    rank_log=null   stdout stays the console's; stderr goes to a file and from there to the console;
                    the files stay if a rank crashes that has written to its own
"""

import codecs
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

from launch.traces import Condenser, has_trace, summary

POLL_S = 0.1
HOLD_S = 3.0  # after which a process that has written a traceback counts as going on
TAIL_BYTES = 2**16  # of a log in which the reason of an end is looked for


class RankLogs:
    """The logs of the ranks that this agent starts, from `with` to the end of its block.

    Attributes:
        pattern: the path of a log with %t in place of the rank.
        kept: whether the files were asked for; others are deleted unless `keep` is called.
    """

    def __init__(self, pattern: str | None) -> None:
        self.kept = pattern is not None
        self._directory = None if self.kept else tempfile.mkdtemp(prefix="launch-")
        self.pattern = pattern or f"{self._directory}/rank_%t.log"
        self._streams: list[_Stream] = []
        self._begins: dict[int, int] = {}  # where the last start of a rank begins in its log
        self._lock = threading.Lock()
        self._frozen = False
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._relay, name="rank logs", daemon=True)

    def __enter__(self) -> "RankLogs":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()
        if self._directory:
            shutil.rmtree(self._directory, ignore_errors=True)

    @property
    def arguments(self) -> tuple[str, str]:
        """What `launch.parent_death` is told: the file, and which streams go there."""
        return self.pattern, "both" if self.kept else "stderr"

    def path(self, rank: int) -> Path:
        """The log of a rank."""
        return Path(self.pattern.replace("%t", str(rank)))

    def watch(self, ranks: Iterable[int]) -> None:
        """Shows from now on what is written by these ranks, which are about to be started."""
        self._begins = {rank: _size(self.path(rank)) for rank in ranks}
        shown = [rank for rank in self._begins if self.shows(rank)]
        with self._lock:
            for stream in self._streams:
                stream.show(everything=not self._frozen)
            self._frozen = False
            target = sys.stdout if self.kept else sys.stderr
            self._streams = [_Stream(self.path(rank), target) for rank in shown]

    def shows(self, rank: int) -> bool:
        """Whether the console shows what a rank writes to stderr."""
        return rank == 0 or not self.kept

    def freeze(self) -> None:
        """Shows no traceback any more, because a process has crashed; `told` tells of it."""
        with self._lock:
            self._frozen = True

    def reason(self, rank: int) -> list[str]:
        """Why a process ended, in three lines at most; empty if the console has shown it."""
        text = self._tail(rank)
        return [] if self.shows(rank) and not has_trace(text) else summary(text)

    def keep(self, rank: int) -> bool:
        """Leaves the files for the user, if a rank has written to its own; says whether it has."""
        if not _size(self.path(rank)):
            return False
        self._directory = None
        return True

    def _tail(self, rank: int) -> str:
        """The end of a log, since the last start."""
        try:
            with self.path(rank).open("rb") as file:
                end = file.seek(0, os.SEEK_END)
                file.seek(max(self._begins.get(rank, 0), end - TAIL_BYTES))
                return file.read().decode(errors="replace")
        except OSError:
            return ""

    def _relay(self) -> None:
        while not self._done.wait(POLL_S):
            with self._lock:
                for stream in self._streams:
                    stream.show(everything=False, holding=self._frozen)
        with self._lock:
            for stream in self._streams:
                stream.show(everything=not self._frozen)


class _Stream:
    """A log that is read on from where it ended, and shown on the console."""

    def __init__(self, path: Path, console: TextIO) -> None:
        self._path = path
        self._console = console
        self._read = _size(path)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._condenser = Condenser(str(path))
        self._held_since = 0.0

    def show(self, *, everything: bool, holding: bool = False) -> None:
        """Shows what was written since the last time.

        Args:
            everything: also what is held back; the stream ends.
            holding: what is held back stays so.
        """
        held = self._condenser.holds
        text = self._condenser.feed(self._news())
        if self._condenser.holds and not held:
            self._held_since = time.monotonic()
        late = time.monotonic() - self._held_since > HOLD_S
        if self._condenser.holds and (everything or (late and not holding)):
            text += self._condenser.release()
        if everything:
            text += self._condenser.end()
        _write(self._console, text)

    def _news(self) -> str:
        try:
            with self._path.open("rb") as file:
                file.seek(self._read)
                content = file.read()
        except OSError:
            return ""
        self._read += len(content)
        return self._decoder.decode(content)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _write(console: TextIO, text: str) -> None:
    """Writes to the console, which may be closed or full: the processes go on without it."""
    if not text:
        return
    try:
        console.write(text)
        console.flush()
    except UnicodeEncodeError:
        _write(console, text.encode("ascii", "replace").decode())
    except (OSError, ValueError):
        pass


def log(text: str) -> None:
    """Writes a line of the agent's own."""
    _write(sys.stderr, f"launch: {text}\n")
