"""One holder at a time of a run's directory.

Two processes that trained in one directory would overwrite each other's settings and checkpoints.
So whoever opens a run for writing first makes `lock.json` there, and removes it at the end:

    lock.json           who holds the directory; its modification time is renewed every BEAT_S
    lock.<token>.json   the lock of a process that is just taking over from the dead holder <token>

Locks of the kernel (flock, fcntl) are not used: on file systems that machines share they may be
missing, or may hold on one machine only, and nothing says so. What works everywhere, NFS from
version 3 on included, is to create a file that must not exist (O_EXCL), and to rename one.

A holder that died does not block. On its own machine, it is dead if no process has its number and
its start time. Elsewhere its heartbeat tells. It is watched until it beats (the holder lives) or
has not done so for LEASE_S (it is dead); whoever starts on another machine after a crash waits that
long at most. A holder that was stopped for longer, and whose directory was taken over since, finds
that out with its next heartbeat and ends at once, without saving.

Taking over is safe against others who try it at the same time: a lock names its holder by a random
token, and only one process can create the file `lock.<token>.json`. The holder is always the last
in the chain  lock.json -> lock.<token of that>.json -> ...
"""

import json
import os
import secrets
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import random
from socket import gethostname
from threading import Event, Thread
from threading import Lock as ThreadLock
from time import monotonic, sleep, strftime, time
from typing import NamedTuple

from rich.console import Console

from conf.errors import ConfigError, Problem, reason_of
from conf.exit_codes import ExitCode
from train.distributed.process_groups import ProcessGroups, raise_on_all_ranks

LOCK = "lock.json"

BEAT_S = 2.0
"""Seconds between two heartbeats; a living holder on another machine is noticed after one."""

LEASE_S = 30.0
"""Seconds without a heartbeat after which a holder on another machine counts as dead."""

WATCH_S = 0.2
"""Seconds between two looks at the heartbeat of another."""


@dataclass(frozen=True)
class Holder:
    """A process that holds a run's directory.

    Attributes:
        host: its machine's name.
        place: the start of the machine and the namespace in which the number of the process means
            something, as two containers may have equal names; empty if they are not known.
        process: its number.
        started: when the process was started, in the kernel's own count; None if it is not known,
            as outside Linux.
        since: when it took the directory.
        token: a random name of this very lock.
    """

    host: str
    place: str
    process: int
    started: str | None
    since: str
    token: str = field(default_factory=lambda: secrets.token_hex(8))

    @classmethod
    def this_process(cls) -> "Holder":
        process = os.getpid()
        since = strftime("%Y-%m-%d %H:%M:%S %z")
        return cls(gethostname(), _place(), process, _start_of(process), since)

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}, since {self.since}"

    @property
    def lives(self) -> bool | None:
        """Whether the process is still there; None if only its heartbeat can tell."""
        if not self.place or (self.host, self.place) != (gethostname(), _place()):
            return None
        if (started := _start_of(self.process)) is not None:
            return started == self.started
        try:
            os.kill(self.process, 0)
        except PermissionError:  # another user's process, which /proc may hide
            return None
        except ProcessLookupError:
            pass
        return False


class _Link(NamedTuple):
    """A file of the chain; `holder` is None if a crash has left the file torn."""

    path: Path
    token: str
    holder: Holder | None


@contextmanager
def hold_run_dir(directory: Path, groups: ProcessGroups, console: Console) -> Iterator[None]:
    """Hold the directory for the ranks of this start; it is made if it does not exist.

    Within the context the same process may enter it again, which changes nothing.

    Raises:
        ConfigError: another process holds it; or it cannot be written.
    """

    def acquire() -> RunLock | None:
        if not groups.is_rank_zero:
            return None
        return RunLock.acquire(directory, lambda text: console.print(text, markup=False))

    lock = raise_on_all_ranks(groups, acquire)
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def holder_of(directory: Path) -> Holder | None:
    """Who holds a run's directory, as far as a look can tell; None if nobody does.

    On another machine the last heartbeat counts, by the clock of this one.
    """
    chain = _chain(directory)
    holder = chain[-1].holder if chain else None
    if holder is None or holder.lives is False:
        return None
    beat = _beat_of(chain[-1].path)
    alive = holder.lives or (beat is not None and time() - beat <= LEASE_S)
    return holder if alive else None


