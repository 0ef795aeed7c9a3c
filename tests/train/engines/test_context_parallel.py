"""Rows dealt over ranks: what one process computes, and no more bytes sent than the docs say.

All cases run one after the other on the same four ranks. `make soak-mesh CASES=100` draws more.
"""

import json
import os
from collections.abc import Callable
from functools import cache
from itertools import accumulate, chain
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from conf.errors import ConfigError
from data.batch import Batch
from phd.attention.attend import attend
from phd.pattern import Pattern
from phd.segments import Segments
from tests.train.engines.test_parity import (
    ROWS,
    TOKENS,
    Training,
    batch,
    check_equal,
    closed,
    united,
)
from tests.train.many_ranks import run_ranks
from tests.train.uneven import COPIES, UNEVEN
from train.compose import load
from train.config import Config
from train.distributed.process_groups import ProcessGroups
from train.engines import context_parallel
from train.engines.context_parallel import (
    CAUSAL,
    ContextPart,
    ContextRank,
    context_backward,
    context_forward,
    row_bytes,
)
from train.loop import train_step
from train.run import open_engine

R = TypeVar("R")

WORLD = 4
EPS = "optim.eps=1e-3"
"""Gradients of this size are noise to AdamW. In `test_parity`, 1e-4 is enough for fewer sums."""
MESHES = {
    "cp4": ("engine.context=4",),
    "fsdp x cp2": ("engine.context=2",),
    "hsdp x cp2": ("engine=hsdp", "engine.replicate=2", "engine.context=2"),
}
MODELS = {
    "vanilla": ("model=vanilla",),
    "phd": ("model=phd", "model.K=3"),
    "phd_swa": ("model=phd_swa", "model.K=3", "model.window=3"),
    "phd_cswa": (*COPIES, "optim.z_loss=0.01"),
    "naive_repeat": ("model=naive_repeat", "model.K=2"),
}
# Each on one mesh alone.
OTHERS = {
    "free_pause": ("model=free_pause",),
    "sps": ("model=sps", "model.window=2"),
    "streams": ("model=hidden_decoding", "model.layers=3", "model.full_every=2"),
    "loop": ("model=loop",),
    "originals": (*COPIES, "model.originals_see_hidden=true", "model.copy_positions=flattened"),
    "muon": ("model=phd", "model.K=3", "optim=muon"),
    "full": (*MODELS["phd_swa"], "engine.activation_checkpointing=full"),
    "selective": (*MODELS["phd_cswa"], "engine.activation_checkpointing=selective"),
}
CELLS = [(model, mesh) for model in MODELS for mesh in MESHES]
CELLS += [(model, "cp4") for model in OTHERS]
SOAK_CASES, SEED = int(os.environ.get("CASES", "3")), int(os.environ.get("SEED", "0"))


# Training


class Step(NamedTuple):
    """How the rows of a step are read: in one micro-batch or two, and as documents or not."""

    accumulation: int
    isolated: bool


STEPS = [Step(1, False), Step(2, False), Step(1, True), Step(2, True)]
"""One training tries them all."""


class Found(NamedTuple):
    """What a rank has trained, and the loss of held-out documents after that."""

    training: Training
    nats: list[float]


def isolated(rows: Batch, seed: int) -> Batch:
    """The rows with documents that begin anywhere."""
    random, starts = Random(seed), np.zeros((len(rows.rows), TOKENS), dtype=np.int64)
    for row in starts:
        for n in random.sample(range(TOKENS), random.randint(0, 4)):
            row[n] = n
    return rows._replace(document_starts=np.maximum.accumulate(starts, 1))


def trained(groups: ProcessGroups, config: Config) -> Found:
    """A step of each kind, and an evaluation of three rows, which not all ranks share evenly."""
    engine = open_engine(config, groups)
    reader, readers = engine.dims.data_rank(groups.rank), engine.dims.data_ranks
    results = []
    for number, step in enumerate(STEPS):
        rows = batch(number)
        rows = isolated(rows, number) if step.isolated else rows
        engine.micro_batch = ROWS // readers // step.accumulation
        results.append(train_step(engine, rows.shard(reader, readers), lr=0.01))
    held_out = isolated(batch(9), 9)._replace(documents=np.arange(ROWS * TOKENS).reshape(ROWS, -1))
    nats = torch.zeros(ROWS * TOKENS, dtype=torch.float64)
    held_out = Batch(*(None if x is None else x[:3] for x in held_out))
    evaluated = engine.evaluate(held_out, document_nats=nats)
    assert evaluated is not None
    nats[0] += sum(map(float, evaluated))
    return Found(closed(engine, results), nats.tolist())


