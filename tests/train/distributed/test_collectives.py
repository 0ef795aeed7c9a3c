"""Ranks that work together succeed together, or all learn what failed, and where."""

import resource
from collections.abc import Sequence

import pytest

from conf.errors import USER_ERRORS, ConfigError, DataError, Problem, TransientError
from tests.train.many_ranks import RanksFailedError, run_ranks
from train.distributed.dist_env import DistEnv
from train.distributed.process_groups import (
    ProcessGroups,
    allow_open_files,
    deal_to_ranks,
    on_all_ranks,
    on_rank_zero,
    raise_on_all_ranks,
)

pytestmark = pytest.mark.process


def squares(groups: ProcessGroups) -> tuple[int, str]:
    mine = deal_to_ranks(groups, lambda: groups.rank, lambda all_: [rank**2 for rank in all_])
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
        (fail if groups.rank == where else list, lambda _: [0]),
        (list, lambda _: fail()),
        (list, len),
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
            "3",
        ]


def told(groups: ProcessGroups) -> tuple:
    gathered = groups.gather_on_rank_zero("x" * groups.rank)
    return gathered, groups.gather(groups.rank), groups.greatest(1.5 * groups.rank)


def test_rank_0_alone_gets_what_is_gathered_on_it() -> None:
    zero, *others = run_ranks(3, told)
    assert zero == (["", "x", "xx"], [0, 1, 2], 3.0)
    assert others == [(None, [0, 1, 2], 3.0)] * 2
    assert told(ProcessGroups()) == ([""], [0], 0.0)


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


def opening(groups: ProcessGroups, errors: Sequence[Exception | None]) -> str:
    """What a rank raises if each rank has its own of these errors."""
    own = errors[groups.rank]

    def make() -> str:
        if own is not None:
            raise own
        return "made"

    try:
        return raise_on_all_ranks(groups, make)
    except Exception as error:
        if error is not own and error.__cause__ is not own:
            return f"{own!r} is lost in {error!r}"
        return f"{type(error).__name__}: {error}"


DEPTH = ConfigError([Problem("model.depth", [2], "expected a number")])
WIDTH = ConfigError([Problem("model.dim", 0, "too narrow")])
SHARD = DataError("a.jsonl is damaged")
BUSY = TransientError("the server is busy")
FAULT = KeyError("weight")
JOINED = ConfigError([*DEPTH.problems, *WIDTH.problems])


@pytest.mark.parametrize(
    ("errors", "told"),
    [
        ([None, None], ["made", "made"]),
        ([DEPTH, DEPTH], [f"ConfigError: {DEPTH}"] * 2),
        ([DEPTH, WIDTH], [f"ConfigError: {JOINED}"] * 2),
        ([WIDTH, SHARD], ["DataError: a.jsonl is damaged"] * 2),
        ([BUSY, SHARD], ["TransientError: the server is busy"] * 2),
        ([FAULT, BUSY], ["KeyError: 'weight'", "RuntimeError: rank 0: KeyError: 'weight'"]),
        ([None, FAULT], ["RuntimeError: rank 1: KeyError: 'weight'", "KeyError: 'weight'"]),
    ],
    ids=["none", "same", "joined", "data-first", "transient-first", "fault-first", "fault-alone"],
)
def test_all_ranks_raise_the_same_kind_of_error(
    errors: list[Exception | None], told: list[str]
) -> None:
    assert run_ranks(2, opening, errors) == told


def failing_alone(groups: ProcessGroups) -> None:
    """Rank 0 fails where rank 1 waits for it."""

    def make() -> None:
        if groups.is_rank_zero:
            raise FAULT
        groups.barrier()

    raise_on_all_ranks(groups, make, USER_ERRORS)


def test_an_error_that_is_not_shared_frees_those_who_wait() -> None:
    with pytest.raises(RanksFailedError) as caught:
        run_ranks(2, failing_alone)
    assert "KeyError: 'weight'" in caught.value.outcomes[0]
    assert "Connection closed by peer" in caught.value.outcomes[1]


# The limit of open files


def test_rank_0_may_have_a_connection_with_every_other_rank() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert hard > 1024
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (600, hard))
        allow_open_files(DistEnv(rank=3, world_size=10 * hard))  # which has a few connections
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (600, hard)
        allow_open_files(DistEnv(rank=0, world_size=64))
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (512 + 4 * 64, hard)
        with pytest.raises(ConfigError, match=f"open files, and this machine allows {hard}"):
            allow_open_files(DistEnv(rank=0, world_size=hard))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
