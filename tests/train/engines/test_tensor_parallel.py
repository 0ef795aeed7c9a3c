"""Ranks that cut matrices among themselves train what one process does, and send what docs say."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

import phd.loss
from data.batch import Batch
from phd.config import ModelConfig
from phd.inference.cuda_graph import can_be_captured
from phd.loss import next_token_loss
from phd.model import ModelWithLoss, Transformer
from tests.train.batches import batch_of
from tests.train.many_ranks import rank_of, run_ranks
from tests.train.uneven import UNEVEN
from train.anomalies.policy import layer_report
from train.checkpoint.reader import flatten
from train.checkpoint.store import CheckpointStore
from train.compose import load
from train.config import Config
from train.distributed.process_groups import ProcessGroups
from train.engines import tensor_parallel
from train.engines.activation_checkpointing import checkpoint_activations
from train.engines.device import autocast
from train.engines.engine import Engine
from train.engines.footprint import LiveBytes
from train.engines.memory import pass_of, rank_footprints
from train.engines.parallelize import PRECISIONS, PRODUCTS
from train.engines.tensor_parallel import (
    PRODUCT_SUM,
    TensorRanks,
    parallelize_tensor,
    vocabulary_loss,
)
from train.loop import train_step
from train.run import open_engine
from train.settings.engine import FsdpConfig
from train.torch_private import TorchDispatchMode

ROWS, TOKENS, VOCAB = 8, 16, 62
# Two ranks have equal parts of heads, widths and vocabulary, which two others cannot halve again.
SMALL = (*UNEVEN, "model.heads=4", "model.kv_heads=2", f"model.vocab_size={VOCAB}")
SMALL += ("optim.grad_clip=3.0", "optim.eps=1e-4")  # see `tests.train.engines.test_parity`
MODELS = {
    "vanilla": ("model=vanilla",),
    "phd": ("model=phd", "model.K=3"),
    "phd_swa": ("model=phd_swa", "model.K=3", "model.window=3"),
    "phd_cswa": ("model=phd_cswa", "model.K=3", "model.window=3", "model.chunk=4"),
    "naive_repeat": ("model=naive_repeat", "model.K=3"),
}
# All else that has weights of its own, or reads the stream in another way.
OTHERS = {
    "vectors": (*MODELS["phd_cswa"], "model.copy_embedding=true", "optim.z_loss=0.01"),
    "untied": (*MODELS["phd"], "model.norm=pre", "model.tied=false", "model.mup_base_dim=9"),
    "hybrid": (*MODELS["phd_swa"], "model.norm=hybrid"),
    "table": ("model=hidden_decoding", "model.layers=3", "model.full_every=2"),
    "learned": ("model=sps", "model.window=3"),
    "originals": ("model=free_pause",),
    "loop": ("model=loop",),
}
SELECTIVE, FULL = (f"engine.activation_checkpointing={mode}" for mode in ("selective", "full"))
HALF = "engine.precision=bf16"
MESHES = {"tensor": 2, "fsdp x tensor": 4}  # by number of ranks
# One training has all of them, a step each.
STEPS = {
    ("concatenated", 1): 0,
    ("concatenated", 2): 1,
    ("isolated", 1): 2,
    ("isolated", 2): 3,
}


class Training(NamedTuple):
    """Of each step the loss and the gradient's norm; the final weights that a rank has to save."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, np.ndarray]


class Between(NamedTuple):
    """What is computed between two steps.

    Attributes:
        evaluated: the loss of held-out rows.
        documents: that of each of their documents.
        error: the largest error of logits that a sample would read.
        weights: the norm of each layer's, as a report of a bad step tells it.
        fewer_copies: the loss of a step with K = 2.
    """

    evaluated: float
    documents: np.ndarray
    error: float
    weights: list[float]
    fewer_copies: float


class Found(NamedTuple):
    """What the ranks of one mesh found."""

    trainings: dict[str, Training]
    checkpointed: Training
    half: Training
    between: Between
    restored: dict[str, np.ndarray]
    sent: dict[str, tuple[int, int]]


def config_of(model: str, *others: str) -> Config:
    return load([*SMALL, *(MODELS | OTHERS)[model], *others])


