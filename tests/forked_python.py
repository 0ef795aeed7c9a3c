"""Python commands that start without the seconds of their imports, for tests of whole processes.

    with forked_python():
        subprocess.run([sys.executable, "train/main.py", ...])

`subprocess` then forks the command from a process that has imported what it needs. To everybody it
is what it would have been: a child of the process that started it, with a pid, a session, signals,
files, variables and an exit code of its own (tests/test_forked_python.py compares them). What it
starts itself is forked, too: ranks, and the workers of multiprocessing and joblib. A command that
needs a Python of its own, as with `-S`, is started as ever.

    this process ── server ── in between ── command

The one in between ends at once. Linux then gives its child to the next process above that has asked
for orphans, and at this moment that is this process.

What a fork does not show: that imports work, that they are quick, and that Python can free all that
was imported. Hashes of strings are the same in all forks of a server. So some tests start a Python.

What libraries read of the variables when they are imported (HOME, TMPDIR, HF_*, TORCH*, TRITON_*,
OMP_NUM_THREADS), they have read of the server's. A command has its own in `os.environ`, but a test
of what a library makes of one of these at its import must start a Python. And `os.execvp` of a
Python goes on in the same process: threads, functions of `atexit`, open files, and what was
imported or changed in modules stay.
"""

import _posixsubprocess
import atexit
import builtins
import ctypes
import fcntl
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.process
import os
import pickle
import re
import runpy
import signal
import socket
import subprocess
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from pathlib import Path
from time import sleep
from types import ModuleType
from typing import Any, NamedTuple, NoReturn

import numpy as np
import pytest

from tests.fork_server import fork_server

SET_PARENT_DEATH_SIGNAL, SET_NAME, SET_SUBREAPER = 1, 15, 36  # of linux/prctl.h
NAME = b"fork-server"
"""What Linux calls the process that commands are forked from."""

FLAGS = {"-u", "-I", "-B"}
LOCALE = ("LC_ALL", "LC_CTYPE", "LANG")
VARIABLES = {
    *("PYTHONPATH", "PYTHONUNBUFFERED"),
    *("PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX"),
}
"""Python's options and variables that a process can follow that has imported everything."""

OF_MULTIPROCESSING = re.compile("resource_tracker|forkserver")
"""Processes that it starts for its own needs."""

FIRST_PROCESS = multiprocessing.current_process()
"""In the server and its forks: the one of a Python that was started as such."""

prctl: Any = ctypes.CDLL(None).prctl if sys.platform == "linux" else None


class Command(NamedTuple):
    """What a new process is.

    Attributes:
        words: with the Python that runs it.
        files: the numbers of those that it inherits, from 0 to 2 on.
        group: of processes that it belongs to; None for one, and a session, of its own.
        ignored: signals that it ignores from its beginning.
        blocked: signals that wait from its beginning.
    """

    words: list[str]
    cwd: str
    variables: dict[str, str]
    group: int | None
    files: list[int]
    ignored: list[int]
    blocked: list[int]


class Script(NamedTuple):
    """What Python runs, from its command line.

    Attributes:
        kind: -m, -c, or empty for a file.
        text: the module, the program or the file.
        strict: whether warnings are errors.
    """

    kind: str
    text: str
    arguments: list[str]
    strict: bool
    unbuffered: bool


def read_words(words: list[str]) -> Script | None:
    """The command line of a Python; None if it needs a Python of its own."""
    if words[0] != sys.executable:
        return None
    rest, strict, unbuffered = words[1:], False, False
    while rest and rest[0].startswith("-"):
        option, *rest = rest
        if option in ("-m", "-c") and rest:
            return Script(option, rest[0], rest[1:], strict, unbuffered)
        if option == "-W" and rest[:1] == ["error"]:
            rest, strict = rest[1:], True
        elif option == "-Werror":
            strict = True
        elif option in FLAGS:
            unbuffered |= option == "-u"
        else:
            return None
    return Script("", rest[0], rest[1:], strict, unbuffered) if rest else None


