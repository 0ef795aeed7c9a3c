"""Processes that start without the seconds of their imports: forked from one that has made them."""

import atexit
import multiprocessing
import os
import runpy
import shutil
import signal
import sys
import traceback
import warnings
from collections.abc import Mapping
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from subprocess import TimeoutExpired
from tempfile import mkdtemp

import pytest

ROOT = Path(__file__).parents[1]


def fork_server() -> ForkServerContext:
    """Where processes are forked from: one that has imported `tests.train.preloaded`.

    A rank starts in 0.1 s then. One that imports for itself takes 4 s, or 8 s with DeepSpeed.
    Python has one such server for a process of tests, so all its tests share it.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.train.preloaded"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)  # it imports from there alone
        forkserver.ensure_running()
    return context


class Command:
    """A script that runs as if Python had been started with it; like a `Popen`.

    Args:
        strict: whether its warnings are errors.

    Attributes:
        returncode: None as long as it runs.
    """

    def __init__(
        self,
        script: Path,
        *arguments: str,
        cwd: Path,
        env: Mapping[str, str] | None = None,
        strict: bool = True,
    ) -> None:
        self._folder = Path(mkdtemp())
        self._streams = [self._folder / name for name in ("output", "errors")]
        variables = dict(os.environ if env is None else env)
        given = ([str(script), *arguments], cwd, variables, self._streams, strict)
        self._process = fork_server().Process(target=_run, args=given)
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        """The return code; None if it still runs."""
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it wrote to stdout and to stderr, when it has ended; to be called once.

        Raises:
            TimeoutExpired: it has not ended after so many seconds; it is killed.
        """
        self._process.join(timeout)
        if self.returncode is None:
            assert timeout is not None
            self.kill()  # Python would wait for it at its own end
            raise TimeoutExpired(str(self._process), timeout)
        output, errors = (path.read_text() for path in self._streams)
        shutil.rmtree(self._folder)
        return output, errors


def _run(
    command: list[str], cwd: Path, env: dict[str, str], streams: list[Path], strict: bool
) -> None:
    """In the new process: runs a script as Python does."""
    for number, path in enumerate(streams, start=1):
        with path.open("w") as file:
            os.dup2(file.fileno(), number)
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", closefd=False)  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", buffering=1, closefd=False)  # type: ignore[misc]
    os.chdir(cwd)
    os.environ.clear()
    os.environ |= env
    sys.argv[:] = command
    sys.path.insert(0, str(Path(command[0]).resolve().parent))
    if strict:
        warnings.simplefilter("error")
    try:
        runpy.run_path(command[0], run_name="__main__")
    except KeyboardInterrupt:
        traceback.print_exc()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except Exception:
        traceback.print_exc()
        sys.exit(1)
    finally:
        atexit._run_exitfuncs()  # a process that was forked would end without
