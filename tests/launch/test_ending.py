"""Of several processes that end, what counts is why the first did."""

from itertools import permutations
from signal import SIGKILL, SIGTERM

from hypothesis import given
from hypothesis import strategies as st

from launch.ending import CRASHED, FINISHED, INTERRUPTED, MISUSED, SAVED, joint

CODES = st.sampled_from([0, 1, 2, 3, 75, 130, -2, -6, -9, -10, -11, -15])


def test_all_finished_is_finished_and_none_is_a_crash() -> None:
    assert joint([0, 0]) == FINISHED
    assert joint([]) == CRASHED
    assert joint([], asked=True) == SAVED  # told to end before anything had begun


def test_saved_is_only_said_if_nobody_crashed() -> None:
    assert joint([SAVED, SAVED]) == SAVED
    assert joint([SAVED, 0, -SIGTERM]) == SAVED
    for crash in (1, 3, -6, -11, -SIGKILL):
        assert joint([SAVED, crash]) == CRASHED


def test_a_killed_process_is_a_crash_unless_it_was_asked_to_end() -> None:
    for death in (-SIGKILL, -SIGTERM):
        assert joint([death]) == CRASHED
        assert joint([death], asked=True) == SAVED


def test_a_wrong_configuration_is_said_whatever_the_others_died_of() -> None:
    for other in (0, 1, 75, -9, -15):
        assert joint([other, 2]) == MISUSED


def test_ctrl_c_is_itself() -> None:
    assert joint([130, 75]) == joint([-2, -15]) == INTERRUPTED


@given(st.lists(CODES, max_size=4), st.booleans())
def test_the_order_does_not_matter_and_the_result_is_documented(
    codes: list[int], asked: bool
) -> None:
    results = {joint(order, asked=asked) for order in permutations(codes)}
    assert len(results) == 1
    assert results <= {FINISHED, CRASHED, MISUSED, SAVED, INTERRUPTED}
