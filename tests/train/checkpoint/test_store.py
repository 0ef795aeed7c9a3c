"""Checkpoints are whole or not there, come back bit for bit, and say what is wrong with them."""

import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.forked_python import forked_python
from train.checkpoint.reader import Checkpoint, flatten
from train.checkpoint.store import CheckpointError, CheckpointStore

FILES = (
    *("__0_0.distcp", ".metadata", "tensors.json", "state.json"),
    *("manifest.json", "COMPLETE"),
)
REPOSITORY = Path(__file__).parents[3]


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", keep=3)


def tensors_of(step: int) -> dict:
    return {
        "model": {"embed.weight": torch.full((4, 3), float(step)), "norm.weight": torch.ones(3)},
        "optimizer": {"embed.weight": {"exp_avg": torch.full((4, 3), -1.0 * step)}},
    }


def save(store: CheckpointStore, *steps: int) -> None:
    for step in steps:
        store.save(step, tensors_of(step), {"cursor": step})
        store.wait()


def names_in(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def same_bits(a: Tensor, b: Tensor) -> bool:
    bits = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)


# What comes back


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8)
SPECS = st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3))


def any_bits(dtype: torch.dtype, shape: list[int]) -> Tensor:
    size = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(256, (size,), dtype=torch.uint8).view(dtype).reshape(shape)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(specs=st.dictionaries(st.sampled_from("abcdefgh"), SPECS, min_size=1))
def test_tensors_of_any_dtype_and_shape_come_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, specs: dict
) -> None:
    saved = {"model": {name: any_bits(*spec) for name, spec in specs.items()}}
    loaded = {"model": {name: any_bits(*spec) for name, spec in specs.items()}}
    store = CheckpointStore(tmp_path_factory.mktemp("any"), keep=1)
    store.save(1, saved, {})
    store.newest().load(loaded)
    weights = store.newest().load_weights()
    for name, tensor in saved["model"].items():
        assert same_bits(loaded["model"][name], tensor)
        assert same_bits(weights[name], tensor)


def test_state_comes_back_with_its_step(store: CheckpointStore) -> None:
    state = {"cursors": [{"lane": 0, "offset": 7}], "config": {"optim": {"lr": 3e-4}}, "run": None}
    store.save(12, tensors_of(12), state)
    found = store.newest()
    assert found.state == {**state, "step": 12}
    assert found.step == 12
    assert found.rejected == ()


def test_the_random_stream_goes_on_where_it_was(store: CheckpointStore) -> None:
    store.save(1, {"rng": {"cpu": torch.get_rng_state()}}, {})
    expected = torch.rand(5)
    rng = {"cpu": torch.empty_like(torch.get_rng_state())}
    store.newest().load({"rng": rng})
    torch.set_rng_state(rng["cpu"])
    assert torch.equal(torch.rand(5), expected)


class Training:
    """A model and its AdamW, with the tensors that a checkpoint holds."""

    def __init__(self) -> None:
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)

    def step(self, seed: int) -> None:
        x = torch.randn(2, 4, generator=torch.Generator().manual_seed(seed))
        self.model(x).square().sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def tensors(self) -> dict:
        moments = {name: self.optimizer.state[p] for name, p in self.model.named_parameters()}
        return {"model": dict(self.model.named_parameters()), "optimizer": moments}


def test_training_resumed_from_a_checkpoint_equals_training_uninterrupted(
    store: CheckpointStore,
) -> None:
    interrupted, resumed = Training(), Training()
    interrupted.step(1)
    store.save(1, interrupted.tensors(), {})
    interrupted.step(2)
    resumed.step(5)
    store.newest().load(resumed.tensors())
    resumed.step(2)
    ours, theirs = flatten(interrupted.tensors()), flatten(resumed.tensors())
    assert ours.keys() == theirs.keys()
    assert all(same_bits(ours[name], theirs[name]) for name in ours)