def batch(step: int, *, isolated: bool) -> Batch:
    """The global batch of a step, whose rows have from no to all of their targets."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, VOCAB, (ROWS, TOKENS + 1), generator=generator)
    mask = torch.rand(ROWS, TOKENS, generator=generator) < torch.rand(ROWS, 1, generator=generator)
    starts = torch.where(
        torch.rand(ROWS, TOKENS, generator=generator) < 0.3, torch.arange(TOKENS), 0
    )
    return batch_of(tokens, mask, starts.cummax(1).values if isolated else None)


def share(engine: Engine, rows: Batch) -> Batch:
    """This rank's rows of a global batch."""
    return rows.shard(engine.dims.data_rank(engine.groups.rank), engine.dims.data_ranks)


def steps(engine: Engine) -> tuple[list[float], list[float]]:
    results = []
    for (documents, accumulation), step in STEPS.items():
        rows = share(engine, batch(step, isolated=documents == "isolated"))
        engine.micro_batch = len(rows.rows) // accumulation
        results.append(train_step(engine, rows, lr=0.01))
        assert results[-1].applied
    losses, norms, _ = ([x.item() for x in column] for column in zip(*results, strict=True))
    return losses, norms


def train(groups: ProcessGroups, config: Config) -> Training:
    engine = open_engine(config, groups)
    losses, norms = steps(engine)
    weights = whole(flatten(engine.state()), "model.")
    engine.close()
    return Training(losses, norms, weights)


def whole(state: Mapping[str, Tensor], prefix: str) -> dict[str, np.ndarray]:
    return {
        name: (x.full_tensor() if isinstance(x, DTensor) else x).numpy(force=True).copy()
        for name, x in state.items()
        if name.startswith(prefix)
    }


def between(groups: ProcessGroups, config: Config) -> Between:
    """An evaluation, a sample's logits, and a step with fewer copies, after other steps."""
    engine = open_engine(config, groups)
    steps(engine)
    documents = np.arange(ROWS * TOKENS).reshape(ROWS, TOKENS) // 5
    rows = batch(9, isolated=True)._replace(documents=documents)
    nats = torch.zeros(documents.max() + 1, dtype=torch.float64)
    found = engine.evaluate(rows, document_nats=nats)
    assert found is not None
    own = whole(flatten(engine.state()), "model.")
    plain = Transformer(config.model)
    plain.load({name.removeprefix("model."): torch.tensor(x) for name, x in own.items()})
    with engine.summon_full_params() as model, torch.no_grad():
        text = torch.arange(11)[None]
        error = (model.logits(text) - plain.logits(text)).abs().max().item()
        if engine.dims.tensor > 1:  # whole matrices are freed between calls
            assert all(weight.is_meta for weight in model.blocks.parameters())
            assert not can_be_captured(model)
    layers = layer_report(engine, share(engine, rows)).values()
    engine.set_copies(2)
    fewer = train_step(engine, share(engine, batch(3, isolated=False)), 0.01)
    with engine.summon_full_params() as model:
        assert model.config.K == 2
    engine.close()
    norms = [layer["weight"]["norm"] for layer in layers]
    return Between(found[0].item(), nats.numpy(), error, norms, fewer.loss.item())


def pieces(groups: ProcessGroups, config: Config, folder: Path) -> dict[str, np.ndarray]:
    """What is restored from one process's checkpoint, and is saved again beside it."""
    saved = CheckpointStore(folder / "one", keep=1, groups=groups).newest()
    assert saved is not None
    engine = open_engine(config, groups)
    engine.restore(saved)
    store = CheckpointStore(folder / f"{groups.world_size}", keep=1, groups=groups)
    store.save(1, engine.state(), {})
    store.wait()
    found = whole(flatten(engine.state()), "")
    engine.close()
    return found


# What is sent


