"""Agents restart what crashed, end what ended, pass on signals and leave nobody behind.

Two agents on loopback stand for two machines.
"""

import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data.storage.atomic import write_atomic
from launch.agent import SignalForwarder
from launch.config import Local, Nodes
from tests.launch.machines import WORKER, Machines, wait_for
from tests.launch.worker import runs
from tests.patience import PATIENCE_S

pytestmark = pytest.mark.process

STATIC: dict[str, Any] = {
    "nodes": 2,
    "rendezvous": "static",
    "each": ({"node_rank": 0}, {"node_rank": 1}),
}


def kill(pid: str) -> None:
    os.kill(int(pid), signal.SIGKILL)


def test_a_killed_process_is_replaced_on_both_machines_and_saving_ends_both(
    machines: Machines,
) -> None:
    machines.pair(nodes=2, max_restarts=1)
    first = machines.wait_for_log("./2 started (.*)", 2)
    assert {line[0][0] for line in first} == {"0", "1"}
    kill(first[0][1])
    second = machines.wait_for_log("./2 started (.*)", 4)[2:]
    assert {line[0][0] for line in second} == {"0", "1"}
    assert not any(runs(int(line[1])) for line in first)
    machines.make_exit(75)
    assert [machines.exit_code(0), machines.exit_code(1)] == [75, 75]
    assert len(machines.log_lines(".* started .*")) == 4


def test_who_waits_for_a_lost_rank_does_not_keep_the_others_waiting(machines: Machines) -> None:
    machines.after_crash_s = 1  # and not its 15 s, in which the test would wait
    machines.pair("deaf", "stuck", nodes=2, max_restarts=1, grace_s=10 * int(PATIENCE_S))
    first = machines.wait_for_log("./2 started (.*)", 2)
    kill(first[0][1])
    # No machine could join, so the other machine knows that somebody is lost: nothing to save.
    assert len(machines.wait_for_log("./2 started (.*)", 4)) == 4
    assert not any(runs(int(line[1])) for line in first)


def test_when_a_machine_dies_its_processes_do_too_and_the_other_goes_on_alone(
    machines: Machines,
) -> None:
    machines.pair(nodes="1:2")
    first = machines.wait_for_log("./2 started (.*)", 2)
    before = len(machines.log_lines("0/1 started .*"))  # the first machine may not have waited
    machines.signal("SIGKILL", agent=1)
    alone = machines.wait_for_log("0/1 started (.*)", before + 1)[-1]
    assert not any(runs(int(line[1])) for line in first)
    machines.signal("SIGTERM")
    assert machines.exit_code() == 75
    assert len(machines.log_lines("0/1 saved SIGTERM")) == 1
    assert not runs(int(alone[1]))


def test_a_machine_that_comes_later_is_taken_in(machines: Machines) -> None:
    machines.pair(nodes="1:2", each=({},))
    machines.wait_for_log("0/1 started .*")
    machines.pair(nodes="1:2", each=({},))
    machines.wait_for_log("./2 started .*", 2)
    assert len(machines.log_lines("0/1 saved SIGTERM")) == 1
    machines.make_exit(0)
    assert [machines.exit_code(0), machines.exit_code(1)] == [0, 0]


def test_when_the_machine_that_keeps_the_list_dies_the_others_may_be_queued_again(
    machines: Machines,
) -> None:
    machines.pair(nodes=2)
    started = machines.wait_for_log("./2 started (.*)", 2)
    machines.signal("SIGKILL")
    assert machines.exit_code(1) == 75
    assert "the other machines are gone" in machines.stderr(1)
    assert not any(runs(int(line[1])) for line in started)


def test_the_machine_that_keeps_the_list_stays_until_all_are_done(machines: Machines) -> None:
    machines.pair(nodes=2)
    for line in machines.wait_for_log("(.)/2 started (.*)", 2):
        parent = Path(f"/proc/{line[2]}/stat").read_text().rpartition(")")[2].split()[1]
        if int(parent) == machines.agents[0].pid:
            machines.make_exit(75, rank=line[1])
    time.sleep(3)  # the other machine looks at the list every second
    machines.make_exit(75)
    assert [machines.exit_code(0), machines.exit_code(1)] == [75, 75]
    assert "gone" not in machines.stderr(1)


def test_a_machine_that_finds_no_other_has_failed(machines: Machines) -> None:
    machines.pair(nodes=2, join_s=2, each=({},))
    assert machines.exit_code() == 1
    assert "too few machines came: 1 of 2 within join_s=2 seconds" in machines.stderr()


MEETINGS: list[dict[str, Any]] = [{}, {"rendezvous": "static", "node_rank": 1}]


