"""Of several processes that end, what counts is why the first did."""

from itertools import permutations
from signal import SIGKILL, SIGTERM

from hypothesis import given
from hypothesis import strategies as st

from conf.exit_codes import ExitCode
from launch.exit_codes import combine_exit_codes

CODES = st.sampled_from([0, 1, 2, 3, 75, 130, -2, -6, -9, -10, -11, -15])


def test_all_finished_is_finished_and_none_is_a_crash() -> None:
    assert combine_exit_codes([0, 0]) == ExitCode.FINISHED
    assert combine_exit_codes([]) == ExitCode.CRASHED
    # A signal may come before any process has started.
    assert combine_exit_codes([], signalled=True) == ExitCode.REQUEUE


def test_saved_is_only_said_if_nobody_crashed() -> None:
    assert combine_exit_codes([ExitCode.REQUEUE, ExitCode.REQUEUE]) == ExitCode.REQUEUE
    assert combine_exit_codes([ExitCode.REQUEUE, 0, -SIGTERM]) == ExitCode.REQUEUE
    for crash in (1, 3, -6, -11, -SIGKILL):
        assert combine_exit_codes([ExitCode.REQUEUE, crash]) == ExitCode.CRASHED


def test_a_killed_process_is_a_crash_unless_it_was_sent_a_signal() -> None:
    for death in (-SIGKILL, -SIGTERM):
        assert combine_exit_codes([death]) == ExitCode.CRASHED
        assert combine_exit_codes([death], signalled=True) == ExitCode.REQUEUE


def test_a_wrong_configuration_is_said_whatever_the_others_died_of() -> None:
    for other in (0, 1, 75, -9, -15):
        assert combine_exit_codes([other, 2]) == ExitCode.MISUSED


def test_ctrl_c_is_itself() -> None:
    assert combine_exit_codes([130, 75]) == combine_exit_codes([-2, -15]) == ExitCode.INTERRUPTED


@given(st.lists(CODES, max_size=4), st.booleans())
def test_the_order_does_not_matter_and_the_result_is_documented(
    codes: list[int], signalled: bool
) -> None:
    results = {combine_exit_codes(order, signalled=signalled) for order in permutations(codes)}
    assert len(results) == 1
    assert results <= {
        ExitCode.FINISHED,
        ExitCode.CRASHED,
        ExitCode.MISUSED,
        ExitCode.REQUEUE,
        ExitCode.INTERRUPTED,
    }
