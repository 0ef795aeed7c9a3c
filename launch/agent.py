"""Starts the processes of this machine, watches over them, and ends with their exit code.

It is torchrun's elastic agent with other rules for the end. Under torchrun, a process that saved
and ended because the scheduler asked for it has failed: it is started again, and when no restarts
are left the exit code is 1. Here:

- an exit code that a restart would only repeat ends the processes of all machines; see
  `launch.exit_codes`. Code 75 is one of them: the run was saved and ended early, or a server, disk
  or network failed for now (`conf.errors.TransientError`), and whoever started the agent starts the
  same command again;
- the agent's exit code is that of the processes;
- SIGTERM, SIGUSR1, SIGUSR2, SIGINT and SIGHUP (as SIGTERM) are passed on to the processes, once,
  and the processes have `grace_s` seconds to save, also if some of them end before others. Under
  `nohup`, SIGHUP stays ignored by all;
- no process outlives its agent (see `launch.parent_death`);
- every restart has a TCPStore of its own (see `launch.torchelastic`).
"""

import json
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.distributed import DistNetworkError, DistStoreError
from torch.distributed.elastic.agent.server.api import RunResult, WorkerSpec
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousHandler,
    RendezvousTimeoutError,
)

from conf.errors import reason_of
from conf.exit_codes import ExitCode
from launch import parent_death, preflight, rank_logs
from launch.config import Check, Local, Nodes
from launch.exit_codes import FINAL, combine_exit_codes
from launch.rank_logs import RankLogs
from launch.rendezvous import create_rendezvous_handler
from launch.torchelastic import ElasticAgent, handle_signals_ourselves, quiet_logs
from launch.traces import lost_another

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)
CONNECTION_ERRORS = (
    RendezvousConnectionError,
    RendezvousTimeoutError,
    DistNetworkError,
    DistStoreError,
)
POLL_S = 0.1
AFTER_CRASH_S = 15  # in which the processes beside one that crashed write their stacks to files
EXIT_BARRIER_S = 300  # that a machine whose processes are done waits for others, beyond `grace_s`


