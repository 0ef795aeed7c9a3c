"""Claims about `train.run_dir.lock`: a run's directory has one holder at a time."""

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from threading import Barrier, Event, Thread

import pytest
from rich.console import Console

from conf.errors import ConfigError
from conf.exit_codes import ExitCode
from tests.forked_python import forked_python
from train.distributed.process_groups import ProcessGroups
from train.run import open_run
from train.run_dir import lock as run_lock
from train.run_dir.lock import LOCK, Holder, RunLock, _create, _start_of, hold_run_dir


@pytest.fixture
def short_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "LEASE_S", 0.3)
    monkeypatch.setattr(run_lock, "WATCH_S", 0.01)
    monkeypatch.setattr(run_lock, "BEAT_S", 0.02)


@contextmanager
def process() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "600"]) as sleeping:
        try:
            yield sleeping
        finally:
            sleeping.kill()


def holder_of(number: int) -> Holder:
    return replace(Holder.this_process(), process=number, started=_start_of(number))


ELSEWHERE = replace(Holder.this_process(), host="node7", place="another start", process=321)


def write_lock(directory: Path, holder: Holder) -> Path:
    directory.mkdir(exist_ok=True)
    _create(directory / LOCK, holder)
    return directory / LOCK


def files(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def refusal(directory: Path) -> str:
    with pytest.raises(ConfigError) as error:
        RunLock.acquire(directory)
    [problem] = error.value.problems
    return str(problem)


@contextmanager
def beating(path: Path) -> Iterator[None]:
    """The heartbeat of a process on another machine."""
    over = Event()

    def beat() -> None:
        while not over.wait(0.02):
            os.utime(path)

    thread = Thread(target=beat)
    thread.start()
    yield
    over.set()
    thread.join()


def test_a_second_run_is_told_who_holds_the_directory_and_writes_nothing(config) -> None:
    settings = config()
    with process() as other:
        holder = holder_of(other.pid)
        write_lock(settings.run_dir, holder)
        (settings.run_dir / "config.yaml").write_text("of the other run")
        before = files(settings.run_dir)
        with (
            pytest.raises(ConfigError) as error,
            open_run(settings, Console(file=io.StringIO())),
        ):
            pass
        assert files(settings.run_dir) == before
    [problem] = map(str, error.value.problems)
    assert problem == (
        f"run.dir='{settings.run_dir}': is in use by process {other.pid} on {holder.host}, since "
        f"{holder.since}; wait for its end, stop it, or choose another run.name or run.dir"
    )


def test_a_holder_that_was_killed_does_not_block(tmp_path: Path) -> None:
    with process() as other:
        write_lock(tmp_path, holder_of(other.pid))
        other.kill()
        # The kernel keeps the number until the parent has asked how it ended.
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
        RunLock.acquire(tmp_path).release()
    write_lock(tmp_path, holder_of(other.pid))
    RunLock.acquire(tmp_path).release()
    assert files(tmp_path) == {}


def test_a_number_that_another_process_has_by_now_does_not_block(tmp_path: Path) -> None:
    with process() as other:
        write_lock(tmp_path, replace(holder_of(other.pid), started="1"))
        RunLock.acquire(tmp_path).release()


@pytest.mark.usefixtures("short_lease")
def test_a_heartbeat_on_another_machine_blocks(tmp_path: Path) -> None:
    with beating(write_lock(tmp_path, ELSEWHERE)):
        assert "is in use by process 321 on node7, since 2" in refusal(tmp_path)
    assert list(files(tmp_path)) == [LOCK]


@pytest.mark.usefixtures("short_lease")
@pytest.mark.parametrize("age_s", [0, 0.2, -50])  # -50: the clock of the file server is ahead
def test_a_holder_on_another_machine_without_a_heartbeat_does_not_block(
    age_s: float, tmp_path: Path
) -> None:
    beat = time.time() - age_s
    os.utime(write_lock(tmp_path, ELSEWHERE), (beat, beat))
    told: list[str] = []
    RunLock.acquire(tmp_path, told.append).release()
    assert told == [
        f"{tmp_path} was held by {ELSEWHERE}; looking whether it is alive (at most 0.3 s)"
    ]
    assert files(tmp_path) == {}


def test_an_old_lock_of_another_machine_is_seen_at_once(tmp_path: Path) -> None:
    os.utime(write_lock(tmp_path, ELSEWHERE), (1e9, 1e9))
    told: list[str] = []
    RunLock.acquire(tmp_path, told.append).release()
    assert (told, files(tmp_path)) == ([], {})


@pytest.mark.usefixtures("short_lease")
@pytest.mark.parametrize("content", [b"", b"\0" * 200, b'{"host": "node7', b"[1]", b"{}"])
def test_a_torn_lock_does_not_block(content: bytes, tmp_path: Path) -> None:
    (tmp_path / LOCK).write_bytes(content)
    RunLock.acquire(tmp_path, lambda _: None).release()
    assert files(tmp_path) == {}


def test_a_name_that_comes_after_the_look_is_seen_although_the_time_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes start together: one reads the lock before the other has written its name."""
    looks: list[float] = []

    def look_again(pause: float) -> None:
        looks.append(pause)
        assert len(looks) < 4, "the name is not seen"

    monkeypatch.setattr(run_lock, "sleep", look_again)
    path = tmp_path / LOCK
    path.touch()
    now = time.time_ns()
    os.utime(path, ns=(now, now))

    def write(_: str) -> None:
        with process() as other:
            path.write_text(json.dumps(asdict(holder_of(other.pid))))
        os.utime(path, ns=(now, now))

    RunLock.acquire(tmp_path, write).release()
    assert files(tmp_path) == {}


@pytest.mark.parametrize("later_ns", [0, 10**9])
def test_a_holder_whose_name_comes_after_the_look_is_named(
    later_ns: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "sleep", lambda _: None)
    path = tmp_path / LOCK
    path.touch()
    now = time.time_ns()
    os.utime(path, ns=(now, now))
    with process() as other:

        def write(_: str) -> None:
            path.write_text(json.dumps(asdict(holder_of(other.pid))))
            os.utime(path, ns=(now + later_ns, now + later_ns))

        with pytest.raises(ConfigError, match=f"is in use by process {other.pid} on "):
            RunLock.acquire(tmp_path, write)


def test_a_link_to_nowhere_does_not_block(tmp_path: Path) -> None:
    (tmp_path / LOCK).symlink_to("nowhere")
    RunLock.acquire(tmp_path).release()
    assert list(tmp_path.iterdir()) == []


def test_of_many_that_take_over_one_gets_the_directory(tmp_path: Path) -> None:
    many = 6
    for dead in ("no holder", "dead", "dead while taking over"):
        with process() as killed:
            holder = holder_of(killed.pid)
        if dead != "no holder":
            write_lock(tmp_path, holder)
        if dead == "dead while taking over":
            _create(tmp_path / f"lock.{holder.token}.json", holder_of(killed.pid))
        together = Barrier(many)

        def attempt(_: int, together: Barrier = together) -> RunLock | None:
            lock = RunLock(tmp_path)
            together.wait()
            try:
                lock._take(lambda _: None)
            except ConfigError:
                return None
            return lock

        with ThreadPoolExecutor(many) as pool:
            [lock] = filter(None, pool.map(attempt, range(many)))
        assert lock._is_own()
        assert list(files(tmp_path)) == [LOCK]
        lock.path.unlink()


def test_the_same_process_may_enter_again(tmp_path: Path) -> None:
    directory, console = tmp_path / "a" / "run", Console(file=io.StringIO())
    with hold_run_dir(directory, ProcessGroups(), console):
        with hold_run_dir(directory / ".." / "run", ProcessGroups(), console):
            pass
        assert list(files(directory)) == [LOCK]
    assert list(tmp_path.iterdir()) == []  # nothing was written, so nothing stays


@pytest.mark.usefixtures("short_lease")
def test_a_holder_whose_directory_was_taken_over_ends_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    lock = RunLock.acquire(tmp_path)
    lock.path.write_bytes(b"")
    lock.path.unlink()
    while not lock.path.exists():  # removed by somebody, which is no reason to end
        time.sleep(0.01)
    assert codes == []
    replacing = tmp_path / "new"
    _create(replacing, ELSEWHERE)
    replacing.replace(lock.path)
    while not codes:
        time.sleep(0.01)
    lock.release()
    assert codes[0] == ExitCode.CRASHED
    assert f"{tmp_path}: this process was stopped" in capsys.readouterr().err
    assert list(files(tmp_path)) == [LOCK]  # that of the other


@pytest.mark.usefixtures("short_lease")
def test_the_heartbeat_renews_the_lock(tmp_path: Path) -> None:
    lock = RunLock.acquire(tmp_path)
    os.utime(lock.path, (1e9, 1e9))
    while lock.path.stat().st_mtime == 1e9:
        time.sleep(0.01)
    lock.release()


def test_a_run_that_begins_anew_keeps_hold_of_the_directory(config, trained, tmp_path) -> None:
    trained(config())
    with hold_run_dir(tmp_path / "run", ProcessGroups(), Console(file=io.StringIO())):
        trained(config("run.resume=never"))
        held = Holder(**json.loads((tmp_path / "run" / LOCK).read_text()))
        assert held.process == os.getpid()
        assert not (tmp_path / "run.old-1" / LOCK).exists()
    assert not (tmp_path / "run" / LOCK).exists()


HOLD = """
import sys, time
from pathlib import Path
from train.run_dir.lock import RunLock
RunLock.acquire(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


@pytest.mark.process
def test_two_processes_hold_one_directory_one_after_the_other(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with forked_python(), subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        assert f"is in use by process {other.pid} on " in refusal(tmp_path)
        other.kill()
        other.wait()
    RunLock.acquire(tmp_path).release()
