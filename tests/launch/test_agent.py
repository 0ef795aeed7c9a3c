"""Agents restart what crashed, end what ended, pass on signals and leave nobody behind.

Two agents on loopback stand for two machines.
"""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from launch.config import Local
from tests.launch.workshop import Workshop, runs, wait_for

pytestmark = pytest.mark.process

STATIC: dict[str, Any] = {
    "nodes": 2,
    "rendezvous": "static",
    "each": ({"node_rank": 0}, {"node_rank": 1}),
}


def kill(pid: str) -> None:
    os.kill(int(pid), signal.SIGKILL)


def test_a_killed_process_is_replaced_on_both_machines_and_saving_ends_both(
    workshop: Workshop,
) -> None:
    workshop.pair(nodes=2, max_restarts=1)
    first = workshop.until("./2 started (.*)", 2)
    assert {line[0][0] for line in first} == {"0", "1"}
    kill(first[0][1])
    second = workshop.until("./2 started (.*)", 4)[2:]
    assert {line[0][0] for line in second} == {"0", "1"}
    assert not any(runs(int(line[1])) for line in first)
    workshop.order(75)
    assert [workshop.code(0), workshop.code(1)] == [75, 75]
    assert len(workshop.told(".* started .*")) == 4


def test_when_a_machine_dies_its_processes_do_too_and_the_other_goes_on_alone(
    workshop: Workshop,
) -> None:
    workshop.pair(nodes="1:2")
    first = workshop.until("./2 started (.*)", 2)
    before = len(workshop.told("0/1 started .*"))  # the first machine may not have waited
    workshop.signal("SIGKILL", agent=1)
    alone = workshop.until("0/1 started (.*)", before + 1)[-1]
    assert not any(runs(int(line[1])) for line in first)
    workshop.signal("SIGTERM")
    assert workshop.code() == 75
    assert len(workshop.told("0/1 saved SIGTERM")) == 1
    assert not runs(int(alone[1]))


def test_a_machine_that_comes_later_is_taken_in(workshop: Workshop) -> None:
    workshop.pair(nodes="1:2", each=({},))
    workshop.until("0/1 started .*")
    workshop.pair(nodes="1:2", each=({},))
    workshop.until("./2 started .*", 2)
    assert len(workshop.told("0/1 saved SIGTERM")) == 1
    workshop.order(0)
    assert [workshop.code(0), workshop.code(1)] == [0, 0]


def test_when_the_machine_that_keeps_the_list_dies_the_others_may_be_queued_again(
    workshop: Workshop,
) -> None:
    workshop.pair(nodes=2)
    started = workshop.until("./2 started (.*)", 2)
    workshop.signal("SIGKILL")
    assert workshop.code(1) == 75
    assert "the other machines are gone" in workshop.errors(1)
    assert not any(runs(int(line[1])) for line in started)


def test_the_machine_that_keeps_the_list_stays_until_all_are_done(workshop: Workshop) -> None:
    workshop.pair(nodes=2)
    for line in workshop.until("(.)/2 started (.*)", 2):
        parent = Path(f"/proc/{line[2]}/stat").read_text().rpartition(")")[2].split()[1]
        if int(parent) == workshop.agents[0].pid:
            workshop.order(75, rank=line[1])
    time.sleep(3)  # the other machine looks at the list every second
    workshop.order(75)
    assert [workshop.code(0), workshop.code(1)] == [75, 75]
    assert "gone" not in workshop.errors(1)


def test_a_machine_that_finds_no_other_has_failed(workshop: Workshop) -> None:
    workshop.pair(nodes=2, join_s=2, each=({},))
    assert workshop.code() == 1
    assert "too few machines came" in workshop.errors()


def test_a_signal_to_one_machine_ends_both_and_repeating_it_hurts_nobody(
    workshop: Workshop,
) -> None:
    workshop.pair("save=0.5", **STATIC)
    workshop.until("./2 started .*", 2)
    workshop.signal("SIGUSR1", agent=1)
    workshop.until("1/2 asked SIGUSR1")
    workshop.signal("SIGUSR1", agent=1)
    workshop.signal("SIGTERM", agent=1)
    assert [workshop.code(0), workshop.code(1)] == [75, 75]
    assert len(workshop.told("1/2 saved SIGUSR1")) == 1  # rank 1 is that of node_rank=1
    assert len(workshop.told("0/2 saved")) == 1
    assert len(workshop.told(".* started .*")) == 2


