"""The record of a bad step, as a file for each rank."""

import json
from dataclasses import asdict, dataclass
from itertools import cycle
from math import isfinite
from pathlib import Path
from typing import Any

from data.batch import Batch
from data.storage.atomic import write_atomic
from data.tokenizer import Tokenizer
from train.distributed.process_groups import ProcessGroups
from train.engines.limits import Limits
from train.engines.mesh import ParallelDims


@dataclass(frozen=True, kw_only=True)
class BadStep:
    """What all ranks know of a bad step."""

    step: int
    batch: int
    loss: float
    grad_norm: float
    limits: Limits
    lr: float

    def __str__(self) -> str:
        """In a line for a person.

        >>> print(BadStep(step=7, batch=7, loss=9, grad_norm=2, limits=Limits(4, 5), lr=1e-3))
        step 7 is bad: its loss is 9 (at most 4), its gradient norm 2 (at most 5)
        """
        most = [f"at most {x:.4g}" if isfinite(x) else "must be finite" for x in self.limits]
        return (
            f"step {self.step} is bad: its loss is {self.loss:.4g} ({most[0]}), its gradient norm "
            f"{self.grad_norm:.4g} ({most[1]})"
        )


Layers = dict[str, dict[str, dict[str, float]]]
"""By layer; then `weight`, `output` or `gradient`; then `norm`, `largest` or `not_finite`."""


def write_bad_step(
    run_directory: Path,
    bad: BadStep,
    batch: Batch,
    tokenizer: Tokenizer,
    layers: Layers,
    groups: ProcessGroups,
    dims: ParallelDims,
) -> Path:
    """Write this rank's part of a bad step to `bad_steps/step_<step>/rank_<rank>.json`.

    For each row: its number in the global batch, its lane, how many targets count, its tokens and
    their text. For each lane: the cursor after the batch, and the cursor of the document that it
    had reached. Of the ranks that work on the same rows the first one writes rows and lanes; each
    writes the layers' norms of the tokens, and of the parts of matrices, that it has. Numbers that
    are not finite are written as text, because JSON has none.

    Raises:
        OSError: the disk refuses.
    """
    stats = batch.stats
    assert stats is not None
    counts = [None] * len(batch.rows) if batch.mask is None else batch.mask.sum(1).tolist()
    rows = [
        {
            "row": dims.data_rank(groups.rank) + number * dims.data_ranks,
            "lane": lane,
            "targets": len(row) - 1 if count is None else count,
            "text": tokenizer.decode(row if count is None else row[: count + 1]),
            "tokens": row.tolist(),
        }
        for number, (row, lane, count) in enumerate(
            zip(batch.rows, cycle(stats.lanes), counts, strict=False)
        )
    ]
    lanes = {
        lane: {"goes_on": stats.lanes[lane].to_json(), "reached": progress.to_json()}
        for lane, progress in stats.progress.items()
    }
    record = {**asdict(bad), "limits": bad.limits._asdict()}
    record |= {"rank": groups.rank, "layers": layers}
    if dims.ranks_per_row > 1:
        record["context_rank"] = f"{dims.context_rank(groups.rank)} of {dims.context}"
        record["tensor_rank"] = f"{dims.tensor_rank(groups.rank)} of {dims.tensor}"
    if dims.is_reader(groups.rank):
        record |= {"lanes": lanes, "rows": rows}
    path = run_directory / "bad_steps" / f"step_{bad.step:08d}" / f"rank_{groups.rank}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(_plain(record), allow_nan=False))
    return path


def _plain(value: Any) -> Any:
    """JSON has no inf and nan."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return str(value) if isinstance(value, float) and not isfinite(value) else value
