"""What `launch.torchelastic` assumes about the private API of the installed torch holds.

If a test fails here after an upgrade, torch has changed: adapt launch/torchelastic.py alone.
"""

import inspect
import logging
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytest
from torch.distributed.elastic.agent.server.api import RunResult, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs

from launch.config import Local
from launch.rendezvous import create_rendezvous_handler
from launch.torchelastic import (
    ATTRIBUTES,
    METHODS,
    ElasticAgent,
    handle_signals_ourselves,
    quiet_logs,
)

# A process that counts its starts in a file, and crashes if there were fewer than it was told.
COUNTS = """
import os, sys
with open(sys.argv[1], "a") as file:
    file.write(os.environ["TORCHELASTIC_RESTART_COUNT"] + "\\n")
sys.exit(0 if int(os.environ["TORCHELASTIC_RESTART_COUNT"]) >= int(sys.argv[2]) else 3)
"""


class Recorder(ElasticAgent):
    """An agent that notes which of the replaceable steps PyTorch takes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.steps: list[str] = []
        self.last: RunResult | None = None

    def monitor(self) -> RunResult:
        self.last = super().monitor()
        return self.last

    def stop(self) -> None:
        self.steps.append("stop")
        super().stop()

    def restart(self) -> None:
        self.steps.append(f"restart, {self.remaining_restarts} left")
        super().restart()


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TORCHELASTIC_SIGNALS_TO_HANDLE", "")
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "")
    loggers = [
        logging.getLogger(f"torch.distributed.elastic.{name}.api")
        for name in ("multiprocessing", "agent.server")
    ]
    levels = [logger.level for logger in loggers]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGQUIT)}
    quiet_logs()
    handle_signals_ourselves()
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


def agent_of(tmp_path: Path, *command: str, max_restarts: int = 1) -> Recorder:
    spec = WorkerSpec(
        role="worker",
        local_world_size=1,
        entrypoint=sys.executable,
        args=("-S", *command),
        rdzv_handler=create_rendezvous_handler(Local()),
        max_restarts=max_restarts,
        monitor_interval=0.05,
    )
    (tmp_path / "logs").mkdir()
    logs = DefaultLogsSpecs(log_dir=str(tmp_path / "logs"))
    return Recorder(spec, logs, grace_s=7, exit_barrier_s=11)


def counting(tmp_path: Path, crashes: int, max_restarts: int) -> Recorder:
    command = ("-c", COUNTS, str(tmp_path / "starts"), str(crashes))
    return agent_of(tmp_path, *command, max_restarts=max_restarts)


def test_the_private_methods_take_what_they_are_given() -> None:
    for name in METHODS:
        parameters = list(inspect.signature(getattr(LocalElasticAgent, name)).parameters)
        if name == "_exit_barrier":
            assert parameters == ["self"]
        elif name == "_shutdown":
            assert parameters == ["self", "death_sig", "timeout"]
        else:
            assert parameters == ["self", "worker_group"]


def test_the_constructor_sets_the_private_attributes(tmp_path: Path) -> None:
    agent = agent_of(tmp_path, "-c", "", max_restarts=5)
    values = {name: getattr(agent, name) for name in ATTRIBUTES}
    group = values.pop("_worker_group")
    assert values == {
        "_exit_barrier_timeout": 11,
        "_pcontext": None,
        "_remaining_restarts": 5,
        "_shutdown_timeout": 7,
    }
    assert group.group_rank is None
    assert (agent.processes, agent.has_started, agent.grace_s) == ([], False, 7)


def test_a_torch_without_one_of_the_names_is_refused_with_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.torchelastic.METHODS", ("_monitor_workers", "_gone"))
    with pytest.raises(RuntimeError, match=r"LocalElasticAgent has no _gone; install torch>=2\.11"):
        agent_of(tmp_path, "-c", "")


def test_run_restarts_after_a_failure_and_ends_after_a_success(tmp_path: Path) -> None:
    agent = counting(tmp_path, crashes=2, max_restarts=5)
    assert agent.run().failures == {}
    assert agent.steps == ["restart, 4 left", "restart, 3 left"]
    assert (tmp_path / "starts").read_text().split() == ["0", "1", "2"]
    assert agent.last is not None
    assert agent.last.state == WorkerState.SUCCEEDED
    assert agent.has_started


def test_run_stops_when_no_restarts_are_left_and_names_the_exit_code(tmp_path: Path) -> None:
    agent = counting(tmp_path, crashes=9, max_restarts=1)
    [failure] = agent.run().failures.values()
    assert failure.exitcode == 3
    assert agent.steps == ["restart, 0 left", "stop"]


def test_forbidding_restarts_makes_the_next_failure_the_last(tmp_path: Path) -> None:
    agent = counting(tmp_path, crashes=9, max_restarts=5)
    agent.forbid_restarts()
    assert agent.run().is_failed()
    assert agent.steps == ["stop"]


def test_processes_are_those_of_the_last_start_and_can_be_ended(tmp_path: Path) -> None:
    agent = agent_of(tmp_path, "-c", "import time; time.sleep(600)")
    agent.start()
    [process] = agent.processes
    assert isinstance(process, Popen)
    assert process.poll() is None
    assert os.getpgid(process.pid) == process.pid  # so that a Ctrl-C reaches all that it starts
    agent.terminate(7)
    assert process.wait() == -signal.SIGTERM
    agent.start()
    [again] = agent.processes
    assert again.pid != process.pid
    agent.terminate(7)


def test_an_agent_that_is_alone_waits_for_nobody(tmp_path: Path) -> None:
    agent = counting(tmp_path, crashes=9, max_restarts=0)
    agent.run()
    agent.wait_for_other_agents(7)
    assert agent._exit_barrier_timeout == 7


def test_torch_leaves_our_signal_handlers_alone(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    counting(tmp_path, crashes=0, max_restarts=0).run()
    assert signal.getsignal(signal.SIGTERM) is before