def config_of(*settings: str) -> Config:
    sizes = (f"train.global_batch={ROWS}", "train.micro_batch=1", f"train.max_steps={len(STEPS)}")
    common = ("data.documents=isolate", "optim.grad_clip=2.3", EPS)
    return load([*UNEVEN, *sizes, *common, *settings])


@cache
def alone(*settings: str) -> Found:
    return trained(ProcessGroups(), config_of(*settings))


def check_same(ranks: list[Found], expected: Found, case: object) -> None:
    check_equal(united(case, [found.training for found in ranks]), expected.training)
    for found in ranks:
        np.testing.assert_allclose(found.nats, expected.nats, rtol=0, atol=2e-4, err_msg=str(case))


# Random meshes and patterns


def drawn(seed: int) -> tuple[str, ...]:
    """The settings of a model and a mesh that do not refuse each other."""
    random = Random(seed)
    while True:
        settings = list(_drawn(random))
        try:
            config_of(*settings)
        except ConfigError:
            continue
        return tuple(settings)


def _drawn(random: Random) -> Any:
    variant = random.choice([*MODELS, "pause", "free_pause", "sps", "hidden_decoding", "loop"])
    yield f"model={variant}"
    if variant not in ("vanilla", "free_pause", "loop"):
        yield f"model.K={random.randint(2, 5)}"
    if variant in ("phd_swa", "phd_cswa", "sps"):
        yield f"model.window={random.randint(1, 12)}"
    if variant == "phd_cswa":
        yield f"model.chunk={random.randint(1, 12)}"
    if variant in ("phd_swa", "phd_cswa"):
        yield f"model.span_unit={random.choice(['hidden', 'token'])}"
        yield f"model.originals_see_hidden={random.choice(['true', 'false'])}"
    if variant not in ("vanilla", "loop"):
        yield f"model.copy_positions={random.choice(['shared', 'flattened'])}"
    yield f"model.norm={random.choice(['reordered', 'pre', 'hybrid', 'hybrid_star'])}"
    yield from random.choice([("model.heads=2", "model.kv_heads=2"), ("model.heads=3",)])
    yield from random.choice(list(MESHES.values()))


# The ranks


class Work(NamedTuple):
    """What the four ranks are to do; the soak also says what pieces of keys have at least."""

    cells: list[Config]
    soak: list[tuple[int, Config]]


def all_cases(groups: ProcessGroups, work: Work) -> dict[str, Any]:
    return {
        "attention": [attended(groups, *case) for case in ATTENTION],
        "sent": [sent(groups, pattern) for pattern in SENT.values()],
        "cells": [trained(groups, config) for config in work.cells],
        "soak": [with_pieces_of(least, trained, groups, config) for least, config in work.soak],
    }


