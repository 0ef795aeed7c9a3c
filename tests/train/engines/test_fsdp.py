"""FSDP2, HSDP and DDP: what ranks hold, when gradients are summed, and what a bad step changes."""

from functools import cache, partial, partialmethod
from itertools import count
from math import inf, nan
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.tensor import DTensor

from data.batch import Batch
from data.prefetch import never
from phd.block import Block
from phd.config import SamplingConfig
from phd.inference.cuda_graph import can_be_captured
from phd.inference.generator import Generator, Request
from phd.model import Transformer
from tests.train.batches import batch_of
from tests.train.many_ranks import RanksFailedError, run_ranks
from tests.train.uneven import COPIES, UNEVEN
from train.checkpoint.reader import flatten
from train.checkpoint.store import CheckpointStore
from train.compose import load
from train.config import Config
from train.distributed.process_groups import ProcessGroups
from train.engines.fsdp import FsdpEngine
from train.engines.limits import Limits
from train.loop import train_step

SMALL = (*UNEVEN, *COPIES, "model.layers=3", "train.max_steps=9")
ROWS = torch.randint(0, 61, (8, 17), generator=torch.Generator().manual_seed(1))
CUTS = {
    "ddp": ("engine=ddp",),
    "fsdp": ("engine=fsdp",),
    "hsdp": ("engine=hsdp",),
}
every_cut = pytest.mark.parametrize("cut", CUTS)


@cache
def config_of(*overrides: str) -> Config:
    return load([*SMALL, *overrides])


def share(groups: ProcessGroups, rows: Tensor = ROWS) -> Batch:
    """This rank's rows of a global batch."""
    return batch_of(rows[groups.rank :: groups.world_size])


def digest(engine: FsdpEngine) -> dict[str, np.ndarray]:
    """All that a checkpoint keeps of this rank's parameters, as bytes that can be compared."""
    return {
        name: (x.to_local() if isinstance(x, DTensor) else x).numpy(force=True).copy()
        for tensors in engine._checkpoint_tensors()
        for name, x in tensors.items()
    }


def equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    assert a.keys() == b.keys()
    return all(np.array_equal(a[name], b[name], equal_nan=True) for name in a)


def whole_weights(engine: FsdpEngine) -> dict[str, np.ndarray]:
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).numpy(force=True).copy()
        for name, p in engine.parameters.items()
    }


# Weights


def initial(groups: ProcessGroups, config: Config) -> tuple[dict[str, np.ndarray], bool, int]:
    engine = FsdpEngine(config, groups)
    shared = torch.equal(engine.model.rope.cos, Transformer(config.model).rope.cos)
    return whole_weights(engine), shared, sum(x.numel() for x in engine.shards.values())


@pytest.mark.process
@pytest.mark.parametrize(("cut", "world_size"), [("ddp", 2), ("fsdp", 3), ("hsdp", 2), ("hsdp", 4)])
def test_initial_weights_are_the_single_processs_bit_for_bit(cut: str, world_size: int) -> None:
    config = config_of(*CUTS[cut], "model.tied=false", "train.global_batch=12")
    expected = Transformer(config.model).reset(config.seed).state_dict()
    found = run_ranks(world_size, initial, config)
    sizes = [size for _, _, size in found]
    for weights, same_tables, _ in found:
        assert same_tables
        assert weights.keys() == expected.keys()
        assert all(np.array_equal(weights[name], expected[name]) for name in expected)
    total = sum(x.numel() for x in expected.values())
    assert sum(sizes) == total * {"ddp": world_size, "fsdp": 1, "hsdp": 2}[cut]


def taken(groups: ProcessGroups, config: Config) -> dict[str, np.ndarray]:
    engine = FsdpEngine(config, groups)
    engine.load(dict(Transformer(config.model).reset(5).named_parameters()))
    return whole_weights(engine)


@pytest.mark.process
@every_cut
def test_whole_weights_can_be_taken_over(cut: str) -> None:
    config = config_of(*CUTS[cut])
    expected = Transformer(config.model).reset(5).state_dict()
    for weights in run_ranks(2, taken, config):
        assert all(np.array_equal(weights[name], expected[name]) for name in expected)


