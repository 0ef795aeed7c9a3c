"""A command that is forked is to everybody what a Python of its own would be."""

import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from launch import parent_death
from tests.forked_python import forked_python, is_server
from tests.patience import PATIENCE_S

pytestmark = pytest.mark.process

TELL = """
import json, os, signal, sys
parent = int(os.environ["PARENT"])
names = {os.getpgid(parent): "its group", os.getsid(parent): "its session", parent: "parent"}
names[os.getpid()] = "it"
ours = (os.getpid(), os.getppid(), os.getpgid(0), os.getsid(0))
print(json.dumps({
    "process, parent, group, session": [names.get(number) for number in ours],
    "signals": {n: str(signal.getsignal(n)) for n in sorted(signal.valid_signals()) if n < 32},
    "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
    "files": [n for n in range(3, 300) if os.path.exists(f"/proc/self/fd/{n}")],
    "name": [__name__, open("/proc/self/comm").read()[:6]],
    "typed": [sys.argv, sys.orig_argv],
    "folders": [os.getcwd(), sys.path[0]],
    "variables": dict(os.environ),
    "streams": [[s.encoding, s.errors, s.line_buffering] for s in (sys.stdout, sys.stderr)],
}))
"""

ENDS = {
    "its end": "print('done')",
    "a code": "import sys; sys.exit(75)",
    "a large code": "import sys; sys.exit(-1)",
    "a text": "import sys; sys.exit('wrong: é')",
    "an error": "print('so far'); raise ValueError('of it')",
    "Ctrl-C": "print('so far'); raise KeyboardInterrupt",
    "no farewell": "import os; print('lost'); os._exit(3)",
    "a farewell": "import atexit; atexit.register(print, 'farewell')",
    "a thread": "import threading, time\ndef late(): time.sleep(0.1); print('late')\n"
    "threading.Thread(target=late).start()",
    "its input": "import sys; print(sys.stdin.read()[::-1], file=sys.stderr)",
    "a signal": "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
    "a closed pipe": "import os\ntry: os.write(os.pipe()[1], b'x')\nexcept OSError as e: print(e)",
    "another program": "import os; os.execvp('echo', ['echo', 'from there'])",
}


def both(command: list[str], **settings: object) -> list[tuple[int, str, str]]:
    """What came of a command that was started, and of the same one forked."""
    started = subprocess.run(command, capture_output=True, text=True, **settings)  # type: ignore[call-overload]
    with forked_python():
        forked = subprocess.run(command, capture_output=True, text=True, **settings)  # type: ignore[call-overload]
    return [(done.returncode, done.stdout, done.stderr) for done in (started, forked)]


@pytest.mark.parametrize("end", ENDS)
def test_it_ends_alike(end: str) -> None:
    started, forked = both([sys.executable, "-c", ENDS[end]], input="some input")
    assert forked == started


@pytest.mark.parametrize("end", ["", "; raise SystemExit(3)", "; raise KeyboardInterrupt"])
def test_what_cannot_be_written_at_the_end_is_told_by_the_exit_code(end: str) -> None:
    command = [sys.executable, "-c", f"print('lost'){end}"]
    variables = {name: x for name, x in os.environ.items() if name != "PYTHONUNBUFFERED"}
    ends = []
    for context in (nullcontext(), forked_python()):
        with context, open("/dev/full", "w") as full:
            done = subprocess.run(
                command, env=variables, stdout=full, stderr=subprocess.PIPE, text=True
            )
        ends.append((done.returncode, done.stderr))
    started, forked = ends
    assert forked == started
    assert started[0] == (-signal.SIGINT if "Interrupt" in end else 120)
    assert "No space left on device" in started[1]


def test_random_numbers_differ_between_forks() -> None:
    draw = "import random, numpy; print(random.random(), numpy.random.rand())"
    command = [sys.executable, "-c", draw]
    with forked_python():
        one, other = (subprocess.check_output(command, text=True).split() for _ in range(2))
    assert one[0] != other[0]
    assert one[1] != other[1]


@pytest.mark.parametrize("new_session", [False, True])
def test_it_begins_alike(new_session: bool, tmp_path: Path) -> None:
    script = tmp_path / "folder/tell.py"
    script.parent.mkdir()
    script.write_text(TELL)
    variables = os.environ | {"PARENT": str(os.getpid()), "OTHER": "é"}
    for command in (["-c", TELL, "a", "-b"], [str(script), "-u"], ["-u", "-B", "folder/tell.py"]):
        started, forked = both(
            [sys.executable, *command],
            cwd=tmp_path,
            env=variables,
            start_new_session=new_session,
        )
        assert started[0] == 0, started
        assert forked == started