def with_pieces_of(least: int, function: Callable[..., R], *arguments: Any) -> R:
    """What a function returns if pieces of the keys have so many bytes at least."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(context_parallel, "PIECE_BYTES", least)
        return function(*arguments)


@cache
def found() -> dict[str, list[list[Any]]]:
    """By kind and case what each rank has found."""
    cells = [config_of(*(MODELS | OTHERS)[model], *MESHES[mesh]) for model, mesh in CELLS]
    soak = [
        (1 if seed % 2 else context_parallel.PIECE_BYTES, config_of(*drawn(seed)))
        for seed in range(SEED, SEED + SOAK_CASES)
    ]
    ranks = run_ranks(WORLD, all_cases, Work(cells, soak))
    return {kind: list(zip(*(rank[kind] for rank in ranks), strict=True)) for kind in ranks[0]}


@pytest.mark.process
@pytest.mark.parametrize(("model", "mesh"), CELLS)
def test_ranks_that_share_rows_train_what_one_process_does(model: str, mesh: str) -> None:
    settings = [s for s in (MODELS | OTHERS)[model] if "checkpointing" not in s]
    ranks = found()["cells"][CELLS.index((model, mesh))]
    check_same(ranks, alone(*settings), (model, mesh))


@pytest.mark.process
@pytest.mark.parametrize("number", range(SOAK_CASES))
def test_random_meshes_and_patterns_train_what_one_process_does(number: int) -> None:
    settings = drawn(SEED + number)
    model = [s for s in settings if s.startswith("model")]
    check_same(found()["soak"][number], alone(*model), settings)


# Attention alone, in float64

SWA, CSWA = Pattern("hidden", K=3, window=5), Pattern("hidden", K=3, window=7, chunk_tokens=3)
ATTENTION = [
    (2, Pattern("causal", K=2), 2, False),
    (2, Pattern("flat", K=3), 3, True),
    (4, Pattern("flat", K=3), 1, True),
    (4, Pattern("stream", K=3), 3, True),
    (4, Pattern("stream", K=3), 1, False),
    (4, Pattern("hidden", K=3), 3, True),
    (2, SWA, 3, False),
    (4, SWA, 1, True),
    (4, CSWA, 3, False),
    (4, CSWA, 3, True),
    (4, Pattern("hidden", K=2, window=3, originals_see_hidden=True), 2, True),
]
ROW = 32


def problem(pattern: Pattern, Q: int, documents: bool) -> tuple[list[Tensor], Tensor | None]:
    """(q, k, v and the gradient of the result, where documents start)."""
    generator = torch.Generator().manual_seed(1)
    K, starts = pattern.key_copies, None
    shapes = [(2, 4, Q), (2, 2, K), (2, 2, K), (2, 4, Q)]
    tensors = [torch.randn(*s, ROW, 4, dtype=torch.float64, generator=generator) for s in shapes]
    if documents:
        starts = torch.zeros(2, ROW, dtype=torch.int64)
        for row, beginnings in zip(starts, ((3, 4, 9, 16, 21), (10, 13, 30)), strict=True):
            row[list(beginnings)] = torch.tensor(beginnings)
        starts = starts.cummax(1).values
    return tensors, starts


def context_of(groups: ProcessGroups, ranks: int) -> ContextRank:
    """This rank's place among its neighbours, of whom `ranks` share rows."""
    all_groups = [dist.new_group(list(range(i, i + ranks))) for i in range(0, WORLD, ranks)]
    group = all_groups[groups.rank // ranks]
    assert isinstance(group, dist.ProcessGroup)
    return ContextRank.of(group)


def attended(groups: ProcessGroups, ranks: int, *case: Any) -> list[list[np.ndarray]]:
    """What `attended_at` finds with whole keys, and with those of heads sent apart."""
    place = context_of(groups, ranks)
    whole = context_parallel.PIECE_BYTES
    return [with_pieces_of(least, attended_at, place, *case) for least in (whole, 1)]


def attended_at(place: ContextRank, pattern: Pattern, Q: int, documents: bool) -> list[np.ndarray]:
    """A rank's part of (out, dq, dk, dv), and which tokens it is of."""
    (q, k, v, dout), starts = problem(pattern, Q, documents)
    index = torch.from_numpy(place.token_index(ROW))
    part = ContextPart.of(place, ROW, None if starts is None else starts.numpy())
    qkv = [x[..., index, :].requires_grad_() for x in (q, k, v)]
    out = part.attend(*qkv, pattern, "packed")
    gradients = torch.autograd.grad(out, qkv, dout[..., index, :])
    return [x.detach().numpy() for x in (out, *gradients, index)]


@pytest.mark.process
@pytest.mark.parametrize("number", range(len(ATTENTION)), ids=[f"{c[1].rule}" for c in ATTENTION])
def test_attention_of_ranks_is_the_dense_definition(number: int) -> None:
    _, pattern, Q, documents = ATTENTION[number]
    (q, k, v, dout), starts = problem(pattern, Q, documents)
    qkv = [x.requires_grad_() for x in (q, k, v)]
    segments = None if starts is None else Segments.of(starts)
    out = attend(q, k, v, pattern, "reference", segments)
    expected = [out, *torch.autograd.grad(out, qkv, dout)]
    for *parts, index in chain.from_iterable(found()["attention"][number]):
        for ours, whole in zip(parts, expected, strict=True):
            theirs = whole.detach().numpy()[..., index, :]
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("heads", "tokens", "pieces"),
    [
        (4, 4, 1),
        (4, 28, 1),
        (4, 32, 2),
        (4, 60, 2),
        (4, 64, 4),
        (4, 992, 4),
        (6, 64, 3),
        (1, 992, 1),
    ],
)
def test_large_rows_are_sent_in_pieces_of_whole_heads(
    heads: int, tokens: int, pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most four, of 4 KiB of the row at least; a token of a head has 64 bytes."""
    monkeypatch.setattr(context_parallel, "PIECE_BYTES", 4096)
    monkeypatch.setattr(context_parallel, "_GROUPS", {"none": None})
    monkeypatch.setattr(context_parallel, "start_all_gather", lambda *_: Done())
    place, shape = ContextRank("none", rank=0, ranks=2), (1, heads, 2, tokens // 2, 8)
    q, kv = torch.zeros(1, 3 * heads, 2, tokens // 2, 8), torch.zeros(shape)
    found = context_parallel._Piece.all_of(q, kv, kv, CSWA, place)
    assert len(found) == pieces
    for read, of_keys in ((3 * heads, False), (heads, True)):
        slices = [piece.keys if of_keys else piece.queries for piece in found]
        assert [i for s in slices for i in range(read)[s]] == list(range(read))


class Done:
    """A collective that is done."""

    def wait(self) -> None:
        pass


def gather_twice(out: Tensor, x: Tensor, *_: Any) -> Done:
    out.copy_(torch.cat([x, x]))
    return Done()


def scatter_twice(out: Tensor, x: Tensor, *_: Any) -> Done:
    out.copy_(x[: len(out)] + x[len(out) :])
    return Done()


def echo(out: Tensor, x: Tensor, *_: Any, **__: Any) -> Done:
    out.copy_(x)
    return Done()


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("documents", [False, True])
def test_attention_of_ranks_is_traced_whole(
    documents: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Collectives are stood in for by ones that give this rank its own: the test is of tracing."""
    torch.compiler.reset()
    monkeypatch.setattr(context_parallel, "start_all_gather", gather_twice)
    monkeypatch.setattr(context_parallel, "start_reduce_scatter", scatter_twice)
    monkeypatch.setattr(dist, "all_to_all_single", echo)
    monkeypatch.setattr(context_parallel, "_GROUPS", {"none": None})
    place = ContextRank("none", rank=1, ranks=2)
    (q, k, v, _), starts = problem(CSWA, CSWA.K, documents)
    qkv = [x[..., : ROW // 2, :].requires_grad_() for x in (q, k, v)]
    part = ContextPart.of(place, ROW, None if starts is None else starts.numpy())

    def attention(*qkv: Tensor) -> Tensor:
        return part.attend(*qkv, CSWA, "packed")

    results = []
    for call in (attention, torch.compile(attention, backend="aot_eager", fullgraph=True)):
        out = call(*qkv)
        results.append([out, *torch.autograd.grad(out.sin().sum(), qkv)])
    torch.testing.assert_close(*results, rtol=0, atol=0)


# Memory


def peak(function: Callable[[], Any], path: Path) -> int:
    """Bytes by which the memory of tensors is higher while the function runs, at most."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = function()  # its own memory is not freed before the end
    profiler.export_chrome_trace(str(path))
    del kept
    events = [x for x in json.loads(path.read_text())["traceEvents"] if x["name"] == "[memory]"]
    events.sort(key=lambda event: event["ts"])
    return max(accumulate(event["args"]["Bytes"] for event in events))


@pytest.mark.parametrize("pieces", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_memory_grows_with_a_row_as_the_plan_says(
    dtype: torch.dtype, pieces: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank's own tokens are as many on 24 ranks as on 8: the rest is of the row's keys."""
    monkeypatch.setattr(context_parallel, "PIECES", pieces)
    monkeypatch.setattr(context_parallel, "PIECE_BYTES", 1)
    monkeypatch.setattr(context_parallel, "_GROUPS", {"none": None})
    monkeypatch.setattr(context_parallel, "start_all_gather", gather_own)
    monkeypatch.setattr(context_parallel, "start_reduce_scatter", scatter_own)
    (few, planned_of_few), (many, planned_of_many) = (
        peaks(ranks, dtype, tmp_path / "trace.json") for ranks in (8, 24)
    )
    assert many - few == pytest.approx(planned_of_many - planned_of_few, rel=0.02)


def peaks(ranks: int, dtype: torch.dtype, trace: Path) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of the forward and backward pass of a layer's attention, and what the plan says."""
    B, G, own, H = 2, 4, 32, 16
    work = ContextPart.of(ContextRank("none", ranks - 1, ranks), ranks * own, None), CAUSAL, False
    q, k, v, dout = (torch.randn(B, G, 1, own, H, dtype=dtype) for _ in range(4))
    out, lse, halo = context_forward(q, k, v, *work)
    result = out, lse, dout
    found = (
        peak(lambda: context_forward(q, k, v, *work), trace),
        peak(lambda: context_backward((q, k, v), result, halo, *work), trace),
    )
    planned = row_bytes(2 * B * ranks * own * G * H, dtype.itemsize, G)
    return np.array(found), np.array(planned)


def gather_own(whole: Tensor, own: Tensor, _: object) -> "Done":
    whole.view(-1, *own.shape).copy_(own)
    return Done()


def scatter_own(own: Tensor, whole: Tensor, _: object) -> "Done":
    own.copy_(whole[: len(own)])
    return Done()


# Bytes

SENT = {
    "vanilla": Pattern("causal"),
    "phd": Pattern("hidden", K=3),
    "phd_cswa-2": Pattern("hidden", K=2, window=4, chunk_tokens=4),
    "phd_cswa-5": Pattern("hidden", K=5, window=16, chunk_tokens=4),
    "phd_swa": SWA,
    "naive_repeat": Pattern("flat", K=3),
}


def sent(groups: ProcessGroups, pattern: Pattern) -> int:
    """The bytes that this rank sends in one layer's forward and backward pass, on four ranks."""
    place, total = context_of(groups, WORLD), 0

    def counting(collective: Any, bytes_of: Any) -> Any:
        def call(output: Tensor, given: Tensor, *more: Any, **settings: Any) -> Any:
            nonlocal total
            total += bytes_of(given)
            return collective(output, given, *more, **settings)

        return call

    with pytest.MonkeyPatch.context() as patch:
        new = hasattr(dist, "all_gather_single")  # from torch 2.13 on
        gather = "all_gather_single" if new else "all_gather_into_tensor"
        scatter = "reduce_scatter_single" if new else "reduce_scatter_tensor"
        for name, bytes_of in (
            (gather, lambda x: x.nbytes * (WORLD - 1)),
            (scatter, lambda x: x.nbytes // WORLD * (WORLD - 1)),
            ("all_to_all_single", lambda x: x.nbytes),  # nothing of it is for the sender itself
        ):
            patch.setattr(dist, name, counting(getattr(dist, name), bytes_of))
        for name in ("all_reduce", "broadcast", "all_gather", "send", "isend", "reduce_scatter"):
            patch.setattr(dist, name, None)  # no other collective
        (q, k, v, dout), _ = problem(pattern, pattern.K, documents=False)
        index = torch.from_numpy(place.token_index(ROW))
        qkv = [x[..., index, :].float().requires_grad_() for x in (q, k, v)]
        out = ContextPart.of(place, ROW, None).attend(*qkv, pattern, "packed")
        torch.autograd.grad(out, qkv, dout[..., index, :].float())
    return total


@pytest.mark.process
def test_ranks_send_the_bytes_that_the_docs_say() -> None:
    """docs/distributed.md: 2 B T G H (c - 1) / c numbers, three times, and what a halo takes."""
    B, G, H, number = 2, 2, 4, 4  # float32 has four bytes, as have gradients
    row = 3 * 2 * B * ROW * G * H * number * (WORLD - 1) // WORLD
    halo = 2 * 2 * B * G * 2 * 2 * H * number  # of phd_swa: two tokens, two hidden copies
    expected = {"phd_swa": [row + halo, row + 2 * halo, row + 2 * halo, row + halo]}
    expected["naive_repeat"] = [3 * row] * WORLD
    for pattern, ranks in zip(SENT, found()["sent"], strict=True):
        assert list(ranks) == expected.get(pattern, [row] * WORLD), pattern


# What cannot be dealt


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["train.seq_len=20"], r"train.seq_len=20: with engine.context=4 .* divisible by 8; .* 16"),
        (
            ["model.attention=reference"],
            r"model.attention=.reference.: it computes whole rows, and en",
        ),
        (["model.attention=flex"], r"model.attention=.flex.: it computes whole rows, and engine."),
        (
            ["model=phd_swa", "model.window=4"],
            r"model.window=4: reaches 3 tokens back.* parts of 2",
        ),
        (["engine.shard=false"], r"engine.context=4: works with FSDP2 around it"),
        (["engine=deepspeed"], r"engine.context"),
    ],
)
def test_what_cannot_be_dealt_is_refused_by_name(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of("model=phd", "engine.context=4", *settings)


def test_all_that_cannot_be_dealt_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as refusal:
        config_of("model=phd", "engine.context=4", "train.seq_len=20", "model.attention=flex")
    assert len(refusal.value.problems) >= 2
