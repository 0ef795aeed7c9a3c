"""The kernels of a decoded token, each beside torch's, as they run in a CUDA graph.

A product is timed over many weights, one after another in one graph, like the layers of a model:

    weight 0, weight 1, weight 2, ...     more bytes than the L2 cache holds: each comes from memory

The time of a call is the graph's over their number. It has the gap between two kernels in it, and
nothing of the host's.

Torch's side is the best that torch has: its products, its attention, and the rest in what
`torch.compile` makes of it, from a product's output in the model's dtype. Ours leaves a product in
partial sums, and the kernel after it has to read them all.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu

from conf.errors import ConfigError
from phd.config import ModelConfig
from phd.inference.cache import KVCache
from phd.inference.kernels.placement import QkvNorms, place_token
from phd.inference.kernels.products import (
    MOST_ROWS,
    ProductBlocks,
    few_rows_kernel,
    gated_product,
    partial_products,
    product,
    product_blocks,
    product_launch,
)
from phd.inference.kernels.residual import SublayerEnd, end_sublayer
from phd.inference.kernels.token_attention import attend_token
from phd.inference.kernels.token_cache import TokenCache, new_hidden_copies
from phd.rope import Rope, rotate
from train.benchmarks import ceiling
from train.benchmarks.ceiling import copied_bytes_per_s, copy_work, dtype_of
from train.benchmarks.timing import Keep, Result, Times, Work, beside, keep_nothing

Row = dict[str, Any]
Calls = Sequence[Callable[[], object]]

TORCH, OURS = "torch", "ours"

COLD_BYTES = {"cpu": 0, "cuda": 128 << 20}
"""What the calls of a graph read, at least: more than twice an H200's L2 cache of 50 MiB."""

MOST_CALLS = 128
HOT_CALLS = 32
"""Calls of a graph at most, and of a kernel whose few bytes the kernel before has just written."""

ROWS = {"cpu": (1, 3), "cuda": (1, 2, 16, MOST_ROWS)}
"""Rows of a product, which are those of the batch times K."""

CONTEXTS = {"cpu": (40,), "cuda": (1024, 8192)}
"""Tokens in the cache, of attention."""

TRIED_SPLITS = (2, 4, 8, 16, 32, 64)
"""Into how many parts the keys are cut with `tune`."""

TRIED = tuple(
    ProductBlocks(outs, depth, warps, stages, splits)
    for outs in (16, 32, 64)
    for depth, stages in ((128, 4), (128, 6), (256, 3), (256, 4))
    for warps in (4, 8)
    for splits in (1, 2, 4)
)
"""Blocks that are tried for each product with `tune`; of those that are whole, without splits."""


class Case(NamedTuple):
    """A kernel at one shape.

    Attributes:
        kernel: what it computes.
        rows: of its input.
        bytes_moved: what a call must read and write.
        calls: by whose kernel it is; torch's is the base.
    """

    kernel: str
    rows: int
    bytes_moved: int
    calls: dict[str, Calls]


class Graph:
    """Calls one after another: on CUDA as one graph, elsewhere by themselves."""

    def __init__(self, calls: Calls, device: torch.device) -> None:
        self.calls = calls
        self.graph: torch.cuda.CUDAGraph | None = None
        if device.type != "cuda":
            return
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in calls:  # libraries allocate and Triton compiles before the capture
                call()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for call in calls:
                call()

    def __call__(self) -> None:
        if self.graph is not None:
            self.graph.replay()
            return
        for call in self.calls:
            call()


class Product(NamedTuple):
    """A projection: its weight is (2 * outs, fan_in) with a gate, else (outs, fan_in).

    One that is `whole` is not left in partial sums.
    """

    name: str
    outs: int
    fan_in: int
    gated: bool = False
    whole: bool = False