def test_it_ignores_and_holds_the_signals_of_who_started_it() -> None:
    tell = [sys.executable, "-c", TELL]
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    try:
        started, forked = both(tell, env=os.environ | {"PARENT": str(os.getpid())})
    finally:
        signal.signal(signal.SIGHUP, before)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])
    assert forked == started
    assert '"blocked": [10]' in forked[1]


def test_a_rank_holds_its_signals_writes_to_its_log_and_runs_its_command(tmp_path: Path) -> None:
    """`launch.parent_death` goes on as another Python."""
    log = tmp_path / "log"
    rank = ["-I", parent_death.__file__, str(os.getpid()), "hold", str(log), "stderr"]
    command = [sys.executable, "-u", "-c", "import sys; print(1 / 0)", "more"]
    started, forked = both([sys.executable, *rank, *command])
    assert forked == started == (1, "", "")
    first, second = log.read_text().split("Traceback")[1:]
    assert first == second


def test_what_needs_a_python_of_its_own_gets_one() -> None:
    modules = "import sys; print('torch' in sys.modules)"
    for option in ("-S", "-I"):
        _, forked = both([sys.executable, option, "-c", modules])
        assert forked == (0, f"{option == '-I'}\n", "")
    for variable in ("PYTHONHASHSEED", "PYTHONUTF8", "LC_CTYPE"):
        _, forked = both([sys.executable, "-c", modules], env=os.environ | {variable: "1"})
        assert forked == (0, "False\n", "")


def test_warnings_are_errors_where_they_were_asked_for() -> None:
    warn = "import warnings; warnings.warn('so')"
    (strict, _, _), forked = both([sys.executable, "-W", "error", "-c", warn])
    assert strict == forked[0] == 1
    assert forked[2].endswith("UserWarning: so\n")
    assert both([sys.executable, "-c", warn])[1][0] == 0


def test_a_killed_one_is_gone_and_so_is_what_it_would_have_forked_from(tmp_path: Path) -> None:
    wait = tmp_path / "wait.py"
    wait.write_text("import signal; print('here', flush=True); signal.pause()")
    command = [sys.executable, "-m", "launch", "local", "processes=1", f"script={wait}"]
    with forked_python():
        agent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert agent.stdout is not None
    with agent.stdout:
        assert agent.stdout.readline() == "here\n"
        below = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
        assert [is_server(int(process)) for process in below] == [True, False]
        agent.kill()
        assert agent.wait(PATIENCE_S) == -signal.SIGKILL
        assert agent.stdout.read() == ""  # everybody who could write has ended


POOL = """
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from joblib import Parallel, delayed

TELL = "__import__('os').getpid(), 'torch' in __import__('sys').modules"

if __name__ == "__main__":
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        print(*pool.map(abs, [-1, 2, -3]))
        process, is_forked = pool.submit(eval, TELL).result()
        print(process in pool._processes, is_forked)
    print(*Parallel(2)(delayed(abs)(n) for n in [-1, 2, -3]))
    print(Parallel(2)(delayed(eval)(TELL) for _ in range(1))[0][1])
    sys.exit(4)
"""


def test_workers_of_pools_are_forked(tmp_path: Path) -> None:
    script = tmp_path / "pool.py"
    script.write_text(POOL)
    started, forked = both([sys.executable, "-W", "error", str(script)])
    assert started == (4, "1 2 3\nTrue False\n1 2 3\nFalse\n", "")
    assert forked == (4, "1 2 3\nTrue True\n1 2 3\nTrue\n", "")


FIRST = """
import subprocess, sys
from tests.forked_python import forked_python

if __name__ == "__main__":
    with forked_python():
        tell = "import sys; print('torch' in sys.modules)"
        print(subprocess.check_output([sys.executable, "-c", tell], text=True))
"""


def test_a_process_that_was_not_forked_can_fork_what_it_starts(tmp_path: Path) -> None:
    """As where the suite runs in one process."""
    script = tmp_path / "first.py"
    script.write_text(FIRST)
    variables = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, str(script)],
        env=variables,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert (done.returncode, done.stdout) == (0, "True\n\n"), done.stderr
