"""Where the agents of a run find each other, in PyTorch's words a rendezvous."""

import os
import time
from dataclasses import dataclass
from datetime import timedelta
from uuid import uuid4

from torch.distributed import PrefixStore, TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousConnectionError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
)
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from launch.config import Local, Nodes


def join(config: Local) -> RendezvousHandler:
    """Reaches the machine that keeps the list of all, or becomes it; waits until it is there.

    Every round of processes gets a TCPStore of its own, which its rank 0 serves. The one that
    PyTorch's agents offer to share keeps the keys of dead processes: with `static` the first
    collective after a restart hangs (torch 2.13). With `c10d` machines of higher rank go on using
    the address of the first round, even if that machine is dead.

    Raises:
        RendezvousConnectionError: it was not there for `join_s`.
    """
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    if isinstance(config, Nodes) and config.rendezvous == "static":
        return StaticRendezvous(config)
    parameters = _parameters(config)
    patience_s = config.join_s if isinstance(config, Nodes) else 0
    deadline = time.monotonic() + patience_s
    while True:  # each attempt takes up to a minute
        try:
            return get_rendezvous_handler(parameters)
        except RendezvousConnectionError:
            if time.monotonic() > deadline:
                raise


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


@dataclass
class StaticRendezvous(RendezvousHandler):
    """Machines whose number and order are given; a lost one is not replaced."""

    config: Nodes
    server: TCPStore | None = None
    rounds: int = 0

    def get_backend(self) -> str:
        """The name for PyTorch's logs."""
        return "static"

    @property
    def use_agent_store(self) -> bool:
        """Whether processes use the agents' TCPStore."""
        return False

    def next_rendezvous(self) -> RendezvousInfo:
        """Waits for all machines, for `join_s` at most; all of them restart equally often."""
        host, _, port = self.config.address.rpartition(":")
        rank = self.config.node_rank
        assert rank is not None
        if self.server is None:
            patience = timedelta(seconds=self.config.join_s)
            world_size = self.config.most_nodes
            self.server = TCPStore(host, int(port), world_size, rank == 0, patience)
        self.rounds += 1
        store = PrefixStore(f"{self.config.id}/{self.rounds}", self.server)
        first = RendezvousStoreInfo.build(rank, store, local_addr=host)
        return RendezvousInfo(store, rank, self.config.most_nodes, first)

    def is_closed(self) -> bool:
        """Never: nobody can come."""
        return False

    def set_closed(self) -> None:
        """Nothing to do."""

    def num_nodes_waiting(self) -> int:
        """None: nobody can come."""
        return 0

    def get_run_id(self) -> str:
        """The run's name."""
        return self.config.id

    def shutdown(self) -> bool:
        """Nothing to do: the server ends with its process."""
        return True
