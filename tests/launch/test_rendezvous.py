"""What the rendezvous says when machines are missing."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed.elastic.rendezvous import RendezvousTimeoutError

from launch.config import Nodes
from launch.rendezvous import create_rendezvous_handler
from tests.launch.machines import free_port


def told(config: Nodes) -> str:
    """What a machine says that waits in vain for others."""
    with pytest.raises(RendezvousTimeoutError) as error:
        create_rendezvous_handler(config).next_rendezvous()
    return str(error.value)


@pytest.mark.parametrize(("nodes", "wanted"), [("4", "4"), ("4:6", "at least 4")])
@pytest.mark.parametrize("came", [1, 3])
def test_too_few_machines_are_counted(nodes: str, wanted: str, came: int) -> None:
    config = Nodes(address=f"localhost:{free_port()}", nodes=nodes, join_s=2)
    with ThreadPoolExecutor(came) as machines:
        texts = list(machines.map(told, [config] * came))
    # All stop waiting at nearly the same time, and one that stops is no longer counted.
    assert f"{came} of {wanted} within join_s=2 seconds" in texts


def test_a_static_rendezvous_counts_too() -> None:
    address = f"localhost:{free_port()}"
    config = Nodes(address=address, nodes="3", join_s=1, rendezvous="static", node_rank=0)
    assert told(config) == "1 of 3 within join_s=1 seconds"