_HELD: "dict[Path, RunLock]" = {}
"""What this process holds, by real path."""


class RunLock:
    """A run's directory that this process holds."""

    def __init__(self, directory: Path) -> None:
        # Not relative, because the current directory may change.
        self.directory = directory.absolute()
        self.path = self.directory / LOCK
        self._key = directory.resolve()
        self._shown = directory
        self._made: list[Path] = []
        self._depth = 1
        self._own = Holder.this_process()
        self._changing = ThreadLock()  # the heartbeat must not run while the lock moves
        self._over = Event()
        self._thread = Thread(target=self._beat, name="run-lock", daemon=True)

    @classmethod
    def acquire(cls, directory: Path, tell: Callable[[str], None] = print) -> "RunLock":
        """Take the directory, or take it over from a holder that died.

        Args:
            directory: of the run.
            tell: is given what takes time.

        Raises:
            ConfigError: another process holds it; or it cannot be written.
        """
        lock = _HELD.get(directory.resolve())
        if lock is not None and lock._own.process == os.getpid():  # and not a fork of its holder
            lock._depth += 1
            return lock
        lock = cls(directory)
        lock._enter(tell)
        _HELD[lock._key] = lock
        lock._thread.start()
        return lock

    def release(self) -> None:
        """Give the directory back; one that was made and in which there is nothing is removed."""
        self._depth -= 1
        if self._depth:
            return
        self._over.set()
        self._thread.join()
        del _HELD[self._key]
        with suppress(OSError):
            if self._is_own():
                self.path.unlink()
        _remove_empty(self._made)

    @classmethod
    def follow(cls, directory: Path, moved: Path) -> None:
        """The directory was renamed to `moved`: hold a new one in its place.

        Raises:
            ConfigError: another process was faster; or it cannot be written.
        """
        lock = _HELD.get(directory.resolve())
        if lock is None:
            return
        with lock._changing:
            lock._enter(print)
            (moved / LOCK).unlink(missing_ok=True)

    def _enter(self, tell: Callable[[str], None]) -> None:
        """Make the directory and take it, or leave nothing of it behind."""
        try:
            self._made = _make(self.directory)
            self._take(tell)
        except BaseException as error:
            _remove_empty(self._made)
            if isinstance(error, OSError):
                hint = "choose another run.dir, or make room there"
                reason = f"cannot be written ({reason_of(error)})"
                problem = Problem("run.dir", str(self._shown), reason, hint)
                raise ConfigError([problem]) from error
            raise

    def _take(self, tell: Callable[[str], None]) -> None:
        while True:
            chain = _chain(self.directory)
            if chain and not _is_dead(chain[-1], tell):
                last = chain[-1]  # which may have been given its name by now
                raise _in_use(self._shown, last.holder or _read_if_there(last.path))
            path = _after(chain, self.directory)
            try:
                _create(path, self._own)
            except FileExistsError:
                if path.is_symlink() and not path.exists():
                    path.unlink(missing_ok=True)  # a link to nowhere is nobody's lock
                sleep(random() * WATCH_S)  # another was faster, or is about to give up
                continue
            # Whoever took over before may have removed the chain that this file continues.
            expected = [*(link.token for link in chain), self._own.token]
            if [link.token for link in _chain(self.directory)] == expected:
                break
            path.unlink(missing_ok=True)
        if chain:
            path.replace(self.path)
        for left in self.directory.glob("lock.*.json"):  # others have died while taking over
            if self._own.token not in left.name:
                left.unlink(missing_ok=True)

    def _is_own(self) -> bool:
        return [link.token for link in _chain(self.directory)] == [self._own.token]

    def _beat(self) -> None:
        while not self._over.wait(BEAT_S):
            with self._changing, suppress(OSError):  # a disk that fails may answer the next time
                if self._is_own():
                    os.utime(self.path)  # by the clock of the file server
                elif chain := _chain(self.directory):
                    self._lost(chain[-1].holder)
                elif self.directory.is_dir():  # somebody has removed the file
                    _create(self.path, self._own)

    def _lost(self, holder: Holder | None) -> None:
        """End this process: whatever it wrote from here on would damage another run's files."""
        who = holder or "another process"
        print(
            f"{self.directory}: this process was stopped for more than {LEASE_S:g} s, and {who}, "
            "has taken the directory over; ending without saving",
            file=sys.stderr,
            flush=True,
        )
        os._exit(ExitCode.CRASHED)


