"""Many ranks write one checkpoint, any number reads it; what fails on one fails on all alike."""

import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from random import Random

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from tests.patience import PATIENCE_S
from tests.train.many_ranks import RanksFailedError, run_ranks
from train.checkpoint.manifest import damage
from train.checkpoint.reader import Checkpoint
from train.checkpoint.store import CheckpointError, CheckpointStore
from train.distributed.process_groups import ProcessGroups

pytestmark = pytest.mark.process

SHAPES = {"long": (10, 3), "uneven": (5,), "short": (2, 4), "one": (1, 6), "empty": (0, 2)}
"""Of sharded tensors: over four ranks some get less than others, or nothing."""


def full(name: str, step: int) -> Tensor:
    shape = SHAPES[name]
    return torch.arange(torch.Size(shape).numel()).float().reshape(shape) + 100 * step


def sharded(groups: ProcessGroups, layout: tuple[int, ...], step: int | None) -> dict:
    """DTensors over a mesh, replicated over the first of two axes; zeros where there is no step."""
    assert torch.Size(layout).numel() == groups.world_size
    mesh = init_device_mesh("cpu", layout)
    placements = [Replicate(), Shard(0)][-len(layout) :]
    whole = {n: torch.zeros(s) if step is None else full(n, step) for n, s in SHAPES.items()}
    return {name: distribute_tensor(x, mesh, placements) for name, x in whole.items()}


def state_of(groups: ProcessGroups, layout: tuple[int, ...], step: int) -> dict:
    """Sharded tensors, and whole ones that one rank gives, or all of them do."""
    whole = {"everywhere": torch.full((3,), float(step))}
    if groups.rank == groups.world_size - 1:
        whole["last"] = torch.tensor(float(step))
    return {"model": sharded(groups, layout, step), "optimizer": whole}


def save_once(groups: ProcessGroups, root: Path, layout: tuple[int, ...], step: int) -> Path:
    store = CheckpointStore(root, keep=2, groups=groups)
    store.save(step, state_of(groups, layout, step), {"cursor": step})
    saved = store.wait()
    assert saved is not None
    return saved.path


def load_once(groups: ProcessGroups, root: Path, layout: tuple[int, ...]) -> dict[str, Tensor]:
    """Load into other shards; return the whole tensors."""
    found = CheckpointStore(root, keep=2, groups=groups).newest()
    assert found is not None
    tensors = sharded(groups, layout, None)
    optimizer = {"everywhere": torch.zeros(3), "last": torch.zeros(())}
    found.load({"model": tensors, "optimizer": optimizer})
    whole = {f"model.{name}": x.full_tensor() for name, x in tensors.items()}
    return whole | {f"optimizer.{name}": x for name, x in optimizer.items()}


def expected(step: int) -> dict[str, Tensor]:
    model = {f"model.{name}": full(name, step) for name in SHAPES}
    everywhere, last = torch.full((3,), float(step)), torch.tensor(float(step))
    return model | {"optimizer.everywhere": everywhere, "optimizer.last": last}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


LAYOUTS = ((1,), (2,), (4,), (2, 2))


@pytest.mark.parametrize("written", LAYOUTS)
def test_what_some_ranks_wrote_any_number_of_ranks_reads(
    tmp_path: Path, written: tuple[int, ...]
) -> None:
    paths = run_ranks(torch.Size(written).numel(), save_once, tmp_path, written, 7)
    assert set(paths) == {tmp_path / "step_00000007"}
    for read in LAYOUTS:
        for loaded in run_ranks(torch.Size(read).numel(), load_once, tmp_path, read):
            assert equal(loaded, expected(7))
    alone = Checkpoint.open(paths[0])
    assert equal(alone.read(alone.specs), expected(7))


def bytes_copied(groups: ProcessGroups) -> int:
    from train.checkpoint.staging import HostMemory, StagedPlanner

    planner = StagedPlanner(sharded(groups, (2, 2), 1), HostMemory())
    return sum(planner.resolve_data(item).nbytes for item in planner.local_plan.items)


def test_replicas_share_out_the_copies_on_the_host() -> None:
    copied = run_ranks(4, bytes_copied)
    assert sum(copied) == sum(full(name, 1).nbytes for name in SHAPES)
    assert sum(map(bool, copied)) > 2


