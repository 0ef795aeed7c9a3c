"""What the ranks of a run tell each other, on the CPU and beside the engine's own traffic."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from itertools import count
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from launch.place import Place
from train.validation import ConfigError

T = TypeVar("T")

# A rank may wait this long for another that trains a tokenizer or unpacks a shard. One that died
# closes its connections, which is noticed at once; one that hangs in a step is the watchdog's.
TIMEOUT = timedelta(hours=2)
MEETING = timedelta(minutes=10)  # in which all have to have come


@dataclass(frozen=True)
class Ranks:
    """The ranks that train together, and this one among them; `Ranks()` is a lone process.

    Attributes:
        place: which one this is.
        control: the gloo group through which they agree; None for a lone process.
        saving: another one, that belongs to the thread that writes checkpoints.
    """

    place: Place = field(default_factory=Place)
    control: dist.ProcessGroup | None = None
    saving: dist.ProcessGroup | None = None

    @property
    def rank(self) -> int:
        return self.place.rank

    @property
    def world(self) -> int:
        return self.place.world

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes what is written once, and speaks for all."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Everybody's value, in the order of ranks, on every rank."""
        if self.control is None:
            return [value]
        values: list[T] = [value] * self.world
        dist.all_gather_object(values, value, group=self.control)
        return values

    def broadcast(self, value: T) -> T:
        """The first rank's value, on every rank."""
        if self.control is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.control)
        return values[0]

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.control is not None:
            dist.barrier(group=self.control)

    def sum(self, x: Tensor) -> Tensor:
        """The sum of everybody's x, in place; on a device without waiting for it."""
        if self.world > 1:
            dist.all_reduce(x)
        return x


@contextmanager
def open_ranks(device: str) -> Iterator[Ranks]:
    """Join the ranks that were started together, and leave them at the end.

    Args:
        device: `auto`, `cpu` or `cuda`; each rank takes the CUDA device of its local number.

    Raises:
        ConfigError: this machine has fewer devices than ranks.
    """
    place = Place.from_environment()
    cuda = device != "cpu" and torch.cuda.is_available()
    if cuda:
        if place.local_rank >= torch.cuda.device_count():
            too_many = (
                f"engine.device={device}: {place.local_rank + 1} or more processes were started on "
                f"this machine, which has {torch.cuda.device_count()} CUDA devices; start one for "
                "each, or set engine.device=cpu"
            )
            raise ConfigError([too_many])
        torch.cuda.set_device(place.local_rank)
    if place.world == 1:
        yield Ranks(place)
        return
    # What an earlier run of this process has left in the store would be taken for this one's.
    store = dist.PrefixStore(f"run {next(_RUNS)}", _store())
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=store,
        rank=place.rank,
        world_size=place.world,
        timeout=TIMEOUT,
    )
    try:
        control, saving = (dist.new_group(backend="gloo", timeout=TIMEOUT) for _ in range(2))
        yield Ranks(place, control, saving)
    finally:
        dist.destroy_process_group()


_RUNS = count()


@cache
def _store() -> dist.Store:
    """Where the ranks of this start find each other, for all runs of this process."""
    store, _, _ = next(iter(dist.rendezvous("env://", timeout=MEETING)))
    return store


class AgreedError(ValueError):
    """Something went wrong on some ranks, and all of them know it."""


def agreed(ranks: Ranks, make: Callable[[], T]) -> T:
    """What `make` returns; a ValueError of any rank is raised on all of them.

    Else the others would wait for that rank until something kills them. `make` must not talk to
    other ranks.
    """
    value, problem = None, None
    try:
        value = make()
    except ValueError as error:
        if ranks.world == 1:
            raise
        problem = str(error)
    if problems := [found for found in ranks.gather(problem) if found is not None]:
        raise AgreedError("; ".join(dict.fromkeys(problems)))
    return cast(T, value)