def test_a_strided_view_is_filled_in_place(store: CheckpointStore) -> None:
    store.save(1, {"model": {"w": torch.arange(6.0).reshape(2, 3)}}, {})
    base = torch.zeros(3, 2)
    store.newest().load({"model": {"w": base.T}})
    assert torch.equal(base, torch.arange(6.0).reshape(2, 3).T)


def test_weights_alone_are_read_without_a_model(store: CheckpointStore) -> None:
    save(store, 3)
    weights = store.newest().load_weights()
    assert list(weights) == ["embed.weight", "norm.weight"]
    assert torch.equal(weights["embed.weight"], torch.full((4, 3), 3.0))


# Damage


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def test_a_checkpoint_has_no_files_but_those_damaged_below(store: CheckpointStore) -> None:
    save(store, 1)
    assert names_in(store.newest().path) == sorted(FILES)


@pytest.mark.parametrize("hurt", [flip, truncate, empty, Path.unlink])
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file_sends_us_to_the_checkpoint_before_and_is_named(
    store: CheckpointStore, file: str, hurt: Callable[[Path], object]
) -> None:
    save(store, 100, 200)
    damaged = store.root / "step_00000200"
    hurt(damaged / file)
    found = store.newest()
    assert found.step == 100
    [(path, reason)] = found.rejected
    assert path == damaged
    assert file in reason
    loaded = tensors_of(0)
    found.load(loaded)
    assert torch.equal(loaded["model"]["embed.weight"], torch.full((4, 3), 100.0))
    with pytest.raises(ValueError, match=f"step_00000200 is not a complete checkpoint.*{file}"):
        Checkpoint.open(damaged)