class SignalForwarder:
    """Inside its `with` block, the first signal raises the `SignalException` that an agent handles.

    Later signals are ignored, because schedulers repeat theirs. A second Ctrl-C comes from a person
    who means it, and is passed on at once.

    Attributes:
        first: the first signal; None if there was none.
        agent: whose processes a second Ctrl-C is for; None before there is one.
    """

    first: signal.Signals | None = None
    agent: "Agent | None" = None

    def __enter__(self) -> "SignalForwarder":
        handle_signals_ourselves()
        ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN  # under nohup
        ours = [number for number in SIGNALS if not (ignored and number == signal.SIGHUP)]
        self._before = {number: signal.signal(number, self._handle) for number in ours}
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if self.first is None:
            self.first = signal.Signals(number)
            # A closed terminal sends SIGHUP, which another script may not handle.
            forwarded = signal.SIGTERM if number == signal.SIGHUP else self.first
            raise SignalException(f"received {self.first.name}", forwarded)
        if number == signal.SIGINT and self.agent is not None:
            self.agent.interrupt()

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Agent(ElasticAgent):
    """PyTorch's agent that knows final exit codes, and that processes may end one after another.

    Args:
        logs: of the processes.
        host: the name of this machine, where there are several; else empty.
        expected: exit codes of which nothing is told.
        elastic: whether machines may join while the processes run.
    """

    def __init__(
        self,
        *args: Any,
        logs: RankLogs,
        host: str = "",
        expected: Iterable[int] = (),
        elastic: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(*args, **settings)
        self._logs = logs
        self._host = host
        self.expected = frozenset(expected)
        self._elastic = elastic
        self._explained = {ExitCode.REQUEUE, -signal.SIGTERM, *expected}

    @property
    def exit_codes(self) -> list[int | None]:
        """The exit codes of the processes, None for those that run; empty before the start."""
        return [process.poll() for process in self.processes]

    def interrupt(self) -> None:
        """Sends a Ctrl-C to every process that runs."""
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGINT)

    def monitor(self) -> RunResult:
        """Reports failures, and forbids restarts after a final exit code."""
        self._wait_while_saving()
        if set(self.exit_codes) - {None, 0} - self._explained:
            self._logs.freeze()  # PyTorch now ends the others, which takes them some seconds
        result = super().monitor()
        if result.is_failed():
            codes = [failure.exitcode for failure in result.failures.values()]
            self._tell(result.failures)
            if combine_exit_codes(codes) in FINAL:
                self.forbid_restarts()
        return result

    def starts(self, ranks: list[int]) -> None:
        """Shows the output of the processes that are about to be started."""
        self._logs.watch(ranks)

    def _tell(self, failures: Mapping[int, ProcessFailure]) -> None:
        """Says which processes have crashed, and of the one that began why."""
        found = {r: f for r, f in failures.items() if f.exitcode not in self._explained}
        reasons = {
            rank: [] if failure.exitcode == ExitCode.MISUSED else self._logs.reason(rank)
            for rank, failure in found.items()
        }
        # A killed process says nothing, and those that wait for it say that it is gone.
        blame = {rank: (found[rank].exitcode > 0, lost_another(reasons[rank])) for rank in found}
        first = min(found, key=lambda rank: blame[rank], default=0)
        for rank in sorted(found, key=lambda rank: (rank != first, rank)):
            name = f"rank {rank} on {self._host}" if self._host else f"rank {rank}"
            told = f"{name} (process {found[rank].pid}) {_describe(found[rank].exitcode)}"
            log = f"its log: {self._logs.path(rank)}" if self._logs.keep(rank) else ""
            if rank == first and reasons[rank]:
                _log("\n  ".join([f"{told}:", *reasons[rank]]))
                _log(log)
            else:
                _log(f"{told}; {log}" if log else told)

    def _wait_while_saving(self) -> None:
        """Waits while some processes have ended with 75 and others run, for `grace_s` at most.

        PyTorch would end the others as soon as it sees the first exit code, in the middle of their
        save.
        """
        deadline = time.monotonic() + self.grace_s
        while set(self.exit_codes) == {ExitCode.REQUEUE, None} and time.monotonic() < deadline:
            time.sleep(POLL_S)

    def restart(self) -> None:
        """Ends the processes and starts them again."""
        # Saving needs all ranks. Where no machine can join, one restarts because some are lost.
        crashed = any(code not in (None, 0) for code in self.exit_codes)
        self.terminate(AFTER_CRASH_S if crashed or not self._elastic else self.grace_s)
        _log(f"starting all processes again; {self.remaining_restarts} more restarts are left")
        self.start()


def run(config: Local, command: Sequence[str], *, expected: Iterable[int] = ()) -> int:
    """Runs `command` in the processes of this machine until all have ended.

    Args:
        config: the settings of this machine.
        command: of each process.
        expected: exit codes that the processes explain themselves: the agent says nothing of them.

    Returns:
        0, 2, 75 or 130 if the processes ended with it (75 as `saved_code`), and 1 otherwise. It is
        also 75 if the connection to the other machines was lost: nothing is wrong with the run, and
        the same command continues it.
    """
    code = _run(config, command, expected)
    return config.saved_code if code == ExitCode.REQUEUE and isinstance(config, Nodes) else code


def check(config: Check, directories: Sequence[str]) -> int:
    """Checks this machine and its connections to the others; returns 0 if nothing is wrong.

    Args:
        config: the settings of this machine.
        directories: whose free space counts.
    """
    host = _host(config) or socket.gethostname()
    probe = preflight.Probe(host, tuple(directories), config)
    # The processes run the code of this agent, wherever they are started.
    root = str(Path(__file__).parents[1])
    program = (
        f"import runpy, sys; sys.path.insert(0, {root!r});"
        f"runpy.run_module({preflight.__name__!r}, run_name='__main__')"
    )
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # what hangs is told in a line
    command = [sys.executable, "-u", "-c", program, probe.text]
    return run(config, command, expected=[preflight.BAD_MACHINE])


def default_processes() -> int:
    """One process for each CUDA device of this machine, or one where there is none."""
    return max(1, torch.cuda.device_count())