def test_pieces_of_one_tensor_are_in_the_files_of_those_who_hold_them(tmp_path: Path) -> None:
    path, *_ = run_ranks(4, save_once, tmp_path, (4,), 1)
    index = json.loads((path / "tensors.json").read_text())
    files = [piece["file"] for piece in index["model.long"]["pieces"]]
    assert sorted(files) == [f"__{rank}_0.distcp" for rank in range(4)]
    [piece] = index["optimizer.last"]["pieces"]
    assert piece["file"] == "__3_0.distcp"
    assert len(index["optimizer.everywhere"]["pieces"]) == 1


# Agreement on the newest


def newest_of(groups: ProcessGroups, root: Path) -> tuple:
    found = CheckpointStore(root, keep=2, groups=groups).newest()
    return found and (found.step, [(path.name, reason) for path, reason in found.rejected])


def test_all_ranks_pass_over_what_one_of_them_finds_damaged(tmp_path: Path) -> None:
    for step in (1, 2):
        path, *_ = run_ranks(2, save_once, tmp_path, (2,), step)
    for file in sorted(path.iterdir()):
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        first, second = run_ranks(2, newest_of, tmp_path)
        assert first == second
        step, [(name, reason)] = first
        assert (step, name) == (1, "step_00000002")
        assert file.name in reason
        file.write_bytes(content)
    assert run_ranks(2, newest_of, tmp_path) == [(2, [])] * 2


LISTED: list[str] = []


def listed(groups: ProcessGroups, root: Path) -> tuple[int, int]:
    """How often this rank has listed the checkpoints to find the newest one, and its step."""

    def note(event: str, arguments: tuple) -> None:
        if event in ("os.listdir", "os.scandir") and Path(arguments[0]) == root:
            LISTED.append(event)

    sys.addaudithook(note)
    found = CheckpointStore(root, keep=2, groups=groups).newest()
    assert found is not None
    return len(LISTED), found.step


def test_one_rank_lists_the_checkpoints(tmp_path: Path) -> None:
    run_ranks(2, save_once, tmp_path, (2,), 5)
    (zero, step), *others = run_ranks(2, listed, tmp_path)
    assert zero > 0
    assert (others, step) == ([(0, 5)], 5)


def newest_error(groups: ProcessGroups, root: Path) -> str:
    with pytest.raises(ValueError, match="is damaged") as error:
        newest_of(groups, root)
    return str(error.value)


def test_all_ranks_raise_when_none_is_left(tmp_path: Path) -> None:
    assert run_ranks(2, newest_of, tmp_path) == [None, None]
    path, *_ = run_ranks(2, save_once, tmp_path, (2,), 1)
    (path / "__1_0.distcp").unlink()
    first, second = run_ranks(2, newest_error, tmp_path)
    assert first == second
    assert "step_00000001: __1_0.distcp is missing" in first


# A disk that refuses one rank


