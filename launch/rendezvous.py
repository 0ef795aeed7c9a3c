"""The rendezvous: how the agents of a run find each other and agree on their ranks."""

import re
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar
from uuid import uuid4

from torch.distributed import DistNetworkError, DistStoreError, PrefixStore, TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousConnectionError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    RendezvousTimeoutError,
)
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from conf.errors import reason_of
from launch.config import Local, Nodes
from launch.torchelastic import use_one_store_per_start

PAUSE_S = 1.0  # between attempts to connect, some of which fail at once
STATIC_S = 10.0  # beyond `join_s`, in which a TCPStore says how many machines have come
PROBE_S = 3.0  # in which a machine that can be reached accepts a connection

T = TypeVar("T")


def create_rendezvous_handler(config: Local) -> RendezvousHandler:
    """Connects to the machine that serves the rendezvous, or serves it on this machine.

    Raises:
        RendezvousConnectionError: that machine could not be reached within `join_s` seconds.
    """
    use_one_store_per_start()
    if not isinstance(config, Nodes):
        return get_rendezvous_handler(_parameters(config))
    if config.rendezvous == "static":
        return StaticRendezvous(config)
    try:
        return _in_time(config.join_s, lambda: _connect(config))
    except TimeoutError:
        raise RendezvousConnectionError(_not_found(config)) from None


def _connect(config: Nodes) -> RendezvousHandler:
    """Connects to the machine that serves the rendezvous, which may start later than this one."""
    parameters = _parameters(config)
    deadline = time.monotonic() + config.join_s
    while time.monotonic() < deadline:
        with suppress(RendezvousConnectionError, DistNetworkError, DistStoreError):
            return CountedRendezvous(config, get_rendezvous_handler(parameters))
        time.sleep(PAUSE_S)
    raise TimeoutError


def _in_time(limit_s: float, call: Callable[[], T]) -> T:
    """What a call returns or raises that may not return, and that signals do not interrupt.

    A TCPStore waits in C++, where Python handles no signal. It has a timeout for a connection, but
    none for the answer of a service that accepts one. So it gets a thread, which is left behind.

    Raises:
        TimeoutError: the call has not returned within `limit_s` seconds.
    """
    returned: list[T] = []
    raised: list[BaseException] = []

    def work() -> None:
        try:
            returned.append(call())
        except BaseException as error:  # of any type: it is raised again by the one who waits
            raised.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(limit_s)
    if raised:
        raise raised[0]
    if not returned:
        raise TimeoutError
    return returned[0]


def _not_found(config: Nodes) -> str:
    """What is wrong with an address at which no rendezvous was found in time."""
    host, _, port = config.address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=PROBE_S).close()
    except OSError as error:
        what = reason_of(error)
    else:
        what = "it accepts connections but does not answer as one; is the port another program's?"
    return f"no rendezvous at {config.address} within join_s={config.join_s} seconds: {what}"


def _parameters(config: Local) -> RendezvousParameters:
    if not isinstance(config, Nodes):
        return RendezvousParameters(
            "c10d", "localhost:0", str(uuid4()), min_nodes=1, max_nodes=1, local_addr="localhost"
        )
    return RendezvousParameters(
        "c10d",
        config.address,
        config.id,
        config.least_nodes,
        config.most_nodes,
        config.local_address,
        join_timeout=config.join_s,
        last_call_timeout=config.last_call_s,
        keep_alive_interval=config.heartbeat_s,
    )