def test_static_machines_start_again_together(workshop: Workshop) -> None:
    workshop.pair(**STATIC)
    groups = {line[1]: line[2] for line in workshop.until("(.)/2 started (.*)", 2)}
    kill(groups["1"])
    workshop.until("./2 started .*", 4)
    workshop.order(0)
    assert [workshop.code(0), workshop.code(1)] == [0, 0]


@pytest.mark.parametrize(
    ("sent", "heard", "code"),
    [("TERM", "TERM", 75), ("USR2", "USR2", 75), ("HUP", "TERM", 75)],
)
def test_a_signal_is_passed_on_and_the_code_is_that_of_who_heard_it(
    workshop: Workshop, sent: str, heard: str, code: int
) -> None:
    workshop.start(Local(processes=1))
    workshop.until("0/1 started .*")
    workshop.signal(f"SIG{sent}")
    assert workshop.code() == code
    assert len(workshop.told(f"0/1 saved SIG{heard}")) == 1


def test_a_second_ctrl_c_is_passed_on_too(workshop: Workshop) -> None:
    workshop.start(Local(processes=1), "save=0.5")
    workshop.until("0/1 started .*")
    workshop.signal("SIGINT")
    workshop.until("0/1 asked SIGINT")
    workshop.signal("SIGINT")
    assert workshop.code() == 130
    assert len(workshop.told("0/1 saved SIGINT SIGINT")) == 1


def test_who_does_not_end_in_time_is_killed(workshop: Workshop) -> None:
    workshop.start(Local(processes=1, grace_s=1), "deaf")
    [started] = workshop.until("0/1 started (.*)")
    told = time.monotonic()
    workshop.signal("SIGTERM")
    assert workshop.code() == 75
    assert time.monotonic() - told < 29  # PyTorch's own grace is 30 s
    assert not runs(int(started[1]))


def test_who_is_done_does_not_disturb_who_still_saves(workshop: Workshop) -> None:
    workshop.start(Local(processes=2), "save_1=1")
    groups = {line[1]: line[2] for line in workshop.until("(.)/2 started (.*)", 2)}
    os.kill(int(groups["1"]), signal.SIGUSR1)
    workshop.until("0/2 saved")
    assert workshop.told("1/2 saved .*") == []
    assert workshop.code() == 75
    assert len(workshop.told("1/2 saved SIGUSR1")) == 1  # and no SIGTERM


@pytest.mark.parametrize(("code", "starts"), [(0, 1), (1, 2), (2, 1), (75, 1)])
def test_only_a_crash_is_tried_again(workshop: Workshop, code: int, starts: int) -> None:
    workshop.order(code)
    workshop.start(Local(processes=1, max_restarts=1))
    assert workshop.code() == code
    assert len(workshop.told(".* started .*")) == starts


def test_a_crash_beside_processes_that_then_save_is_a_crash(workshop: Workshop) -> None:
    workshop.start(Local(processes=2, max_restarts=1))
    workshop.until("./2 started .*", 2)
    workshop.order(3, rank="0")
    assert workshop.code() == 1
    assert len(workshop.told("0/2 started .*")) == 2
    assert workshop.errors().count("launch: rank 0 (process ") == 2
    assert "ended with exit code 3" in workshop.errors()


def test_the_code_for_saved_can_be_another(workshop: Workshop) -> None:
    workshop.order(75)
    workshop.pair(nodes=1, saved_code=143, each=({},))
    assert workshop.code() == 143


def test_nobody_outlives_an_agent_that_is_killed(workshop: Workshop) -> None:
    workshop.start(Local(processes=2), "deaf")
    started = workshop.until("./2 started (.*)", 2)
    workshop.signal("SIGKILL")
    wait_for(lambda: not any(runs(int(line[1])) for line in started), "the end of the workers")