def products_of(size: ModelConfig) -> list[Product]:
    """The products of a layer, and the LM head."""
    heads = size.heads * size.head_dim
    return [
        Product("q, k, v", heads + 2 * size.kv_heads * size.head_dim, size.dim),
        Product("attention's output", size.dim, heads),
        Product("gate, up, SwiGLU", size.ffn_dim, size.dim, gated=True, whole=True),
        Product("down", size.dim, size.ffn_dim),
        Product("LM head", size.vocab_size, size.dim, whole=True),
    ]


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """What is measured.

    Attributes:
        sizes: of the models.
        rows: of the products, the batch times K; the K of attention.
        contexts: tokens in the cache, of attention.
        tune: try each product in the blocks `TRIED` as well, and attention in `TRIED_SPLITS`.
    """

    sizes: tuple[ModelConfig, ...]
    rows: tuple[int, ...]
    contexts: tuple[int, ...]
    tune: bool = False


def shapes_of(
    sizes: Sequence[ModelConfig],
    device: torch.device,
    copies: tuple[int, ...] = (),
    contexts: tuple[int, ...] = (),
    *,
    tune: bool = False,
) -> Shapes:
    """The usual shapes on a device, with the copies and contexts that are asked for."""
    rows = tuple(sorted({1, *copies})) if copies else ROWS[device.type]
    contexts = tuple(dict.fromkeys(contexts)) or CONTEXTS[device.type]
    return Shapes(sizes=tuple(sizes), rows=rows, contexts=contexts, tune=tune)


def bench_decode(
    shapes: Shapes, repeat: int, device: torch.device, *, keep: Keep = keep_nothing
) -> Result:
    """Time every kernel of a token.

    Raises:
        ConfigError: Triton's kernels cannot run on this device.
    """
    if device.type != "cuda" and not is_interpreted():
        expected = "Triton's kernels run on CUDA, or slowly with TRITON_INTERPRET=1"
        raise ConfigError([f"name=decode: {expected}"], "the arguments")
    copy = copy_work(device)
    where = ceiling.conditions(device).partition(";")[0]
    note = "us: of a call in a CUDA graph; of_copy: its bytes per second over those of a copy"
    result = Result([], {}, f"{where}\n{note}")
    for size in shapes.sizes:
        for case in cases(size, shapes, device):
            rows = [*result.rows, *_rows(size, case, copy, repeat, device)]
            result = replace(result, rows=rows, ratios=_ratios(rows))
            keep(result)
    return result


def is_interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels."""
    return not isinstance(few_rows_kernel, triton.JITFunction)


def cases(size: ModelConfig, shapes: Shapes, device: torch.device) -> Iterator[Case]:
    """The kernels of a token of a model, at each number of rows."""
    for product_shape in products_of(size):
        for rows in shapes.rows:
            yield product_case(product_shape, rows, device, tune=shapes.tune)
    for context in shapes.contexts:
        for K in shapes.rows:
            yield attention_case(size, K, context, device, tune=shapes.tune)
    for K in shapes.rows:
        yield placement_case(size, K, device)
        yield residual_case(size, K, device)


def product_case(shape: Product, rows: int, device: torch.device, *, tune: bool) -> Case:
    """A product of some rows with a weight, beside cuBLAS."""
    dtype = dtype_of(device)
    parts = 2 if shape.gated else 1
    x = torch.randn(rows, shape.fan_in, device=device, dtype=dtype)
    first = torch.randn(parts * shape.outs, shape.fan_in, device=device, dtype=dtype) * 0.02
    weights = [first, *(first.clone() for _ in range(_copies(first.nbytes, device) - 1))]
    ours = gated_product if shape.gated else product if shape.whole else partial_products
    theirs = compiled(_swiglu, device) if shape.gated else linear
    calls: dict[str, Calls] = {
        TORCH: [partial(theirs, x, weight) for weight in weights],
        OURS: [partial(ours, x, weight) for weight in weights],
    }
    if tune and rows <= MOST_ROWS:  # of more, ours is cuBLAS's as well
        for blocks in TRIED:
            if shape.whole and blocks.splits > 1:
                continue
            name = "outs={} depth={} warps={} stages={} splits={}".format(*blocks)
            tried = partial(product_in, blocks, x, gated=shape.gated)
            calls[name] = [partial(tried, weight) for weight in weights]
    moved = first.nbytes + x.nbytes + rows * shape.outs * x.element_size()
    return Case(shape.name, rows, moved, calls)


def product_in(blocks: ProductBlocks, x: Tensor, weight: Tensor, *, gated: bool) -> Tensor:
    """Partial sums of a product, or a gated product, in other blocks than its table has."""
    dtype = torch.float32 if blocks.splits > 1 else None
    launch, out = product_launch(x, weight, blocks, gated=gated, dtype=dtype)
    few_rows_kernel[launch.grid](*launch.arguments, **launch.constants, **launch.options)
    return out


def compiled(work: Callable[..., Tensor], device: torch.device) -> Callable[..., Tensor]:
    """What `torch.compile` makes of some work on CUDA; on the CPU, the work."""
    if device.type != "cuda":
        return work
    torch.compiler.reset()  # after eight shapes of one function, torch compiles no more of them
    return torch.compile(work, dynamic=False)


def partial_sums(rows: int, outs: int, fan_in: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random outputs of a product: ours (parts, rows, outs), and torch's (rows, outs)."""
    dtype = dtype_of(device)
    if rows > MOST_ROWS:  # cuBLAS's in one part
        parts = torch.randn(1, rows, outs, device=device, dtype=dtype)
    else:
        splits = product_blocks(rows, outs, fan_in, dtype.itemsize).splits
        parts = torch.randn(splits, rows, outs, device=device)
    return parts, parts.sum(0).to(dtype)


