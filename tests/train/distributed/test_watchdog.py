"""A process that hangs writes every thread's stack and ends, whatever it hangs in."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.forked_python import forked_python
from tests.patience import PATIENCE_S
from train.distributed.watchdog import Watchdog

pytestmark = pytest.mark.process

ROOT = Path(__file__).parents[3]

START = """
import ctypes, sys
from pathlib import Path
from time import sleep
from train.distributed import watchdog
watchdog.LINGER_S = 0.5
guarded = watchdog.Watchdog(Path(sys.argv[1]), 3, float(sys.argv[2]))
"""

SLEEP = """
def hang_here():
    sleep(60)
with guarded:
    hang_here()
"""

LOCKED = """
def hang_here():
    ctypes.PyDLL(None).sleep(60)
with guarded:
    hang_here()
"""

LEAVE = """
with guarded:
    guarded.exit_within(0.5)
    guarded.exit_within(60)
    while True:
        guarded.heartbeat()
        sleep(0.1)
"""

ON_TIME = """
with guarded:
    for _ in range(6):
        guarded.heartbeat()
        sleep(0.25)
sleep(1.7)
print("done")
"""

LATE = """
with guarded:
    sleep(0.7)
    guarded.heartbeat()
    sleep(60)
"""

FAILING = """
with guarded:
    1 / 0
"""


def start(script: str, directory: Path, step_timeout: float) -> subprocess.Popen[str]:
    return start_python(START + script, str(directory), str(step_timeout))


def start_python(script: str, *arguments: str) -> subprocess.Popen[str]:
    with forked_python():
        return subprocess.Popen(
            [sys.executable, "-c", script, *arguments],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


def stacks(directory: Path, rank: int = 3) -> str:
    return (directory / "stacks" / f"rank_{rank}.txt").read_text()


@pytest.mark.parametrize(("script", "dumps"), [(SLEEP, 2), (LOCKED, 1)], ids=["free", "locked"])
def test_a_hanging_process_writes_where_it_hangs_and_ends(
    script: str, dumps: int, tmp_path: Path
) -> None:
    process = start(script, tmp_path, 0.5)
    _, told = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1  # and not 0, as after its sleep
    text = stacks(tmp_path)
    assert text.count("in hang_here") == dumps
    assert f"rank 3, process {process.pid} on {socket.gethostname()} started" in text
    if dumps == 2:  # Python could tell more
        for said in (text, told):
            assert f"process {process.pid} on {socket.gethostname()}" in said
            assert "no step for 0.5 s" in said


def test_who_has_to_leave_is_not_kept_by_more_steps(tmp_path: Path) -> None:
    process = start(LEAVE, tmp_path, 60)
    process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1
    text = stacks(tmp_path)
    assert text.count("has 0.5 s to leave") == 1
    assert "still there 0.5 s after it had to leave" in text


def test_steps_on_time_and_what_comes_afterwards_are_left_alone(tmp_path: Path) -> None:
    process = start(ON_TIME, tmp_path, 1.0)
    assert process.communicate(timeout=PATIENCE_S) == ("done\n", "")
    assert process.returncode == 0
    assert not (tmp_path / "stacks").exists()


def test_a_step_that_comes_too_late_changes_nothing(tmp_path: Path) -> None:
    process = start(LATE, tmp_path, 0.4)
    process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1


def test_an_error_is_no_hang_and_stacks_of_earlier_starts_stay(tmp_path: Path) -> None:
    start(SLEEP, tmp_path, 0.2).communicate(timeout=PATIENCE_S)
    before = stacks(tmp_path)
    process = start(FAILING, tmp_path, 60)
    _, told = process.communicate(timeout=PATIENCE_S)
    assert "ZeroDivisionError" in told
    assert stacks(tmp_path) == before
    start(SLEEP, tmp_path, 0.2).communicate(timeout=PATIENCE_S)
    assert stacks(tmp_path).startswith(before)
    assert stacks(tmp_path).count("started") == 2


KILLED = """
import os, signal
with guarded:
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("starts", [1, 2])
def test_what_a_killed_process_leaves_says_so_and_goes_with_the_next_clean_end(
    starts: int, tmp_path: Path
) -> None:
    for _ in range(starts):
        process = start(KILLED, tmp_path, 60)
        process.communicate(timeout=PATIENCE_S)
        assert process.returncode == -signal.SIGKILL
    lines = stacks(tmp_path).splitlines()
    assert len(lines) == starts
    assert all("without stacks below, it still runs or was killed" in line for line in lines)
    with Watchdog(tmp_path, 3, 60.0):
        assert stacks(tmp_path).startswith(lines[0])
    assert not (tmp_path / "stacks").exists()


@pytest.mark.parametrize("removed", ["stacks/rank_0.txt", "stacks"])
def test_a_run_ends_well_if_somebody_has_removed_its_stacks(removed: str, tmp_path: Path) -> None:
    with Watchdog(tmp_path, 0, 60.0):
        path = tmp_path / removed
        path.unlink() if path.is_file() else shutil.rmtree(path)


PEERS = """
import os, sys, torch, torch.distributed as dist
from pathlib import Path
from time import sleep
from train.distributed import watchdog
watchdog.LINGER_S = 1.0
directory, rank, port = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
store = dist.TCPStore("127.0.0.1", port, 3, rank == 0)
dist.init_process_group("gloo", store=store, rank=rank, world_size=3)
def exchange():
    dist.all_reduce(torch.ones(1))
with watchdog.Watchdog(directory, rank, 1.5 + 0.3 * rank) as guarded:
    exchange()
    guarded.heartbeat()
    print("ready", flush=True)
    sleep(0.5)
    exchange()
"""


def test_ranks_that_wait_for_a_stopped_one_all_write_where_before_the_first_ends(
    tmp_path: Path,
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    groups = [start_python(PEERS, str(tmp_path), str(rank), str(port)) for rank in range(3)]
    try:
        for process in groups:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        groups[2].send_signal(signal.SIGSTOP)
        for process in groups[:2]:
            process.communicate(timeout=PATIENCE_S)
            assert process.returncode != 0
        for rank in (0, 1):
            text = stacks(tmp_path, rank)
            assert "no step for" in text
            assert "in exchange" in text
    finally:
        for process in groups:
            process.kill()
            process.communicate()


def test_a_file_that_cannot_be_written_is_an_error_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "stacks").touch()
    process = start(SLEEP, tmp_path, 60)
    _, told = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1
    assert "FileExistsError" in told
