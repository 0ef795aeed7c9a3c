"""This process's place among those that were started together."""

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """What `torchrun` tells every process that it starts.

    Attributes:
        rank: this process's number among all of them.
        world: how many there are.
        local_rank: its number on this machine, which is the number of its device.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @classmethod
    def from_environment(cls) -> "Place":
        """The place that `torchrun`'s variables say; the only process where there are none."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        return cls(*(int(os.environ.get(n, d)) for n, d in zip(names, (0, 1, 0), strict=True)))