def _swiglu(x: Tensor, weight: Tensor) -> Tensor:
    gate, up = linear(x, weight).chunk(2, -1)
    return silu(gate) * up


def attention_case(
    size: ModelConfig, K: int, context: int, device: torch.device, *, tune: bool
) -> Case:
    """Attention of a token of PHD-CSWA, beside torch's over the originals alone."""
    cache = _full_cache(size, K, context, device)
    G, H, pattern, new = size.kv_heads, size.head_dim, cache.pattern, new_hidden_copies(cache)
    q = torch.randn(K, size.heads * H, device=device, dtype=dtype_of(device))
    heads = q.view(K, G, -1, H).transpose(0, 1).reshape(1, G, -1, H)
    layers = [TokenCache.of(cache, i, new) for i in range(len(cache.originals))]

    def ours(splits: int | None) -> Calls:
        return [partial(attend_token, q, layer, pattern, splits) for layer in layers]

    calls: dict[str, Calls] = {
        TORCH: [partial(scaled_dot_product_attention, heads, *x.originals) for x in layers],
        OURS: ours(None),
    }
    if tune:
        calls |= {f"splits={splits}": ours(splits) for splits in TRIED_SPLITS}
    moved = cache.nbytes // len(layers) + 2 * new.nbytes + 2 * q.nbytes
    return Case(f"attention at {context}", K, moved, calls)


def _full_cache(size: ModelConfig, K: int, context: int, device: torch.device) -> KVCache:
    """A cache of a row of `context` tokens with the one that is decoded; as many layers as needed
    so that none stays in the cache of the processor."""
    variant = {"variant": "phd_cswa" if K > 1 else "vanilla", "K": K, "layers": 1}
    config = replace(size, **variant, max_seq_len=context)  # type: ignore[arg-type]
    dtype = dtype_of(device)
    one = KVCache(config, capacity=context, dtype=dtype, device="meta")
    config = replace(config, layers=_copies(one.nbytes, device))
    cache = KVCache(config, capacity=context, dtype=dtype, device=device)
    for x in (*cache.originals, *cache.ring):
        x.normal_()
    cache.lengths.fill_(context - 1)
    return cache


