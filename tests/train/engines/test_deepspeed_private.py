"""What train/engines/deepspeed_private.py assumes of DeepSpeed, one test for each assumption."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from phd.model import Transformer
from tests.train.batches import batch_of
from tests.train.many_ranks import run_ranks
from tests.train.uneven import COPIES, UNEVEN
from train.compose import load
from train.distributed.process_groups import ProcessGroups
from train.engines.deepspeed_private import (
    check_json,
    disable_shared_memory_comm,
    fragment,
    global_grad_norm,
    kept_gathered,
    shard_size,
)
from train.engines.limits import Limits
from train.engines.state_rules import is_embedding
from train.engines.zero import DeepSpeedEngine, import_deepspeed

pytest.importorskip("deepspeed")

WORLD = 2
STAGES = (1, 2, 3)
SETTINGS = (
    # An odd width, so that parameters have an odd number of elements.
    *("engine=deepspeed", *UNEVEN, *COPIES, "model.dim=17", "engine.device=cpu"),
    *("train.max_steps=1", f"train.global_batch={WORLD}", "train.micro_batch=1"),
    # Otherwise stage 3 keeps small parameters whole on every rank.
    "engine.deepspeed.zero_optimization.stage3_param_persistence_threshold=0",
)
TOKENS = torch.randint(0, 61, (WORLD, 17), generator=torch.Generator().manual_seed(1))


@contextmanager
def opened(groups: ProcessGroups, stage: int) -> Iterator[DeepSpeedEngine]:
    engine = DeepSpeedEngine(load([*SETTINGS, f"engine.stage={stage}"]), groups)
    yield engine
    engine.close()


def gradient_norms(engine: DeepSpeedEngine) -> list[float]:
    """The norm as each call of the optimizer finds it, within the step."""
    norms: list[float] = []
    engine.optimizer.register_step_pre_hook(
        lambda *_: norms.append(float(global_grad_norm(engine.engine.optimizer)))
    )
    rank = engine.groups.rank
    with engine.grad_sync(last=True):
        engine.backward(engine.forward(batch_of(TOKENS[rank : rank + 1])).total)
    engine.optimizer_step(0.0, torch.zeros(()), Limits())
    return norms


def sharding(engine: DeepSpeedEngine) -> dict[str, Any]:
    """What stage 3 holds of each parameter, and for how long it gathers one."""
    parameters = list(engine.model.parameters())
    sizes = [shard_size(parameter) for parameter in parameters]
    embedding = engine.model.embed
    read = [engine.model.get_parameter("embed.weight")]
    gather = engine.deepspeed.zero.GatheredParameters
    with torch.no_grad(), gather(read):
        embedding(TOKENS)
        released = embedding.weight.numel()
    with torch.no_grad(), gather(read), kept_gathered(read, owner=engine):
        embedding(TOKENS)
        kept = embedding.weight.numel()
    return {"sizes": sizes, "released": released, "kept": kept, "after": embedding.weight.numel()}


def pieces(engine: DeepSpeedEngine) -> dict[str, list[float]]:
    """What `fragment` says is this rank's of each parameter."""
    others, embeddings = (group["params"][0] for group in engine.optimizer.param_groups)
    found = {}
    for name, parameter in engine.model.named_parameters():
        flat = embeddings if is_embedding(name) else others
        found[name] = flat.detach().narrow(0, *fragment(parameter)).tolist()
    return found


def on_a_rank(groups: ProcessGroups, _: Path) -> dict[str, Any]:
    linear = nn.functional.linear
    seen: dict[str, Any] = {"norms": {}, "pieces": {}}
    for stage in STAGES:
        with opened(groups, stage) as engine:
            seen["norms"][stage] = gradient_norms(engine)
            if stage < 3:
                seen["pieces"][stage] = pieces(engine)
            if stage == 3:
                seen |= sharding(engine)
                seen["linear is replaced"] = nn.functional.linear is not linear
            operators = engine.deepspeed.ops.__compatible_ops__
            seen["compiles"] = operators["deepspeed_shm_comm"]
            operators["deepspeed_shm_comm"] = True
            disable_shared_memory_comm(engine.deepspeed)
            seen["then compiles"] = operators["deepspeed_shm_comm"]
    return seen


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank has seen of stages 1 to 3, in one life of the processes."""
    return run_ranks(WORLD, on_a_rank, tmp_path_factory.mktemp("deepspeed"))


@pytest.fixture(scope="module")
def model() -> Transformer:
    config = load([*SETTINGS, "engine.stage=1"])
    return Transformer(config.model).reset(config.seed)


def test_the_gradients_norm_is_known_within_the_step(
    ranks: list[dict[str, Any]], model: Transformer
) -> None:
    total = model.loss(TOKENS[:, :-1], TOKENS[:, 1:]).total
    gradients: tuple[Tensor, ...] = torch.autograd.grad(total, list(model.parameters()))
    norm = nn.utils.get_total_norm(gradients).item()
    for seen in ranks:
        for stage in STAGES:
            assert seen["norms"][stage] == pytest.approx([norm] * len(seen["norms"][stage]))
            assert seen["norms"][stage]


@pytest.mark.parametrize("stage", [1, 2])
def test_the_ranks_parts_of_a_parameter_are_the_whole_of_it_in_their_order(
    stage: int, ranks: list[dict[str, Any]], model: Transformer
) -> None:
    of_ranks = [seen["pieces"][stage] for seen in ranks]
    cut = [name for name in of_ranks[0] if all(parts[name] for parts in of_ranks)]
    assert cut  # at a border between ranks
    for name, parameter in model.named_parameters():
        whole = [value for parts in of_ranks for value in parts[name]]
        assert whole == parameter.flatten().tolist(), name


def test_stage_3_cuts_each_parameter_into_equal_padded_shards(
    ranks: list[dict[str, Any]], model: Transformer
) -> None:
    sizes = [-(-parameter.numel() // WORLD) for parameter in model.parameters()]
    assert any(parameter.numel() % WORLD for parameter in model.parameters())
    for seen in ranks:
        assert seen["sizes"] == sizes


def test_a_gathered_parameter_is_released_by_its_module_unless_another_uses_it(
    ranks: list[dict[str, Any]], model: Transformer
) -> None:
    for seen in ranks:
        assert seen["released"] == 0
        assert seen["kept"] == model.embed.weight.numel()
        assert seen["after"] == 0


def test_stage_3_replaces_linear_for_the_whole_process(ranks: list[dict[str, Any]]) -> None:
    assert all(seen["linear is replaced"] for seen in ranks)


def test_the_shared_memory_all_reduce_can_be_declared_incompatible(
    ranks: list[dict[str, Any]],
) -> None:
    for seen in ranks:
        assert seen["compiles"] is False
        assert seen["then compiles"] is False


def test_check_json_accepts_what_deepspeed_accepts() -> None:
    """What it refuses is tested in test_zero.py."""
    import_deepspeed(torch.device("cpu"))
    check_json({"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 2}})
