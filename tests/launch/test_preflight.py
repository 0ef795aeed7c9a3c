"""The check of machines finds each fault that is put in, and names the machine that has it.

Two agents on loopback stand for two machines. They have different addresses there.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from launch.config import Check
from launch.preflight import CODE, ROOT, Probe, code_hash, look_around, pairs
from tests.launch.machines import QUICK, Machines, listens, wait_for
from tests.patience import PATIENCE_S

FIRST, SECOND = "127.0.0.1", "127.0.0.2"
# What sitecustomize.py does to the processes of one machine, as Python starts.
FAULTS = """
import importlib.metadata, shutil, time
clock, usage, version = time.time, shutil.disk_usage, importlib.metadata.version
time.time = lambda: clock() - 100
shutil.disk_usage = lambda path: usage(path)._replace(free=3 * 2**28)
importlib.metadata.version = lambda name: "0.1" if name == "numpy" else version(name)
"""

# The process of a rank stops when it looks at a disk; only SIGCONT makes it go on.
STOPS = """
import os, pathlib, shutil, signal
def stop(path):
    pathlib.Path(path, "stopped").write_text(str(os.getpid()))
    os.kill(os.getpid(), signal.SIGSTOP)
shutil.disk_usage = stop
"""


def settings(machines: Machines, **changed: Any) -> dict[str, Any]:
    """For two machines whose speeds do not count, because those of a busy machine vary."""
    base: dict[str, Any] = {
        "nodes": 2,
        "processes": 1,
        "address": f"{FIRST}:{machines.port}",
        "message_mib": 1,
    }
    base |= {"min_relative_speed": 0.0, "min_free_disk_gib": 0.0, "device": "cpu"}
    return base | {key: QUICK[key] for key in ("heartbeat_s", "join_s")} | changed


def start(machines: Machines, address: str, **changed: Any) -> None:
    check = Check(**settings(machines, local_address=address, **changed))
    machines.check(check, [str(machines.directory)])
    wait_for(lambda: listens(machines.port), "an agent that serves the rendezvous")


def findings(text: str) -> list[tuple[str, str]]:
    """What was found: the address of each machine, and what is wrong with it."""
    return re.findall(r"^check: \S+ \((\S+?)\): (.*)$", text, re.MULTILINE)


@pytest.mark.process
def test_machines_that_are_alike_pass(machines: Machines) -> None:
    for address in (FIRST, SECOND):
        start(machines, address)
    assert [machines.exit_code(0), machines.exit_code(1)] == [0, 0]
    said = machines.stdout(0) + machines.stdout(1)
    assert "check: no fault was found" in said
    assert "all-reduce among all 2 ranks: " in said
    assert len(re.findall(r"^\S+ \(127\.0\.0\.[12]\) +[01] +cpu ", said, re.MULTILINE)) == 2


@pytest.mark.process
def test_every_fault_is_found_on_the_machine_that_has_it(
    machines: Machines, tmp_path: Path
) -> None:
    """Clock, disk, a library and the code of the second one; the bandwidth suffices nowhere."""
    start(machines, FIRST, min_free_disk_gib=1.0, min_bandwidth_gb_s=1e6)
    other = tmp_path / "checkout"
    for package in CODE:
        shutil.copytree(ROOT / package, other / package)
    (other / "data" / "new.py").write_text("X = 1\n")
    (tmp_path / "sitecustomize.py").write_text(FAULTS)
    values = settings(machines, local_address=SECOND, min_free_disk_gib=1.0, min_bandwidth_gb_s=1e6)
    command = [sys.executable, "-m", "launch", "check", *(f"{k}={v}" for k, v in values.items())]
    second = subprocess.run(
        [*command, f"run.dir={tmp_path}/run", f"data.cache.dir={tmp_path}"],
        cwd=other,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{other}"},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        timeout=PATIENCE_S,
    )
    assert [machines.exit_code(), second.returncode] == [1, 1]
    found = findings(machines.stdout() + second.stdout)
    about = {
        address: " | ".join(text for where, text in found if where == address)
        for address in (FIRST, SECOND)
    }
    both, own = "expected at least min_bandwidth_gb_s=1e+06", about[SECOND]
    assert both in about[FIRST]
    assert both in own
    # Who is rank 0 is not certain, and of two machines it is the one that the other differs from.
    differing = " | ".join(about.values())
    assert re.search(r"its clock is 100 s (behind|ahead of) that of", differing)
    assert re.search(r"numpy is \S+, and \S+ elsewhere", differing)
    assert re.search(r"the project's code is \w{12}, and \w{12} elsewhere", differing)
    assert f"{tmp_path}/run has 0.8 GiB free; expected at least min_free_disk_gib=1" in own
    assert "GiB free" not in about[FIRST]


@pytest.mark.process
def test_a_rank_that_hangs_is_named(machines: Machines) -> None:
    """A process that is stopped as soon as it has come stands for a device or disk that hangs."""
    (machines.directory / "sitecustomize.py").write_text(STOPS)
    start(machines, FIRST, check_s=12)
    start(machines, SECOND, check_s=12, env={"PYTHONPATH": str(machines.directory)})
    wait_for(lambda: "check_s" in machines.stdout(0) + machines.stdout(1), "the end of the time")
    os.kill(int((machines.directory / "stopped").read_text()), signal.SIGCONT)
    assert [machines.exit_code(0), machines.exit_code(1)] == [1, 1]
    said = machines.stdout(0) + machines.stdout(1)
    [(where, what)] = findings(said)
    assert where == SECOND
    assert re.fullmatch(r"looks at its device and disks \(rank [01]\)", what)


def test_a_device_that_is_missing_is_a_finding_and_not_a_crash(tmp_path: Path) -> None:
    ranks: Any = SimpleNamespace(rank=5, machine=1, local_rank=99)
    probe = Probe("node1", (str(tmp_path), str(tmp_path / "a" / "b")), Check(device="cuda"))
    report = look_around(probe, ranks)
    [failure] = report.failures
    assert failure.startswith("its device does not work (RuntimeError: ")
    expected = "there are" if torch.cuda.is_available() else "no CUDA device is available"
    assert expected in failure
    assert (report.rank, report.machine, report.host) == (5, 1, "node1")
    assert set(report.free_gib) == {str(tmp_path), str(tmp_path / "a" / "b")}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_cannot_be_written_is_a_finding(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    ranks: Any = SimpleNamespace(rank=0, machine=0, local_rank=0)
    report = look_around(Probe("node0", (str(tmp_path),), Check(device="cpu")), ranks)
    assert "cannot be written" in report.failures[0]


def test_the_hash_of_the_code_changes_with_a_letter_and_with_a_name(tmp_path: Path) -> None:
    (tmp_path / "phd").mkdir()
    file = tmp_path / "phd" / "model.py"
    hashes = [code_hash(tmp_path)]
    for text in ("x = 1\n", "x = 2\n"):
        file.write_text(text)
        hashes.append(code_hash(tmp_path))
    file.rename(file.with_name("block.py"))
    hashes.append(code_hash(tmp_path))
    assert len(set(hashes)) == 4
    (tmp_path / "phd" / "notes.txt").write_text("no code")
    assert code_hash(tmp_path) == hashes[-1]


@pytest.mark.parametrize("machines", [1, 2, 3, 4, 5, 8, 9])
def test_every_machine_meets_its_neighbours_and_no_two_wait_for_each_other(machines: int) -> None:
    """Each machine takes its pairs in the order of all, in which the first pair can always go."""
    left = {machine: list(pairs(machine, machines)) for machine in range(machines)}
    assert all(len(own) == min(machines - 1, 2) for own in left.values())
    while any(left.values()):
        ready = [own[0] for own in left.values() if own]
        [pair, *_] = [pair for pair in ready if all(left[m][0] == pair for m in pair)]
        for machine in pair:
            left[machine].pop(0)
