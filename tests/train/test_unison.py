"""Ranks that work together succeed together, or all learn what failed, and where."""

from tests.train.many_ranks import run_ranks
from train.ranks import Ranks
from train.unison import first_alone, together


def squares(ranks: Ranks) -> tuple[int, str]:
    mine = together(ranks, lambda: ranks.rank, lambda all_: [rank**2 for rank in all_])
    return mine, first_alone(ranks, lambda: f"of rank {ranks.rank}")


def test_each_rank_gets_its_part_of_the_answer() -> None:
    assert run_ranks(3, squares) == [(0, "of rank 0"), (1, "of rank 0"), (4, "of rank 0")]
    assert squares(Ranks()) == (0, "of rank 0")


def failing(ranks: Ranks, where: int, error: Exception) -> list[str]:
    """What a rank sees when the work of one fails, then the answer, and then nothing."""

    def fail() -> list[int]:
        raise error

    seen = []
    for work, answer in (
        (fail if ranks.rank == where else list, lambda _: [0] * ranks.world),
        (list, lambda _: fail()),
        (list, lambda _: [0] * ranks.world),
    ):
        try:
            seen.append(str(together(ranks, work, answer)))
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


def buried(ranks: Ranks) -> str:
    def fail() -> None:
        try:
            raise OSError(28, "No space left on device")
        except OSError:
            raise RuntimeError("unexpected position") from None

    try:
        together(ranks, fail if ranks.rank else list, lambda _: [None] * ranks.world)
    except OSError as error:
        return str(error)
    raise AssertionError


def test_a_refusal_by_the_system_is_found_under_what_it_caused() -> None:
    assert run_ranks(2, buried) == ["rank 1: [Errno 28] No space left on device"] * 2
