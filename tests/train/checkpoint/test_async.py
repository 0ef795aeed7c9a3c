"""A save stops training for the copy alone; what goes wrong behind it is told and hurts nothing."""

import os
import subprocess
import sys
from pathlib import Path
from socket import gethostname
from time import perf_counter, sleep

import pytest
import torch

from train.checkpoint.staging import HostMemory, StagedPlanner
from train.checkpoint.store import CheckpointError, CheckpointStore

SLOW_S = 0.1
"""What a slow disk takes to flush a file; six are flushed in a save."""


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path, keep=2)


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def slow_fsync(descriptor: int) -> None:
        sleep(SLOW_S)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", slow_fsync)


def tensors(value: float) -> dict:
    return {"model": {"w": torch.full((100,), value)}}


def names_in(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


@pytest.mark.usefixtures("slow_disk")
def test_tensors_may_change_as_soon_as_save_returns(store: CheckpointStore) -> None:
    trained = tensors(1.0)
    store.save(1, trained, {})
    assert not store.root.exists() or not list(store.root.glob("step_*"))
    trained["model"]["w"].fill_(2.0)
    store.wait()
    assert store.newest().load_weights()["w"].unique().tolist() == [1.0]


@pytest.mark.usefixtures("slow_disk")
def test_a_slow_disk_delays_the_next_save_alone(store: CheckpointStore) -> None:
    start = perf_counter()
    assert store.save(1, tensors(1.0), {}) is None
    first_s = perf_counter() - start
    saved = store.save(2, tensors(2.0), {})
    second_s = perf_counter() - start
    assert first_s < saved.save_s
    assert (saved.step, saved.path) == (1, store.root / "step_00000001")
    assert 6 * SLOW_S < saved.save_s < second_s
    assert store.wait().step == 2
    assert names_in(store.root) == ["step_00000001", "step_00000002"]


@pytest.mark.usefixtures("slow_disk")
def test_the_newest_is_the_one_being_written(store: CheckpointStore) -> None:
    store.save(1, tensors(1.0), {})
    assert store.newest().step == 1
    assert store.wait().step == 1


@pytest.mark.usefixtures("slow_disk")
def test_closing_waits_until_nothing_is_written_any_more(store: CheckpointStore) -> None:
    store.save(1, tensors(1.0), {})
    store.close()
    assert names_in(store.root) == ["step_00000001"]


def test_every_save_is_told_of_once(store: CheckpointStore) -> None:
    assert store.wait() is None
    assert store.save(1, tensors(1.0), {}) is None
    assert store.save(2, tensors(2.0), {}).step == 1
    assert store.wait().step == 2
    assert store.wait() is None
    assert store.save(3, tensors(3.0), {}) is None
    store.wait()


def test_a_failed_save_is_told_by_the_next_which_is_begun_nevertheless(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").touch()
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    store.save(1, tensors(1.0), {})
    store.close()
    (tmp_path / "checkpoints").unlink()
    with pytest.raises(CheckpointError, match="the checkpoint of step 1 could not be written"):
        store.save(2, tensors(2.0), {})
    assert store.wait().step == 2
    assert store.newest().step == 2


def test_a_failed_save_is_told_by_waiting_and_once(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").touch()
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    store.save(1, tensors(1.0), {})
    with pytest.raises(CheckpointError, match="step 1"):
        store.wait()
    assert store.wait() is None


def test_an_error_that_is_not_the_disks_is_no_checkpoint_error(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "save", None)
    store.save(1, tensors(1.0), {})
    with pytest.raises(RuntimeError, match="TypeError: 'NoneType' object is not callable") as error:
        store.wait()
    assert not isinstance(error.value, CheckpointError)
    assert names_in(store.root) == []


def test_a_disk_that_gives_back_something_else_costs_the_save_and_no_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    store.save(1, tensors(1.0), {})
    store.wait()
    fsync = os.fsync

    def losing_fsync(descriptor: int) -> None:
        fsync(descriptor)
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.suffix == ".distcp":
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(content)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", losing_fsync)
        store.save(2, tensors(2.0), {})
        with pytest.raises(CheckpointError, match=r"does not give back .*: __0_0\.distcp has"):
            store.wait()
    assert names_in(tmp_path) == ["step_00000001"]
    assert store.newest().step == 1


def test_the_memory_of_one_save_serves_the_next() -> None:
    memory = HostMemory()
    weights = {"model.a": torch.ones(3), "model.b": torch.zeros(2, 2)}
    plans = [StagedPlanner(weights, memory) for _ in range(2)]
    places = [
        [plan.resolve_data(item).data_ptr() for item in plan.local_plan.items] for plan in plans
    ]
    assert places[0] == places[1]
    assert not set(places[0]) & {tensor.data_ptr() for tensor in weights.values()}


# Retention


def test_every_mth_is_kept_for_ever_beside_the_newest(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2, keep_every=20)
    for step in range(10, 80, 10):
        store.save(step, tensors(step), {})
    store.wait()
    kept = [int(name.removeprefix("step_")) for name in names_in(tmp_path)]
    assert kept == [20, 40, 60, 70]


def test_a_damaged_one_is_not_kept_for_ever(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1, keep_every=2)
    store.save(2, tensors(2.0), {})
    store.wait()
    (tmp_path / "step_00000002" / "COMPLETE").unlink()
    store.save(3, tensors(3.0), {})
    store.wait()
    assert names_in(tmp_path) == ["step_00000003"]


# What other processes have left


@pytest.fixture
def leave(tmp_path: Path):
    """Leaves an unfinished directory of a process, last written to some seconds ago."""

    def left(host: str, process: int, age_s: float) -> Path:
        path = tmp_path / f".step_00000009.{host}.{process}.0a1b.partial"
        path.mkdir()
        (path / "__0_0.distcp").touch()
        then = path.stat().st_mtime - age_s
        os.utime(path, (then, then))
        return path

    return left


def dead_process() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


@pytest.mark.process
def test_unfinished_directories_are_deleted_unless_their_process_may_be_alive(
    store: CheckpointStore, leave
) -> None:
    here, parent = gethostname(), os.getppid()
    alive = {leave(here, parent, 60), leave("node-17.cluster", 1, 60)}
    dead = {leave(here, dead_process(), 60), leave(here, os.getpid(), 60)}
    dead |= {leave(here + "x", parent, 7200), leave(here, 1, 7200)}
    store.save(1, tensors(1.0), {})
    store.wait()
    assert set(store.root.glob(".*")) == alive
    assert all(not path.exists() for path in dead)


# What is in a checkpoint, and what is wanted


def test_random_states_need_not_be_there_nor_be_wanted(store: CheckpointStore) -> None:
    saved = {"model": {"w": torch.ones(2)}, "random": {"cpu": torch.ones(5), "tpu": torch.ones(1)}}
    store.save(1, saved, {})
    wanted = {
        "model": {"w": torch.zeros(2)},
        "random": {"cpu": torch.zeros(5), "gpu": torch.zeros(3)},
    }
    store.newest().load(wanted)
    assert wanted["model"]["w"].tolist() == [1, 1]
    assert wanted["random"]["cpu"].tolist() == [1] * 5
    assert wanted["random"]["gpu"].tolist() == [0] * 3


def test_random_states_of_another_shape_do_not_fit(store: CheckpointStore) -> None:
    store.save(1, {"random": {"cpu": torch.ones(5)}}, {})
    with pytest.raises(ValueError, match=r"random.cpu: float32 \[5\] in .*, float32 \[4\]"):
        store.newest().load({"random": {"cpu": torch.zeros(4)}})


def test_whether_tensors_fit_is_told_without_memory_for_them(store: CheckpointStore) -> None:
    store.save(1, tensors(1.0), {})
    found = store.newest()
    found.check({"model": {"w": torch.empty(100, device="meta")}})
    with pytest.raises(ValueError, match="is of another model; 1 of its tensors"):
        found.check({"model": {"w": torch.empty(101, device="meta")}})


def test_single_tensors_are_read_by_name(store: CheckpointStore) -> None:
    store.save(1, {"model": {"a": torch.ones(2), "b": torch.zeros(3, dtype=torch.int64)}}, {})
    read = store.newest().read(["model.b"])
    assert list(read) == ["model.b"]
    assert read["model.b"].dtype == torch.int64
    assert read["model.b"].tolist() == [0] * 3
