"""Python commands that start without the seconds of their imports, for tests of whole processes.

    with forked_python():
        subprocess.run([sys.executable, "train/main.py", ...])

`subprocess` then forks the command from a process that has imported what it needs. To everybody it
is what it would have been: a child of the process that started it, with a pid, a session, signals,
streams, variables and an exit code of its own (tests/test_forked_python.py compares them). A
`python -m launch` that is forked forks its ranks, too. A command that needs a Python of its own
(`-S`, or files that it inherits) is started as ever.

    this process ── server ── in between ── command

The one in between ends at once. Linux then gives its child to the next process above that has asked
for orphans, and at this moment that is this process.

What a fork does not show: that imports work, that they are quick, and that Python can free all that
was imported. Hashes of strings are the same in all forks of a server. So some tests start a Python.
"""

import atexit
import builtins
import ctypes
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.process
import os
import pickle
import runpy
import signal
import socket
import subprocess
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from pathlib import Path
from time import sleep
from types import ModuleType
from typing import Any, NamedTuple, NoReturn

from tests.fork_server import fork_server

SET_PARENT_DEATH_SIGNAL, SET_NAME, SET_SUBREAPER = 1, 15, 36  # of linux/prctl.h
NAME = b"fork-server"
"""What Linux calls the process that commands are forked from."""

FLAGS = {"-u", "-I", "-B"}
LOCALE = ("LC_ALL", "LC_CTYPE", "LANG")
VARIABLES = {"PYTHONPATH", "PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE"}
"""Python's options and variables that a process can follow that has imported everything."""

FIRST_PROCESS = multiprocessing.current_process()
"""In the server and its forks: the one of a Python that was started as such."""

prctl = ctypes.CDLL(None).prctl


class Command(NamedTuple):
    """What a new process is.

    Attributes:
        words: with the Python that runs it.
        group: of processes that it belongs to; None for one, and a session, of its own.
        ignored: signals that it ignores from its beginning.
        blocked: signals that wait from its beginning.
    """

    words: list[str]
    cwd: str
    variables: dict[str, str]
    group: int | None
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
        elif option in FLAGS:
            unbuffered |= option == "-u"
        else:
            return None
    return Script("", rest[0], rest[1:], strict, unbuffered) if rest else None


def can_fork(words: list[str], variables: Mapping[str, str]) -> bool:
    """Whether a process that has imported everything can do what a new Python would."""
    own = {name for name in variables if name.startswith("PYTHON")} - VARIABLES
    same_locale = all(variables.get(name) == os.environ.get(name) for name in LOCALE)
    return not own and same_locale and read_words(words) is not None


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

    def start(self, command: Command, streams: tuple[int, int, int]) -> int:
        """Start a command as a child of this process; returns its pid."""
        given = pickle.dumps(command)
        with self._lock:
            prctl(SET_SUBREAPER, 1, 0, 0, 0)
            try:
                size = len(given).to_bytes(8, "big")
                socket.send_fds(self._connection, [size], streams)
                self._connection.sendall(given)
                return int.from_bytes(_receive(self._connection, 9)[:8], "big")
            finally:
                prctl(SET_SUBREAPER, 0, 0, 0, 0)


_server: list[Server] = []  # of this process


def _own_server() -> Server:
    if not _server:
        ours, theirs = socket.socketpair()
        process = fork_server().Process(target=_serve, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        _server.append(Server(ours))
    return _server[0]


@contextmanager
def forked_python() -> Iterator[None]:
    """Within it, `subprocess` forks the Python commands that it starts."""
    before = subprocess._fork_exec  # type: ignore[attr-defined]
    subprocess._fork_exec = _forking(before)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        subprocess._fork_exec = before  # type: ignore[attr-defined]


def _forking(fork_exec: Any) -> Any:
    """`subprocess._fork_exec` that forks what it can."""

    def start(*given: Any) -> int:
        args, _, close_fds, keep, cwd, env, *more = given
        read_in, _, _, write_out, _, write_error, _, tell, restore, session, *more = more
        words = [os.fsdecode(word) for word in args]
        folder = os.getcwd() if cwd is None else os.fsdecode(cwd)
        pairs = os.environb.items() if env is None else (text.split(b"=", 1) for text in env)
        variables = {os.fsdecode(name): os.fsdecode(value) for name, value in pairs}
        same_user = tuple(more[:6]) == (-1, None, None, None, -1, None)  # and no preexec_fn
        usual = same_user and close_fds and restore and tuple(keep) == (tell,)
        if not (usual and os.path.isdir(folder) and can_fork(words, variables)):
            return int(fork_exec(*given))
        command = Command(
            words=words,
            cwd=folder,
            variables=variables,
            group=None if session else os.getpgid(0),
            ignored=[n for n in signal.valid_signals() if signal.getsignal(n) is signal.SIG_IGN],
            blocked=list(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
        )
        files = (read_in, write_out, write_error)
        streams = tuple(n if file == -1 else file for n, file in enumerate(files))
        return _own_server().start(command, streams)  # type: ignore[arg-type]

    return start


# The server


def _serve(connection: socket.socket) -> None:
    """Fork commands until the process that asks for them is gone."""
    prctl(SET_NAME, NAME, 0, 0, 0)
    # A signal to the group is not for this process. One to a new process waits until it is ready.
    others = signal.valid_signals() - {signal.SIGTERM}  # with which multiprocessing ends this one
    signal.pthread_sigmask(signal.SIG_SETMASK, others)
    while True:
        size, streams, *_ = socket.recv_fds(connection, 8, 3)
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
                _become(command, streams)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        for stream in streams:
            os.close(stream)
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


def _become(command: Command, streams: list[int]) -> NoReturn:
    """Do and be in this process what a Python would that was started with the command."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    if command.group is None:
        os.setsid()
    else:
        os.setpgid(0, command.group)
    os.chdir(command.cwd)
    os.environ.clear()
    os.environ |= command.variables
    _forget_the_server()
    if command.words[1:3] == ["-m", "launch"]:
        _start_own_server()
    _take_signals(command)
    os.execvp = _exec
    words, path = command.words, list(sys.path)
    while True:
        try:
            sys.path[:] = path
            _exit(_run(words))
        except _ReplacedError as replaced:
            words = replaced.words


def _forget_the_server() -> None:
    """Nothing is left of the multiprocessing of which this process was one."""
    prctl(SET_NAME, b"python", 0, 0, 0)
    multiprocessing.process._current_process = FIRST_PROCESS  # type: ignore[attr-defined]
    multiprocessing.process._parent_process = None  # type: ignore[attr-defined]
    multiprocessing.forkserver._forkserver.__init__()  # type: ignore[attr-defined, misc]
    multiprocessing.resource_tracker._resource_tracker.__init__()  # type: ignore[attr-defined, misc]


def _start_own_server() -> None:
    """What this process starts will be forked, too, as children of its own."""
    ours, theirs = socket.socketpair()
    if not os.fork():
        ours.close()
        nothing = os.open(os.devnull, os.O_RDWR)
        for number in range(3):
            os.dup2(nothing, number)
        _serve(theirs)
        os._exit(0)
    theirs.close()
    _server.append(Server(ours))
    subprocess._fork_exec = _forking(subprocess._fork_exec)  # type: ignore[attr-defined]


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
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
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
