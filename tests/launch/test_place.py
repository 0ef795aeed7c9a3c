"""A process's place is what torchrun says, and that of the only one where nobody does."""

import pytest

from launch.place import Place

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


def test_a_process_that_nobody_placed_is_the_only_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    assert Place.from_environment() == Place(rank=0, world=1, local_rank=0)


def test_a_process_has_the_place_that_torchrun_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, number in zip(NAMES, (13, 16, 5), strict=True):
        monkeypatch.setenv(name, str(number))
    assert Place.from_environment() == Place(rank=13, world=16, local_rank=5)
