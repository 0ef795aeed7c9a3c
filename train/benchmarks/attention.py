"""Forward and backward of one layer's attention: PHD's variants, vanilla and naive repetition."""

from collections.abc import Callable
from functools import cache, partial
from math import ceil
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from phd.attention.attend import attend, resolve_backend
from phd.attention.flash import causal_backward, causal_forward
from phd.config import Backend, ModelConfig, Variant
from phd.pattern import Pattern
from phd.torch_private import HAS_TRITON
from train.benchmarks import ceiling
from train.benchmarks.ceiling import conditions, dtype_of, product_flops_per_s, product_work
from train.benchmarks.timing import Bar, Kind, Panel, Result, Times, Work, beside

BASE = "vanilla"
"""PyTorch's own causal attention with the kernel that it chooses, and what all is compared with."""

VANILLA, PHD = Pattern("causal"), Pattern("hidden", K=2)

NEIGHBOURS: tuple[Variant, ...] = ("free_pause", "sps")
"""The neighbours of PHD whose rule is no other variant's."""

FORWARD, BOTH = "forward", "+ backward"

RECOMPUTED = 3.5
"""FLOPs of forward and backward over the forward's. The backward has five products and the forward
two, because it computes the scores again. FlashAttention-2 (arXiv 2307.08691) counts like this."""


class Shape(NamedTuple):
    """B rows of T tokens, N query heads and G key/value heads of H dimensions."""

    B: int
    N: int
    G: int
    H: int
    T: int

    def __str__(self) -> str:
        return f"B {self.B}, N {self.N}, G {self.G}, H {self.H}, T {self.T}"


class Grid(NamedTuple):
    """What is measured.

    Attributes:
        shapes: of the inputs.
        copies: K of phd_cswa by the default backend, and beside it, by their names, of
        naive, flex, packed: naive repetition, and two backends that are named;
        rule_1: the causal kernel alone;
        variants: phd and phd_swa;
        neighbours: free_pause and sps, whose window is the others' W;
        dense: the dense mask.
    """

    shapes: tuple[Shape, ...]
    copies: tuple[int, ...]
    naive: tuple[int, ...]
    flex: tuple[int, ...] = ()
    packed: tuple[int, ...] = ()
    rule_1: tuple[int, ...] = ()
    variants: tuple[int, ...] = ()
    neighbours: tuple[int, ...] = ()
    dense: tuple[int, ...] = ()


GRIDS = {
    "cpu": Grid(
        shapes=(Shape(1, 8, 2, 64, 1024), Shape(1, 8, 2, 64, 2048)),
        copies=(2, 3, 4),
        naive=(3,),
        neighbours=(2,),
        dense=(3,),
    ),
    "cuda": Grid(
        shapes=(Shape(4, 32, 8, 64, 4096), Shape(4, 16, 4, 128, 4096)),  # the first is size 1b2's
        copies=(2, 3, 4),
        naive=(2, 3, 4),
        flex=(2, 3),
        packed=(2, 3, 4),
        rule_1=(2, 3, 4),
        variants=(2,),
        neighbours=(2,),
    ),
}

SHORT_GRIDS = {
    "cpu": Grid(
        shapes=(Shape(1, 4, 2, 32, 128),),
        copies=(2, 3),
        naive=(2, 3),
        neighbours=(2,),
        dense=(3,),
    ),
    "cuda": Grid(
        shapes=GRIDS["cuda"].shapes[:1], copies=(2, 3), naive=(2, 3), flex=(2,), rule_1=(2, 3)
    ),
}


class Subject(NamedTuple):
    """One way to compute one pattern's attention.

    Attributes:
        backend: by its name in `phd.attention.attend`; of the others, what computes it.
        forward: computes the output.
        both: computes the output and new gradients, which are added to nothing.
        flops: of the forward pass, of the pairs that the pattern allows.
    """

    K: int
    backend: str
    forward: Work
    both: Work
    flops: float


