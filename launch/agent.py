"""Starts the processes of this machine, watches over them, and ends as they end.

It is torchrun's own elastic agent with another view of endings. Under torchrun, a process that
saved and ended because the scheduler said so is one that failed: it is started again, and when the
restarts are used up the exit code is 1. Here:

- an ending that a restart would only repeat (see `launch.exit_codes`) is final on all machines;
- the exit code is the processes' own;
- SIGTERM, SIGUSR1, SIGUSR2, SIGINT and SIGHUP (as SIGTERM) are passed on, once, and processes have
  `grace_s` to save, also if some of them are done before others;
- no process outlives its agent (see `launch.parent_death`);
- every restart has a TCPStore of its own (see `launch.rendezvous`).
"""

import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from subprocess import Popen
from types import FrameType

import torch
from torch.distributed import DistNetworkError, DistStoreError
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.api import SubprocessContext
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousHandler,
    RendezvousTimeoutError,
)

from launch import parent_death
from launch.config import Local, Nodes
from launch.exit_codes import FINAL, combine_exit_codes
from launch.rendezvous import join
from train.exit_codes import ExitCode

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)
LOST = (RendezvousConnectionError, RendezvousTimeoutError, DistNetworkError, DistStoreError)
POLL_S = 0.1
CRASH_S = 15  # in which the processes beside one that crashed write down where they are
LAST_EXIT_S = 300  # machines that are done wait so long for those that are not


class SignalForwarder:
    """Within it, the first signal raises the `SignalException` that an agent answers.

    Others are ignored, since schedulers repeat themselves; but a person who does means it: a second
    Ctrl-C is passed on at once.

    Attributes:
        first: the one that came, or None.
        agent: whose processes a second Ctrl-C is for, once there is one.
    """

    first: signal.Signals | None = None
    agent: "Agent | None" = None

    def __enter__(self) -> "SignalForwarder":
        # PyTorch handles what is named here at every start; Ctrl-\\ ends everything at once.
        os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"
        self._before = {number: signal.signal(number, self._hear) for number in SIGNALS}
        return self

    def _hear(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if self.first is None:
            self.first = signal.Signals(number)
            passed = signal.SIGTERM if number == signal.SIGHUP else self.first
            raise SignalException(f"received {self.first.name}", passed)
        if number == signal.SIGINT and self.agent is not None:
            self.agent.interrupt()

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Agent(LocalElasticAgent):
    """PyTorch's agent, told which endings are final and that some processes end before others."""

    def __init__(self, spec: WorkerSpec, logs: DefaultLogsSpecs, grace_s: int) -> None:
        super().__init__(
            spec, logs, exit_barrier_timeout=LAST_EXIT_S + grace_s, shutdown_timeout=grace_s
        )

    @property
    def codes(self) -> list[int | None]:
        """What the processes ended with, None for those that run; nothing if there are none."""
        return [process.poll() for process in self._processes]

    @property
    def _processes(self) -> list[Popen[bytes]]:
        context = self._pcontext
        if context is None:
            return []
        assert isinstance(context, SubprocessContext)
        return [handler.proc for handler in context.subprocess_handlers.values()]

    @property
    def had_processes(self) -> bool:
        """Whether enough machines have met at least once."""
        return self._worker_group.group_rank is not None

    def interrupt(self) -> None:
        """Sends a Ctrl-C to every process that runs."""
        for process in self._processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGINT)

    def exit_barrier_before_leaving(self) -> None:
        """Waits until the other machines are done too: one of them keeps the list of all."""
        self._exit_barrier_timeout = self._shutdown_timeout
        self._exit_barrier()

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        self._wait_while_saving()
        result = super()._monitor_workers(worker_group)
        if result.is_failed():
            codes = [failure.exitcode for failure in result.failures.values()]
            for rank, failure in result.failures.items():
                if failure.exitcode not in (ExitCode.REQUEUE, -signal.SIGTERM):
                    _log(f"rank {rank} (process {failure.pid}) {_ended(failure.exitcode)}")
            if combine_exit_codes(codes) in FINAL:
                self._remaining_restarts = 0
        return result

    def _wait_while_saving(self) -> None:
        """Leaves the others in peace when one is done: the super class would end them at once."""
        deadline = time.monotonic() + self._shutdown_timeout
        while set(self.codes) == {ExitCode.REQUEUE, None} and time.monotonic() < deadline:
            time.sleep(POLL_S)

    def _stop_workers(self, worker_group: WorkerGroup) -> None:  # noqa: ARG002
        self._shutdown(timeout=self._shutdown_timeout)

    def _restart_workers(self, worker_group: WorkerGroup) -> None:
        # After a crash the others have nothing to wait for: one they would save with is gone.
        crashed = any(code not in (None, 0) for code in self.codes)
        self._shutdown(timeout=CRASH_S if crashed else self._shutdown_timeout)
        _log(f"starting all processes again; {self._remaining_restarts} more times if need be")
        self._pcontext = None  # a signal from now on does not find processes of the past
        self._initialize_workers(worker_group)


