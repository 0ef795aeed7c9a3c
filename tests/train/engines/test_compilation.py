"""Blocks are compiled once, in the first step, and from the cache at a later start."""

import os
from collections.abc import Callable
from functools import partialmethod
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from data.batch import Batch
from phd.block import Block
from phd.inference.generator import Generator, Request
from tests.train.batches import batch_of
from tests.train.many_ranks import run_ranks
from tests.train.uneven import COPIES, UNEVEN
from train.compose import load
from train.config import Config
from train.distributed.process_groups import ProcessGroups
from train.engines.fsdp import FsdpEngine
from train.loop import train_step

pytestmark = [
    pytest.mark.compile,
    # Dynamo's own: it instantiates autograd functions and reads `.grad` of what it traces.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not:UserWarning"),
]


def config_of(*overrides: str) -> Config:
    small = (*UNEVEN, *COPIES, "model.copy_embedding=false", "train.max_steps=9")
    return load([*small, "engine.compile=true", *overrides])


def drawn(rows: int, seed: int, *, documents: bool) -> Batch:
    """Rows of 16 tokens, cut into another number of documents with each seed."""
    generator = torch.Generator().manual_seed(seed)
    batch = batch_of(torch.randint(0, 61, (rows, 17), generator=generator))
    first = np.arange(16) % (3 + seed) == 0
    starts = np.maximum.accumulate(np.where(first, np.arange(16), 0))
    return batch._replace(document_starts=np.tile(starts, (rows, 1))) if documents else batch


@pytest.fixture
def count_graphs(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], CompileCounterWithBackend]:
    """Compiles blocks with this backend from now on, and counts their graphs.

    `aot_eager` traces, functionalises and differentiates as the default backend does, and builds no
    C++. `eager` traces alone, in half the time: the number of graphs of known shapes is the same.
    """

    def count(backend: str) -> CompileCounterWithBackend:
        counter = CompileCounterWithBackend(backend)
        monkeypatch.setattr(Block, "compile", partialmethod(nn.Module.compile, backend=counter))
        return counter

    return count


@pytest.mark.parametrize(
    ("documents", "precision", "attention", "backend"),
    # Documents have lengths that are no constants of a graph. Differentiating it may limit these.
    [(False, "fp32", "reference", "eager"), (True, "bf16", "packed", "aot_eager")],
    ids=["rows", "documents"],
)
def test_nothing_is_compiled_after_the_first_step(
    documents: bool,
    precision: str,
    attention: str,
    backend: str,
    count_graphs: Callable[[str], CompileCounterWithBackend],
) -> None:
    counter = count_graphs(backend)
    settings = ("model.layers=5", "train.micro_batch=4", f"engine.precision={precision}")
    config = config_of(*settings, f"model.attention={attention}")
    engine = FsdpEngine(config, ProcessGroups())
    train_step(engine, drawn(8, 0, documents=documents), 1e-3)
    # The first block, those between, and the last; each with and without gradients.
    assert counter.frame_count == 6
    for seed in range(1, 4):
        train_step(engine, drawn(8, seed, documents=documents), 1e-3)
        engine.evaluate(drawn(8 + seed, seed, documents=documents))
        with engine.summon_full_params() as model:
            Generator(model).generate([Request(range(seed + 2), max_tokens=9)])
    assert counter.frame_count == 6


def test_each_number_of_copies_is_compiled_once(
    count_graphs: Callable[[str], CompileCounterWithBackend],
) -> None:
    # What computes attention, and what becomes of the graphs, makes no difference to their number.
    counter = count_graphs("eager")
    settings = ("model.attention=reference", "schedule.copies={0:1,0.5:3}", "train.max_steps=4")
    config, graphs, losses = config_of(*settings), [], []
    plain = FsdpEngine(config_of(*settings, "engine.compile=false"), ProcessGroups())
    engine = FsdpEngine(config, ProcessGroups())
    for step in range(4):
        for each in (engine, plain):
            each.set_copies(config.copy_stage(step).K)
            result = train_step(each, drawn(8, step, documents=False), 1e-3)
            assert result is not None
            losses.append(result.loss.item())
        graphs.append(counter.frame_count)
        engine.evaluate(drawn(8, step, documents=False))
        assert counter.frame_count == graphs[-1]
    # The first block and the last; each with and without gradients.
    assert graphs == [4, 4, 8, 8]
    assert losses[::2] == pytest.approx(losses[1::2], rel=1e-5)


