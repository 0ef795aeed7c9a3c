"""The first signal is noted, a person who insists is heard, and afterwards all is as before."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event, get_ident
from typing import Any

import pytest

from tests.forked_python import forked_python
from tests.patience import PATIENCE_S
from train.distributed.signals import SIGNALS, StopSignal, exit_immediately

ROOT = Path(__file__).parents[3]
REPEATED = [number for number in SIGNALS if number != signal.SIGINT]


@pytest.fixture(autouse=True)
def hang_up_is_not_ignored() -> Iterator[None]:
    """Also where the suite runs under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


def handlers() -> list[object]:
    return [signal.getsignal(number) for number in SIGNALS]


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_only_noted(number: signal.Signals) -> None:
    with StopSignal() as stop_signal:
        assert stop_signal.received is None
        assert not stop_signal.is_set()
        send(number)
        assert stop_signal.received is number
        assert stop_signal.is_set()


@pytest.mark.parametrize("first", SIGNALS)
def test_a_sigint_after_the_first_signal_acts_at_once(first: signal.Signals) -> None:
    with StopSignal() as stop_signal:
        send(first)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
    assert stop_signal.received is first


@pytest.mark.parametrize("first", SIGNALS)
@pytest.mark.parametrize("second", REPEATED)
def test_any_other_signal_after_the_first_is_ignored(
    first: signal.Signals, second: signal.Signals
) -> None:
    with StopSignal() as stop_signal:
        for number in (first, second, second):
            send(number)
        assert stop_signal.received is first


def test_the_first_signal_alone_is_told_to_another_thread() -> None:
    told: list[int] = []
    heard = Event()

    def hear() -> None:
        told.append(get_ident())
        heard.set()

    with StopSignal() as stop_signal, stop_signal.on_first(hear):
        assert not heard.wait(0.05)
        send(signal.SIGUSR1)
        assert heard.wait(PATIENCE_S)
        send(signal.SIGTERM)
    assert len(told) == 1
    assert told[0] != get_ident()


def test_signals_of_others_are_theirs() -> None:
    told, others = Event(), Event()
    before = signal.signal(signal.SIGALRM, lambda *_: others.set())
    try:
        with StopSignal() as stop_signal, stop_signal.on_first(told.set):
            send(signal.SIGALRM)
            assert others.wait(PATIENCE_S)
            assert not told.wait(0.05)
            assert stop_signal.received is None
            send(signal.SIGTERM)
            assert told.wait(PATIENCE_S)
    finally:
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("sent", [[], *([number] for number in SIGNALS)])
@pytest.mark.parametrize("context", [StopSignal, exit_immediately])
def test_afterwards_everything_is_as_before(
    context: Callable[[], StopSignal], sent: list[signal.Signals]
) -> None:
    before, open_files = handlers(), os.listdir("/proc/self/fd")
    try:
        with context():
            for number in sent:
                send(number)
    except (SystemExit, KeyboardInterrupt):
        assert context is exit_immediately
    assert handlers() == before
    assert os.listdir("/proc/self/fd") == open_files
    woken = signal.set_wakeup_fd(-1)
    assert woken == -1


def test_an_error_within_restores_the_handlers_too() -> None:
    before = handlers()
    with pytest.raises(ZeroDivisionError), StopSignal():
        1 / 0  # noqa: B018
    assert handlers() == before


@pytest.mark.parametrize("number", REPEATED)
def test_who_has_nothing_to_save_leaves_at_once_to_go_on_later(number: signal.Signals) -> None:
    with pytest.raises(SystemExit) as ending, exit_immediately():
        send(number)
    assert ending.value.code == 75


@pytest.mark.parametrize("context", [StopSignal, exit_immediately])
def test_a_hang_up_that_nohup_ignores_stays_ignored(context: Callable[[], Any]) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with context() as stop_signal:
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        send(signal.SIGHUP)
        if stop_signal:
            assert not stop_signal.is_set()
            send(signal.SIGTERM)
            assert stop_signal.received is signal.SIGTERM
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


STUCK = """
import ctypes, sys
from pathlib import Path
from train.distributed import watchdog
from train.distributed.signals import StopSignal
watchdog.LINGER_S = 0.5
guarded = watchdog.Watchdog(Path(sys.argv[1]), 0, 60)
mutex = ctypes.create_string_buffer(128)
library = ctypes.CDLL(None)
library.pthread_mutex_lock(mutex)
stop_signal = StopSignal()
with guarded, stop_signal, stop_signal.on_first(lambda: guarded.exit_within(0.5)):
    print("ready", flush=True)
    library.pthread_mutex_lock(mutex)  # waits for itself, and no signal wakes it
"""


@pytest.mark.process
def test_a_process_that_never_comes_back_from_c_has_left_by_its_deadline(tmp_path: Path) -> None:
    with forked_python():
        process = subprocess.Popen(
            [sys.executable, "-c", STUCK, str(tmp_path)],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1
    assert "still there 0.5 s after it had to leave" in told
