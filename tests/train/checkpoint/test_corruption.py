"""Two hundred ways to hurt checkpoints that two ranks have written: each of them is noticed."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import torch

from tests.train.many_ranks import run_ranks
from train.checkpoint.store import CheckpointStore
from train.distributed.process_groups import ProcessGroups

pytestmark = pytest.mark.process

STEPS = (3, 2, 1)
CASES = 200


def save_all(groups: ProcessGroups, root: Path) -> None:
    """Save each step; either rank writes a tensor."""
    store = CheckpointStore(root, keep=len(STEPS), groups=groups)
    for step in reversed(STEPS):
        store.save(
            step, {f"model.w{groups.rank}": torch.full((50,), float(step))}, {"cursor": step}
        )
    store.wait()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole") / "checkpoints"
    run_ranks(2, save_all, root)
    return root


def flip(path: Path, rng: Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def truncate(path: Path, rng: Random) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size))


def delete(path: Path, rng: Random) -> None:  # noqa: ARG001
    path.unlink()


HURTS: tuple[Callable[[Path, Random], None], ...] = (flip, truncate, delete)
FILES = (
    *("__0_0.distcp", "__1_0.distcp", ".metadata", "tensors.json", "state.json"),
    *("manifest.json", "COMPLETE"),
)


def test_no_kind_of_file_is_left_out(whole: Path) -> None:
    assert {path.name for path in whole.glob("step_*/*")} == set(FILES)


def test_every_corruption_is_noticed_and_the_newest_good_one_is_loaded(
    whole: Path, tmp_path: Path
) -> None:
    loaded = []
    for seed in range(CASES):
        rng, root = Random(seed), tmp_path / str(seed)
        shutil.copytree(whole, root)
        hurt = {}
        for step in STEPS[: rng.choice((1, 1, 2, 3))]:
            hurt[step] = FILES[(seed + step) % len(FILES)]
            HURTS[seed % len(HURTS)](root / f"step_{step:08d}" / hurt[step], rng)
        store = CheckpointStore(root, keep=1)
        if len(hurt) == len(STEPS):
            with pytest.raises(ValueError, match=r"every checkpoint in .* is damaged") as error:
                store.newest()
            told = str(error.value).splitlines()[1:-1]
        else:
            found = store.newest()
            assert found.step == found.state["cursor"] == max(set(STEPS) - set(hurt))
            weights = found.load_weights()
            assert torch.cat([*weights.values()]).tolist() == [float(found.step)] * 100
            told = [f"{path.name}: {reason}" for path, reason in found.rejected]
            loaded.append(found.step)
        assert len(told) == len(hurt)
        for line, (step, file) in zip(told, hurt.items(), strict=True):
            assert f"step_{step:08d}" in line
            assert file in line
        shutil.rmtree(root)
    assert len(loaded) < CASES
    assert set(loaded) == {1, 2}