@pytest.mark.process
def test_the_number_of_replicas_must_divide_the_number_of_ranks() -> None:
    told = (
        "engine.replicate=2: must divide the number of ranks, 3; choose another, or start another"
    )
    with pytest.raises(RanksFailedError, match=told):
        run_ranks(3, initial, config_of("engine=hsdp", "train.global_batch=9"))
    with pytest.raises(ValueError, match=r"engine.replicate=2: must divide .* ranks, 1"):
        FsdpEngine(config_of("engine=hsdp"), ProcessGroups())


# Steps

BAD = {
    "loss": Limits(loss=1.0),
    "norm": Limits(grad_norm=1e-3),
}


def bad_steps(groups: ProcessGroups, config: Config) -> list[str]:
    """Names of the kinds of bad step that changed something, or were not told of."""
    engine, found = FsdpEngine(config, groups), []
    train_step(engine, share(groups), 0.01)
    before = digest(engine)
    for name, limits in BAD.items():
        result = train_step(engine, share(groups), 0.01, limits)
        if result.applied or not equal(digest(engine), before):
            found.append(name)
    whole = whole_weights(engine)
    for name, value in (("nan", nan), ("inf", inf)):
        poisoned = whole | {"norm.weight": np.full_like(whole["norm.weight"], value)}
        engine.load({name: torch.tensor(x) for name, x in poisoned.items()})
        ill = digest(engine)
        if train_step(engine, share(groups), 0.01).applied or not equal(digest(engine), ill):
            found.append(name)
    engine.load({name: torch.tensor(x) for name, x in whole.items()})
    if not equal(digest(engine), before):
        found.append("healing")
    result = train_step(engine, share(groups), 0.01, Limits(loss=100.0, grad_norm=100.0))
    if not result.applied or equal(digest(engine), before):
        found.append("good")
    twin = FsdpEngine(config, groups)
    for _ in range(2):
        train_step(twin, share(groups), 0.01)
    return found if equal(digest(engine), digest(twin)) else [*found, "after"]


@pytest.mark.process
@every_cut
def test_a_bad_step_changes_no_bit_of_weights_moments_and_counts(cut: str) -> None:
    assert run_ranks(2, bad_steps, config_of(*CUTS[cut])) == [[], []]


@pytest.mark.parametrize("clip", ["1.0", "null"])
def test_a_bad_step_of_one_process_changes_nothing(clip: str) -> None:
    assert bad_steps(ProcessGroups(), config_of(f"optim.grad_clip={clip}")) == []


def given_up(groups: ProcessGroups, config: Config) -> list[bool]:
    """Two steps, between which another is given up after one, two or three micro-batches."""
    engine, twin = FsdpEngine(config, groups), FsdpEngine(config, groups)
    train_step(engine, share(groups), 0.01)
    train_step(twin, share(groups), 0.01)
    for passes in range(1, 4):
        asked = count(1)
        stop = partial(lambda asked, passes: next(asked) == passes, asked, passes)
        stopped = train_step(engine, share(groups, ROWS.flip(0)), 0.01, stop_requested=stop)
        if stopped is not None or next(asked) != passes + 1:
            return [False]
    for each in (engine, twin):
        train_step(each, share(groups), 0.01)
    return [equal(digest(engine), digest(twin))]


@pytest.mark.process
@pytest.mark.parametrize(
    ("cut", "precision"), [("ddp", "fp32"), ("fsdp", "fp32"), ("fsdp", "bf16")]
)
def test_a_step_that_is_given_up_leaves_nothing_behind(cut: str, precision: str) -> None:
    settings = (f"engine.precision={precision}", "train.micro_batch=1")
    assert run_ranks(2, given_up, config_of(*CUTS[cut], *settings)) == [[True], [True]]


# Evaluating and generating between steps


def between(groups: ProcessGroups, config: Config) -> tuple[bool, float, np.ndarray, np.ndarray]:
    """(whether steps are as if nothing had been between, a loss, logits, losses of documents)."""
    engine, twin = FsdpEngine(config, groups), FsdpEngine(config, groups)
    with engine.summon_full_params() as model, torch.no_grad():
        model.logits(ROWS[:1, :-1])  # before any step
    for _ in range(2):
        train_step(engine, share(groups), 0.01)
        train_step(twin, share(groups), 0.01)
        total, targets = engine.evaluate(batch_of(ROWS[:5]))
        nats = torch.zeros(12, dtype=torch.float64)
        documents = np.arange(5 * 16).reshape(5, 16) // 7
        again = engine.evaluate(batch_of(ROWS[:5])._replace(documents=documents), never, nats)
        assert again == (total, targets)
        with engine.summon_full_params() as model, torch.no_grad():
            logits = model.logits(ROWS[:1, :-1])
            # A block that gathers its weights is not part of a CUDA graph.
            assert can_be_captured(model) == (groups.control is None)
    loss = (total / targets).item()
    return equal(digest(engine), digest(twin)), loss, logits.numpy(), nats.numpy()


