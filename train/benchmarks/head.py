"""The LM head and its loss, forward and backward, beside other implementations and a product."""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from phd.loss import IGNORED, chunked_cross_entropy, next_token_loss
from phd.torch_private import HAS_LINEAR_CROSS_ENTROPY, summed_linear_cross_entropy
from train.benchmarks import ceiling
from train.benchmarks.ceiling import conditions, dtype_of, product_flops_per_s, product_work
from train.benchmarks.timing import Bar, Kind, Panel, Result, Times, beside

BASE = "plain"
"""A product and cross-entropy in float32 with all logits, by torch.compile on CUDA."""

OURS = ("ours", "ours_z_loss", "ours_float32_weight")


class Shape(NamedTuple):
    """Hidden states (rows, D) and a head (V, D)."""

    rows: int
    D: int
    V: int

    def __str__(self) -> str:
        return f"{self.rows:,} rows, D {self.D:,}, V {self.V:,}"


SHAPES = {"cpu": Shape(2048, 256, 4096), "cuda": Shape(4 * 4096, 2048, 100_352)}
"""Size tiny on the CPU, and four rows of 4096 tokens of size 1b2 on CUDA."""

SHORT_SHAPES = {"cpu": Shape(256, 64, 512), "cuda": SHAPES["cuda"]}

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""hidden (R, D), weight (V, D) and targets (R,) to the sum of their losses."""


class Inputs(NamedTuple):
    """What a loss takes."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor


class Subject(NamedTuple):
    """An implementation and its inputs."""

    loss: Loss
    inputs: Inputs

    def step(self) -> tuple[Tensor, ...]:
        """(loss, d_hidden, d_weight) of the mean."""
        total = self.loss(*self.inputs) / len(self.inputs.targets)
        return total.detach(), *torch.autograd.grad(total, self.inputs[:2])


def bench_head(repeat: int, device: torch.device, *, short: bool = False) -> Result:
    """Forward and backward of the head and the loss; FLOPs are those of the three products.

    Args:
        repeat: turns of each piece of work.
        device: where it is measured: float32 on the CPU, bfloat16 on CUDA.
        short: leave out our loss by torch's operations on CUDA; a smaller shape on the CPU.
    """
    shape = (SHORT_SHAPES if short else SHAPES)[device.type]
    subjects = subjects_of(shape, device)
    if short and device.type == "cuda":
        del subjects["chunked"]
    exact = _exact(subjects[BASE].inputs)
    extra = {name: peak_gib(subject, device) for name, subject in subjects.items()}
    errors = {name: 100 * error(subject.step()[2], exact) for name, subject in subjects.items()}
    works = {name: subject.step for name, subject in subjects.items()}
    times = beside(
        BASE, works.pop(BASE), works | {ceiling.NAME: product_work(device)}, repeat, device
    )
    rows = table(shape, times, device)
    for row in rows:
        row["d_weight error %"] = errors.get(row["work"])
        row["extra GiB"] = extra.get(row["work"])
    speed = {row["work"]: row["tflop/s"] for row in rows}
    ratios = {"ours_over_product": speed["ours"] / speed[ceiling.NAME]}
    for name in subjects:
        if name not in OURS:
            ratios[f"{name}_over_ours"] = times.ratio(name).median / times.ratio("ours").median
    subject = f"{shape}; {conditions(device)}{_absent()}"
    return Result(rows, ratios, subject, panels=[_panel(shape, rows)])


def subjects_of(shape: Shape, device: torch.device) -> dict[str, Subject]:
    """What is measured, by name; the base comes first."""
    inputs = _inputs(shape, device)
    compiled = torch.compile(_plain) if device.type == "cuda" else _plain
    losses: dict[str, Loss] = {
        BASE: compiled,
        "ours": _ours,
        "ours_z_loss": partial(_ours, z_loss=1e-4),
        "chunked": lambda h, w, y: chunked_cross_entropy(h, w, y, 0.0)[0],
    }
    if HAS_LINEAR_CROSS_ENTROPY:
        losses["torch"] = lambda h, w, y: summed_linear_cross_entropy(h, w, y, IGNORED, None)
    if find_spec("liger_kernel") is not None and device.type == "cuda":
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORED, reduction="sum")
        losses["liger"] = lambda h, w, y: liger(w, h, y)
    found = {name: Subject(loss, inputs) for name, loss in losses.items()}
    if device.type == "cuda":
        single = inputs.weight.detach().float().requires_grad_()
        found["ours_float32_weight"] = Subject(_ours, inputs._replace(weight=single))
    return found


def table(shape: Shape, times: Times, device: torch.device) -> list[dict[str, Any]]:
    """A row for each piece of work; the ceiling is the last one."""
    flops = 6 * shape.rows * shape.V * shape.D  # logits, d_hidden and d_weight
    ceiling_flops = product_flops_per_s(times, device)
    rows = []
    for work in times.seconds:
        speed = ceiling_flops if work == ceiling.NAME else flops / times.typical_s(work)
        tflops = {"tflop/s": speed / 1e12, "of_product": speed / ceiling_flops}
        rows.append({"work": work} | times.columns(work) | tflops)
    return rows


def peak_gib(subject: Subject, device: torch.device) -> float | None:
    """The most memory that a step takes beside its inputs; None where nobody counts it."""
    if device.type != "cuda":
        return None
    subject.step()  # compiles, and allocates the workspace of products
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    subject.step()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**30


def error(ours: Tensor, exact: Tensor) -> float:
    """The norm of the error, as a share of that of the exact value."""
    return ((ours.double() - exact).norm() / exact.norm()).item()


def _exact(inputs: Inputs) -> Tensor:
    """d_weight of the same inputs in float64."""
    hidden, weight = (x.detach().double().requires_grad_() for x in inputs[:2])
    total = chunked_cross_entropy(hidden, weight, inputs.targets, 0.0)[0]
    return torch.autograd.grad(total / len(inputs.targets), weight)[0]


def _inputs(shape: Shape, device: torch.device) -> Inputs:
    """Normalised hidden states, a head of the usual size, and a tenth of targets that are none."""
    generator = torch.Generator(device).manual_seed(0)
    draw = partial(torch.randn, generator=generator, device=device)
    hidden = draw(shape.rows, shape.D).to(dtype_of(device))
    weight = (draw(shape.V, shape.D) * shape.D**-0.5).to(dtype_of(device))
    targets = torch.randint(0, shape.V, (shape.rows,), generator=generator, device=device)
    targets[::10] = IGNORED
    return Inputs(hidden.requires_grad_(), weight.requires_grad_(), targets)


def _plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = (hidden @ weight.T).float()
    return cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORED)


def _ours(hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float = 0.0) -> Tensor:
    return next_token_loss(hidden[None], weight, targets[None], z_loss).total


def _absent() -> str:
    """The implementations that cannot be measured here, in words."""
    names = {"torch's linear_cross_entropy": HAS_LINEAR_CROSS_ENTROPY}
    names["liger_kernel"] = find_spec("liger_kernel") is not None
    missing = [name for name, found in names.items() if not found]
    return f"; not installed: {', '.join(missing)}" if missing else ""


def _panel(shape: Shape, rows: list[dict[str, Any]]) -> Panel:
    kinds = dict.fromkeys(OURS, Kind.OURS) | {BASE: Kind.BASE, ceiling.NAME: Kind.CEILING}
    bars = [
        Bar(row["work"].replace("_", " "), row["tflop/s"], kinds.get(row["work"], Kind.PEER))
        for row in rows
    ]
    return Panel(f"LM head and loss, forward and backward: {shape}", "useful TFLOP/s", bars)
