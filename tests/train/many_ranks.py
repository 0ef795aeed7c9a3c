"""Runs a function on many ranks: fresh processes, started as torchrun would, that gloo connects; or
as one of ranks that are not there."""

import os
import pickle
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from time import monotonic
from typing import Any

import torch
import torch.distributed as dist

from tests.fork_server import fork_server
from tests.patience import PATIENCE_S
from train.distributed.process_groups import init_process_groups
from train.torch_private import use_fake_backend


class RanksFailedError(Exception):
    """Some ranks did not return.

    Attributes:
        outcomes: of each rank what it returned, or a text that says how it failed.
    """

    def __init__(self, outcomes: list[Any], failed: list[int]) -> None:
        told = "\n".join(f"rank {rank}: {outcomes[rank]}" for rank in failed)
        super().__init__(f"{len(failed)} of {len(outcomes)} ranks failed\n{told}")
        self.outcomes = outcomes


def run_ranks(
    world_size: int, function: Callable[..., Any], *arguments: Any, deadline_s: float = PATIENCE_S
) -> list[Any]:
    """Call `function(ranks, *arguments)` on `world_size` ranks; return what each returned.

    Args:
        world_size: how many.
        function: of the top level of a module; gets this rank's `ProcessGroups`, all groups joined.
        arguments: anything that can be pickled.
        deadline_s: who is still running then is killed, and has failed.

    Raises:
        RanksFailedError: with tracebacks, and with who was killed by what.
    """
    context = fork_server()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipes, processes = [], []
    for rank in range(world_size):
        ours, theirs = context.Pipe(duplex=False)
        given = (theirs, rank, world_size, store.port, dict(os.environ), function, arguments)
        processes.append(context.Process(target=_rank, args=given, daemon=True))
        processes[-1].start()
        theirs.close()
        pipes.append(ours)
    try:
        outcomes = _outcomes(pipes, monotonic() + deadline_s)
    finally:
        for process in processes:
            process.kill()
            process.join()
    failed = [rank for rank, (fine, _) in enumerate(outcomes) if not fine]
    values = [value for _, value in outcomes]
    if failed:
        raise RanksFailedError(values, failed)
    return values


def variables_of(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What torchrun tells a rank of this machine; its `TCPStore` listens at the port."""
    place = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": 1}
    return {name: str(value) for name, value in (place | meeting).items()}


def _rank(
    pipe: Connection,
    rank: int,
    world_size: int,
    port: int,
    environment: dict[str, str],
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    """One of the processes."""
    os.environ.clear()  # the server may have variables of an earlier test
    os.environ |= environment | variables_of(rank, world_size, port)
    del sys.argv[1:]  # pytest's options are no overrides of a run
    torch.set_num_threads(1)
    warnings.simplefilter("error", FutureWarning)  # pytest's filters do not reach this process
    try:
        with init_process_groups("cpu") as groups:
            value = function(groups, *arguments)
        outcome = True, value
    except BaseException:
        outcome = False, traceback.format_exc()
    pipe.send_bytes(pickle.dumps(outcome))  # `send` would leave tensors in memory that ends here
    pipe.close()


def _outcomes(pipes: list[Connection], end: float) -> list[tuple[bool, Any]]:
    """What the ranks send until `end`, in their order."""
    outcomes: dict[Connection, tuple[bool, Any]] = {}
    while len(outcomes) < len(pipes):
        ready = wait([pipe for pipe in pipes if pipe not in outcomes], max(0, end - monotonic()))
        if not ready:
            break
        for pipe in ready:
            assert isinstance(pipe, Connection)
            try:
                outcomes[pipe] = pickle.loads(pipe.recv_bytes())
            except EOFError:
                outcomes[pipe] = False, "the process died"
    return [outcomes.get(pipe, (False, "the process was still running")) for pipe in pipes]


@contextmanager
def rank_of(rank: int, ranks: int) -> Iterator[None]:
    """This process as one of many ranks that send nothing."""
    use_fake_backend()
    dist.init_process_group("fake", rank=rank, world_size=ranks, store=dist.HashStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