@pytest.mark.process
@pytest.mark.parametrize("policy", ["auto", "always", "never"])
def test_evaluating_and_generating_see_the_newest_weights_and_change_nothing(policy: str) -> None:
    settings = f"engine.reshard_after_forward={policy}"
    _, loss, logits, nats = between(ProcessGroups(), config_of())
    assert nats.sum() / (5 * 16) == pytest.approx(loss, abs=1e-5)
    for same, found, generated, of_documents in run_ranks(
        2, between, config_of("engine=fsdp", settings)
    ):
        np.testing.assert_allclose(of_documents, nats, atol=1e-4)
        assert same
        assert found == pytest.approx(loss, abs=1e-5)
        np.testing.assert_allclose(generated, logits, atol=1e-4)


def restored(groups: ProcessGroups, config: Config, root: Path) -> list[bool]:
    """Save after a step, take it up in an engine that has just evaluated, and go on."""
    first, second = FsdpEngine(config, groups), FsdpEngine(config, groups)
    train_step(first, share(groups), 0.01)
    store = CheckpointStore(root, keep=1, groups=groups)
    store.save(1, first.state(), {})
    store.wait()
    drawn = torch.rand(3)
    train_step(second, share(groups, ROWS.flip(0)), 0.02)
    second.evaluate(batch_of(ROWS))
    checkpoint = store.newest()
    assert checkpoint is not None
    second.restore(checkpoint)
    same = [torch.equal(torch.rand(3), drawn) or not groups.is_rank_zero]
    for _ in range(2):
        same.append(equal(digest(first), digest(second)))
        losses = [train_step(engine, share(groups), 0.01).loss for engine in (first, second)]
        same.append(torch.equal(*losses))
    return same


@pytest.mark.process
@every_cut
def test_a_restored_engine_goes_on_bitwise_on_many_ranks(cut: str, tmp_path: Path) -> None:
    for same in run_ranks(2, restored, config_of(*CUTS[cut]), tmp_path):
        assert all(same), same


def written(groups: ProcessGroups, config: Config) -> dict[str, tuple[bool, torch.Size]]:
    state = flatten(FsdpEngine(config, groups).state())
    return {name: (isinstance(x, DTensor), x.shape) for name, x in state.items()}


@pytest.mark.process
@every_cut
def test_whole_tensors_of_a_checkpoint_are_written_by_one_rank_each(cut: str) -> None:
    config = config_of(*CUTS[cut])
    alone = FsdpEngine(config_of(), ProcessGroups())
    expected = {name: x.shape for name, x in flatten(alone.state()).items()}
    parts = run_ranks(2, written, config)
    assert {name: shape for part in parts for name, (_, shape) in part.items()} == expected
    for name in expected:
        owners = [part[name] for part in parts if name in part]
        cut_up = cut != "ddp" and not name.startswith("random.") and not name.endswith(".step")
        assert len(owners) == (2 if cut_up else 1), name
        assert all(is_cut == cut_up for is_cut, _ in owners), name
    assert min(map(len, parts)) > 0.4 * max(map(len, parts))


# Other uses of the model


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not:UserWarning")
def test_compiled_blocks_write_without_being_compiled_again(monkeypatch) -> None:
    # What becomes of the graphs, and what computes attention, makes no difference to their number.
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(Block, "compile", partialmethod(nn.Module.compile, backend=counter))
    request = Request([5, 7, 11], max_tokens=12, sampling=SamplingConfig(temperature=0))
    written = []
    for compiled in ("true", "false"):
        settings = ("model.attention=reference", f"engine.compile={compiled}")
        engine = FsdpEngine(config_of(*settings), ProcessGroups())
        train_step(engine, batch_of(ROWS), 0.01)
        compilations = counter.frame_count
        assert compilations > 0
        with engine.summon_full_params() as model:
            written += Generator(model).generate([request])
        assert counter.frame_count == compilations
        train_step(engine, batch_of(ROWS), 0.01)
        assert counter.frame_count == compilations
    assert written[0] == written[1]