@pytest.fixture
def silent() -> Iterator[socket.socket]:
    """A service that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(PATIENCE_S)
        yield server


def waiter(server: socket.socket, **settings: Any) -> Nodes:
    """A machine that looks for the rendezvous at a service."""
    address = f"127.0.0.1:{server.getsockname()[1]}"
    return Nodes(**{"processes": 1, "nodes": "2", "address": address, **settings})


@pytest.mark.parametrize("settings", MEETINGS, ids=["c10d", "static"])
def test_a_service_that_never_answers_is_no_rendezvous(
    machines: Machines, silent: socket.socket, settings: dict[str, Any]
) -> None:
    config = waiter(silent, join_s=2, **settings)
    machines.start(config)
    assert machines.exit_code() == 1
    told = f"launch: no rendezvous at {config.address} within join_s=2 seconds: it accepts"
    assert machines.stderr().startswith(told)


@pytest.mark.parametrize("settings", MEETINGS, ids=["c10d", "static"])
def test_a_signal_ends_the_waiting_for_a_service_that_never_answers(
    machines: Machines, silent: socket.socket, settings: dict[str, Any]
) -> None:
    machines.start(waiter(silent, join_s=9999, **settings))
    connection, _ = silent.accept()
    with connection:
        machines.signal("SIGTERM")
        assert machines.exit_code() == 75


def test_a_signal_to_one_machine_ends_both_and_repeating_it_hurts_nobody(
    machines: Machines,
) -> None:
    machines.pair("save=0.5", **STATIC)
    machines.wait_for_log("./2 started .*", 2)
    machines.signal("SIGUSR1", agent=1)
    machines.wait_for_log("1/2 received SIGUSR1")
    machines.signal("SIGUSR1", agent=1)
    machines.signal("SIGTERM", agent=1)
    assert [machines.exit_code(0), machines.exit_code(1)] == [75, 75]
    assert len(machines.log_lines("1/2 saved SIGUSR1")) == 1  # rank 1 is that of node_rank=1
    assert len(machines.log_lines("0/2 saved")) == 1
    assert len(machines.log_lines(".* started .*")) == 2


def test_static_machines_start_again_together(machines: Machines) -> None:
    machines.pair(**STATIC)
    groups = {line[1]: line[2] for line in machines.wait_for_log("(.)/2 started (.*)", 2)}
    kill(groups["1"])
    machines.wait_for_log("./2 started .*", 4)
    machines.make_exit(0)
    assert [machines.exit_code(0), machines.exit_code(1)] == [0, 0]


@pytest.mark.parametrize(
    ("sent", "heard", "code"),
    [("TERM", "TERM", 75), ("USR2", "USR2", 75), ("HUP", "TERM", 75)],
)
def test_a_signal_is_passed_on_and_the_code_is_that_of_who_heard_it(
    machines: Machines, sent: str, heard: str, code: int
) -> None:
    machines.start(Local(processes=1))
    machines.wait_for_log("0/1 started .*")
    machines.signal(f"SIG{sent}")
    assert machines.exit_code() == code
    assert len(machines.log_lines(f"0/1 saved SIG{heard}")) == 1


def test_a_second_ctrl_c_is_passed_on_too(machines: Machines) -> None:
    machines.start(Local(processes=1), "save=0.5")
    machines.wait_for_log("0/1 started .*")
    machines.signal("SIGINT")
    machines.wait_for_log("0/1 received SIGINT")
    machines.signal("SIGINT")
    assert machines.exit_code() == 130
    assert len(machines.log_lines("0/1 saved SIGINT SIGINT")) == 1


def test_a_terminal_that_is_gone_saves_as_sigterm_does(machines: Machines) -> None:
    machines.start(Local(processes=1))
    machines.wait_for_log("0/1 started .*")
    machines.signal("SIGHUP")
    assert machines.exit_code() == 75
    assert len(machines.log_lines("0/1 saved SIGTERM")) == 1


def test_a_hang_up_that_nohup_ignores_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_SIGNALS_TO_HANDLE", "")
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with SignalForwarder() as forwarder:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN  # as processes inherit it
            assert forwarder.first is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_who_does_not_end_in_time_is_killed(machines: Machines) -> None:
    machines.start(Local(processes=1, grace_s=1), "deaf")
    [started] = machines.wait_for_log("0/1 started (.*)")
    machines.signal("SIGTERM")
    assert machines.exit_code() == 75
    # PyTorch's own grace is 30 s, in which it would turn up to 1500 times; on a busy machine fewer.
    assert 0 < (machines.directory / "deaf_turns").stat().st_size < 1000
    assert not runs(int(started[1]))


def test_who_is_done_does_not_disturb_who_still_saves(machines: Machines) -> None:
    machines.start(Local(processes=2), "save_1=1")
    groups = {line[1]: line[2] for line in machines.wait_for_log("(.)/2 started (.*)", 2)}
    os.kill(int(groups["1"]), signal.SIGUSR1)
    machines.wait_for_log("0/2 saved")
    assert machines.log_lines("1/2 saved .*") == []
    assert machines.exit_code() == 75
    assert len(machines.log_lines("1/2 saved SIGUSR1")) == 1  # and no SIGTERM


@pytest.mark.parametrize(("code", "starts"), [(0, 1), (1, 2), (2, 1), (75, 1)])
def test_only_a_crash_is_tried_again(machines: Machines, code: int, starts: int) -> None:
    machines.make_exit(code)
    machines.start(Local(processes=1, max_restarts=1))
    assert machines.exit_code() == code
    assert len(machines.log_lines(".* started .*")) == starts


def test_a_crash_beside_processes_that_then_save_is_a_crash(machines: Machines) -> None:
    machines.start(Local(processes=2, max_restarts=1))
    machines.wait_for_log("./2 started .*", 2)
    machines.make_exit(3, rank="0")
    assert machines.exit_code() == 1
    assert len(machines.log_lines("0/2 started .*")) == 2
    assert machines.stderr().count("launch: rank 0 (process ") == 2
    assert "ended with exit code 3" in machines.stderr()


def test_the_code_for_saved_can_be_another(machines: Machines) -> None:
    machines.make_exit(75)
    machines.pair(nodes=1, saved_code=143, each=({},))
    assert machines.exit_code() == 143


def test_nobody_outlives_an_agent_that_is_killed(machines: Machines) -> None:
    machines.start(Local(processes=2), "deaf")
    started = machines.wait_for_log("./2 started (.*)", 2)
    machines.signal("SIGKILL")
    wait_for(lambda: not any(runs(int(line[1])) for line in started), "the end of the workers")


@pytest.mark.parametrize("end", ["raise", "SIGKILL"])
def test_the_cause_of_a_crash_is_told_in_five_lines_and_the_rest_is_in_the_logs(
    machines: Machines, end: str
) -> None:
    machines.start(Local(processes=3, max_restarts=0))
    groups = {line[1]: line[2] for line in machines.wait_for_log("(.)/3 started (.*)", 3)}
    if end == "raise":
        write_atomic(machines.directory / "raise_1", "seven apples")  # it is read as it appears
    else:
        kill(groups["1"])
    assert machines.exit_code() == 1
    told = machines.stderr().splitlines()
    about = [n for n, line in enumerate(told) if line.startswith("launch: rank 1 (process ")]
    assert about == [0]  # the cause comes first, and whoever only lost it stays out of the way
    assert "Traceback" not in machines.stderr()
    assert not any("Connection closed" in line for line in told)
    if end == "SIGKILL":
        assert "died of SIGKILL" in told[0]
        return
    assert told[0].endswith("ended with exit code 1:")
    assert told[1].startswith(f'  File "{WORKER}", line ')
    assert told[3] == "  ValueError: seven apples"
    log = Path(told[4].removeprefix("launch: its log: "))
    assert "Traceback (most recent call last)" in log.read_text()
    shutil.rmtree(log.parent)


def test_each_rank_has_a_log_and_the_console_shows_that_of_rank_0(machines: Machines) -> None:
    pattern = machines.directory / "deep" / "rank_%t.log"
    machines.start(Local(processes=2, max_restarts=1, rank_log=str(pattern)), "talk")
    first = machines.wait_for_log("./2 started (.*)", 2)
    wait_for(lambda: "rank 0 on stderr" in machines.stdout(), "rank 0's output")
    kill(first[0][1])
    machines.wait_for_log("./2 started .*", 4)
    wait_for(lambda: machines.stdout().count("rank 0 on stdout") == 2, "rank 0's second output")
    machines.make_exit(0)
    assert machines.exit_code() == 0
    assert "rank 1" not in machines.stdout()
    for rank in (0, 1):
        lines = Path(str(pattern).replace("%t", str(rank))).read_text().splitlines()
        assert lines.count(f"rank {rank} on stdout") == lines.count(f"rank {rank} on stderr") == 2
        assert [line[:11] for line in lines if line.startswith("---")] == [
            "--- start 0",
            "--- start 1",
        ]


def test_what_processes_say_reaches_the_console_and_no_file_stays(machines: Machines) -> None:
    machines.start(Local(processes=2), "talk")
    wait_for(lambda: machines.stderr().count("on stderr") == 2, "both ranks on the console")
    pids = [line[1] for line in machines.wait_for_log("./2 started (.*)", 2)]
    logs = [Path(os.readlink(f"/proc/{pid}/fd/2")) for pid in pids]
    assert all(log.exists() for log in logs)
    machines.make_exit(0)
    assert machines.exit_code() == 0
    assert sorted(machines.stdout().splitlines()) == ["rank 0 on stdout", "rank 1 on stdout"]
    assert not any(log.exists() or log.parent.exists() for log in logs)


def test_variables_reach_every_process(machines: Machines) -> None:
    machines.start(
        Local(processes=2, env={"COLOUR": "dark 'blue' $HOME"}), "tell=COLOUR", "tell=LAUNCHED_BY"
    )
    machines.wait_for_log("./2 COLOUR=dark 'blue' \\$HOME", 2)
    # What was typed, for the run's environment.json.
    [typed, *_] = machines.wait_for_log("./2 LAUNCHED_BY=(.*)", 2)
    assert isinstance(json.loads(typed[1]), list)
    machines.make_exit(0)
    assert machines.exit_code() == 0
