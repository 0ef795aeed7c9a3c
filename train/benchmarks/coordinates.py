"""The coordinate check of muP: how large activations are, over width, after each of a few steps.

    logits, changed by      the standard parametrisation        muP
    step 3                            . *                       * . . * . .
    step 2                        . *                           * . . * . .
    step 1                  * . *                               * . . * . .
                            64       512  dimensions            64       512

Where a line rises, wide models are moved further by one learning rate than narrow ones, so that
they need a lower one. In muP all lines are level (arXiv 2203.03466, appendix D.1). At the start
muP's logits are smaller in wider models, as 1/sqrt(D), which is right: what a step adds is not.
"""

import csv
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from phd.block import AttentionContext, Block
from phd.config import ModelConfig
from phd.model import RowContext, Transformer
from train.benchmarks.timing import Result
from train.engines.optimizer import build_optimizer
from train.settings.optim import OptimConfig

BYTES = 256
"""The vocabulary: text is read byte by byte, so that no tokenizer is needed."""

QUANTITIES = {
    "embedding": "the embedding's output",
    "attention": "attention's output, before a norm",
    "scores": "attention's scores, before the softmax",
    "feed-forward": "the feed-forward network's output, before a norm",
    "residual stream": "the residual stream after a block",
    "logits": "the logits",
}
PARAMETRISATIONS = ("standard", "muP")
LEVEL = 0.25
"""The largest slope of a quantity that is told to stay: it grows by 1.7 over a factor of 8."""


@dataclass(frozen=True)
class Check:
    """What is trained.

    Attributes:
        model: its layers, norms and proportions are those of all widths.
        widths: the values of D, each a multiple of the narrowest, which is muP's base.
        optim: the optimizer; its learning rate is that of the narrowest.
        steps: of training.
        rows, tokens: of a batch.
    """

    model: ModelConfig
    widths: tuple[int, ...]
    optim: OptimConfig
    steps: int = 8
    rows: int = 4
    tokens: int = 64

    def model_of(self, width: int, parametrisation: str) -> ModelConfig:
        """The model of a width: more heads of one width, and wider in all else."""
        head_dim = min(self.widths) // 2
        heads = width // head_dim
        return replace(
            self.model.vanilla_twin,
            dim=width,
            ffn_dim=width * self.model.ffn_dim // self.model.dim,
            heads=heads,
            kv_heads=heads // 2,
            head_dim=head_dim,
            vocab_size=BYTES,
            max_seq_len=self.tokens,
            mup_base_dim=min(self.widths) if parametrisation == "muP" else None,
        )


class Coordinates(NamedTuple):
    """How large a quantity is in one model.

    Attributes:
        layer: from 0 on; None: the quantity is no block's.
        size: the mean absolute value.
        change: that of the difference to before the first step, for the same text.
    """

    parametrisation: str
    width: int
    step: int
    quantity: str
    layer: int | None
    size: float
    change: float


Draw = Callable[[list[Coordinates], str, Path], None]
"""Draws what was measured, of a subject in words, into a file."""


def bench_coordinates(check: Check, out: Path, device: torch.device, draw: Draw | None) -> Result:
    """Train a model of each width with and without muP, and tell what grows with the width.

    Args:
        out: the directory for `coordinates-steps.csv`, all that was measured, and the chart.
        draw: draws the chart; None: there is none.
    """
    found = measure(check, device)
    files = [_write(found, out / "coordinates-steps.csv")]
    rows = table(found)
    subject = (
        f"vanilla, {check.model.layers} layers, norm={check.model.norm}, optim={check.optim.kind}, "
        f"lr {check.optim.lr:g} (of D = {min(check.widths)}), {check.steps} steps of "
        f"{check.rows} x {check.tokens} bytes of Python"
    )
    if draw is not None:
        draw(found, subject, out / "coordinates.png")
        files.append(out / "coordinates.png")
    method = f"what {check.steps} steps change in activations, by the width of the model"
    return Result(rows, steepest(rows), subject, files, method=method, notes=words(rows))


def measure(check: Check, device: torch.device) -> list[Coordinates]:
    """Every quantity of every model, before the first step and after each."""
    text = python_text(check, device)
    found = []
    for parametrisation in PARAMETRISATIONS:
        for width in check.widths:
            config = check.model_of(width, parametrisation)
            first: dict[tuple[str, int | None], Tensor] = {}
            for step, values in enumerate(_trained(config, check, text)):
                first = first or values
                found += [
                    Coordinates(
                        *(parametrisation, width, step, quantity, layer),
                        size=_mean_size(value),
                        change=_mean_size(value - first[quantity, layer]),
                    )
                    for (quantity, layer), value in values.items()
                ]
    return found


