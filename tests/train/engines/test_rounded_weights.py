"""Weights rounded once a step give what autocast gives, which rounds them at every call."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from phd.linear import Linear
from phd.model import Transformer
from tests.train.batches import batch_of
from tests.train.many_ranks import run_ranks
from tests.train.uneven import COPIES, UNEVEN
from train.checkpoint.store import CheckpointStore
from train.compose import load
from train.config import Config
from train.distributed.process_groups import ProcessGroups
from train.engines.fsdp import FsdpEngine
from train.loop import train_step

ROWS = torch.randint(0, 61, (8, 17), generator=torch.Generator().manual_seed(1))
BF16 = "engine.precision=bf16"


def config_of(*overrides: str) -> Config:
    steps = ("train.max_steps=9", "train.micro_batch=2")
    return load([*UNEVEN, *COPIES, *steps, *overrides])


def projections(engine: FsdpEngine) -> list[Linear]:
    return [layer for layer in engine.model.blocks.modules() if isinstance(layer, Linear)]


def is_rounded(engine: FsdpEngine) -> bool:
    """Whether every projection has a copy, and each copy is the weight of now."""
    return all(
        layer.rounded is not None and torch.equal(layer.rounded, layer.weight.bfloat16())
        for layer in projections(engine)
    )


@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
def test_steps_are_bit_for_bit_those_of_autocast(checkpointing: str) -> None:
    settings = config_of(BF16, f"engine.activation_checkpointing={checkpointing}")
    rounded, plain = (FsdpEngine(settings, ProcessGroups()) for _ in range(2))
    for layer in projections(plain):
        layer.rounded = None
    for _ in range(3):
        results = [train_step(engine, batch_of(ROWS), 1e-2) for engine in (rounded, plain)]
        assert torch.equal(results[0].loss, results[1].loss)
        assert torch.equal(results[0].grad_norm, results[1].grad_norm)
        assert is_rounded(rounded)
    for ours, theirs in zip(rounded.shards.values(), plain.shards.values(), strict=True):
        assert torch.equal(ours, theirs)
    found = [engine.evaluate(batch_of(ROWS)) for engine in (rounded, plain)]
    assert found[0] == found[1]


def test_copies_follow_the_weights_wherever_these_come_from(tmp_path: Path) -> None:
    settings = config_of(BF16)
    engine, other = (FsdpEngine(settings, ProcessGroups()) for _ in range(2))
    assert is_rounded(engine)
    engine.load(dict(Transformer(settings.model).reset(5).named_parameters()))
    assert is_rounded(engine)
    train_step(engine, batch_of(ROWS), 1e-2)
    store = CheckpointStore(tmp_path, keep=1, keep_every=0, groups=ProcessGroups())
    store.save(1, engine.state(), {})
    store.wait()
    checkpoint = store.newest()
    assert checkpoint is not None
    other.restore(checkpoint)
    assert is_rounded(other)
    for ours, theirs in zip(projections(engine), projections(other), strict=True):
        assert torch.equal(ours.rounded, theirs.rounded)
    # They are nothing that a checkpoint or an optimizer knows of.
    assert {x.dtype for x in engine.model.state_dict().values()} == {torch.float32}


def test_in_float32_there_are_none() -> None:
    engine = FsdpEngine(config_of(), ProcessGroups())
    assert all(layer.rounded is None for layer in projections(engine))


def steps_and_gathers(groups: ProcessGroups, config: Config) -> tuple[list[Tensor], int, bool]:
    """Losses of three steps, the all-gathers of the third, and whether there are copies."""
    engine = FsdpEngine(config, groups)
    rows = batch_of(ROWS[groups.rank :: groups.world_size])
    losses = [train_step(engine, rows, 1e-2).loss.item() for _ in range(2)]
    with torch.profiler.profile() as profile:
        losses.append(train_step(engine, rows, 1e-2).loss.item())
    gathers = sum("allgather" in event.name for event in profile.events())
    return losses, gathers, is_rounded(engine)


@pytest.mark.process
def test_sharded_weights_can_be_gathered_once_a_step_and_replicated_ones_are_rounded() -> None:
    kept = "engine.reshard_after_forward=never"
    always = "engine.reshard_after_forward=always"
    found = {
        cut: run_ranks(2, steps_and_gathers, config_of(BF16, "train.micro_batch=1", *overrides))[0]
        for cut, overrides in {
            "kept": ("engine=fsdp", kept),
            "freed": ("engine=fsdp", always),
            "replicated": ("engine=ddp",),
        }.items()
    }
    assert found["kept"][0] == found["freed"][0]
    # Two units of blocks and the root; each of four micro-batches gathers a block twice.
    assert 4 * found["kept"][1] <= found["freed"][1]
    assert found["replicated"][2]
    assert found["replicated"][0] == pytest.approx(found["kept"][0], rel=1e-2)
