"""A process's place is what torchrun says, and that of the only one where nobody does."""

import pytest

from train.distributed.dist_env import DistEnv

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


def test_a_process_that_nobody_placed_is_the_only_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    assert DistEnv.from_environment() == DistEnv(rank=0, world_size=1, local_rank=0)


def test_a_process_has_the_place_that_torchrun_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, number in zip(NAMES, (13, 16, 5), strict=True):
        monkeypatch.setenv(name, str(number))
    assert DistEnv.from_environment() == DistEnv(rank=13, world_size=16, local_rank=5)
