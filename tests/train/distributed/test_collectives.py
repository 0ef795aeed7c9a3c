"""Ranks that work together succeed together, or all learn what failed, and where."""

import pytest

from tests.train.many_ranks import run_ranks
from train.distributed.process_groups import ProcessGroups, on_all_ranks, on_rank_zero

pytestmark = pytest.mark.process


def squares(groups: ProcessGroups) -> tuple[int, str]:
    mine = on_all_ranks(groups, lambda: groups.rank, lambda all_: [rank**2 for rank in all_])
    return mine, on_rank_zero(groups, lambda: f"of rank {groups.rank}")


def test_each_rank_gets_its_part_of_the_answer() -> None:
    assert run_ranks(3, squares) == [(0, "of rank 0"), (1, "of rank 0"), (4, "of rank 0")]
    assert squares(ProcessGroups()) == (0, "of rank 0")


def failing(groups: ProcessGroups, where: int, error: Exception) -> list[str]:
    """What a rank sees when the work of one fails, then the answer, and then nothing."""

    def fail() -> list[int]:
        raise error

    seen = []
    for work, answer in (
        (fail if groups.rank == where else list, lambda _: [0] * groups.world_size),
        (list, lambda _: fail()),
        (list, lambda _: [0] * groups.world_size),
    ):
        try:
            seen.append(str(on_all_ranks(groups, work, answer)))
        except (OSError, RuntimeError) as caught:
            seen.append(f"{type(caught).__name__}: {caught}")
    return seen


def test_what_fails_on_one_rank_fails_on_all_and_they_can_go_on() -> None:
    for told in run_ranks(3, failing, 2, ValueError("too odd")):
        assert told == [
            "RuntimeError: rank 2: ValueError: too odd",
            "RuntimeError: ValueError: too odd",
            "0",
        ]


def buried(groups: ProcessGroups) -> str:
    def fail() -> None:
        try:
            raise OSError(28, "No space left on device")
        except OSError:
            raise RuntimeError("unexpected position") from None

    try:
        on_all_ranks(groups, fail if groups.rank else list, lambda _: [None] * groups.world_size)
    except OSError as error:
        return str(error)
    raise AssertionError


def test_a_refusal_by_the_system_is_found_under_what_it_caused() -> None:
    assert run_ranks(2, buried) == ["rank 1: [Errno 28] No space left on device"] * 2
