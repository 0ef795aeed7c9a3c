"""Agents that run for real and stand for machines, with `worker.py` in place of the training."""

import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from launch import agent
from launch.config import Check, Local, Nodes
from tests.fork_server import fork_server
from tests.patience import PATIENCE_S

WORKER = Path(__file__).with_name("worker.py")
QUICK = {"last_call_s": 3, "heartbeat_s": 2, "join_s": 30, "grace_s": 8}


class Machines:
    """A directory in which workers run, and the agents that started them.

    An agent is a process of its own, forked from one that has imported PyTorch, which takes 2 s.

    Attributes:
        after_crash_s: that agents give processes beside one that crashed, before they kill them.
    """

    after_crash_s = agent.AFTER_CRASH_S

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.agents: list[ForkServerProcess] = []
        self.port = free_port()

    def start(self, config: Local, *options: str) -> None:
        """Runs an agent."""
        command = [sys.executable, "-S", str(WORKER), str(self.directory), *options]
        config = replace(config, script=str(WORKER))
        files = [self.directory / f"{kind}_{len(self.agents)}" for kind in ("output", "errors")]
        given = (config, command, files, self.after_crash_s)
        self.agents.append(fork_server().Process(target=_run, args=given))
        self.agents[-1].start()

    def check(self, config: Check, directories: list[str]) -> None:
        """Runs an agent that checks its machine."""
        files = [self.directory / f"{kind}_{len(self.agents)}" for kind in ("output", "errors")]
        self.agents.append(fork_server().Process(target=_check, args=(config, directories, files)))
        self.agents[-1].start()

    def pair(self, *options: str, each: tuple[dict[str, Any], ...] = ({}, {}), **both: Any) -> None:
        """Starts two agents with a process each; the first one serves the rendezvous."""
        address = {"address": f"127.0.0.1:{self.port}", "local_address": "127.0.0.1"}
        for own in each:
            self.start(Nodes(**{"processes": 1, **address, **QUICK, **both, **own}), *options)
            wait_for(lambda: listens(self.port), "an agent that serves the rendezvous")

    def signal(self, name: str, agent: int = 0) -> None:
        """Sends a signal to an agent."""
        pid = self.agents[agent].pid
        assert pid is not None
        os.kill(pid, signal.Signals[name])

    def make_exit(self, code: int, rank: str = "") -> None:
        """Makes all processes, or those of one rank, end with an exit code."""
        (self.directory / (f"exit_{rank}" if rank else "exit")).write_text(str(code))

    def log_lines(self, pattern: str) -> list[re.Match[str]]:
        """The lines of the workers' log that match."""
        log = self.directory / "log"
        lines = log.read_text().splitlines() if log.exists() else []
        return [found for line in lines if (found := re.fullmatch(pattern, line))]

    def wait_for_log(self, pattern: str, count: int = 1) -> list[re.Match[str]]:
        """Waits until at least `count` lines of the log match; returns those that do."""
        wait_for(lambda: len(self.log_lines(pattern)) >= count, pattern, self._told)
        return self.log_lines(pattern)

    def _told(self) -> str:
        """What the workers have logged, and each agent's exit code and errors."""
        lines = [line[0] for line in self.log_lines(".*")]
        agents = [(agent.exitcode, self.stderr(n)) for n, agent in enumerate(self.agents)]
        return f"{lines}; {agents}"

    def exit_code(self, agent: int = 0) -> int | None:
        """Waits for an agent's exit code."""
        self.agents[agent].join(PATIENCE_S)
        return self.agents[agent].exitcode

    def stderr(self, agent: int = 0) -> str:
        """What an agent and its processes wrote to stderr."""
        return self._written("errors", agent)

    def stdout(self, agent: int = 0) -> str:
        """What an agent and its processes wrote to stdout."""
        return self._written("output", agent)

    def _written(self, kind: str, agent: int) -> str:
        file = self.directory / f"{kind}_{agent}"
        return file.read_text() if file.exists() else ""

    def close(self) -> None:
        """Kills all agents; their processes die with them."""
        for process in self.agents:
            process.kill()
            process.join()
            process.close()


def _run(config: Local, command: list[str], files: list[Path], after_crash_s: int) -> None:
    agent.AFTER_CRASH_S = after_crash_s
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which `nohup make test` ignores
    _write_to(files)
    sys.exit(agent.run(config, command))


def _check(config: Check, directories: list[str], files: list[Path]) -> None:
    _write_to(files)
    sys.exit(agent.check(config, directories))


def _write_to(files: list[Path]) -> None:
    """Makes files of stdout and stderr."""
    for number, path in enumerate(files, start=1):
        with path.open("w") as file:
            os.dup2(file.fileno(), number)


def free_port() -> int:
    """A port of this machine that is not in use."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def wait_for(true: Callable[[], bool], what: str, told: Callable[[], str] = str) -> None:
    """Waits until something is true; what was `told` until then explains why it never is."""
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline, f"never: {what} {told()}"
        time.sleep(0.02)


def listens(port: int) -> bool:
    """Whether a process listens at a port of this machine."""
    tables = [Path("/proc/net/tcp"), Path("/proc/net/tcp6")]
    rows = [row.split() for table in tables for row in table.read_text().splitlines()[1:]]
    return any(row[1].endswith(f":{port:04X}") and row[3] == "0A" for row in rows)
