"""Ranks of this machine that a benchmark measures together."""

import os
import socket
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.queues import SimpleQueue
from typing import Any, TypeVar

import torch

from train.distributed.process_groups import init_process_groups

R = TypeVar("R")


def on_gloo_ranks(ranks: int, work: Callable[..., R], *arguments: Any) -> list[R]:
    """What `work(groups, *arguments)` returns on each of so many ranks, with a thread each.

    Args:
        work: a function of the top level of a module; it gets the rank's `ProcessGroups`.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload([work.__module__])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results: SimpleQueue[tuple[int, R]] = context.SimpleQueue()
    processes = [
        context.Process(target=_rank, args=(results, rank, ranks, port, work, arguments))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    found = dict(results.get() for _ in processes)
    for process in processes:
        process.join()
    return [found[rank] for rank in range(ranks)]


def _rank(
    results: "SimpleQueue[tuple[int, R]]",
    rank: int,
    ranks: int,
    port: int,
    work: Callable[..., R],
    arguments: tuple[Any, ...],
) -> None:
    place = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in (place | meeting).items()})
    torch.set_num_threads(1)
    with init_process_groups("cpu") as groups:
        results.put((rank, work(groups, *arguments)))