def bench_attention(repeat: int, device: torch.device, *, short: bool = False) -> Result:
    """Attention of phd_cswa with W = 16 and C = 32 beside its peers and a matrix product.

    Args:
        repeat: turns of each piece of work. The dense mask gets a quarter of them.
        device: where it is measured: float32 on the CPU, bfloat16 on CUDA.
        short: measure one shape and fewer works.
    """
    grid = (SHORT_GRIDS if short else GRIDS)[device.type]
    rows: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    panels: list[Panel] = []
    for shape in grid.shapes:
        subjects = subjects_of(shape, grid, device)
        for name in (FORWARD, BOTH):
            times = _times(subjects, name, repeat, device)
            rows += table(shape, name, subjects, times, device)
            if name == BOTH:
                ratios |= attention_ratios(shape, grid, times)
            panels.append(_panel(shape, name, subjects, times, device))
    backends = {_backend("auto", shape, device): None for shape in grid.shapes}
    subject = f"W = 16, C = 32; backend {' and '.join(backends)}; {conditions(device)}"
    return Result(rows, ratios, subject, panels=panels)


def subjects_of(shape: Shape, grid: Grid, device: torch.device) -> dict[str, Subject]:
    """What is measured at a shape, by name; the base comes first."""
    inputs = cache(partial(_inputs, shape, device))

    def subject(variant: Variant, K: int, backend: Backend = "auto") -> Subject:
        pattern = Pattern.of(ModelConfig(variant=variant, K=K))
        chosen = _backend(backend, shape, device, pattern)
        own = inputs(K) if pattern.key_copies == K else inputs(K, pattern.key_copies)
        works = _autograd_works(lambda q, k, v: attend(q, k, v, pattern, chosen), *own)
        return Subject(K, chosen, *works, _flops(shape, pattern))

    found = {BASE: _sdpa(shape, *inputs(1)), "vanilla_ours": subject("vanilla", 1)}
    for K in grid.copies:
        found[f"phd_cswa_K{K}"] = subject("phd_cswa", K)
        if K in grid.packed and found[f"phd_cswa_K{K}"].backend != "packed":
            found[f"phd_cswa_K{K}_packed"] = subject("phd_cswa", K, "packed")
        if K in grid.flex:
            found[f"phd_cswa_K{K}_flex"] = subject("phd_cswa", K, "flex")
        if K in grid.rule_1:
            found[f"rule_1_K{K}"] = _rule_1(shape, K, *inputs(K))
        if K in grid.naive:
            found[f"naive_repeat_K{K}"] = subject("naive_repeat", K)
    for K in grid.variants:
        found |= {f"phd_K{K}": subject("phd", K), f"phd_swa_K{K}": subject("phd_swa", K)}
    for K in grid.neighbours:
        found |= {f"{name}_K{K}": subject(name, K) for name in NEIGHBOURS}
    return found | {f"dense_mask_K{K}": subject("phd_cswa", K, "reference") for K in grid.dense}


def attention_ratios(shape: Shape, grid: Grid, times: Times) -> dict[str, float]:
    """PHD's time over vanilla's, also divided by K, and naive repetition's over PHD's."""
    over, at = times.ratio, f"H{shape.H}_T{shape.T}"
    ratios: dict[str, float] = {}
    for K in grid.copies:
        phd = over(f"phd_cswa_K{K}").median
        ratios[f"phd_cswa_over_vanilla_K{K}_{at}"] = phd
        ratios[f"phd_cswa_over_K_vanilla_K{K}_{at}"] = phd / K
        if K in grid.naive:
            naive = over(f"naive_repeat_K{K}").median
            ratios[f"naive_over_phd_cswa_K{K}_{at}"] = naive / phd
    return ratios


def table(
    shape: Shape, name: str, subjects: dict[str, Subject], times: Times, device: torch.device
) -> list[dict[str, Any]]:
    """A row for each piece of work of a pass; the ceiling is the last one."""
    ceiling_flops = product_flops_per_s(times, device)
    rows = []
    for work in (*subjects, ceiling.NAME):
        subject = subjects.get(work)
        columns = times.columns(work)
        speed = ceiling_flops
        if subject is not None:
            speed = subject.flops * (RECOMPUTED if name == BOTH else 1) / times.typical_s(work)
        rows.append(
            {"H": shape.H, "T": shape.T, "pass": name, "work": work}
            | columns
            | {"over_K": columns[f"x_{BASE}"] / subject.K if subject else None}
            | {"tflop/s": speed / 1e12, "of_product": speed / ceiling_flops}
        )
    return rows


