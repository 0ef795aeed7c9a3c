"""Machines on loopback for each test."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.machines import Machines


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    started = Machines(tmp_path)
    yield started
    started.close()