def can_fork(words: list[str], variables: Mapping[str, str]) -> bool:
    """Whether a process that has imported everything can do what a new Python would."""
    own = {name for name in variables if name.startswith("PYTHON")} - VARIABLES
    same_locale = all(variables.get(name) == os.environ.get(name) for name in LOCALE)
    script = read_words(words)
    serves = script is not None and OF_MULTIPROCESSING.search(script.text)
    folders = variables.get("PYTHONPATH", "").split(os.pathsep)
    customized = any(Path(folder, "sitecustomize.py").exists() for folder in folders)
    return script is not None and not (own or serves or customized) and same_locale


def is_server(process: int) -> bool:
    """Whether commands are forked from a process."""
    try:
        return Path(f"/proc/{process}/comm").read_bytes().strip() == NAME
    except OSError:
        return False


# The side that starts commands


class Server:
    """A process that has imported everything, below this one, and forks commands."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def close(self) -> None:
        """Let it end."""
        self._connection.close()

    def start(self, command: Command, files: list[int]) -> int:
        """Start a command, with these files, as a child of this process; returns its pid."""
        given = pickle.dumps(command)
        with self._lock:
            prctl(SET_SUBREAPER, 1, 0, 0, 0)
            try:
                size = len(given).to_bytes(8, "big")
                socket.send_fds(self._connection, [size], files)
                self._connection.sendall(given)
                return int.from_bytes(_receive(self._connection, 9)[:8], "big")
            finally:
                prctl(SET_SUBREAPER, 0, 0, 0, 0)


_server: list[Server] = []  # of this process
_for_good = pytest.MonkeyPatch()  # in a fork


def _own_server() -> Server:
    if not _server:
        start_server()
    return _server[0]


def start_server(prepare: Callable[[], object] | None = None) -> None:
    """Start the process that commands of this one are forked from.

    Args:
        prepare: what it does first of all, of the top level of a module.
    """
    assert not _server, "it has one"
    ours, theirs = socket.socketpair()
    process = fork_server().Process(target=_serve, args=(theirs, prepare), daemon=True)
    process.start()
    theirs.close()
    atexit.register(ours.close)
    _server.append(Server(ours))


@contextmanager
def forked_python() -> Iterator[None]:
    """Within it, `subprocess` and pools of processes fork the Python commands that they start."""
    with pytest.MonkeyPatch.context() as patch:
        _fork_what_is_started(patch)
        yield


def has_server() -> bool:
    """Whether there is a process already that has imported everything."""
    return bool(_server)


def start_as_ever() -> None:
    """From now on a process that was forked is as one that was not: what it starts is a Python,
    and within `forked_python` it is forked from a server that has imported what commands need."""
    _for_good.undo()
    while _server:
        _server.pop().close()


def _fork_what_is_started(patch: pytest.MonkeyPatch) -> None:
    forking = _forking(_posixsubprocess.fork_exec)
    patch.setattr(
        _posixsubprocess, "fork_exec", forking
    )  # multiprocessing and joblib call it there
    patch.setattr(subprocess, "_fork_exec", forking)


def _forking(fork_exec: Callable[..., int]) -> Callable[..., int]:
    """The function with which Python starts processes, but one that forks what it can."""

    def start(*given: Any) -> int:
        args, _, close_fds, keep, cwd, env, *more = given
        read_in, _, _, write_out, _, write_error, _, tell, _, session, *more = more
        words = [os.fsdecode(word) for word in args]
        folder = os.getcwd() if cwd is None else os.fsdecode(cwd)
        pairs = os.environb.items() if env is None else (text.split(b"=", 1) for text in env)
        variables = {os.fsdecode(name): os.fsdecode(value) for name, value in pairs}
        same_user = tuple(more[:6]) == (-1, None, None, None, -1, None)  # and no preexec_fn
        usual = same_user and close_fds and os.path.isdir(folder)
        if not (usual and can_fork(words, variables)):
            return fork_exec(*given)
        standard = (read_in, write_out, write_error)
        files = {n: n if file == -1 else file for n, file in enumerate(standard)}
        files |= {file: file for file in keep if file != tell}
        command = Command(
            words=words,
            cwd=folder,
            variables=variables,
            files=list(files),
            group=None if session else os.getpgid(0),
            ignored=[n for n in signal.valid_signals() if signal.getsignal(n) is signal.SIG_IGN],
            blocked=list(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
        )
        return _own_server().start(command, list(files.values()))

    return start


# The server


def _serve(connection: socket.socket, prepare: Callable[[], object] | None = None) -> None:
    """Fork commands until the process that asks for them is gone."""
    prctl(SET_NAME, NAME, 0, 0, 0)
    if prepare is not None:
        prepare()
    # A signal to the group is not for this process. One to a new process waits until it is ready.
    others = signal.valid_signals() - {signal.SIGTERM}  # with which multiprocessing ends this one
    signal.pthread_sigmask(signal.SIG_SETMASK, others)
    while True:
        size, files, *_ = socket.recv_fds(connection, 8, 250)
        if not size:
            return
        command = pickle.loads(_receive(connection, int.from_bytes(size, "big")))
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        between = os.fork()
        if not between:
            between = os.getpid()
            if pid := os.fork():
                connection.sendall(pid.to_bytes(8, "big"))
                os._exit(0)
            while os.getppid() == between:
                sleep(0.0005)
            try:
                _become(command, files)
            except BaseException:
                os.write(2, traceback.format_exc().encode())
            finally:
                os._exit(1)
        for file in files:
            os.close(file)
        os.waitpid(between, 0)
        connection.sendall(b"!")  # its child has its new parent
        signal.pthread_sigmask(signal.SIG_SETMASK, others)


def _receive(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = connection.recv(size - len(data))
        assert part, "the other side is gone"
        data += part
    return data


# The new process


class _ReplacedError(BaseException):
    """The process goes on as another command, as after `exec`."""

    def __init__(self, words: list[str]) -> None:
        self.words = words


def _become(command: Command, files: list[int]) -> NoReturn:
    """Do and be in this process what a Python would that was started with the command."""
    _inherit(dict(zip(command.files, files, strict=True)))
    if command.group is None:
        os.setsid()
    else:
        os.setpgid(0, command.group)
    os.chdir(command.cwd)
    os.environ.clear()
    os.environ |= command.variables
    _forget_the_server()
    start_own_server()
    _take_signals(command)
    np.random.seed()  # as `random` does by itself in a fork
    words, path = command.words, list(sys.path)
    while True:
        try:
            sys.path[:] = path
            _exit(_run(words))
        except _ReplacedError as replaced:
            words = replaced.words


def _inherit(files: Mapping[int, int]) -> None:
    """Give each file its number, and close all others."""
    safe = max(*files, *files.values()) + 1
    moved = {number: fcntl.fcntl(file, fcntl.F_DUPFD, safe) for number, file in files.items()}
    for number, file in moved.items():
        os.dup2(file, number)
    _close_all_but(files)


def _close_all_but(files: Collection[int]) -> None:
    first = 0
    for number in [*sorted(files), os.sysconf("SC_OPEN_MAX")]:
        if first < number:  # an empty range would be that of all files
            os.closerange(first, number)
        first = number + 1


def _forget_the_server() -> None:
    """Nothing is left of the multiprocessing of which this process was one."""
    prctl(SET_NAME, b"python", 0, 0, 0)
    multiprocessing.process._current_process = FIRST_PROCESS  # type: ignore[attr-defined]
    multiprocessing.process._parent_process = None  # type: ignore[attr-defined]
    multiprocessing.forkserver._forkserver.__init__()  # type: ignore[attr-defined, misc]
    multiprocessing.resource_tracker._resource_tracker.__init__()  # type: ignore[attr-defined, misc]


def start_own_server() -> None:
    """What this process starts will be forked, too, as children of its own."""
    ours, theirs = socket.socketpair()
    if not os.fork():
        _close_all_but([theirs.fileno()])
        for _ in range(3):  # its standard streams
            os.open(os.devnull, os.O_RDWR)
        _serve(theirs)
        os._exit(0)
    theirs.close()
    # Out of the way of small numbers, which are those of a new Python's files.
    high = fcntl.fcntl(ours, fcntl.F_DUPFD_CLOEXEC, 500)
    ours.close()
    _server.append(Server(socket.socket(fileno=high)))
    _fork_what_is_started(_for_good)
    _for_good.setattr(os, "execvp", _exec)


def _take_signals(command: Command) -> None:
    """Signals do what they do to a new Python."""
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        if number in command.ignored or number in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_IGN)
        elif number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)
        else:
            signal.signal(number, signal.SIG_DFL)
    signal.set_wakeup_fd(-1)
    signal.pthread_sigmask(signal.SIG_SETMASK, command.blocked)


def _exec(program: str, words: list[str]) -> NoReturn:
    """`os.execvp`."""
    if program == words[0] and can_fork(words, os.environ):
        raise _ReplacedError(words)
    os.execvpe(program, words, os.environ)


def _run(words: list[str]) -> int:
    """Run what the command line says; returns the exit code."""
    script = read_words(words)
    assert script is not None
    _open_streams(script.unbuffered or "PYTHONUNBUFFERED" in os.environ)
    sys.orig_argv[:] = words
    sys.argv[:] = [script.kind or script.text, *script.arguments]
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    folders = {"-c": "", "-m": os.getcwd(), "": str(Path(script.text).resolve().parent)}
    sys.path[:0] = [folders[script.kind], *filter(None, given)]
    if script.strict:
        warnings.simplefilter("error")
        sys.warnoptions.append("error")  # as options of what this process starts
    main = sys.modules["__main__"] = ModuleType("__main__")
    main.__dict__["__builtins__"] = builtins
    try:
        if script.kind == "-m":
            runpy._run_module_as_main(script.text)  # type: ignore[attr-defined]
        elif script.kind == "-c":
            exec(compile(script.text, "<string>", "exec"), vars(main))
        else:
            main.__file__ = script.text
            exec(compile(Path(script.text).read_bytes(), script.text, "exec"), vars(main))
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        _report(error)
        return -signal.SIGINT
    except Exception as error:
        _report(error)
        return 1
    return 0


def _report(error: BaseException) -> None:
    """Print the traceback, from the script on."""
    own = error.__traceback__
    assert own is not None
    sys.excepthook(type(error), error.with_traceback(own.tb_next), own.tb_next)


def _exit(code: int) -> NoReturn:
    """End as a Python does, but for freeing what was imported, which takes 0.3 s."""
    threading._shutdown()  # type: ignore[attr-defined]  # waits for the other threads
    atexit._run_exitfuncs()
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        try:
            if not stream.closed:
                stream.flush()
        except (OSError, ValueError) as error:
            shown = f"<_io.TextIOWrapper name='<{name}>' mode='w' encoding='{stream.encoding}'>"
            with suppress(OSError, ValueError):
                told = f"Exception ignored in: {shown}\n{type(error).__name__}: {error}"
                print(told, file=sys.stderr)
            code = code if code == -signal.SIGINT else 120
    if code == -signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code & 0xFF)


def _open_streams(unbuffered: bool) -> None:
    sys.stdin = sys.__stdin__ = os.fdopen(0, encoding="utf-8", closefd=False)  # type: ignore[misc]
    for name, number in (("stdout", 1), ("stderr", 2)):
        file = os.fdopen(number, "wb", 0 if unbuffered else -1, closefd=False)
        each_line = not unbuffered and (number == 2 or os.isatty(number))
        settings = {"line_buffering": each_line, "write_through": unbuffered}
        errors = getattr(sys, name).errors  # which depend on the locale
        stream = TextIOWrapper(file, "utf-8", errors, **settings)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