def run(config: Local, command: Sequence[str]) -> int:
    """Runs `command` in the processes of this machine until all have ended.

    Returns:
        0, 2, 75 or 130 if that is what they ended with (75 as `saved_code`), otherwise 1. It is 75
        also if the other machines were lost on the way: nothing is wrong, and the same command
        goes on.
    """
    code = _run(config, command)
    return config.saved_code if code == ExitCode.REQUEUE and isinstance(config, Nodes) else code


def count_devices() -> int:
    """The processes that this machine is made for."""
    return max(1, torch.cuda.device_count())


def _run(config: Local, command: Sequence[str]) -> int:
    processes = config.processes or count_devices()
    if processes > 1:  # or each would start a thread for every core
        threads = max(1, torch.get_num_threads() // processes)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    # It reports every ending as a failure, 75 included; what is one is told here.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    logging.getLogger("torch.distributed.elastic.agent.server.api").setLevel(logging.ERROR)
    with SignalForwarder() as forwarder, tempfile.TemporaryDirectory(prefix="launch-") as scratch:
        try:
            handler = join(config)
        except SignalException:
            return _code_after_signal(forwarder, [])
        except LOST as error:
            _log(f"nobody keeps the list of machines ({error})")
            return ExitCode.CRASHED
        signals = "hold" if config.script is None else "deliver"  # train/main.py unblocks them
        spec = WorkerSpec(
            role="worker",
            local_world_size=processes,
            entrypoint=sys.executable,
            args=("-I", parent_death.__file__, str(os.getpid()), signals, *command),
            rdzv_handler=handler,
            max_restarts=config.max_restarts,
            monitor_interval=POLL_S,
        )
        forwarder.agent = Agent(spec, DefaultLogsSpecs(log_dir=scratch), config.grace_s)
        return _supervise(forwarder.agent, handler, forwarder)


def _supervise(agent: Agent, handler: RendezvousHandler, forwarder: SignalForwarder) -> int:
    """Runs the agent to its end."""
    try:
        failures = agent.run().failures.values()
    except SignalException:
        code = _code_after_signal(forwarder, agent.codes)
        if code == ExitCode.REQUEUE and agent.codes:
            agent.exit_barrier_before_leaving()
        return code  # the list stays open: an elastic run may go on, or this machine come back
    except RendezvousClosedError:
        _log("the other machines have ended the run")
        return ExitCode.CRASHED
    except LOST as error:
        if not agent.had_processes:
            _log(f"too few machines came ({type(error).__name__})")
            return ExitCode.CRASHED
        _log(f"the other machines are gone; the same command goes on ({type(error).__name__})")
        return ExitCode.REQUEUE
    code = (
        combine_exit_codes(failure.exitcode for failure in failures)
        if failures
        else ExitCode.FINISHED
    )
    if code in (ExitCode.REQUEUE, ExitCode.MISUSED):
        agent.exit_barrier_before_leaving()
    handler.shutdown()
    return code


def _code_after_signal(forwarder: SignalForwarder, codes: Sequence[int | None]) -> int:
    """The exit code after a signal."""
    if forwarder.first == signal.SIGINT:
        return ExitCode.INTERRUPTED
    return combine_exit_codes((code for code in codes if code is not None), asked=True)


def _ended(code: int) -> str:
    return f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _log(text: str) -> None:
    print(f"launch: {text}", file=sys.stderr, flush=True)