@contextmanager
def small_files(limit: int) -> Iterator[None]:
    """The kernel refuses to write files of this process beyond `limit` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def refused_on_one(groups: ProcessGroups, root: Path, unlucky: int) -> list:
    """Save three times; the second time the disk refuses what one rank writes."""
    store = CheckpointStore(root, keep=3, groups=groups)
    store.save(1, state_of(groups, (2,), 1), {})
    store.wait()
    seen: list = []
    large = {"model": {f"w{groups.rank}": torch.zeros(50_000)}}
    with small_files(100_000 if groups.rank == unlucky else 10_000_000):
        store.save(2, large, {})
        store.close()
    try:
        store.save(3, state_of(groups, (2,), 3), {})
    except CheckpointError as error:
        seen.append(str(error))
    saved = store.wait()
    assert saved is not None
    groups.barrier()
    return [*seen, saved.step, sorted(path.name for path in root.iterdir())]


@pytest.mark.parametrize("unlucky", [0, 1])
def test_a_disk_that_refuses_one_rank_costs_all_ranks_that_save_and_no_other(
    tmp_path: Path, unlucky: int
) -> None:
    first, second = run_ranks(2, refused_on_one, tmp_path, unlucky)
    assert first == second
    error, step, names = first
    who = "rank 1: " if unlucky else ""
    assert error.endswith(
        f"the checkpoint of step 2 could not be written to {tmp_path}: "
        f"{who}[Errno 27] File too large"
    )
    assert step == 3
    assert names == ["step_00000001", "step_00000003"]
    assert all(damage(tmp_path / name) is None for name in names)


# Death of a rank


def train_until_killed(groups: ProcessGroups, root: Path, unlucky: int, saves: float) -> str:
    """Save for ever; one rank is killed so many saves after the first.

    The other tells what it notices.
    """
    store = CheckpointStore(root, keep=2, keep_every=7, groups=groups)
    found = store.newest()
    first = found.step + 1 if found else 1
    for step in count(first):
        tensors = {f"w{groups.rank}": torch.full((20_000,), float(step))}
        try:
            store.save(step, {"model": tensors}, {"cursor": step})
        except RuntimeError as error:
            assert store.wait() is None, "no save is begun without the other"
            return str(error)
        if step == first:
            saved = store.wait()
            assert saved is not None
            if groups.rank == unlucky:
                kill = (os.getpid(), signal.SIGKILL)
                threading.Timer(saves * saved.save_s, os.kill, kill).start()
    raise AssertionError


KILLS = 20
OVERLOOKED_S = PATIENCE_S / 10  # for which a rank waits that has overlooked the other's death


def test_a_rank_killed_at_any_moment_leaves_nothing_that_looks_whole_and_is_not(
    tmp_path: Path,
) -> None:
    steps, noticed = [0], 0
    for seed in range(KILLS):
        rng = Random(seed)
        unlucky, saves = seed % 2, rng.uniform(0, 3)
        with pytest.raises(RanksFailedError) as error:
            run_ranks(2, train_until_killed, tmp_path, unlucky, saves, deadline_s=OVERLOOKED_S)
        assert error.value.outcomes[unlucky] == "the process died"
        noticed += "peer" in error.value.outcomes[1 - unlucky]
        assert not [path for path in tmp_path.glob("step_*") if damage(path) and _marked(path)]
        store = CheckpointStore(tmp_path, keep=2)
        if found := store.newest():
            weights = found.load_weights()
            values = {value for w in weights.values() for value in w.unique().tolist()}
            assert (weights.keys(), values) == ({"w0", "w1"}, {float(found.step)})
            assert found.state["cursor"] == found.step
            steps.append(found.step)
    assert steps == sorted(set(steps))
    assert len(steps) == KILLS + 1
    assert noticed >= KILLS - 2  # once in 300 times gloo overlooks it: torchrun ends the others


def _marked(path: Path) -> bool:
    return (path / "COMPLETE").exists()


# A slow rank


def slow_on_one(groups: ProcessGroups, root: Path) -> tuple[float, int]:
    """Seconds that training stops for a save when the disk of rank 1 takes a second."""
    store = CheckpointStore(root, keep=2, groups=groups)
    tensors = state_of(groups, (2,), 1)
    if groups.rank == 1:
        fsync = os.fsync
        os.fsync = lambda descriptor: (time.sleep(1.0), fsync(descriptor))[1]
    start = time.perf_counter()
    store.save(1, tensors, {})
    stall_s = time.perf_counter() - start
    saved = store.wait()
    assert saved is not None
    return stall_s, saved.save_s


def test_one_rank_with_a_slow_disk_stops_the_training_of_none(tmp_path: Path) -> None:
    for stall_s, save_s in run_ranks(2, slow_on_one, tmp_path):
        assert stall_s < save_s
        assert save_s >= 1.0


def test_a_dtensor_is_read_in_place(tmp_path: Path) -> None:
    [path] = run_ranks(1, save_once, tmp_path, (1,), 3)
    [same] = run_ranks(1, read_in_place, path)
    assert same


def read_in_place(groups: ProcessGroups, path: Path) -> bool:
    tensors = sharded(groups, (1,), None)
    before = {name: x.to_local().data_ptr() for name, x in tensors.items()}
    whole = {"everywhere": torch.zeros(3), "last": torch.zeros(())}
    Checkpoint.open(path).load({"model": tensors, "optimizer": whole})
    assert all(isinstance(x, DTensor) for x in tensors.values())
    return before == {name: x.to_local().data_ptr() for name, x in tensors.items()}
