"""A training step as hooks see it, and what a hook is.

A hook of one's own is a class with `every` and `__call__`; `train.main.main(config, hooks=[...])`
takes functions that make one from an opened run:

    class WeightNorm:
        every = 20

        def __init__(self, run: Run) -> None:
            self.engine = run.engine

        def __call__(self, record: StepRecord) -> Metrics:
            with self.engine.summon_full_params() as model:
                return {"weights/norm": model.embed.weight.norm().item()}

    if __name__ == "__main__":
        compose.run(lambda config: main(config, hooks=[WeightNorm]))
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import Tensor
from xxhash import xxh3_64_intdigest

from conf.errors import DataError
from data.batch import Batch, BatchStats
from train.distributed.process_groups import ProcessGroups
from train.ending import Ending

Metrics = dict[str, float | str]


@dataclass(frozen=True)
class StepRecord:
    """An optimizer step that has been taken.

    Attributes:
        step: optimizer steps taken so far, this one included.
        tokens: tokens of all rows so far, this step's and their padding included.
        flops: `phd.flops.training_flops` of the documents so far, this step's included, without
            padding.
        batches: batches that the stream has given so far; more than steps where some were skipped.
        lr: the step's learning rate.
        loss, grad_norm: scalars on the device; see `train.engines.engine.StepResult`.
        batch: this rank's rows.
        stats: what all ranks' rows have added to the run; the stream goes on from its cursors,
            which are those of all lanes on rank 0, and of this rank's lanes on the others.
        train_s: seconds of training in this process, without hooks.
        data_wait_s: seconds of `train_s` that were spent waiting for data, by rank on rank 0; this
            rank's alone on the others.
        bad_steps: what is remembered of bad steps; a JSON object.
        ending: why this is the last step; None if it is not.
        failure: the error because of which there is no next batch; None if there is one.
    """

    step: int
    tokens: int
    flops: int
    batches: int
    lr: float
    loss: Tensor
    grad_norm: Tensor
    batch: Batch
    stats: BatchStats
    train_s: float
    data_wait_s: tuple[float, ...]
    bad_steps: Mapping[str, Any] = field(default_factory=dict)
    ending: Ending | None = None
    failure: Exception | None = None

    def of_all(self, groups: ProcessGroups, ranks_per_row: int = 1) -> "StepRecord":
        """The record with what only all ranks together know; every rank calls it.

        All ranks learn the counts. Rank 0 alone, which logs and saves, gets a cursor of each lane
        and a time of each rank: there are as many as ranks, or more.

        Args:
            ranks_per_row: how many neighbouring ranks have the same rows, which count once.

        Raises:
            DataError: on all ranks; such neighbours have read other rows.
        """
        rows = xxh3_64_intdigest(self.batch.rows.tobytes()) if ranks_per_row > 1 else 0
        own = self.stats, self.data_wait_s, self.flops, rows
        known = groups.gather_on_rank_zero(own)
        stats, waits, flops, _ = own
        if known is not None:
            readers = known[::ranks_per_row]
            flops = sum(flops for _, _, flops, _ in readers)
            stats = BatchStats.merged([stats for stats, _, _, _ in readers])
            waits = tuple(wait for _, waits, _, _ in known for wait in waits)
        counts = stats.targets, stats.positions, stats.target_bytes
        unlike = None if known is None else _unlike([hash_ for *_, hash_ in known], ranks_per_row)
        unlike, flops, targets, positions, size = groups.broadcast((unlike, flops, *counts))
        if unlike is not None:
            first, other = unlike
            raise DataError(
                f"ranks {first} and {other} work on the same rows, and have read others at step "
                f"{self.step}: the text is not the same on all machines. Give all of them the same "
                "files"
            )
        stats = stats._replace(targets=targets, positions=positions, target_bytes=size)
        return replace(self, flops=flops, stats=stats, data_wait_s=waits)


def _unlike(rows: Sequence[int], ranks_per_row: int) -> tuple[int, int] | None:
    """The first two ranks that should have the same rows, and have not.

    >>> _unlike([7, 7, 8, 9], 2)
    (2, 3)
    """
    firsts = (rank // ranks_per_row * ranks_per_row for rank in range(len(rows)))
    pairs = ((first, rank) for rank, first in enumerate(firsts) if rows[rank] != rows[first])
    return next(pairs, None) if ranks_per_row > 1 else None


EARLY_STEPS = (1, 2, 5, 10)
"""Steps that are reported besides every so many, so that a run shows at once how it begins."""


class Hook(Protocol):
    """Measures something beside the training.

    Attributes:
        every: steps between two calls; 0: only after the last step. A hook with an attribute
            `early` that is true is also called after each of `EARLY_STEPS`, and one with an
            attribute `steps` after each of those.
    """

    every: int

    def __call__(self, record: StepRecord) -> Metrics:
        """Called on all ranks after every `every`-th step, and after the last step of a start.

        Args:
            record: the step; `ending` is set if it is the last one. A hook that takes long returns
                at once where `ending.by_signal`: the process has little time left to leave.

        Returns:
            what is logged, by name; `{}` where there is nothing to log.
        """


def is_due(hook: Hook, step: int) -> bool:
    """Whether a hook is called after this step, if it is not the last."""
    early = getattr(hook, "early", False) and step in EARLY_STEPS
    named = step in getattr(hook, "steps", ())
    return named or bool(hook.every and (early or step % hook.every == 0))
