"""The private API of PyTorch's elastic agent that `launch.agent` needs, and nothing else.

`LocalElasticAgent` is made to be subclassed, but what a subclass needs has names with an underscore
and may change with any version of torch. All of these names are used here and nowhere else;
tests/launch/test_torchelastic.py checks each assumption against the torch that is installed.

    run()   rendezvous, start the processes
            until all have ended:  monitor()  every POLL_S
                                   restart()  after a failure, or when a machine comes
            stop()  after the last failure
"""

import logging
import os
import signal
from subprocess import Popen
from typing import Any

import torch
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.api import SubprocessContext

TESTED = "torch>=2.11,<2.14"
METHODS = (
    "_exit_barrier",
    "_initialize_workers",
    "_monitor_workers",
    "_restart_workers",
    "_shutdown",
    "_start_workers",
    "_stop_workers",
)
ATTRIBUTES = (
    "_exit_barrier_timeout",
    "_pcontext",
    "_remaining_restarts",
    "_shutdown_timeout",
    "_worker_group",
)


class ElasticAgent(LocalElasticAgent):
    """PyTorch's agent with public names for the steps that a subclass replaces.

    Args:
        spec: what the processes run.
        logs: where PyTorch keeps the files of the processes.
        grace_s: seconds that processes have to end after a signal before they are killed.
        exit_barrier_s: seconds that an agent whose processes are done waits for the other agents.

    Raises:
        RuntimeError: the installed torch lacks a name that this class relies on.
    """

    def __init__(
        self, spec: WorkerSpec, logs: DefaultLogsSpecs, *, grace_s: int, exit_barrier_s: float
    ) -> None:
        super().__init__(spec, logs, exit_barrier_timeout=exit_barrier_s, shutdown_timeout=grace_s)
        if missing := [name for name in (*METHODS, *ATTRIBUTES) if not hasattr(self, name)]:
            raise RuntimeError(
                f"torch {torch.__version__}: its LocalElasticAgent has no {', '.join(missing)}; "
                f"install {TESTED}, or adapt launch/torchelastic.py"
            )

    # What a subclass replaces

    def monitor(self) -> RunResult:
        """Looks at the processes once; after a failure it also ends the others."""
        return super()._monitor_workers(self._worker_group)

    def stop(self) -> None:
        """Ends the processes for good."""
        self.terminate(self.grace_s)

    def restart(self) -> None:
        """Ends the processes and starts them again, at the next rendezvous."""
        self.terminate(self.grace_s)
        self.start()

    def starts(self, ranks: list[int]) -> None:
        """Is called when the ranks of this machine are known, before their processes start."""

    # What a subclass calls

    @property
    def processes(self) -> list[Popen[bytes]]:
        """The processes of this machine, also those that have ended; empty before the start."""
        context = self._pcontext
        if context is None:
            return []
        assert isinstance(context, SubprocessContext)
        return [handler.proc for handler in context.subprocess_handlers.values()]

    @property
    def has_started(self) -> bool:
        """Whether the processes have been started at least once."""
        return self._worker_group.group_rank is not None

    @property
    def grace_s(self) -> int:
        """Seconds that processes have to end after a signal before they are killed."""
        return self._shutdown_timeout

    @property
    def remaining_restarts(self) -> int:
        """How often the processes may still be started again after a failure."""
        return self._remaining_restarts

    def forbid_restarts(self) -> None:
        """Makes the next failure the last."""
        self._remaining_restarts = 0

    def terminate(self, timeout_s: int) -> None:
        """Sends SIGTERM to the processes that run, and SIGKILL to those that run on too long."""
        self._shutdown(timeout=timeout_s)

    def start(self) -> None:
        """Meets the other machines and starts the processes."""
        self._pcontext = None  # so that `processes` never holds those of an earlier start
        self._initialize_workers(self._worker_group)

    def wait_for_other_agents(self, timeout_s: float) -> None:
        """Waits until all agents are here, for `timeout_s` seconds at most.

        The agent that serves the rendezvous must not leave while others still talk to it.
        """
        self._exit_barrier_timeout = timeout_s
        reports = logging.getLogger("torch.distributed.elastic.agent.server.api")
        level = reports.level
        reports.setLevel(logging.CRITICAL)  # another agent may be gone: no page about that
        try:
            self._exit_barrier()
        finally:
            reports.setLevel(level)

    # What PyTorch calls

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self.starts([worker.global_rank for worker in worker_group.workers])
        return super()._start_workers(worker_group)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:  # noqa: ARG002
        return self.monitor()

    def _stop_workers(self, worker_group: WorkerGroup) -> None:  # noqa: ARG002
        self.stop()

    def _restart_workers(self, worker_group: WorkerGroup) -> None:  # noqa: ARG002
        self.restart()


def quiet_logs() -> None:
    """Silences PyTorch's reports of exit codes; the agent's own say which of them are failures.

    PyTorch reports every exit code but 0 as an error, also 75 of a run that was saved.
    """
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    logging.getLogger("torch.distributed.elastic.agent.server.api").setLevel(logging.ERROR)


def handle_signals_ourselves() -> None:
    """Keeps PyTorch from replacing our signal handlers at every start of processes.

    It handles only the signals that this variable names. SIGQUIT, which Ctrl-\\\\ sends, ends
    everything at once.
    """
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = signal.SIGQUIT.name


def use_one_store_per_start() -> None:
    """Gives every start of the processes a TCPStore of its own, which its rank 0 serves.

    The store that PyTorch's agents offer to share keeps the keys of processes that have died. With
    a static rendezvous, the first collective after a restart then hangs (torch 2.13). With c10d,
    machines of higher rank keep using the address of the first start, even if that machine is dead.
    """
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