class CountedRendezvous(RendezvousHandler):
    """PyTorch's rendezvous, which also tells how many machines came if they were too few.

    Each machine adds itself to a count beside the rendezvous, in the same TCPStore.
    """

    def __init__(self, config: Nodes, handler: RendezvousHandler) -> None:
        self._config = config
        self._handler = handler
        host, _, port = config.address.rpartition(":")
        timeout = timedelta(seconds=config.join_s)
        self._store = TCPStore(host, int(port), timeout=timeout, wait_for_workers=False)
        self._key = f"{config.id}/machines"

    def next_rendezvous(self) -> RendezvousInfo:
        """Waits for the other machines, for `join_s` seconds at most."""
        self._store.add(self._key, 1)
        try:
            return self._handler.next_rendezvous()
        except RendezvousTimeoutError as error:
            came = _too_few(self._config, self._store.add(self._key, 0))
            raise RendezvousTimeoutError(came) from error
        finally:
            self._leave()

    def _leave(self) -> None:
        """Takes this machine from the count, which is of those that wait."""
        # The machine that serves the rendezvous may be gone, and the count with it.
        with suppress(DistNetworkError, DistStoreError):
            self._store.add(self._key, -1)

    def get_backend(self) -> str:
        """The name of this rendezvous in PyTorch's logs."""
        return self._handler.get_backend()

    @property
    def use_agent_store(self) -> bool:
        """Whether the processes use the agents' TCPStore."""
        return self._handler.use_agent_store

    def is_closed(self) -> bool:
        """Whether the run has ended."""
        return self._handler.is_closed()

    def set_closed(self) -> None:
        """Ends the run on all machines."""
        self._handler.set_closed()

    def num_nodes_waiting(self) -> int:
        """How many machines have come since the last start."""
        return self._handler.num_nodes_waiting()

    def get_run_id(self) -> str:
        """The name of the run at this address."""
        return self._handler.get_run_id()

    def shutdown(self) -> bool:
        """Ends the rendezvous."""
        return self._handler.shutdown()


def _too_few(config: Nodes, came: int) -> str:
    """How many machines came, of how many that were waited for."""
    least = "" if config.least_nodes == config.most_nodes else "at least "
    return f"{came} of {least}{config.least_nodes} within join_s={config.join_s} seconds"


@dataclass
class StaticRendezvous(RendezvousHandler):
    """A rendezvous of machines whose number and ranks are given; a lost one is not replaced.

    PyTorch's own static rendezvous uses the same keys after a restart, so that machines would find
    the values of the earlier start, and makes the processes use the agents' store (see
    `use_one_store_per_start`).

    Attributes:
        config: the settings of this machine.
        server: the TCPStore of the machine with rank 0; None before the first start.
        starts: how often the processes have been started.
    """

    config: Nodes
    server: TCPStore | None = None
    starts: int = 0

    def get_backend(self) -> str:
        """The name of this rendezvous in PyTorch's logs."""
        return "static"

    @property
    def use_agent_store(self) -> bool:
        """Whether the processes use the agents' TCPStore."""
        return False

    def next_rendezvous(self) -> RendezvousInfo:
        """Waits for all machines, for `join_s` seconds at most.

        All machines restart together, so the number of starts is the same on all of them, and keys
        that begin with it belong to one start.
        """
        host, _, port = self.config.address.rpartition(":")
        rank = self.config.node_rank
        assert rank is not None
        if self.server is None:
            timeout = timedelta(seconds=self.config.join_s)
            world_size = self.config.most_nodes
            try:
                self.server = _in_time(
                    self.config.join_s + STATIC_S,
                    lambda: TCPStore(host, int(port), world_size, rank == 0, timeout),
                )
            except TimeoutError:
                raise RendezvousConnectionError(_not_found(self.config)) from None
            except DistStoreError as error:
                # "Timed out after 601 seconds waiting for clients. 2/3 clients joined."
                joined = re.search(r"(\d+)/\d+ clients joined", str(error))
                came = _too_few(self.config, int(joined[1])) if joined else str(error)
                raise RendezvousTimeoutError(came) from error
        self.starts += 1
        store = PrefixStore(f"{self.config.id}/{self.starts}", self.server)
        address = RendezvousStoreInfo.build(rank, store, local_addr=host)
        return RendezvousInfo(store, rank, self.config.most_nodes, address)

    def is_closed(self) -> bool:
        """Never, because no machine can come later."""
        return False

    def set_closed(self) -> None:
        """Does nothing, because `is_closed` is always false."""

    def num_nodes_waiting(self) -> int:
        """Always 0, because no machine can come later."""
        return 0

    def get_run_id(self) -> str:
        """The name of the run at this address."""
        return self.config.id

    def shutdown(self) -> bool:
        """Does nothing: the server ends with its process."""
        return True
