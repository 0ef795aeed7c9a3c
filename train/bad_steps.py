"""Steps that must not count: how they are told from others, and what is written of them."""

import json
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import cycle
from math import isfinite, sqrt
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from data.stream import Batch
from data.tokenizer import Tokenizer
from phd.loss import IGNORED
from train.config import FaultsConfig
from train.engine import NO_LIMITS, Engine, Limits, Rows
from train.ranks import Ranks
from train.sinks import write_whole

NORMAL = 1.4826
"""The standard deviation of a normal distribution over its median absolute deviation."""

LEAST_DEVIATION = 0.01
"""The least standard deviation, over the median: a loss that hardly varies has no spikes."""

LAG = 2
"""A step's limits come from steps up to the last but one before it. The step right before may not
have been looked at when this one is queued, and has been after a save; limits must not tell."""


class _Known(NamedTuple):
    """A step with a finite loss and gradient norm."""

    step: int
    loss: float
    grad_norm: float
    applied: bool


class BadSteps:
    """What is remembered of steps in order to know a spike; the same on all ranks.

        step n may have at most    median + spike * max(1.4826 MAD, 1 % of the median)

    of the loss and of the gradient norm, each over the applied steps among the last `window` finite
    ones up to n - 2. Nothing is a spike while fewer than half a window of them are known. (MAD: the
    median absolute deviation.)

    A spike stays out of the medians, so one moves no limit. But half of `most_in_a_row` spikes in a
    row are no longer about the model, whose weights none of them has changed: the data have. All
    that was known before is forgotten, and nothing is a spike until half a window is known again.
    So only steps that are not finite can be bad for ever.

    Args:
        saved: what `to_json` gave; None: nothing is remembered.

    Attributes:
        count: bad steps of the run so far.
        in_a_row: how many of them are the last steps.
    """

    def __init__(self, config: FaultsConfig, saved: Mapping[str, Any] | None = None) -> None:
        self.config = config
        saved = saved or {"known": [], "count": 0, "in_a_row": 0}
        self.known = deque((_Known(*k) for k in saved["known"]), maxlen=config.window + LAG)
        self.count: int = saved["count"]
        self.in_a_row: int = saved["in_a_row"]

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        known = [list(step) for step in self.known]
        return {"known": known, "count": self.count, "in_a_row": self.in_a_row}

    def limits(self, step: int) -> Limits:
        """What this step may have at most. Steps up to the last but one before it are taken."""
        if self.config.spike is None:
            return NO_LIMITS
        applied = self._applied(step)
        if len(applied) < self.config.window / 2:
            return NO_LIMITS
        return Limits(
            _limit([known.loss for known in applied], self.config.spike),
            _limit([known.grad_norm for known in applied], self.config.spike),
        )

    def take(self, step: int, loss: float, grad_norm: float, applied: bool) -> None:
        """Remember a step; they are taken in their order."""
        self.in_a_row = 0 if applied else self.in_a_row + 1
        self.count += not applied
        if isfinite(loss) and isfinite(grad_norm):
            self.known.append(_Known(step, loss, grad_norm, applied))

    @property
    def too_many(self) -> bool:
        """Whether the last steps were bad so often that the run is to end."""
        return self.in_a_row >= self.config.most_in_a_row

    def _applied(self, step: int) -> list[_Known]:
        """The steps to which this one is compared."""
        patience = max(1, self.config.most_in_a_row // 2)
        past = [known for known in self.known if known.step <= step - LAG]
        found: list[_Known] = []
        refused = 0
        for known in past[-self.config.window :]:
            refused = 0 if known.applied else refused + 1
            if known.applied:
                found.append(known)
            elif refused >= patience:
                found.clear()
        return found


def _limit(values: list[float], spike: float) -> float:
    middle = median(values)
    deviation = NORMAL * median(abs(value - middle) for value in values)
    return middle + spike * max(deviation, LEAST_DEVIATION * abs(middle))


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
    ranks: Ranks,
) -> Path:
    """Write this rank's part of a bad step to `bad_steps/step_<step>/rank_<rank>.json`.

    Of each row: its number in the global batch, its lane, the targets that count, its tokens, and
    the text that they spell. Of each lane, where it goes on after the batch, and the document that
    it had reached, by its place in its source. Numbers that are not finite are written as text.

    Raises:
        OSError: the disk refuses.
    """
    reading = batch.reading
    counts = [None] * len(batch.rows) if batch.mask is None else batch.mask.sum(1).tolist()
    rows = [
        {
            "row": ranks.rank + number * ranks.world,
            "lane": lane,
            "targets": len(row) - 1 if count is None else count,
            "text": tokenizer.decode(row if count is None else row[: count + 1]),
            "tokens": row.tolist(),
        }
        for number, (row, lane, count) in enumerate(
            zip(batch.rows, cycle(reading.lanes), counts, strict=False)
        )
    ]
    lanes = {
        lane: {"goes_on": reading.lanes[lane].to_json(), "reached": reached.to_json()}
        for lane, reached in reading.reached.items()
    }
    record = {**asdict(bad), "limits": bad.limits._asdict()}
    record |= {"rank": ranks.rank, "layers": layers, "lanes": lanes, "rows": rows}
    path = run_directory / "bad_steps" / f"step_{bad.step:08d}" / f"rank_{ranks.rank}.json"
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
        with torch.compiler.set_stance("force_eager"), engine.reducing(last=False):
            with _watched(engine, sizes, weights=number == 0):
                loss = engine.forward(part)
            engine.backward(loss.total / targets)
    engine.discard()
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