def placement_case(size: ModelConfig, K: int, device: torch.device) -> Case:
    """Norms, RoPE and the write to the cache, beside what torch makes of them."""
    context, H, N, G = 64, size.head_dim, size.heads, size.kv_heads
    cache = _full_cache(size, K, context, device)
    dtype, layer = dtype_of(device), TokenCache.of(cache, 0, new_hidden_copies(cache))
    qkv, whole = partial_sums(K, (N + 2 * G) * H, size.dim, device)
    of_q, of_k = (torch.ones(heads * H, device=device, dtype=dtype) for heads in (N, G))
    norms = QkvNorms(of_q, of_k, None, size.norm_eps, per_head=False)
    with device:
        rope = Rope(cache.config)

    def theirs() -> Tensor:
        q, k, v = whole.split([N * H, G * H, G * H], 1)
        q = rms_norm(q, (N * H,), of_q, size.norm_eps)
        k = rms_norm(k, (G * H,), of_k, size.norm_eps)
        cos, sin = (x[:, None, None] for x in rope.at(cache.lengths[:, None], cache.lengths[:1]))
        both = rotate(torch.cat([q, k], 1).view(1, K, N + G, 1, H), cos, sin).to(dtype)
        layer.originals[0, :, :, context - 1] = both[:, N:, 0, 0]
        layer.originals[1, :, :, context - 1] = v[:1].view(1, G, H)
        return both[:, :N]

    calls: dict[str, Calls] = {
        TORCH: [compiled(theirs, device)] * HOT_CALLS,
        OURS: [lambda: place_token(qkv, norms, rope, layer, cache.pattern)] * HOT_CALLS,
    }
    moved = qkv.nbytes + whole.nbytes
    return Case("q/k norm, RoPE, cache", K, moved, calls)


def residual_case(size: ModelConfig, rows: int, device: torch.device) -> Case:
    """The end of a sublayer of OLMo 2: the norm of its output, and the sum."""
    dtype = dtype_of(device)
    stream = torch.randn(rows, size.dim, device=device)
    output, whole = partial_sums(rows, size.dim, size.ffn_dim, device)
    end = SublayerEnd(of_output=torch.ones(size.dim, device=device, dtype=dtype))

    def theirs() -> Tensor:
        normed = rms_norm(whole, (size.dim,), end.of_output, size.norm_eps)
        return stream.add_(normed).to(dtype)

    calls: dict[str, Calls] = {
        TORCH: [compiled(theirs, device)] * HOT_CALLS,
        OURS: [lambda: end_sublayer(stream, output, end, size.norm_eps, dtype)] * HOT_CALLS,
    }
    moved = 2 * stream.nbytes + output.nbytes + rows * size.dim * dtype.itemsize
    return Case("residual and norm", rows, moved, calls)


def _copies(nbytes: int, device: torch.device) -> int:
    """How many operands of this size are needed so that none stays in the cache."""
    return max(1, min(MOST_CALLS, ceil(COLD_BYTES[device.type] / nbytes)))


def _rows(
    size: ModelConfig, case: Case, copy: Work, repeat: int, device: torch.device
) -> list[Row]:
    """A row for each kernel of a case, torch's first."""
    works: dict[str, Work] = {}
    for name, calls in case.calls.items():
        try:
            works[name] = Graph(calls, device)
        except triton.OutOfResources:  # blocks that were tried, and are too large for the device
            if name in (TORCH, OURS):
                raise
    turns = works | {ceiling.COPY: copy}
    times = beside(TORCH, turns.pop(TORCH), turns, repeat, device)
    copy_speed = copied_bytes_per_s(times, device)
    times = times.divided(len(case.calls[TORCH]))
    return [_row(size, case, by, times, copy_speed) for by in works]


def _row(size: ModelConfig, case: Case, by: str, times: Times, copy_speed: float) -> Row:
    columns = times.columns(by)
    speed = case.bytes_moved / times.typical_s(by)
    del columns["ms"]
    return {
        "size": size.size,
        "kernel": case.kernel,
        "rows": case.rows,
        "by": by,
        "us": times.typical_s(by) * 1e6,
        **columns,
        "gb_per_s": speed / 1e9,
        "of_copy": speed / copy_speed,
    }


def _ratios(rows: list[Row]) -> dict[str, float]:
    """Our time over torch's of each kernel, and the best of what was tried over ours."""
    ratios = {}
    for row in rows:
        name = f"{row['size']} {row['kernel']}, {row['rows']} rows"
        if row["by"] == OURS:
            ratios[f"{name}: ours / torch"] = row["x_torch"]
            ours = row["us"]
        elif row["by"] != TORCH:
            best = min(
                (r for r in rows if _key(r) == _key(row) and r["by"] not in (TORCH, OURS)),
                key=lambda r: r["us"],
            )
            if best is row:
                ratios[f"{name}: {row['by']} / ours"] = row["us"] / ours
    return ratios


def _key(row: Row) -> tuple[Any, ...]:
    return row["size"], row["kernel"], row["rows"]