def _chain(directory: Path) -> list[_Link]:
    """The locks in a directory, of which the last one counts; empty if nobody holds it."""
    chain: list[_Link] = []
    while True:
        path = _after(chain, directory)
        try:
            holder = _read(path)
        except FileNotFoundError:
            return chain
        chain.append(_Link(path, holder.token if holder else f"torn{len(chain)}", holder))


def _read(path: Path) -> Holder | None:
    """Who a lock names; None if a crash has left the file torn, or it is being written."""
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        return Holder(**json.loads(text))
    except (ValueError, TypeError):
        return None


def _read_if_there(path: Path) -> Holder | None:
    try:
        return _read(path)
    except FileNotFoundError:
        return None


def _after(chain: list[_Link], directory: Path) -> Path:
    """The file that continues a chain."""
    return directory / (f"lock.{chain[-1].token}.json" if chain else LOCK)


def _create(path: Path, holder: Holder) -> None:
    with path.open("x", encoding="utf-8") as file:
        file.write(json.dumps(asdict(holder), indent=1) + "\n")


def _is_dead(link: _Link, tell: Callable[[str], None]) -> bool:
    """Whether the holder is gone; looks at its heartbeat where nothing else can tell."""
    lives = link.holder.lives if link.holder else None
    if lives is not None:
        return not lives
    beat = _beat_of(link.path)
    # Usually the clocks are right, and an old lock is seen at once.
    if beat is None or (time() - beat > LEASE_S and _now_there(link.path) - beat > LEASE_S):
        return True
    who = link.holder or "a process that has not written its name"
    tell(
        f"{link.path.parent} was held by {who}; looking whether it is alive (at most {LEASE_S:g} s)"
    )
    end = monotonic() + LEASE_S
    while monotonic() < end:
        sleep(WATCH_S)
        if (now := _beat_of(link.path)) != beat:
            return now is None
        # The name may have come after the look, within the same tick of the file server's clock.
        if link.holder is None and (holder := _read_if_there(link.path)) is not None:
            return _is_dead(link._replace(holder=holder), tell)
    return True


def _beat_of(path: Path) -> float | None:
    """The time of the last heartbeat, by the clock of the file server; None if the lock is gone."""
    try:
        with path.open("rb") as file:  # NFS asks its server at an open, not at a stat
            return os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return None


def _now_there(path: Path) -> float:
    """The time by the clock of the file server, which made the heartbeats' times, too."""
    probe = path.with_name(f".{LOCK}.{secrets.token_hex(4)}.partial")
    try:
        probe.touch()
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _start_of(process: int) -> str | None:
    """When a process was started, in clock ticks since the machine's start; None: not known.

    A process that has died, and whose parent has not asked for its exit code yet, has none.
    """
    try:
        stat = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # See proc(5); the name in parentheses, which comes second, may hold spaces.
    state, *others = stat.rpartition(")")[2].split()
    return None if state in "ZX" else others[18]


def _place() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _make(directory: Path) -> list[Path]:
    """Make a directory; returns those of its path that did not exist, the innermost first."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    return missing


def _remove_empty(directories: list[Path]) -> None:
    with suppress(OSError):
        for directory in directories:
            directory.rmdir()


def _in_use(directory: Path, holder: Holder | None) -> ConfigError:
    who = holder or "a process that has not written its name"
    expected = f"is in use by {who}"
    hint = "wait for its end, stop it, or choose another run.name or run.dir"
    return ConfigError([Problem("run.dir", str(directory), expected, hint)])
