"""The exit code of a run follows from why it ended, and from whether it was saved."""

import signal

import pytest

from conf.exit_codes import ExitCode
from train.ending import Ending

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@pytest.mark.parametrize("number", SIGNALS)
def test_each_signal_is_an_ending(number: signal.Signals) -> None:
    assert Ending.of_signal(number) == number.name
    assert Ending.of_signal(number).by_signal


def test_only_signals_keep_somebody_waiting() -> None:
    assert {e for e in Ending if e.by_signal} == {Ending.of_signal(number) for number in SIGNALS}


@pytest.mark.parametrize("timed", [False, True])
@pytest.mark.parametrize("ending", [Ending.FINISHED, Ending.OUT_OF_TEXT])
def test_a_complete_run_has_finished(ending: Ending, timed: bool) -> None:
    assert ending.is_complete(timed=timed)
    assert ending.exit_code(saved=True, timed=timed) == ExitCode.FINISHED


def test_time_completes_a_run_that_has_no_other_length() -> None:
    assert Ending.MAX_TIME.exit_code(saved=True, timed=True) == ExitCode.FINISHED
    assert Ending.MAX_TIME.exit_code(saved=True, timed=False) == ExitCode.REQUEUE


@pytest.mark.parametrize("timed", [False, True])
def test_a_signal_leaves_the_rest_to_the_next_start(timed: bool) -> None:
    for ending in (Ending.SIGTERM, Ending.SIGHUP, Ending.SIGUSR1, Ending.SIGUSR2):
        assert ending.exit_code(saved=True, timed=timed) == ExitCode.REQUEUE
    assert Ending.SIGINT.exit_code(saved=True, timed=timed) == ExitCode.INTERRUPTED


def test_what_was_not_saved_is_a_crash_unless_a_person_ended_it() -> None:
    codes = {ending: ending.exit_code(saved=False, timed=False) for ending in Ending}
    assert codes.pop(Ending.SIGINT) == ExitCode.INTERRUPTED
    assert set(codes.values()) == {ExitCode.CRASHED}
