"""Muon: torch's mathematics, on matrices that are whole or in pieces under every engine."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils.flop_counter import FlopCounterMode

from conf.errors import ConfigError
from data.batch import Batch
from phd.config import ModelConfig
from phd.model import Transformer
from tests.train.batches import batch_of
from tests.train.many_ranks import run_ranks
from tests.train.uneven import COPIES, UNEVEN
from train.checkpoint.reader import Checkpoint, flatten
from train.checkpoint.store import CheckpointStore
from train.compose import load
from train.costs.optimizer import optimizer_cost
from train.distributed.process_groups import ProcessGroups
from train.engines.footprint import LiveBytes
from train.engines.limits import Limits
from train.engines.muon import MuonAdamW
from train.engines.newton_schulz import muon_step_bytes, newton_schulz, newton_schulz_flops
from train.engines.optimizer import build_optimizer, set_clip_and_skip, set_lr
from train.engines.state_rules import moment_bytes, state_shapes
from train.loop import train_step
from train.run import open_engine
from train.settings.optim import OptimConfig

MATRICES = ("attention.q", "attention.k", "attention.v", "attention.o", "ffn.gate", "ffn.up")
MATRICES += ("ffn.down",)


def model_of(**settings: object) -> Transformer:
    shape = {"layers": 2, "dim": 8, "ffn_dim": 12, "heads": 2, "kv_heads": 1, "head_dim": 4}
    return Transformer(ModelConfig(**shape, vocab_size=11, **settings)).reset(0)


def is_matrix(name: str) -> bool:
    return name.startswith("blocks.") and name.removesuffix(".weight").endswith(MATRICES)


def draw_gradients(model: Transformer, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


# One process


@pytest.mark.parametrize("adjust_lr", ["match_rms_adamw", "original"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_in_bfloat16_it_is_torchs_muon_for_matrices_and_torchs_adamw_for_the_rest(
    adjust_lr: str, nesterov: bool
) -> None:
    tables = {"variant": "hidden_decoding", "K": 3, "copy_embedding": True, "tied": False}
    ours, theirs = model_of(**tables), model_of(**tables)
    shared = {"weight_decay": 0.5, "momentum": 0.9, "nesterov": nesterov, "ns_steps": 4}
    config = OptimConfig(
        kind="muon", lr=0.1, muon_lr=0.2, adjust_lr=adjust_lr, betas=(0.8, 0.9), **shared
    )
    optimizer = build_optimizer(ours, config, torch.bfloat16)
    named = dict(theirs.named_parameters())
    matrices = [p for name, p in named.items() if is_matrix(name)]
    embeddings = [named[f"{name}.weight"] for name in ("embed", "copy_embed", "copy_input")]
    ids = {id(p) for p in (*matrices, *embeddings)}
    rest = [p for p in named.values() if id(p) not in ids]
    twins = (
        torch.optim.Muon(matrices, lr=0.1, adjust_lr_fn=adjust_lr, **shared),
        torch.optim.AdamW(rest, lr=0.05, betas=(0.8, 0.9), weight_decay=0.5, fused=True),
        torch.optim.AdamW(embeddings, lr=0.05, betas=(0.8, 0.9), weight_decay=0, fused=True),
    )
    assert len(matrices) == 14
    for step in range(3):
        draw_gradients(ours, step)
        draw_gradients(theirs, step)
        set_lr(optimizer, 0.05)  # half the peak
        set_clip_and_skip(optimizer, torch.tensor(0.9), 1.0, torch.tensor(True))
        for each in (optimizer, *twins):
            each.step()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("shape", [(3, 5, 9), (3, 9, 5), (2, 6, 6), (1, 1, 7)])
def test_in_float32_the_singular_values_are_mapped_by_the_polynomial(
    shape: tuple[int, int, int],
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x *= 10.0 ** torch.arange(shape[0])[:, None, None]
    U, S, V = torch.linalg.svd(x.double(), full_matrices=False)
    S = S / S.norm(dim=1, keepdim=True)
    for _ in range(5):
        S = 3.4445 * S - 4.7750 * S**3 + 2.0315 * S**5
    found = newton_schulz(x.clone(), steps=5)
    torch.testing.assert_close(found, (U * S[:, None] @ V).float(), rtol=0, atol=2e-5)
    assert newton_schulz(torch.zeros(shape), steps=5).abs().max() == 0


def test_its_flops_are_those_of_its_products() -> None:
    for shape in map(torch.Size, [(5, 9), (9, 5), (6, 6)]):
        with FlopCounterMode(display=False) as counter:
            newton_schulz(torch.randn(2, *shape), steps=3)
        assert counter.get_total_flops() == 2 * newton_schulz_flops(shape, steps=3)


def test_a_step_is_clipped_as_adamws_and_a_bad_one_changes_nothing() -> None:
    models = [model_of(), model_of()]
    config = OptimConfig(kind="muon", lr=0.05, weight_decay=0.5)
    clipped, plain = (build_optimizer(model, config) for model in models)
    norm, good = torch.tensor(8.0 - 1e-6), torch.tensor(True)
    for step in range(2):
        for model in models:
            draw_gradients(model, step)
        for parameter in models[1].parameters():
            assert parameter.grad is not None
            parameter.grad /= 4
        set_clip_and_skip(clipped, norm, 2.0, good)
        clipped.step()
        plain.step()
    assert same(*models, clipped, plain)
    for spoil in (torch.nan, torch.inf, 1.0):
        draw_gradients(models[0], 7)
        for parameter in models[0].parameters():
            assert parameter.grad is not None
            parameter.grad *= spoil
        set_clip_and_skip(clipped, torch.tensor(spoil), 2.0, ~good)
        clipped.step()
        assert same(*models, clipped, plain)


def same(
    ours: Transformer,
    theirs: Transformer,
    first: torch.optim.Optimizer,
    second: torch.optim.Optimizer,
) -> bool:
    """Whether weights and state are the same to the last bit."""
    pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
    return all(
        torch.equal(a, b)
        and first.state[a].keys() == second.state[b].keys()
        and all(torch.equal(first.state[a][key], second.state[b][key]) for key in first.state[a])
        for a, b in pairs
    )


def test_state_is_told_by_parameter_as_it_is() -> None:
    model, config = model_of(), OptimConfig(kind="muon")
    optimizer = build_optimizer(model, config)
    found = {
        f"{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }
    assert {name: value.shape for name, value in found.items()} == state_shapes(
        model.config, config
    )
    moments = [value for value in found.values() if value.ndim]
    assert moment_bytes(model.config, config) == sum(value.nbytes for value in moments)
    assert {n for n, _ in model.named_parameters() if is_matrix(n)} == {
        name.removesuffix(".momentum_buffer") for name in found if name.endswith("momentum_buffer")
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 200, 10**6])
def test_the_memory_of_its_step_is_what_the_plan_counts(
    dtype: torch.dtype, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.engines.newton_schulz.BATCH", batch)
    model = model_of()
    optimizer = build_optimizer(model, OptimConfig(kind="muon"), dtype)
    assert isinstance(optimizer, MuonAdamW)
    draw_gradients(model, 0)
    live = LiveBytes()
    with live:
        optimizer.step()
    planned = muon_step_bytes(optimizer.shapes, dtype, ranks=1, shards=1, flat=False)
    assert live.most == planned


# Many ranks

WORLD, ROWS = 4, 8
SMALL = (
    *(*UNEVEN, *COPIES, "optim=muon", "model.mup_base_dim=12"),
    *(f"train.global_batch={ROWS}", "train.micro_batch=1", "train.max_steps=99"),
    *("optim.grad_clip=2.3", "optim.weight_decay=0.3", "optim.muon_lr=5e-3"),
    "model.head_dim=6",  # keys have 6 rows, two on each rank but the last, which has none
)
ENGINES = {
    "fsdp": ("engine=fsdp",),
    "zero2": ("engine=deepspeed", "engine.stage=2"),
    "hsdp": ("engine=hsdp",),
    "zero1": ("engine=deepspeed", "engine.stage=1"),
    "ddp": ("engine=ddp",),
    "zero0": ("engine=deepspeed", "engine.stage=0"),
}
SHARDS = {"hsdp": 2, "ddp": 1, "zero0": 1}  # of the weights or moments; WORLD with the others
STEPS = 3  # with each engine, of which the second one is bad


class Link(NamedTuple):
    """Steps under one engine, which goes on from the checkpoint of the engine before.

    Attributes:
        received: bytes that other ranks sent for Newton-Schulz in a step.
    """

    received: int
    losses: list[float]
    norms: list[float]
    applied: list[bool]
    state: dict[str, np.ndarray]


def batch(step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, 61, (ROWS, 17), generator=generator)
    return batch_of(tokens, torch.rand(ROWS, 16, generator=generator) < 0.7)


@contextmanager
def counted(rank: int) -> Iterator[list[int]]:
    """Bytes that each all-to-all brings from other ranks."""
    found: list[int] = []
    call = dist.all_to_all_single

    def count(into: torch.Tensor, sent: torch.Tensor, sizes: list[int], *given: object) -> object:
        found.append((sum(sizes) - sizes[rank]) * into.itemsize)
        return call(into, sent, sizes, *given)

    dist.all_to_all_single = count
    try:
        yield found
    finally:
        dist.all_to_all_single = call


def train(groups: ProcessGroups, engines: list[tuple[str, ...]], folder: Path) -> list[Link]:
    """The chain of engines."""
    links: list[Link] = []
    checkpoint: Checkpoint | None = None
    for number, settings in enumerate(engines):
        store = CheckpointStore(folder / str(number), keep=1, groups=groups)
        engine = open_engine(load([*SMALL, *settings, f"seed={number}"]), groups)
        if checkpoint is not None:
            engine.restore(checkpoint)
        results = []
        for step in range(STEPS):
            rows = batch(STEPS * number + step).shard(groups.rank, groups.world_size)
            limits = Limits(loss=0.0) if step == 1 else Limits()
            with counted(groups.rank) as received:
                results.append(train_step(engine, rows, 0.01, limits))
        columns = ([x.item() for x in column] for column in zip(*results, strict=True))
        store.save(number + 1, engine.state(), {})
        store.wait()
        state = {
            name: (x.full_tensor() if isinstance(x, DTensor) else x).numpy(force=True).copy()
            for name, x in flatten(engine.state()).items()
            if not name.startswith("random.")
        }
        links.append(Link(sum(received), *columns, state))
        engine.close()
        checkpoint = store.newest()
    return links


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[Link]:
    return train(ProcessGroups(), [("engine=fsdp",)] * len(ENGINES), tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> list[list[Link]]:
    """By engine, by rank."""
    folder = tmp_path_factory.mktemp("many")
    ranks = run_ranks(WORLD, train, list(ENGINES.values()), folder)
    return [list(links) for links in zip(*ranks, strict=True)]


@pytest.mark.process
@pytest.mark.parametrize("engine", ENGINES)
def test_each_engine_goes_on_from_another_and_trains_what_one_process_does(
    engine: str, alone: list[Link], shared: list[list[Link]]
) -> None:
    number = list(ENGINES).index(engine)
    expected, links = alone[number], shared[number]
    norms = list(chain(*(link.norms for link in alone)))
    assert min(norms) < 2.3 < max(norms)
    state: dict[str, np.ndarray] = {}
    for link in links:
        assert link.applied == [True, False, True]
        np.testing.assert_allclose(link.losses, expected.losses, rtol=0, atol=1e-5)
        np.testing.assert_allclose(link.norms, expected.norms, rtol=1e-4, atol=0)
        state |= link.state
    # The plan counts even shards, and as if a matrix lay on its owner by chance.
    cost = optimizer_cost(load([*SMALL]), torch.float32, WORLD, SHARDS.get(engine, WORLD))
    assert cost is not None
    received = sum(link.received for link in links) / WORLD
    assert received == pytest.approx(cost.received, rel=0 if engine in SHARDS else 0.1)
    assert state.keys() == expected.state.keys()
    for name, value in expected.state.items():
        np.testing.assert_allclose(state[name], value, rtol=0, atol=1e-5, err_msg=name)


# What cannot be

FSDP = "choose engine=fsdp, which shards weights, gradients and moments"
HOST = "optim.kind=muon would make its matrix products on the host"
ZERO = "engine.deepspeed.zero_optimization."
REFUSED = {
    "engine.stage=3": "engine.stage=3: optim.kind=muon needs whole matrices, and stage 3 gives "
    f"the optimizer flat and padded parts of many; choose 0, 1 or 2; or {FSDP}",
    "engine.offload_optimizer=true": f"engine.offload_optimizer=true: {HOST}; {FSDP}",
    f"{ZERO}offload_optimizer.device=cpu": f"{ZERO}offload_optimizer={{'device': 'cpu'}}: {HOST}; "
    f"{FSDP}",
    f"{ZERO}cpu_offload=true": f"{ZERO}cpu_offload=true: {HOST}; {FSDP}",
    f"{ZERO}compute_grad_norm=false": f"{ZERO}compute_grad_norm: the optimizer clips and skips bad "
    "steps by the norm of the gradient; leave it out",
    f"{ZERO}save_muon_momentum_buffer_in_memory=true": f"{ZERO}save_muon_momentum_buffer_in_memory"
    "=true: it is of DeepSpeed's own Muon, and here it would change nothing; leave it out",
    f"{ZERO}round_robin_gradients=true": f"{ZERO}round_robin_gradients: DeepSpeed would save the "
    "weights of one parameter as those of another; leave it out",
    "engine.deepspeed.zero_allow_untested_optimizer=false": "engine.deepspeed."
    "zero_allow_untested_optimizer: follows from optim; set that instead",
    "engine.deepspeed.optimizer.type=Muon": "engine.deepspeed.optimizer: follows from optim; set "
    "that instead",
}


def test_what_deepspeed_would_do_otherwise_is_refused_by_name() -> None:
    with pytest.raises(ConfigError) as error:
        load([*SMALL, "engine=deepspeed", *REFUSED])
    assert sorted(map(str, error.value.problems)) == sorted(REFUSED.values())


def test_a_run_goes_on_with_the_optimizer_it_began_with(small, trained, opened) -> None:
    first = load(small("optim=muon", "train.max_steps=2"))
    state = flatten(trained(first).run.engine.state())
    for other, told in {
        ("optim=adamw",): "optim.kind was 'muon' and is now 'adamw'",
        ("run.name=new", f"run.start_from={first.run_dir}", "run.start_optimizer=true"): (
            "the optimizer's moments are asked for; .* has those of optim=muon"
        ),
    }.items():
        into = small() if "optim=adamw" in other else small(f"run.dir={first.run_dir}-other")
        with pytest.raises(ConfigError, match=told):
            trained(load([*into, *other]))
    given = (f"run.dir={first.run_dir}-third", f"run.start_from={first.run_dir}", "optim=muon")
    started = flatten(opened(load(small(*given, "run.start_optimizer=true"))).engine.state())
    names = [name for name in state if not name.startswith("random.")]
    assert any(name.endswith("momentum_buffer") for name in names)
    assert all(torch.equal(started[name], state[name]) for name in names)
    assert trained(load(small("optim=muon", "train.max_steps=3"))).record.step == 3
