"""This process's place among those that were started together."""

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class DistEnv:
    """What `torchrun` tells every process that it starts.

    Attributes:
        rank: this process's number among all of them.
        world_size: how many there are.
        local_rank: its number on this machine, which is the number of its device.
        restarts: how often they have been started again, by `torchrun` or by SLURM.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    restarts: int = 0

    @classmethod
    def from_environment(cls) -> "DistEnv":
        """The place that `torchrun`'s variables say; the only process where there are none."""

        def number(name: str, otherwise: int) -> int:
            return int(os.environ.get(name, otherwise))

        return cls(
            rank=number("RANK", 0),
            world_size=number("WORLD_SIZE", 1),
            local_rank=number("LOCAL_RANK", 0),
            restarts=number("TORCHELASTIC_RESTART_COUNT", 0) + number("SLURM_RESTART_COUNT", 0),
        )