def _times(subjects: dict[str, Subject], name: str, repeat: int, device: torch.device) -> Times:
    works: dict[str, Work] = {
        work: subject.both if name == BOTH else subject.forward
        for work, subject in subjects.items()
    }
    base, product = works.pop(BASE), {ceiling.NAME: product_work(device)}
    # The dense mask takes up to 53 times as long as vanilla (T = 2048, two CPU cores) and gigabytes
    # of memory, which would disturb the others. So it has turns of its own.
    slow = {work: works.pop(work) for work in subjects if work.startswith("dense_mask")}
    times = beside(BASE, base, works | product, repeat, device)
    if slow:
        times = times.with_works_of(beside(BASE, base, slow, ceil(repeat / 4), device))
    return times


def _panel(
    shape: Shape, name: str, subjects: dict[str, Subject], times: Times, device: torch.device
) -> Panel:
    """The times over vanilla's; the dense mask would make all others too short to compare."""
    bars, default = [], _backend("auto", shape, device)
    for work, subject in subjects.items():
        if not work.startswith("dense_mask"):
            ours = work.startswith(("phd", "vanilla_", *NEIGHBOURS)) and subject.backend == default
            kind = Kind.BASE if work == BASE else Kind.OURS if ours else Kind.PEER
            how = "" if work.endswith(subject.backend) else f" ({subject.backend})"
            label = work.replace("_", " ") + how
            ratio = times.ratio(work)
            bars.append(Bar(label, ratio.median, kind, ratio.low, ratio.high))
    passes = "forward and backward" if name == BOTH else name
    return Panel(f"{passes}: {shape}", "time / vanilla's", bars)


def _backend(
    backend: Backend, shape: Shape, device: torch.device, pattern: Pattern = PHD
) -> Backend:
    return resolve_backend(backend, device.type, dtype_of(device), shape.H, HAS_TRITON, pattern)


def _inputs(
    shape: Shape, device: torch.device, K: int, key_copies: int | None = None
) -> tuple[list[Tensor], Tensor]:
    """q, k and v, and the gradient of the output, each (B, heads, K, T, H).

    Fewer copies may give keys and values; None: all K.
    """
    B, N, G, H, T = shape
    q, k, v, dout = (
        torch.randn(B, heads, copies, T, H, device=device, dtype=dtype_of(device))
        for heads, copies in ((N, K), (G, key_copies or K), (G, key_copies or K), (N, K))
    )
    return [x.requires_grad_() for x in (q, k, v)], dout


def _flops(shape: Shape, pattern: Pattern) -> float:
    """FLOPs of a forward pass: 4 H for each head and pair of slots, as in `phd.flops`."""
    return 4.0 * shape.H * shape.N * shape.B * pattern.pairs(shape.T)


def _autograd_works(
    call: Callable[..., Tensor], inputs: list[Tensor], dout: Tensor
) -> tuple[Work, Work]:
    """The forward pass without what a backward pass needs, and both passes."""
    return (
        torch.no_grad()(lambda: call(*inputs)),
        lambda: torch.autograd.grad(call(*inputs), inputs, dout),
    )


def _sdpa(shape: Shape, inputs: list[Tensor], dout: Tensor) -> Subject:
    """PyTorch's own causal attention, with the kernel that it chooses."""
    call = partial(scaled_dot_product_attention, is_causal=True, enable_gqa=True)
    own = [x.detach().squeeze(2).requires_grad_() for x in inputs]
    works = _autograd_works(call, own, dout.squeeze(2))
    return Subject(1, "torch's choice", *works, _flops(shape, VANILLA))


def _rule_1(shape: Shape, K: int, inputs: list[Tensor], dout: Tensor) -> Subject:
    """The causal kernel alone, with the K copies as K times as many query heads."""
    q, k, v, dout = (x.detach() for x in (*inputs, dout))
    # Query heads of a key head lie together, as in the packed backend.
    q, dout = (x.flatten(1, 2) for x in (q, dout))
    k, v = (x[:, :, 0] for x in (k, v))
    scale = shape.H**-0.5

    def both() -> None:
        out, lse = causal_forward(q, k, v, scale)
        causal_backward(dout, q, k, v, out, lse, scale)

    flops = K * _flops(shape, VANILLA)
    return Subject(K, "causal kernel", lambda: causal_forward(q, k, v, scale), both, flops)
