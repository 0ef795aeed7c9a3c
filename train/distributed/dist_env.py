"""What `torchrun` tells every process that it starts, read from the environment."""

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class DistEnv:
    """This process among those that were started together.

    Attributes:
        rank: this process's number among all of them.
        world_size: how many there are.
        local_rank: its number on this machine, which is also the number of its device.
        local_world_size: how many of them are on this machine.
        restarts: how often they have been started again, by `torchrun` or by SLURM.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    restarts: int = 0

    @classmethod
    def from_environment(cls) -> "DistEnv":
        """As `torchrun`'s variables say; a lone process where they are not set."""

        def number(name: str, default: int) -> int:
            return int(os.environ.get(name, default))

        return cls(
            rank=number("RANK", 0),
            world_size=number("WORLD_SIZE", 1),
            local_rank=number("LOCAL_RANK", 0),
            local_world_size=number("LOCAL_WORLD_SIZE", 1),
            restarts=number("TORCHELASTIC_RESTART_COUNT", 0) + number("SLURM_RESTART_COUNT", 0),
        )
