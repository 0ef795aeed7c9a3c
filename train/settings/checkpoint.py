"""`checkpoint.`: when the run's state is saved."""

from dataclasses import dataclass

from conf.errors import Problem
from conf.settings import Settings, at_least


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Settings):
    """When the run's state is saved. It is also saved at the end and after a signal to stop.

    Attributes:
        every: the steps between two checkpoints; 0: only at the end.
        keep: how many of the newest checkpoints are kept. A trunk (`schedule=wsd_s`) also saves and
            keeps that of each step at which a decay begins.
        keep_every: the checkpoints of every multiple of this many steps are kept, too; 0: only the
            newest are kept.
    """

    every: int = 100
    keep: int = 2
    keep_every: int = 0

    def problems(self) -> list[Problem]:
        return at_least(self, "checkpoint", 0, "every", "keep_every") + at_least(
            self, "checkpoint", 1, "keep"
        )
