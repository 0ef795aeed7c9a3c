"""Two machines on the loopback device, whose processes a test kills, and a scheduler that starts
again whatever ended too early."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from time import monotonic, sleep

from tests.forked_python import forked_python, is_server
from tests.patience import PATIENCE_S
from train.checkpoint.reader import Checkpoint

ROOT = Path(__file__).parents[2]


class Cluster:
    """Two agents with two ranks each that train one run.

    Attributes:
        codes: what agents have ended with so far.
    """

    def __init__(self, overrides: list[str], log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        meeting = [f"address=127.0.0.1:{port}", "local_address=127.0.0.1", "nodes=2"]
        haste = ["join_s=60", "heartbeat_s=2", "max_restarts=1000", "grace_s=120"]
        self._command = [sys.executable, "-m", "launch", "nodes", *meeting, *haste]
        self._command += ["processes=2", *overrides]
        self._log = log
        self._agents: list[subprocess.Popen[bytes]] = []
        self.codes: list[int] = []

    def start(self) -> None:
        """Start both machines."""
        self._agents = [self._agent(), self._agent()]

    def _agent(self) -> subprocess.Popen[bytes]:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with self._log.open("ab") as log, forked_python():
            return subprocess.Popen(
                self._command, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def replace_the_dead(self) -> bool:
        """Start again, as a scheduler would, machines that ended otherwise than well; return
        whether any is still at work."""
        for number, agent in enumerate(self._agents):
            if agent.poll() not in (None, 0):
                self.codes.append(agent.returncode)
                self._agents[number] = self._agent()
        return any(agent.poll() is None for agent in self._agents)

    def ended(self) -> list[int] | None:
        """The codes of both machines, once both have ended."""
        codes = [agent.poll() for agent in self._agents]
        return None if None in codes else [code for code in codes if code is not None]

    def finished(self) -> bool:
        """Whether both machines have ended, and well."""
        return self.ended() == [0, 0]

    def agents(self) -> list[int]:
        """The processes of the agents at work."""
        return [agent.pid for agent in self._agents if agent.poll() is None]

    def groups(self) -> list[int]:
        """The processes of the ranks at work."""
        return [child for agent in self.agents() for child in children(agent)]

    def kill_everything(self) -> None:
        for agent in self._agents:
            for process in [*children(agent.pid), agent.pid]:
                kill(process, signal.SIGKILL)
            agent.wait()

    @contextmanager
    def at_work(self) -> Iterator["Cluster"]:
        """Started, and at the end nothing of it is left."""
        self.start()
        try:
            yield self
        finally:
            self.kill_everything()

    def wait_for(self, done: Callable[[], bool]) -> None:
        """Wait, replacing the dead, until something is so or everybody is done."""
        deadline = monotonic() + PATIENCE_S
        while not done() and self.replace_the_dead():
            assert monotonic() < deadline, f"nothing happens; see\n{self.told()}"
            sleep(0.005)

    def told(self) -> str:
        """The end of what the processes have printed."""
        return self._log.read_text(errors="replace")[-6000:]


def children(process: int) -> list[int]:
    """The processes that a process has started; without the one that they are forked from."""
    try:
        text = Path(f"/proc/{process}/task/{process}/children").read_text()
    except FileNotFoundError:
        return []
    return [int(number) for number in text.split() if not is_server(int(number))]


def kill(process: int, how: signal.Signals) -> bool:
    """Send a signal; return whether the process was there."""
    try:
        os.kill(process, how)
    except ProcessLookupError:
        return False
    return True


def newest_step(run: Path) -> int:
    """The step of the newest checkpoint; 0 if there is none."""
    return max((int(path.name[5:]) for path in (run / "checkpoints").glob("step_*")), default=0)


def final_weights(run: Path, step: int) -> Checkpoint:
    return Checkpoint.open(run / "checkpoints" / f"step_{step:08d}")


def random_moment(cluster: Cluster, run: Path, rng: Random) -> str:
    """Wait for a moment in which something is lost if anything is; return what it is called."""
    kind = rng.choice(["training", "training", "saving", "starting"])
    if kind == "starting":
        cluster.wait_for(lambda: len(cluster.groups()) == 4)
        _pause(run, rng.uniform(0, 10))
        return kind
    reached = newest_step(run)
    cluster.wait_for(lambda: newest_step(run) > reached)
    if kind == "saving":
        # A save between two looks counts too: else the run may end while we wait for another.
        reached = newest_step(run)
        cluster.wait_for(lambda: _is_saving(run) or newest_step(run) > reached)
        sleep(rng.uniform(0, 0.1))
    else:
        _pause(run, rng.uniform(0, 1))
    return kind


def _pause(run: Path, seconds: float) -> None:
    """Sleep, but not for longer than to the next checkpoint: a fast run would be over."""
    reached, end = newest_step(run), monotonic() + seconds
    while newest_step(run) == reached and monotonic() < end:
        sleep(0.01)


def _is_saving(run: Path) -> bool:
    return any((run / "checkpoints").glob(".step_*.partial"))