def _trained(
    config: ModelConfig, check: Check, text: Tensor
) -> Iterator[dict[tuple[str, int | None], Tensor]]:
    """The activations of a model for the first batch of a text, at first and after each step."""
    probe, *batches = text
    model = Transformer(config).to(text.device).reset(0)
    optimizer = build_optimizer(model, check.optim, width_ratio=config.width_ratio)
    yield activations(model, probe[:, :-1])
    for batch in batches:
        loss = model.loss(batch[:, :-1], batch[:, 1:])
        (loss.total / loss.targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        yield activations(model, probe[:, :-1])


def python_text(check: Check, device: torch.device) -> Tensor:
    """Batches of text, of Python's own source: bytes (1 + steps, rows, T + 1).

    Where the source is at its end, it begins again.
    """
    shape = (1 + check.steps, check.rows, check.tokens + 1)
    needed, found = int(np.prod(shape)), b""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        found += path.read_bytes()
        if len(found) >= needed:
            break
    numbers = np.resize(np.frombuffer(found, dtype=np.uint8), shape)
    return torch.from_numpy(numbers.astype(np.int64)).to(device)


class Recorder:
    """The context of whole rows, which also hands the scores of attention to `record`."""

    def __init__(self, context: RowContext, record: Callable[[Tensor], None]) -> None:
        self.context, self.record = context, record
        self.select_queries, self.select_keys = context.select_queries, context.select_keys

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        queries, keys, _ = self.context.rotated(q, k, v)
        keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], 1)
        scores = queries @ keys.mT * queries.shape[-1] ** -0.5
        self.record(scores.tril())  # what comes later is not seen
        return self.context.attend(q, k, v)


@torch.no_grad()
def activations(model: Transformer, tokens: Tensor) -> dict[tuple[str, int | None], Tensor]:
    """Each quantity of a plain transformer, by its name and its layer."""
    found: dict[tuple[str, int | None], Tensor] = {}
    with _recorded(model, found):
        found["logits", None] = model.logits(tokens)
    return found


@contextmanager
def _recorded(model: Transformer, found: dict[tuple[str, int | None], Tensor]) -> Iterator[None]:
    """Within it, the model's forward pass writes what it computes into `found`."""

    def keep(name: str, layer: int | None = None) -> Callable[[Tensor], None]:
        return lambda x: found.update({(name, layer): x.clone()})

    def hook(module: nn.Module, name: str, layer: int | None = None) -> Any:
        record = keep(name, layer)
        return module.register_forward_hook(lambda _module, _inputs, output: record(output))

    def with_recorder(
        layer: int,
    ) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Tensor, Tensor, AttentionContext]]:
        return lambda _, given: (*given[:2], Recorder(given[2], keep("scores", layer)))

    hooks = [hook(model.embed, "embedding")]
    for layer, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        hooks += [
            hook(block.attention, "attention", layer),
            hook(block.ffn, "feed-forward", layer),
            hook(block, "residual stream", layer),
            block.attention.register_forward_pre_hook(with_recorder(layer)),
        ]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def _mean_size(x: Tensor) -> float:
    return x.abs().mean().item()


# What comes of it


def table(found: list[Coordinates]) -> list[dict[str, Any]]:
    """A row for each quantity and parametrisation: its change after the last step, by width."""
    last = max(x.step for x in found)
    rows = []
    for parametrisation in PARAMETRISATIONS:
        for quantity in QUANTITIES:
            of = (parametrisation, quantity)
            own = [x for x in found if (x.parametrisation, x.quantity) == of]
            changes = by_width([x for x in own if x.step == last], "change")
            rows.append(
                {"by": parametrisation, "work": quantity}
                | {f"D = {width}": change for width, change in changes.items()}
                | {
                    "slope of change": slope(changes),
                    "slope of size": slope(by_width([x for x in own if x.step == last], "size")),
                    "of size at first": slope(by_width([x for x in own if x.step == 0], "size")),
                }
            )
    return rows


def by_width(found: list[Coordinates], what: str) -> dict[int, float]:
    """The mean of `size` or `change` over layers, for each width."""
    widths = dict.fromkeys(x.width for x in found)
    return {
        width: float(np.mean([getattr(x, what) for x in found if x.width == width]))
        for width in widths
    }


def slope(values: dict[int, float]) -> float:
    """The exponent p of the power law c * width^p that is nearest to the values.

    >>> round(slope({64: 3.0, 128: 6.0, 256: 12.0}), 6)
    1.0
    """
    x, y = np.log(list(values)), np.log(list(values.values()))
    return float(np.polyfit(x, y, 1)[0])


def steepest(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The slope of the change that is farthest from 0, by parametrisation."""
    found: dict[str, float] = {}
    for row in rows:
        name, value = f"steepest slope, {row['by']}", row["slope of change"]
        found[name] = max(found.get(name, 0.0), value, key=abs)
    return found


def words(rows: list[dict[str, Any]]) -> list[str]:
    """For each parametrisation what the width makes larger, what smaller, and what it leaves."""
    lines = []
    for parametrisation in PARAMETRISATIONS:
        slopes = {r["work"]: r["slope of change"] for r in rows if r["by"] == parametrisation}
        more = [f"{name} (as D^{x:z.2f})" for name, x in slopes.items() if x > LEVEL]
        less = [f"{name} (as D^{x:z.2f})" for name, x in slopes.items() if x < -LEVEL]
        if more:
            lines.append(
                f"{parametrisation}: training changes more in wider models: {', '.join(more)}"
            )
        if less:
            lines.append(
                f"{parametrisation}: training changes less in wider models: {', '.join(less)}"
            )
        if not more and not less:
            low, high = min(slopes.values()), max(slopes.values())
            lines.append(
                f"{parametrisation}: training changes everything equally at all widths "
                f"(as D^{low:z.2f} to D^{high:z.2f})"
            )
    return lines


def _write(found: list[Coordinates], path: Path) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Coordinates._fields)
        writer.writerows(found)
    return path
