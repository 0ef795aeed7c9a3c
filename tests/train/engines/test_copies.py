"""Every engine starts from given weights and moments, and goes on with other copies."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from data.batch import Batch
from phd.model import Transformer
from tests.train.batches import batch_of
from tests.train.many_ranks import run_ranks
from tests.train.uneven import COPIES, UNEVEN
from train.checkpoint.reader import flatten
from train.compose import load
from train.config import Config
from train.distributed.process_groups import ProcessGroups
from train.loop import train_step
from train.run import open_engine

SMALL = (*UNEVEN, *COPIES, "train.max_steps=6", "schedule.copies={0:1,0.5:3}")
ENGINES = {
    "ddp": ("engine=ddp",),
    "fsdp": ("engine=fsdp",),
    "hsdp": ("engine=hsdp",),
    **{f"zero{stage}": ("engine=deepspeed", f"engine.stage={stage}") for stage in range(4)},
}
STEPS_BEFORE = 7


class Trained(NamedTuple):
    """Losses of the steps, the loss of an evaluation, and weights and moments of this rank."""

    losses: list[float]
    held_out: float
    tensors: dict[str, np.ndarray]


def batch(step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    return batch_of(torch.randint(0, 61, (8, 17), generator=generator))


def moments(name: str, shape: torch.Size) -> dict[str, Tensor]:
    """AdamW's state of a parameter, after some steps elsewhere."""
    generator = torch.Generator().manual_seed(len(name))
    mean = torch.randn(shape, generator=generator) / 100
    square = torch.rand(shape, generator=generator) / 100 + mean**2
    return {"exp_avg": mean, "exp_avg_sq": square, "step": torch.tensor(float(STEPS_BEFORE))}


def trained(groups: ProcessGroups, config: Config) -> Trained:
    """Steps with one copy, and with three, from weights and moments that are given."""
    engine = open_engine(config, groups)
    weights = dict(Transformer(config.model).reset(5).named_parameters())
    shapes = {name: weight.shape for name, weight in weights.items()}
    engine.load(weights, lambda name: moments(name, shapes[name]))
    losses = []
    for step in range(6):
        engine.set_copies(config.copy_stage(step).K)
        result = train_step(engine, batch(step).shard(groups.rank, groups.world_size), lr=0.01)
        assert result is not None
        losses.append(result.loss.item())
    found = engine.evaluate(batch(100))
    assert found is not None
    state = flatten(engine.state())
    tensors = {
        name: (x.full_tensor() if isinstance(x, DTensor) else x).numpy(force=True).copy()
        for name, x in state.items()
        if not name.startswith("random.")
    }
    engine.close()
    return Trained(losses, found[0].item(), tensors)


def all_trained(groups: ProcessGroups, configs: list[Config]) -> list[Trained]:
    return [trained(groups, config) for config in configs]


@pytest.fixture(scope="module")
def alone() -> Trained:
    return trained(ProcessGroups(), load(SMALL))


@pytest.mark.process
def test_two_ranks_of_any_engine_switch_copies_on_as_one_process_does(alone: Trained) -> None:
    configs = [load([*SMALL, *settings]) for settings in ENGINES.values()]
    first, second = run_ranks(2, all_trained, configs)
    for name, ours, others in zip(ENGINES, first, second, strict=True):
        assert ours.losses == others.losses, name
        assert ours.losses == pytest.approx(alone.losses, rel=1e-5), name
        assert ours.held_out == pytest.approx(alone.held_out, rel=1e-5), name
        tensors = ours.tensors | others.tensors
        assert tensors.keys() == alone.tensors.keys()
        for key, expected in alone.tensors.items():
            np.testing.assert_allclose(tensors[key], expected, rtol=2e-3, atol=2e-5, err_msg=name)


def test_adamw_counts_on_and_its_moments_are_used(alone: Trained) -> None:
    assert alone.tensors["optimizer.embed.weight.step"] == STEPS_BEFORE + 6
    config = load(SMALL)
    fresh = open_engine(config, ProcessGroups())
    fresh.load(dict(Transformer(config.model).reset(5).named_parameters()))
    assert not any(x.any() for n, x in flatten(fresh.state()).items() if n.startswith("optimizer"))
    result = train_step(fresh, batch(0), lr=0.01)
    assert result is not None
    # Before its update, a step with another K or without moments has the same or another loss.
    assert result.loss.item() != pytest.approx(alone.losses[0], rel=1e-3)
    fresh.load(dict(Transformer(config.model).reset(5).named_parameters()))
    fresh.set_copies(1)
    again = train_step(fresh, batch(0), lr=0.01)
    assert again is not None
    assert again.loss.item() == alone.losses[0]
    assert not np.array_equal(
        fresh.model.embed.weight.numpy(force=True), alone.tensors["model.embed.weight"]
    )


def test_vectors_of_copies_wait_at_zero_until_these_are_switched_on() -> None:
    """They have no gradient until then, and embeddings have no weight decay."""
    config = load([*SMALL, "model.copy_positions=flattened"])
    engine = open_engine(config, ProcessGroups())
    vectors = engine.model.copy_embed.weight
    for step in range(6):
        engine.set_copies(config.copy_stage(step).K)
        train_step(engine, batch(step), lr=0.01)
        moved = vectors.detach().any(1).tolist()
        mean = flatten(engine.state())["optimizer.copy_embed.weight.exp_avg"].any(1).tolist()
        assert moved == mean == ([True, False, False] if step < 3 else [True, True, True])
