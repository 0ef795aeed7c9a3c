"""The first signal is noted, the second acts, and afterwards everything is as before."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from train.interruption import Interruption

REPOSITORY = Path(__file__).parents[2]
BOTH = [signal.SIGINT, signal.SIGTERM]


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", BOTH)
def test_the_first_signal_is_only_noted(number: signal.Signals) -> None:
    with Interruption() as interruption:
        assert interruption.received is None
        send(number)
        assert interruption.received is number


def test_a_second_signal_acts_at_once() -> None:
    with Interruption() as interruption:
        send(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
    assert interruption.received is signal.SIGTERM


@pytest.mark.parametrize("sent", [[], [signal.SIGINT], [signal.SIGTERM]])
def test_afterwards_the_handlers_are_those_from_before(sent: list[signal.Signals]) -> None:
    before = [signal.getsignal(number) for number in BOTH]
    with Interruption():
        for number in sent:
            send(number)
    assert [signal.getsignal(number) for number in BOTH] == before


def test_an_error_within_restores_them_too() -> None:
    before = [signal.getsignal(number) for number in BOTH]
    with pytest.raises(ZeroDivisionError), Interruption():
        1 / 0  # noqa: B018
    assert [signal.getsignal(number) for number in BOTH] == before


TWICE = """
import os, signal
from train.interruption import Interruption

with Interruption():
    os.kill(os.getpid(), signal.SIGTERM)
    print("noted", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    print("never printed", flush=True)
"""


def test_a_second_sigterm_ends_the_process() -> None:
    done = subprocess.run(
        [sys.executable, "-c", TWICE],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "noted\n")