class Sent(TorchDispatchMode):
    """Counts the bytes that a rank sends to the others of its tensor group.

    A ring of t ranks, which sends the least, sends (t - 1) / t of what is gathered or of what is
    summed; an all-reduce does both. It also keeps the sides of all results.
    """

    VERBS = ("all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce")

    def __init__(self, ranks: TensorRanks) -> None:
        super().__init__()
        self.ranks, self.bytes, self.sides = ranks, 0, set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is PRODUCT_SUM:
            with self:  # which would not see into it
                return tensor_parallel.product_sum(*args)
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not isinstance(out, DTensor) and out.ndim > 1:
            self.sides |= {*out.shape}
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "_c10d_functional" and name in self.VERBS:  # FSDP2 has other operators
            gathers = name == "all_gather_into_tensor"
            moved = out.nbytes if gathers else args[0].nbytes * (1 + (name == "all_reduce"))
            self.bytes += moved * (self.ranks.size - 1) // self.ranks.size
        return out


def sent(groups: ProcessGroups, config: Config) -> tuple[int, int]:
    """Bytes that a step sends to tensor ranks, and how many there should be."""
    engine = open_engine(config, groups)
    ranks = engine.model_with_loss.ranks
    assert isinstance(ranks, TensorRanks)
    rows = share(engine, batch(0, isolated=False))
    engine.micro_batch = len(rows.rows)
    with Sent(ranks) as counter:
        train_step(engine, rows, 0.01)
    engine.close()
    # Neither logits nor the weights of the whole vocabulary are ever on one rank.
    assert VOCAB not in counter.sides
    assert VOCAB // ranks.size in counter.sides
    mode = config.engine.activation_checkpointing
    return counter.bytes, bytes_of_step(config.model, len(rows.rows), ranks.size, mode)


def bytes_of_step(model: ModelConfig, rows: int, t: int, mode: str) -> int:
    """The formula of docs/distributed.md for norm=reordered in float32, one micro-batch a step."""
    K, L, slots, share = model.K, model.layers, rows * TOKENS, (t - 1) / t
    stream, one = 4 * slots * model.dim * share, 2 * 4 * slots * share
    total = 2 * stream  # the embedding, there and back
    for layer in range(L):
        given = K if layer else model.distinct_inputs
        queries, computed = (1, 1) if layer == L - 1 else (given, K)
        total += 2 * (given + 3 * computed) * stream  # two gathers, two sums; there and back
        total += 2 * (queries + given) * one  # norms of queries and keys, there and back
        if mode in ("selective", "full"):
            total += (given + computed) * stream + (queries + given) * one
        if mode == "full":
            total += 2 * computed * stream
    total += 2 * stream + 3 * one  # the loss: the largest logit, the sum, and the target's
    return int(total + 2 * 4 * model.dim * (2 * L + 1) * share)  # gradients of norms' weights


# The ranks


def find(groups: ProcessGroups, mesh: str, folder: Path) -> Found:
    """All that is asked of a mesh, one after the other on the same ranks."""
    tensor = "engine.tensor=2"
    deep = (tensor, "model.layers=3")  # a first layer, a last one, and one between
    models = MODELS | OTHERS if mesh == "fsdp x tensor" else MODELS
    check_vocabulary_loss(groups)
    return Found(
        {model: train(groups, config_of(model, tensor)) for model in models},
        train(groups, config_of("phd_cswa", tensor, SELECTIVE)),
        train(groups, config_of("phd_cswa", tensor, HALF)),
        between(groups, config_of("vectors", tensor)),
        pieces(groups, config_of("vectors", tensor), folder),
        {
            "vanilla": sent(groups, config_of("vanilla", *deep)),
            "phd_cswa": sent(groups, config_of("phd_cswa", *deep)),
            "selective": sent(groups, config_of("phd_cswa", *deep, SELECTIVE)),
            "full": sent(groups, config_of("phd_cswa", *deep, FULL)),
        },
    )


# As in `tests.train.engines.test_context_parallel`: attention in pieces rounds in another way.
SMOOTH = "optim.eps=1e-3"


def dealt(groups: ProcessGroups) -> dict[str, Training]:
    """Where the tokens of rows are dealt over further ranks."""
    settings = ("engine.tensor=2", "engine.context=2", SMOOTH)
    return {model: train(groups, config_of(model, *settings)) for model in MODELS}