def _run(config: Local, command: Sequence[str], expected: Iterable[int]) -> int:
    os.environ.update(config.env)
    processes = config.processes or default_processes()
    if processes > 1:  # each would otherwise start a thread for every core
        threads = max(1, torch.get_num_threads() // processes)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    os.environ["LAUNCHED_BY"] = json.dumps(sys.orig_argv)  # for a run's environment.json
    quiet_logs()
    with (
        SignalForwarder() as forwarder,
        tempfile.TemporaryDirectory(prefix="launch-") as scratch,
        RankLogs(config.rank_log) as logs,
    ):
        try:
            handler = create_rendezvous_handler(config)
        except SignalException:
            return _code_after_signal(forwarder, [])
        except CONNECTION_ERRORS as error:
            _log(reason_of(error))
            return ExitCode.CRASHED
        # train/main.py unblocks the signals when it can handle them; other scripts may not.
        signals = "hold" if config.script is None else "deliver"
        wrapper = ("-I", parent_death.__file__, str(os.getpid()))
        spec = WorkerSpec(
            role="worker",
            local_world_size=processes,
            entrypoint=sys.executable,
            args=(*wrapper, signals, *logs.arguments, *command),
            rdzv_handler=handler,
            max_restarts=config.max_restarts,
            monitor_interval=POLL_S,
        )
        forwarder.agent = Agent(
            spec,
            DefaultLogsSpecs(log_dir=scratch),
            grace_s=config.grace_s,
            exit_barrier_s=EXIT_BARRIER_S + config.grace_s,
            logs=logs,
            host=_host(config),
            expected=expected,
            elastic=isinstance(config, Nodes) and config.is_elastic,
        )
        return _run_agent(forwarder.agent, handler, forwarder)


def _run_agent(agent: Agent, handler: RendezvousHandler, forwarder: SignalForwarder) -> int:
    """Runs the agent to its end; returns the exit code."""
    try:
        failures = agent.run().failures.values()
    except SignalException:
        code = _code_after_signal(forwarder, agent.exit_codes)
        if code == ExitCode.REQUEUE and agent.exit_codes:
            agent.wait_for_other_agents(agent.grace_s)
        # The rendezvous stays open: an elastic run may go on, or this machine may come back.
        return code
    except RendezvousClosedError:
        _log("the other machines have ended the run")
        return ExitCode.CRASHED
    except CONNECTION_ERRORS as error:
        reason = reason_of(error)
        if not agent.has_started:
            few = not isinstance(error, RendezvousConnectionError)
            _log(f"too few machines came: {reason}" if few else reason)
            return ExitCode.CRASHED
        _log(
            f"the other machines are gone ({reason}); the same command continues the run "
            f"(exit code {int(ExitCode.REQUEUE)})"
        )
        return ExitCode.REQUEUE
    code = (
        combine_exit_codes(failure.exitcode for failure in failures)
        if failures
        else ExitCode.FINISHED
    )
    if code == ExitCode.REQUEUE:
        _log(
            "saved and ended early, or something around the run failed for now; the same command "
            f"continues it (exit code {int(code)})"
        )
    ended_together = agent.expected.intersection(failure.exitcode for failure in failures)
    if code in (ExitCode.REQUEUE, ExitCode.MISUSED) or ended_together:
        agent.wait_for_other_agents(agent.grace_s)
    handler.shutdown()
    return code


def _code_after_signal(forwarder: SignalForwarder, codes: Sequence[int | None]) -> ExitCode:
    """The exit code after a signal to the agent."""
    if forwarder.first == signal.SIGINT:
        return ExitCode.INTERRUPTED
    return combine_exit_codes((code for code in codes if code is not None), signalled=True)


def _host(config: Local) -> str:
    """The name of this machine in messages; empty if there are no others."""
    if not isinstance(config, Nodes) or config.most_nodes == 1:
        return ""
    name = socket.gethostname()
    return f"{name} ({config.local_address})" if config.local_address else name


def _describe(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    hint = " (was the memory full? `dmesg` tells)" if code == -signal.SIGKILL else ""
    return f"died of {signal.Signals(-code).name}{hint}"


def _log(text: str) -> None:
    rank_logs.log(text)
