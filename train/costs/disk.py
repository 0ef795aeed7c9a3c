"""The disk that a run's checkpoints take."""

from math import lcm
from typing import NamedTuple

from train.config import Config
from train.engines.state_rules import moment_bytes


class Disk(NamedTuple):
    """Bytes of checkpoints.

    Attributes:
        checkpoint: of one.
        most: how many there are at a time, the one that is being written included; None if that
            depends on how long the run will be.
    """

    checkpoint: int
    most: int | None

    @property
    def total(self) -> int | None:
        """Of all."""
        return None if self.most is None else self.checkpoint * self.most


def checkpoint_disk(config: Config, parameters: int) -> Disk:
    """What the checkpoints of a run take at most.

    The newest `keep` stay, those of every multiple of `keep_every`, and those from which decays
    start. An older one goes when the new one is complete.
    """
    settings, total = config.checkpoint, config.total_steps
    size = 4 * parameters + moment_bytes(config.model, config.optim)  # all of it is float32
    if total is None:
        return Disk(size, None if settings.keep_every else settings.keep + 1)
    # The moment before the last save is complete, when all that is kept so far is there.
    earlier = (total - 1) // settings.every if settings.every else 0
    newest = min(earlier, settings.keep)
    kept = 0
    if settings.keep_every and earlier:
        period = lcm(settings.every, settings.keep_every)
        kept = (earlier - newest) * settings.every // period
    # The last decay of a trunk starts from its last checkpoint.
    return Disk(size, newest + kept + max(0, len(config.branches) - 1) + 1)