@pytest.fixture(scope="module")
def in_three_dimensions() -> list[dict[str, Training]]:
    """By rank, FSDP x CP x TP."""
    return run_ranks(8, dealt)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a process alone has saved a checkpoint of two steps."""
    path = tmp_path_factory.mktemp("checkpoints")
    engine = open_engine(config_of("vectors"), ProcessGroups())
    steps(engine)
    store = CheckpointStore(path / "one", keep=1)
    store.save(1, engine.state(), {})
    store.wait()
    return path


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, list[Found]]:
    """By mesh, by rank."""
    return {mesh: run_ranks(ranks, find, mesh, folder) for mesh, ranks in MESHES.items()}


@cache
def alone(model: str, *others: str) -> Training:
    """In one micro-batch a step, whatever the accumulation is."""
    engine = open_engine(config_of(model, *others), ProcessGroups())
    results = []
    for (documents, _), step in STEPS.items():
        rows = batch(step, isolated=documents == "isolated")
        engine.micro_batch = ROWS
        results.append(train_step(engine, rows, lr=0.01))
    losses, norms, _ = ([x.item() for x in column] for column in zip(*results, strict=True))
    return Training(losses, norms, whole(flatten(engine.state()), "model."))


def weights_of(trainings: list[Training]) -> dict[str, np.ndarray]:
    """The weights of all ranks, which must be the same where several have one."""
    weights: dict[str, Any] = {}
    for training in trainings:
        assert training[:2] == trainings[0][:2]
        for name, value in training.weights.items():
            assert np.array_equal(weights.setdefault(name, value), value), name
    return weights


def check_steps(found: Training, expected: Training, chosen: slice | int = slice(None)) -> None:
    losses, norms = (np.array(x)[chosen] for x in found[:2])
    np.testing.assert_allclose(losses, np.array(expected.losses)[chosen], rtol=0, atol=1e-5)
    np.testing.assert_allclose(norms, np.array(expected.norms)[chosen], rtol=1e-5, atol=0)


def check_weights(trainings: list[Training], expected: Training) -> None:
    weights = weights_of(trainings)
    assert weights.keys() == expected.weights.keys()
    for name, value in expected.weights.items():
        np.testing.assert_allclose(weights[name], value, rtol=0, atol=1e-5, err_msg=name)


every_mesh = pytest.mark.parametrize("mesh", MESHES)


@pytest.mark.process
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("documents", ["concatenated", "isolated"])
@pytest.mark.parametrize("model", MODELS)
@every_mesh
def test_a_step_has_the_loss_and_the_norm_of_one_processs(
    mesh: str, model: str, documents: str, accumulation: int, found: dict[str, list[Found]]
) -> None:
    norms = alone("vanilla").norms
    assert min(norms) < 3.0 < max(norms)  # some are clipped
    for rank in found[mesh]:
        check_steps(rank.trainings[model], alone(model), STEPS[documents, accumulation])


@pytest.mark.process
@pytest.mark.parametrize("model", MODELS)
@every_mesh
def test_final_weights_are_those_of_one_process(
    mesh: str, model: str, found: dict[str, list[Found]]
) -> None:
    check_weights([rank.trainings[model] for rank in found[mesh]], alone(model))


@pytest.mark.process
@pytest.mark.parametrize("model", MODELS)
def test_eight_ranks_train_what_one_does_with_fsdp_and_context_parallelism_around(
    model: str, in_three_dimensions: list[dict[str, Training]]
) -> None:
    trainings = [rank[model] for rank in in_three_dimensions]
    check_steps(trainings[0], alone(model, SMOOTH))
    check_weights(trainings, alone(model, SMOOTH))


@pytest.mark.process
@pytest.mark.parametrize("model", OTHERS)
def test_every_wiring_and_every_table_is_cut_right(
    model: str, found: dict[str, list[Found]]
) -> None:
    trainings = [rank.trainings[model] for rank in found["fsdp x tensor"]]
    check_steps(trainings[0], alone(model))
    check_weights(trainings, alone(model))


@pytest.mark.process
@every_mesh
def test_recomputation_changes_no_bit_and_half_precision_not_the_scale(
    mesh: str, found: dict[str, list[Found]]
) -> None:
    first = found[mesh][0]
    exact = first.trainings["phd_cswa"]
    assert first.checkpointed[:2] == exact[:2]
    np.testing.assert_allclose(first.half.losses, exact.losses, rtol=1e-2)
    # Of later steps' gradients the weights are other ones, after some steps of AdamW.
    assert first.half.norms[0] == pytest.approx(exact.norms[0], rel=3e-2)
    assert first.half.norms[0] != pytest.approx(exact.norms[0], rel=1e-4)


@pytest.mark.process
@every_mesh
def test_evaluations_samples_and_other_copies_are_those_of_one_process(
    mesh: str, found: dict[str, list[Found]]
) -> None:
    expected = between(ProcessGroups(), config_of("vectors"))
    for rank in found[mesh]:
        for value, wanted in zip(rank.between, expected, strict=True):
            np.testing.assert_allclose(value, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.process
@every_mesh
def test_a_checkpoint_goes_from_one_process_to_a_mesh_and_back(
    mesh: str, folder: Path, found: dict[str, list[Found]]
) -> None:
    saved = CheckpointStore(folder / "one", keep=1).newest()
    assert saved is not None
    engine = open_engine(config_of("vectors"), ProcessGroups())
    engine.restore(saved)
    expected = whole(flatten(engine.state()), "")
    restored: dict[str, np.ndarray] = {}
    for rank in found[mesh]:
        restored |= rank.restored
    assert restored.keys() == expected.keys()
    assert all(np.array_equal(restored[name], value) for name, value in expected.items())
    back = CheckpointStore(folder / f"{MESHES[mesh]}", keep=1).newest()
    assert back is not None
    anew = open_engine(config_of("vectors", "seed=7"), ProcessGroups())
    anew.restore(back)
    for name, value in whole(flatten(anew.state()), "").items():
        assert np.array_equal(value, expected[name]), name


@pytest.mark.process
@pytest.mark.parametrize("model", ["vanilla", "phd_cswa", "selective", "full"])
@every_mesh
def test_a_step_sends_what_the_formula_says(
    mesh: str, model: str, found: dict[str, list[Found]]
) -> None:
    for rank in found[mesh]:
        counted, expected = rank.sent[model]
        assert counted == expected > 0


# Memory

WIDE = (
    "model=phd",
    "model.K=3",
    "model.layers=5",
    "data.lanes=1",
    "train.global_batch=4",
    "train.seq_len=64",
)
WIDE += ("model.dim=64", "model.ffn_dim=160", "model.heads=8", "model.kv_heads=8")
WIDE += ("model.head_dim=8", "model.vocab_size=64", "engine.device=cpu", "engine.compile=false")


def kept_by_two_blocks(ranks: int, mode: str, precision: str, every: int) -> tuple[int, int]:
    """Bytes that are left for two blocks' backward pass; how many were predicted.

    Args:
        every: which of the blocks compute something again.
    """
    settings = (f"engine.activation_checkpointing={mode}", f"engine.precision={precision}")
    cut = (f"engine.tensor={ranks}", f"engine.checkpoint_every_block={every}")
    config = load([*WIDE, *cut, *settings])
    dtype, kept = PRECISIONS[precision], []
    given = replace(pass_of(config, dtype, ranks, "cpu"), weights=dtype, rounded=False)
    for layers in (3, 5):
        with rank_of(0, ranks):
            with torch.device("meta"):
                model = ModelWithLoss(Transformer(replace(config.model, layers=layers)), 0.0)
            if ranks > 1:
                mesh = dist.device_mesh.init_device_mesh("cpu", (ranks,))
                parallelize_tensor(model, TensorRanks.of(mesh))
            checkpoint_activations(model.model, config.engine, PRODUCTS)
            model.model.blocks.to(dtype)  # as FSDP2 gathers them
            model.to_empty(device="cpu")
            tokens, live = torch.zeros(4, 64, dtype=torch.int64), LiveBytes()
            with live, autocast(torch.device("cpu"), dtype):
                hidden = model.model(tokens)
                kept.append(live.bytes - hidden.nbytes)
    return kept[1] - kept[0], sum(part.saved for part in rank_footprints(given, config)[1:3])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("mode", "every"), [("none", 1), ("selective", 1), ("selective", 2), ("full", 1)]
)
def test_a_rank_keeps_its_part_of_a_block_as_was_predicted(
    mode: str, every: int, precision: str
) -> None:
    alone, _ = kept_by_two_blocks(1, mode, precision, every)
    for ranks in (2, 4):
        kept, predicted = kept_by_two_blocks(ranks, mode, precision, every)
        if mode == "none" or every > 1:  # what is gathered is kept whole
            assert predicted == pytest.approx(kept, rel=0.12)
        else:
            assert kept * ranks == predicted * ranks == alone


# The loss


def check_vocabulary_loss(groups: ProcessGroups) -> None:
    """Equal to the loss of the whole vocabulary, in value and gradient, on these ranks."""
    ranks = TensorRanks.of(dist.device_mesh.init_device_mesh("cpu", (groups.world_size,)))
    phd.loss.ROWS_AT_ONCE, kept = 5, phd.loss.ROWS_AT_ONCE  # a chunk, and a part of one
    generator = torch.Generator().manual_seed(1)
    part = 12 // groups.world_size
    mine = slice(groups.rank * part, (groups.rank + 1) * part)
    for scale, z_loss in ((1.0, 0.0), (1.0, 0.01), (300.0, 1e-4)):
        hidden = torch.randn(2, 6, 4, generator=generator).mul_(scale).requires_grad_()
        weight = torch.randn(12, 4, generator=generator).requires_grad_()
        targets = torch.randint(0, 12, (2, 6), generator=generator)
        targets[0, :2] = phd.loss.IGNORED
        expected = next_token_loss(hidden, weight, targets, z_loss)
        (expected.total / 7).backward()
        copy, own = hidden.detach().clone().requires_grad_(), weight.detach()[mine].clone()
        own.requires_grad_()
        found = vocabulary_loss(copy.flatten(0, 1), own, targets, z_loss, ranks, per_target=True)
        (found.total / 7).backward()
        each = phd.loss.cross_entropy_per_target(hidden, weight, targets)
        torch.testing.assert_close(found[:3], expected[:3])
        torch.testing.assert_close(found.per_target, each, rtol=1e-5, atol=2e-5 * scale)
        assert copy.grad is not None
        assert own.grad is not None
        assert hidden.grad is not None
        assert weight.grad is not None
        torch.testing.assert_close(ranks.sum(copy.grad), hidden.grad, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(own.grad, weight.grad[mine], rtol=1e-4, atol=1e-6 * scale)
    phd.loss.ROWS_AT_ONCE = kept


def test_what_a_product_takes_is_sent_in_its_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[torch.dtype] = []

    def gathered(x: Tensor, size: int, group: str) -> Tensor:
        assert (size, group) == (2, "two")
        sent.append(x.dtype)
        return torch.cat([x, x], -2)

    monkeypatch.setattr(tensor_parallel, "_gathered", gathered)
    ranks = TensorRanks(mesh=None, size=2, rank=0, group="two")  # type: ignore[arg-type]
    x = torch.zeros(1, 2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert ranks.gather_for_product(x).dtype == torch.bfloat16
        assert ranks.gather(x).dtype == torch.float32
    ranks.gather_for_product(x)
    assert sent == [torch.bfloat16, torch.float32, torch.float32]


# What is refused


def test_what_cannot_be_cut_is_refused_by_name_and_at_once() -> None:
    model = config_of("vanilla").model
    config = FsdpConfig(tensor=4, context=2, precision="fp8")
    wrong = replace(model, ffn_dim=26, kv_heads=2, vocab_size=62, dim=32)
    found = [str(problem) for problem in config.problems_with(wrong, 20)]
    told = [text.partition(",")[0] for text in found]
    for side in ("model.kv_heads=2", "model.ffn_dim=26", "model.vocab_size=62"):
        assert f"engine.tensor=4: {side} is not divisible by it" in told
    assert "engine.tensor=4: train.seq_len=20 is not divisible by engine.context=2 x it" in told
    assert any(text.startswith("engine.precision='fp8': not possible with") for text in found)
    assert FsdpConfig(tensor=2).problems_with(wrong, 20) == []
    assert [p.key for p in config.optimizer_problems("muon")] == ["engine.tensor"]
    assert config.optimizer_problems("adamw") == []
    assert FsdpConfig(tensor=2).compiles_on("cuda")
