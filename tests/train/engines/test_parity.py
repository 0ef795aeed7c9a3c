"""Every engine trains the same model: five steps on four ranks equal five of one process."""

from functools import cache
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor

from data.batch import Batch
from tests.train.batches import batch_of
from tests.train.many_ranks import run_ranks
from tests.train.uneven import COPIES, UNEVEN
from train.checkpoint.reader import flatten
from train.compose import load
from train.config import Config
from train.distributed.process_groups import ProcessGroups
from train.engines.engine import Engine, StepResult
from train.loop import train_step
from train.run import open_engine

WORLD, ROWS, TOKENS, VOCAB = 4, 8, 16, 61

# Of the norms of these steps' gradients some are above `grad_clip` and some below.
SMALL = (*UNEVEN, f"train.global_batch={ROWS}", "train.max_steps=5", "optim.grad_clip=2.3")
MODELS = {
    "vanilla": ("model=vanilla",),
    # With muP, whose learning rates differ by group.
    "phd_cswa": (*COPIES, "optim.z_loss=0.01", "model.mup_base_dim=12"),
}
# AdamW's first step divides a gradient by its own size. Where that is mere rounding (7e-8 beside
# 3e-2 in one weight of free_pause), it tells nothing but the order of sums: two micro-batches of
# one process move that weight by 1e-4. With this eps a step is a smooth function of the gradient.
SMOOTH = "optim.eps=1e-4"
NEIGHBOURS = {
    "free_pause": ("model=free_pause", SMOOTH),
    "sps": ("model=sps", "model.window=3", SMOOTH),
    "streams": ("model=hidden_decoding", "model.layers=3", "model.full_every=2", SMOOTH),
    "loop": ("model=loop", SMOOTH),
}
FSDP = {
    "ddp": ("engine=ddp",),
    "fsdp": ("engine=fsdp",),
    "hsdp": ("engine=hsdp",),
}
ZERO = {f"zero{stage}": ("engine=deepspeed", f"engine.stage={stage}") for stage in range(4)}
FAMILIES = {"fsdp": FSDP, "zero": ZERO}
MICRO_BATCH = {1: 2, 2: 1}  # by accumulation, on four ranks
# A learned vector is read without a call of its module, and a loop calls each block twice.
OF_NEIGHBOURS = {
    "fsdp": [("fsdp", model) for model in NEIGHBOURS],
    "zero": [("zero3", "sps"), ("zero3", "loop")],
}

everywhere = pytest.mark.parametrize(
    ("family", "engine"), [(family, name) for family, group in FAMILIES.items() for name in group]
)


class Training(NamedTuple):
    """Of each step the loss, the gradient's norm and whether it was applied; the final weights."""

    losses: list[float]
    norms: list[float]
    applied: list[bool]
    weights: dict[str, np.ndarray]


class Case(NamedTuple):
    """One cell of the matrix, or one of those in half precision."""

    engine: str
    model: str
    accumulation: int
    settings: tuple[str, ...] = ()