def test_a_loops_passes_are_compiled_once_and_compute_the_same(
    count_graphs: Callable[[str], CompileCounterWithBackend],
) -> None:
    counter = count_graphs("eager")
    settings = (*UNEVEN, "model=loop", "model.passes=3", "model.attention=reference")
    plain, engine = (
        FsdpEngine(load([*settings, f"engine.compile={compiled}"]), ProcessGroups())
        for compiled in ("false", "true")
    )
    for step in range(3):
        for each in (plain, engine):
            train_step(each, drawn(8, step, documents=False), 1e-3)
        # A block of the first pass, one that sees the keys of that, and the last, which computes
        # the last copy alone; each with and without gradients.
        assert counter.frame_count == 6
        engine.evaluate(drawn(8, step, documents=False))
        assert counter.frame_count == 6
    torch.testing.assert_close(engine.model.state_dict(), plain.model.state_dict())


def test_rows_that_fill_up_an_evaluation_do_not_count(
    count_graphs: Callable[[str], CompileCounterWithBackend],
) -> None:
    counter, batch = count_graphs("aot_eager"), drawn(5, 0, documents=False)
    found = []
    for compiled in ("true", "false"):
        settings = config_of(f"engine.compile={compiled}", "train.micro_batch=4")
        engine = FsdpEngine(settings, ProcessGroups())
        result = engine.evaluate(batch)
        assert result is not None
        found.append([x.item() for x in result])
    assert counter.frame_count > 0
    (ours, targets), (theirs, expected) = found
    assert targets == expected == 80
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_each_engine_has_all_graphs_that_torch_allows(
    count_graphs: Callable[[str], CompileCounterWithBackend],
) -> None:
    """As in a sweep, whose runs share a process."""
    counter = count_graphs("eager")
    for width in (8, 16):
        # The number of graphs does not depend on what computes attention, and these are smaller.
        settings = config_of(f"model.ffn_dim={width}", "model.attention=reference")
        engine = FsdpEngine(settings, ProcessGroups())
        before = counter.frame_count
        with torch._dynamo.config.patch(recompile_limit=4):
            train_step(engine, drawn(8, 0, documents=False), 1e-3)
        assert counter.frame_count == before + 4


def a_step(groups: ProcessGroups, cache: str, compiled: str) -> tuple[int, int, list[float]]:
    """Graphs that were kept from an earlier start, those that were not, and what was computed."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
    torch._inductor.config.compile_threads = 1
    settings = ("model.layers=1", "data.holdout=0", f"engine.compile={compiled}")
    engine = FsdpEngine(config_of(*settings), groups)
    result = train_step(engine, drawn(8, 0, documents=False), 1e-3)
    assert result is not None
    graphs = counters["aot_autograd"]
    hits, misses = graphs["autograd_cache_hit"], graphs["autograd_cache_miss"]
    return hits, misses, [result.loss.item(), result.grad_norm.item()]


@pytest.mark.process
def test_a_later_start_compiles_nothing_again_and_computes_the_same(tmp_path: Path) -> None:
    starts = [run_ranks(1, a_step, str(tmp_path), x)[0] for x in ("true", "true", "false")]
    assert [start[:2] for start in starts] == [(0, 1), (1, 0), (0, 0)]
    *compiled, plain = (computed for *_, computed in starts)
    for computed in compiled:
        assert computed == pytest.approx(plain, rel=1e-5)
