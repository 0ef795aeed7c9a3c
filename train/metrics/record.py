"""A step that was taken, as hooks see it, and what a hook is."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import Tensor

from data.batch import Batch, BatchStats
from train.distributed.process_groups import ProcessGroups

Metrics = dict[str, float | str]


@dataclass(frozen=True)
class StepRecord:
    """An optimizer step that has been taken.

    Attributes:
        step: how many have been, this one included.
        tokens: tokens of all rows so far, this step's and their padding included.
        batches: batches that the stream has given so far; more than steps where some were passed
            over.
        loss, grad_norm: scalars on the device; see `train.engines.engine.StepResult`.
        lr: the step's learning rate.
        batch: this rank's rows.
        stats: what all ranks' rows have added; its cursors are where the stream goes on.
        train_s: seconds of training in this process, without hooks.
        data_wait_s: how many of them were waits for data, by rank.
        bad_steps: what is remembered of bad steps; a JSON object.
        ending: why this is the last step: `finished`, `max_time`, `out_of_text`, `no_data` or a
            signal's name; or None.
        failure: why there is no next batch; None if there is.
    """

    step: int
    tokens: int
    batches: int
    lr: float
    loss: Tensor
    grad_norm: Tensor
    batch: Batch
    stats: BatchStats
    train_s: float
    data_wait_s: tuple[float, ...]
    bad_steps: Mapping[str, Any] = field(default_factory=dict)
    ending: str | None = None
    failure: Exception | None = None

    def of_all(self, groups: ProcessGroups) -> "StepRecord":
        """The record with what only all ranks together know; every rank calls it."""
        known = groups.gather((self.stats, self.data_wait_s))
        return replace(
            self,
            stats=BatchStats.merged([stats for stats, _ in known]),
            data_wait_s=tuple(wait for _, waits in known for wait in waits),
        )

    @property
    def interrupted(self) -> bool:
        """Somebody waits for the process to end: only what must be done should be."""
        return self.ending is not None and self.ending.startswith("SIG")


class Hook(Protocol):
    """Called on all ranks after every `every`-th step (0: never) and after the last."""

    every: int

    def __call__(self, record: StepRecord) -> Metrics: ...


def is_due(hook: Hook, step: int) -> bool:
    """Whether a hook is to be called after this step, if it is not the last."""
    return bool(hook.every and step % hook.every == 0)