def batch(step: int) -> Batch:
    """The global batch of a step, whose rows have from no to all of their targets."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, VOCAB, (ROWS, TOKENS + 1), generator=generator)
    share = torch.rand(ROWS, 1, generator=generator)
    return batch_of(tokens, torch.rand(ROWS, TOKENS, generator=generator) < share)


def train(groups: ProcessGroups, config: Config) -> Training:
    """The configured steps; the weights are those that this rank has to save."""
    engine = open_engine(config, groups)
    results = []
    for step in range(config.train.max_steps):
        rows = batch(step).shard(engine.dims.data_rank(groups.rank), engine.dims.data_ranks)
        results.append(train_step(engine, rows, lr=0.01))
    return closed(engine, results)


def closed(engine: Engine, results: list[StepResult]) -> Training:
    """What an engine has trained in some steps; ends it."""
    losses, norms, applied = ([x.item() for x in column] for column in zip(*results, strict=True))
    weights = {
        name: (x.full_tensor() if isinstance(x, DTensor) else x).numpy(force=True)
        for name, x in flatten(engine.state()).items()
        if name.startswith("model.")
    }
    engine.close()
    return Training(losses, norms, applied, weights)


def train_all(groups: ProcessGroups, configs: list[Config]) -> list[Training]:
    return [train(groups, config) for config in configs]


@cache
def alone(model: str, accumulation: int = 1) -> Training:
    micro_batch = f"train.micro_batch={ROWS // accumulation}"
    settings = (MODELS | NEIGHBOURS)[model]
    return train(ProcessGroups(), load([*SMALL, *settings, "engine=fsdp", micro_batch]))


@cache
def trained(family: str) -> dict[Case, Training]:
    """All cases of a family of engines, one after the other on the same four ranks."""
    engines = FAMILIES[family]
    cases = [Case(*cell) for cell in product(engines, MODELS, MICRO_BATCH)]
    cases += [Case(engine, model, 1) for engine, model in OF_NEIGHBOURS[family]]
    half = ("train.max_steps=1", "engine.precision=bf16")
    cases += [Case(engine, "phd_cswa", 2, half) for engine in engines]
    if family == "fsdp":
        reduced = (*half, "engine.reduce=bf16")
        cases += [Case(engine, "phd_cswa", 2, reduced) for engine in engines]
    groups = run_ranks(WORLD, train_all, [config_of(case) for case in cases])
    return {case: united(case, parts) for case, *parts in zip(cases, *groups, strict=True)}


def config_of(case: Case) -> Config:
    micro_batch = f"train.micro_batch={MICRO_BATCH[case.accumulation]}"
    model, engine = (MODELS | NEIGHBOURS)[case.model], (FSDP | ZERO)[case.engine]
    return load([*SMALL, *model, *engine, micro_batch, *case.settings])


def united(case: object, parts: list[Training]) -> Training:
    """What the ranks found, which must be the same, with the weights that each of them has."""
    first = parts[0]
    assert all(part[:3] == first[:3] for part in parts), case
    weights: dict[str, Any] = {}
    for part in parts:
        for name, value in part.weights.items():
            assert np.array_equal(weights.setdefault(name, value), value), (case, name)
    return first._replace(weights=weights)


def check_equal(found: Training, expected: Training) -> None:
    assert all(found.applied)
    np.testing.assert_allclose(found.losses, expected.losses, rtol=0, atol=1e-5)
    np.testing.assert_allclose(found.norms, expected.norms, rtol=1e-4, atol=0)
    assert found.weights.keys() == expected.weights.keys()
    for name, value in expected.weights.items():
        np.testing.assert_allclose(found.weights[name], value, rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("model", MODELS)
def test_one_process_takes_the_same_steps_in_two_micro_batches(model: str) -> None:
    norms = alone(model).norms
    assert min(norms) < 0.9 * 2.3 < 1.1 * 2.3 < max(norms)  # the premise of all tests here
    check_equal(alone(model, accumulation=2), alone(model))


@pytest.mark.parametrize("model", NEIGHBOURS)
def test_neighbours_of_phd_take_the_same_steps_in_two_micro_batches(model: str) -> None:
    check_equal(alone(model, accumulation=2), alone(model))


@pytest.mark.process
@pytest.mark.parametrize("accumulation", MICRO_BATCH)
@pytest.mark.parametrize("model", MODELS)
@everywhere
def test_four_ranks_train_what_one_does(
    family: str, engine: str, model: str, accumulation: int
) -> None:
    check_equal(trained(family)[Case(engine, model, accumulation)], alone(model))


@pytest.mark.process
@pytest.mark.parametrize(
    ("family", "engine", "model"),
    [(family, *cell) for family, cells in OF_NEIGHBOURS.items() for cell in cells],
)
def test_four_ranks_train_neighbours_of_phd_as_one_does(
    family: str, engine: str, model: str
) -> None:
    check_equal(trained(family)[Case(engine, model, 1)], alone(model))


@pytest.mark.process
@everywhere
def test_gradients_have_the_same_scale_in_half_precision(family: str, engine: str) -> None:
    cases = {c: t for c, t in trained(family).items() if c.settings and c.engine == engine}
    assert len(cases) == (2 if family == "fsdp" else 1)
    expected = alone("phd_cswa")
    for case, found in cases.items():
        assert found.losses[0] == pytest.approx(expected.losses[0], rel=1e-2), case
        assert found.norms[0] == pytest.approx(expected.norms[0], rel=3e-2), case
        assert found.norms[0] != pytest.approx(expected.norms[0], rel=1e-4), case
