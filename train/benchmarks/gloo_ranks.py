"""Processes of this machine that a benchmark measures together."""

import os
import socket
import traceback
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any, Literal, TypeVar

import torch

from train.distributed.process_groups import init_process_groups

R = TypeVar("R")


def on_processes(
    count: int,
    work: Callable[..., R],
    *arguments: Any,
    start: Literal["spawn", "forkserver"] = "forkserver",
) -> list[R]:
    """What `work(number, *arguments)` returns in each of so many processes.

    Raises:
        RuntimeError: as soon as one of them fails or dies; the others, which may wait for it, are
            killed.
    """
    context: Any = get_context(start)
    pipes: dict[Connection, int] = {}
    processes = []
    for number in range(count):
        ours, theirs = context.Pipe(duplex=False)
        given = (theirs, work, number, arguments)
        processes.append(context.Process(target=_process, args=given, daemon=True))
        processes[-1].start()
        theirs.close()
        pipes[ours] = number
    found: dict[int, R] = {}
    try:
        while len(found) < count:
            for pipe in wait([pipe for pipe, number in pipes.items() if number not in found]):
                assert isinstance(pipe, Connection)
                found[pipes[pipe]] = _received(pipe, pipes[pipe])
    except BaseException:
        for process in processes:
            process.kill()
        raise
    finally:
        for process in processes:
            process.join()
    return [found[number] for number in range(count)]


def _received(pipe: Connection, number: int) -> Any:
    try:
        fine, value = pipe.recv()
    except EOFError:
        raise RuntimeError(f"process {number} died") from None
    if not fine:
        raise RuntimeError(f"process {number} failed:\n{value}")
    return value


def _process(
    pipe: Connection, work: Callable[..., Any], number: int, arguments: tuple[Any, ...]
) -> None:
    try:
        pipe.send((True, work(number, *arguments)))
    except Exception:
        pipe.send((False, traceback.format_exc()))


def on_gloo_ranks(ranks: int, work: Callable[..., R], *arguments: Any) -> list[R]:
    """What `work(groups, *arguments)` returns on each of so many ranks, with a thread each.

    Args:
        work: a function of the top level of a module; it gets the rank's `ProcessGroups`.
    """
    get_context("forkserver").set_forkserver_preload([work.__module__])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return on_processes(ranks, partial(_rank, ranks, port, work), *arguments)


def _rank(ranks: int, port: int, work: Callable[..., R], rank: int, *arguments: Any) -> R:
    place = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in (place | meeting).items()})
    torch.set_num_threads(1)
    with init_process_groups("cpu") as groups:
        return work(groups, *arguments)
