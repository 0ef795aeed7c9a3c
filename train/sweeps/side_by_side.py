"""Runs of a sweep side by side on this machine: `hydra/launcher=joblib` has a pool of processes.

The process of the sweep starts the pool and waits. What it does for the runs is here: signals reach
all of them, each one's output has a file of its own, and none outlives it.

    <folder>/<name>.json     the outcome of a run; see outcome.py
    <folder>/<number>.pid    a process of the pool; has the name of the run that it is at work on
    <folder>/<name>.alone    a run that was at work when a process of the pool died
    <folder>/turn            is locked by the runs at work, and by one alone for itself
    <folder>/stop            the sweep was told to end; no further run begins

When a process of the pool dies, the pool kills the others as well, and nobody can tell which one it
was. So the runs that were at work are begun again, one at a time; the one that dies then has
crashed. If they were too large to run side by side, all of them finish.
"""

import ctypes
import fcntl
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from time import monotonic
from types import FrameType

from conf.errors import reason_of
from conf.exit_codes import ExitCode
from conf.standard_streams import guard_standard_streams
from train.config import Config
from train.console import LOG, duration
from train.distributed.signals import exit_immediately, handled_signals
from train.sweeps.outcome import Outcome

STOP, TURN = "stop", "turn"
PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of linux/prctl.h


def is_stopped(folder: Path) -> bool:
    """Whether the sweep was told to end."""
    return (folder / STOP).exists()


def at_work(folder: Path) -> list[str]:
    """The runs that a pool which is no more was at work on; it is forgotten."""
    paths = list(folder.glob("*.pid"))
    names = [path.read_text(encoding="utf-8") for path in paths]
    # A child of a dead process may hold its lock for a while.
    for path in (*paths, folder / TURN):
        path.unlink(missing_ok=True)
    return sorted(name for name in names if name)


def leave_alone(folder: Path, name: str) -> None:
    """Have a run begin when no other is at work, and none begin beside it."""
    (folder / f"{name}.alone").touch()


@contextmanager
def _turn(folder: Path, name: str) -> Iterator[None]:
    """Waits for a run's turn, which lasts as long as this context."""
    with (folder / TURN).open("a") as file:
        alone = (folder / f"{name}.alone").exists()
        fcntl.flock(file, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield


@contextmanager
def passing_on_signals(folder: Path) -> Iterator[None]:
    """Within this context a signal to end reaches all runs, and no further one begins.

    The pool itself would kill its processes while they save. A second SIGINT is a
    KeyboardInterrupt: a person insists.
    """

    def pass_on(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        if number == signal.SIGINT and (folder / STOP).exists():
            raise KeyboardInterrupt
        (folder / STOP).touch()
        for path in folder.glob("*.pid"):
            with suppress(ProcessLookupError):
                os.kill(int(path.stem), number)

    handlers = {number: signal.signal(number, pass_on) for number in handled_signals()}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def as_member(config: Config, folder: Path, run: Callable[[], Outcome]) -> Outcome | None:
    """The outcome of a run in this process of a pool; None if it was not begun.

    A signal ends the run, and not the process: the pool would take that for a fault, and give up.
    """
    guard_standard_streams()
    _end_with_parent()
    # A terminal sends Ctrl-C to all processes of a group. Here it comes by way of the sweep's.
    with suppress(OSError):  # it leads a session of its own already
        os.setpgid(0, 0)
    own, begun, parent = folder / f"{os.getpid()}.pid", monotonic(), os.getppid()

    def leave_if_alone(*signal_and_frame: object) -> None:  # noqa: ARG001
        if os.getppid() != parent:  # nobody is left to give this process a run, or to end it
            os._exit(ExitCode.REQUEUE)

    try:
        with exit_immediately(), ExitStack() as stack:
            own.touch()
            stack.enter_context(_turn(folder, config.name))
            if is_stopped(folder):
                return None
            own.write_text(config.name, encoding="utf-8")
            try:
                with _output_in(config.run_dir / LOG, f"{config.name}: begins"):
                    outcome = run()
            except OSError as error:  # of the log; those of the run are an outcome already
                outcome = Outcome(config.name, ExitCode.CRASHED, f"no log: {reason_of(error)}")
    except (SystemExit, KeyboardInterrupt) as end:
        code = ExitCode.REQUEUE if isinstance(end, SystemExit) else ExitCode.INTERRUPTED
        outcome = Outcome(config.name, code, "it was told to end", ended=True)
    finally:
        # The signal may come once more, when there is nothing to end between two runs.
        for number in handled_signals():
            signal.signal(number, leave_if_alone)
        own.unlink(missing_ok=True)  # the sweep's process may be gone, and the folder with it
    _tell(outcome, duration(monotonic() - begun), config.run_dir / LOG)
    leave_if_alone()
    return outcome


def _end_with_parent() -> None:
    """Have this process told to end when the sweep's dies, so that nothing goes on unseen."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGTERM)


def _tell(outcome: Outcome, took: str, log: Path) -> None:
    """Say in one line how a run has ended."""
    if outcome.ended:
        text = f"{outcome.name}: ended before its end"
    elif outcome.code:
        text = f"{outcome.name}: failed: {outcome.reason}; see {log}"
    else:
        text = f"{outcome.name}: finished after {took}"
    _print(text)


def _print(line: str) -> None:
    """Print a line at once, because other processes print to the same place."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


@contextmanager
def _output_in(path: Path, title: str) -> Iterator[None]:
    """Within this context all that this process prints is added to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _print(f"{title}; its output is in {path}")
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    before = os.dup(1), os.dup(2)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, descriptor in enumerate(before, 1):
            os.dup2(descriptor, number)
            os.close(descriptor)