@settings(max_examples=100, deadline=None)
@given(file=st.sampled_from(FILES), place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_flipped_bit_is_detected(
    tmp_path_factory: pytest.TempPathFactory, file: str, place: float, bit: int
) -> None:
    root = tmp_path_factory.getbasetemp() / "flipped"
    store = CheckpointStore(root, keep=1)
    save(store, 1)
    path = root / "step_00000001" / file
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[int(place * len(whole))] ^= 1 << bit
    path.write_bytes(flipped)
    with pytest.raises(ValueError, match="step_00000001"):
        store.newest()
    path.write_bytes(whole)
    assert store.newest().step == 1


def test_a_changed_pickle_is_never_opened(store: CheckpointStore, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "sprung",)

    save(store, 1, 2)
    (store.root / "step_00000002" / ".metadata").write_bytes(pickle.dumps(Trap()))
    assert store.newest().step == 1
    assert not (tmp_path / "sprung").exists()


def test_without_checkpoints_there_is_nothing_to_find(store: CheckpointStore) -> None:
    assert store.newest() is None
    (store.root / ".step_00000001.partial").mkdir(parents=True)
    assert store.newest() is None


def test_when_all_are_damaged_each_is_named_and_the_way_out_too(store: CheckpointStore) -> None:
    save(store, 1, 2)
    (store.root / "step_00000001" / "COMPLETE").unlink()
    truncate(store.root / "step_00000002" / "state.json")
    with pytest.raises(ValueError, match="is damaged") as error:
        store.newest()
    lines = str(error.value).splitlines()
    assert lines[1] == "  step_00000002: state.json has 27 bytes instead of 28"
    assert lines[2] == "  step_00000001: COMPLETE is missing"
    assert "run.resume=never" in lines[3]


def test_the_leftovers_of_a_crash_are_cleaned_up_by_the_next_save(store: CheckpointStore) -> None:
    save(store, 1)
    shutil.copytree(store.root / "step_00000001", store.root / ".step_00000005.partial")
    assert store.newest().step == 1
    save(store, 2)
    assert names_in(store.root) == ["step_00000001", "step_00000002"]


def test_steps_are_ordered_as_numbers(store: CheckpointStore) -> None:
    save(store, 99_999_999, 100_000_000)
    assert store.newest().step == 100_000_000


# A model of another shape


def test_tensors_that_do_not_fit_are_all_named_and_nothing_is_changed(
    store: CheckpointStore,
) -> None:
    save(store, 1)
    other = {
        "model": {
            "embed.weight": torch.zeros(4, 5),
            "norm.weight": torch.zeros(3, dtype=torch.bfloat16),
            "head.weight": torch.zeros(2),
        }
    }
    with pytest.raises(ValueError, match="step_00000001 is of another model; 4 of") as error:
        store.newest().load(other)
    message = str(error.value)
    assert message.splitlines()[2:-1] == [  # after the title and the sentence
        "  model.embed.weight: float32 [4, 3] in the checkpoint, float32 [4, 5] in this run",
        "  model.head.weight: nothing in the checkpoint, float32 [2] in this run",
        "  model.norm.weight: float32 [3] in the checkpoint, bfloat16 [3] in this run",
        "  optimizer.embed.weight.exp_avg: float32 [4, 3] in the checkpoint, nothing in this run",
    ]
    assert all(key in message for key in ("run.name", "run.dir", "run.resume=never"))
    assert all(not tensor.any() for tensor in flatten(other).values())


def test_of_many_tensors_that_do_not_fit_the_first_are_named(store: CheckpointStore) -> None:
    store.save(1, {"model": {f"layer{n:02}": torch.zeros(2) for n in range(20)}}, {})
    with pytest.raises(ValueError, match="20 of its tensors") as error:
        store.newest().load({"model": {f"layer{n:02}": torch.zeros(3) for n in range(20)}})
    lines = str(error.value).splitlines()
    shown = [line.split(":")[0] for line in lines[2:10]]
    assert shown == [f"  model.layer{n:02}" for n in range(8)]
    assert lines[10] == "  and 12 more"


# Retention and saving again


def test_the_newest_few_are_kept(store: CheckpointStore) -> None:
    save(store, 1, 2, 3, 4, 5)
    assert names_in(store.root) == ["step_00000003", "step_00000004", "step_00000005"]


def test_checkpoints_that_look_broken_do_not_count_as_kept(store: CheckpointStore) -> None:
    save(store, 1, 2, 3)
    truncate(store.root / "step_00000002" / "__0_0.distcp")
    (store.root / "step_00000003" / "COMPLETE").unlink()
    save(store, 4)
    assert names_in(store.root) == ["step_00000001", "step_00000004"]


def test_after_a_fallback_the_resumed_checkpoint_outlives_the_damaged_later_ones(
    tmp_path: Path,
) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    save(store, 100, 200)
    flip(tmp_path / "step_00000200" / "__0_0.distcp")
    save(store, 150)
    assert names_in(tmp_path) == ["step_00000100", "step_00000150", "step_00000200"]
    save(store, 200)
    assert names_in(tmp_path) == ["step_00000150", "step_00000200"]
    assert store.newest().step == 200


def test_a_whole_checkpoint_of_the_step_is_left_alone(store: CheckpointStore) -> None:
    save(store, 1)
    before = [path.stat() for path in sorted(store.newest().path.iterdir())]
    save(store, 1)
    assert [path.stat() for path in sorted(store.newest().path.iterdir())] == before


def test_files_that_are_not_checkpoints_are_left_alone(store: CheckpointStore) -> None:
    save(store, 1)
    (store.root / "notes.txt").write_text("the good one is step 1")
    shutil.copytree(store.root / "step_00000001", store.root / "step_00000001.copy")
    save(store, 2, 3, 4)
    assert {"notes.txt", "step_00000001.copy"} <= set(names_in(store.root))


# A disk that refuses, or loses its power


def test_everything_is_on_the_disk_before_it_becomes_visible(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = store.root / "step_00000001"
    flushed = []
    fsync = os.fsync

    def recording_fsync(descriptor: int) -> None:
        fsync(descriptor)
        flushed.append((os.fstat(descriptor).st_ino, path.exists()))

    monkeypatch.setattr(os, "fsync", recording_fsync)
    save(store, 1)
    ino = {file: (path / file).stat().st_ino for file in FILES}
    assert set(flushed[:-5]) == {(ino[file], False) for file in FILES[:4]}
    assert flushed[-5:] == [
        (ino["manifest.json"], False),
        (ino["COMPLETE"], False),
        (path.stat().st_ino, False),
        (store.root.stat().st_ino, True),
        (store.root.parent.stat().st_ino, True),
    ]


@pytest.fixture
def small_files() -> Iterator[None]:
    """Let the kernel refuse to write any file beyond 64 KiB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("small_files")
@pytest.mark.parametrize(
    ("tensors", "state"),
    [
        ({"model": {"w": torch.zeros(100_000)}}, {}),
        ({"model": {"w": torch.zeros(10)}}, {"text": "x" * 100_000}),
    ],
    ids=["in the tensors", "in the state"],
)
def test_a_save_that_the_disk_refuses_says_so_and_leaves_the_last_one(
    store: CheckpointStore, tensors: dict, state: dict
) -> None:
    save(store, 1)
    store.save(2, tensors, state)
    with pytest.raises(CheckpointError, match=r"step 2 .*/checkpoints: \[Errno 27\] File too larg"):
        store.wait()
    assert names_in(store.root) == ["step_00000001"]
    assert store.newest().step == 1
    save(store, 3)
    assert store.newest().step == 3


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"step 1 could not be written to .*file/checkpoints"):
        save(CheckpointStore(tmp_path / "file" / "checkpoints", keep=1), 1)


def test_an_interrupt_while_tensors_are_copied_is_an_interrupt(store: CheckpointStore) -> None:
    class Interrupting(Tensor):
        def detach(self) -> Tensor:
            raise KeyboardInterrupt

    tensors = {"model": {"w": torch.zeros(2).as_subclass(Interrupting)}}
    with pytest.raises(KeyboardInterrupt):
        store.save(1, tensors, {})
    assert store.wait() is None
    assert store.newest() is None


def run_script(script: str, *arguments: object) -> object:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    with forked_python():
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


FULL_DISK = """
import ctypes, json, os, sys, torch
from pathlib import Path
from train.checkpoint.store import CheckpointError, CheckpointStore

# What `unshare --user --map-root-user --mount` does, and then `mount`.
libc, ids = ctypes.CDLL(None), {"uid": os.getuid(), "gid": os.getgid()}
CLONE_NEWUSER, CLONE_NEWNS = 0x10000000, 0x20000
assert libc.unshare(CLONE_NEWUSER | CLONE_NEWNS) == 0
Path("/proc/self/setgroups").write_text("deny")
for kind, number in ids.items():
    Path(f"/proc/self/{kind}_map").write_text(f"0 {number} 1")
assert libc.mount(b"tmpfs", sys.argv[1].encode(), b"tmpfs", 0, b"size=1m") == 0

store = CheckpointStore(Path(sys.argv[1]) / "checkpoints", keep=1)
seen = []
for step, kilobytes in enumerate([300, 900, 500]):
    try:
        store.save(step, {"model": {"w": torch.zeros(kilobytes * 250)}}, {})
        store.wait()
    except CheckpointError as error:
        seen.append(str(error))
    seen.append([path.name for path in store.root.iterdir()])
print(json.dumps(seen))
"""


@pytest.mark.process
def test_on_a_full_disk_the_last_checkpoint_stays_and_the_next_that_fits_is_saved(
    tmp_path: Path,
) -> None:
    mount = f"mount -t tmpfs -o size=1m tmpfs {tmp_path}"
    namespace = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c")
    if not shutil.which("unshare") or subprocess.run([*namespace, mount]).returncode != 0:
        pytest.skip("no right to mount a small file system here")
    seen = run_script(FULL_DISK, tmp_path)
    first, problem, second, third = seen
    assert (first, second, third) == (["step_00000000"], ["step_00000000"], ["step_00000002"])
    assert "step 1 could not be written" in problem
    assert "No space left on device" in problem


# Crashes


CRASH_EVERYWHERE = """
import json, os, shutil, sys, torch
from pathlib import Path
from train.checkpoint.store import CheckpointStore
from train.checkpoint.manifest import damage

TOUCHES_DISK = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}

def save(root, step):
    tensors = {"model": {"w": torch.full((100,), float(step))}}
    store = CheckpointStore(root, keep=2)
    store.save(step, tensors, {"cursor": step})
    store.wait()

def die_before_touch(number):
    left = [number]
    def hook(event, arguments):
        if event in TOUCHES_DISK:
            left[0] -= 1
            if left[0] == 0:
                os._exit(1)
    sys.addaudithook(hook)

def killed_while_saving_step_3(root, number):
    if (child := os.fork()) == 0:
        die_before_touch(number)
        save(root, 3)
        os._exit(0)
    return os.waitpid(child, 0)[1] != 0

def contents(root):
    found = CheckpointStore(root, keep=2).newest()
    return [found.step, found.state["cursor"], *found.load_weights()["w"].unique().tolist()]

base, work, damaged = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "damaged"
save(base, 1)
save(base, 2)
if damaged:
    save(base, 3)
    (base / "step_00000003" / "state.json").write_text("{}")
outcomes, number, killed = [], 0, True
while killed:
    number += 1
    shutil.copytree(base, work)
    killed = killed_while_saving_step_3(work, number)
    after_crash = contents(work)
    false_marks = [p.parent.name for p in work.glob("step_*/COMPLETE") if damage(p.parent)]
    save(work, 3)
    outcomes.append([after_crash, false_marks, contents(work), sorted(os.listdir(work))])
    shutil.rmtree(work)
print(json.dumps(outcomes))
"""


@pytest.mark.process
@pytest.mark.parametrize("third", ["absent", "damaged"])
def test_a_crash_before_any_touch_of_the_disk_leaves_a_whole_checkpoint(
    tmp_path: Path, third: str
) -> None:
    outcomes = run_script(CRASH_EVERYWHERE, tmp_path / "base", tmp_path / "work", third)
    assert len(outcomes) > 20
    assert {str(after_crash) for after_crash, *_ in outcomes} == {"[2, 2, 2.0]", "[3, 3, 3.0]"}
    for _, false_marks, after_next_save, names in outcomes:
        assert false_marks == [] or (third == "damaged" and false_marks == ["step_00000003"])
        assert after_next_save == [3, 3, 3.0]
        assert names == ["step_00000002", "step_00000003"]


KILL_AT_RANDOM = """
import itertools, json, os, random, signal, sys, time, torch
from pathlib import Path
from train.checkpoint.store import CheckpointStore

store = CheckpointStore(Path(sys.argv[1]), keep=2)

def save_for_ever(step):
    for step in itertools.count(step):
        tensors = {"model": {"w": torch.full((500_000,), float(step))}}
        store.save(step, tensors, {"cursor": step})

seen = [[0, 0, 0]]
for _ in range(10):
    if (child := os.fork()) == 0:
        save_for_ever(seen[-1][0] + 1)
    time.sleep(random.uniform(0.02, 0.25))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    if found := store.newest():
        weights = found.load_weights()["w"].unique().tolist()
        seen.append([found.step, found.state["cursor"], *weights])
print(json.dumps(seen))
"""


@pytest.mark.process
def test_a_kill_at_a_random_moment_never_leaves_something_that_loads_wrongly(
    tmp_path: Path,
) -> None:
    seen = run_script(KILL_AT_RANDOM, tmp_path)
    assert all(entry == [entry[0]] * 3 for entry in seen)
    steps = [entry[0] for entry in seen]
    assert steps == sorted(steps)
    assert steps[-1] > 0
