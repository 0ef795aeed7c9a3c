"""What is written down of a bad step."""

import json
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import cycle
from math import isfinite, sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.batch import Batch
from data.tokenizer import Tokenizer
from phd.loss import IGNORED
from train.distributed.process_groups import ProcessGroups
from train.engines.engine import Engine, Limits, Rows
from train.metrics.sinks import write_whole


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
) -> Path:
    """Write this rank's part of a bad step to `bad_steps/step_<step>/rank_<rank>.json`.

    Of each row: its number in the global batch, its lane, the targets that count, its tokens, and
    the text that they spell. Of each lane, where it goes on after the batch, and the document that
    it had reached, by its place in its source. Numbers that are not finite are written as text.

    Raises:
        OSError: the disk refuses.
    """
    stats = batch.stats
    assert stats is not None
    counts = [None] * len(batch.rows) if batch.mask is None else batch.mask.sum(1).tolist()
    rows = [
        {
            "row": groups.rank + number * groups.world_size,
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
    record |= {"rank": groups.rank, "layers": layers, "lanes": lanes, "rows": rows}
    path = run_directory / "bad_steps" / f"step_{bad.step:08d}" / f"rank_{groups.rank}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(_plain(record), allow_nan=False))
    return path


def _plain(value: Any) -> Any:
    """JSON has no inf and nan."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return str(value) if isinstance(value, float) and not isfinite(value) else value


class _Size:
    """Sums over the elements of some tensors; what is not finite is counted, and else left out."""

    def __init__(self) -> None:
        self.squares = self.largest = 0.0
        self.not_finite = 0

    def add(self, x: Tensor) -> None:
        x = x.detach().float()
        finite = x.isfinite()
        self.not_finite += int((~finite).sum())
        x = x.where(finite, 0)
        self.squares += x.square().sum(dtype=torch.float64).item()
        self.largest = max(self.largest, x.abs().amax().item())

    def to_json(self) -> dict[str, float]:
        norm = sqrt(self.squares)
        return {"norm": norm, "largest": self.largest, "not_finite": self.not_finite}


def layer_report(engine: Engine, rows: Rows) -> Layers:
    """The sizes of each layer's weights, outputs and gradients of the outputs, on a rank's rows.

    They are those of the model as it is now. The gradient is that of the rows' mean loss. The
    model stays as it is. Every rank calls it, with as many rows; each gets its own report.
    """
    sizes: defaultdict[str, defaultdict[str, _Size]]
    sizes = defaultdict(lambda: defaultdict(_Size))
    targets = max(int((rows.targets != IGNORED).sum()), 1)
    for number, part in enumerate(rows.split(engine.micro_batch)):
        # Hooks on compiled modules are not seen.
        with torch.compiler.set_stance("force_eager"), engine.grad_sync(last=False):
            with _watched(engine, sizes, weights=number == 0):
                loss = engine.forward(part)
            engine.backward(loss.total / targets)
    engine.drop_gradients()
    return {
        layer: {kind: size.to_json() for kind, size in kinds.items()}
        for layer, kinds in sizes.items()
    }


@contextmanager
def _watched(
    engine: Engine, sizes: defaultdict[str, defaultdict[str, _Size]], weights: bool
) -> Iterator[None]:
    """Measure what a forward pass within this context sees, and what its backward pass will.

    Weights are measured right before they are used: that is when a sharded one is whole.
    """
    model = engine.model
    layers: dict[str, nn.Module] = {"embed": model.embed}
    layers |= {f"blocks.{number}": block for number, block in enumerate(model.blocks)}
    layers["norm"] = model.norm

    def watch(name: str, layer: nn.Module) -> Iterator[Any]:
        def on_weights(module: nn.Module, _: object) -> None:
            for parameter in module.parameters(recurse=False):
                sizes[name]["weight"].add(parameter)

        def on_output(module: nn.Module, _: object, output: Tensor) -> None:  # noqa: ARG001
            sizes[name]["output"].add(output)
            output.register_hook(sizes[name]["gradient"].add)

        if weights:
            for module in layer.modules():
                yield module.register_forward_pre_hook(on_weights)
        yield layer.register_forward_hook(on_output)

    handles = [handle for name, layer in layers.items() for handle in watch(name, layer)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
