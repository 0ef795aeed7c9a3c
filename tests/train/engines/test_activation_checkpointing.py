"""Checkpointed blocks keep less, and their gradients are the same to the last bit."""

from collections.abc import Callable
from functools import partialmethod
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from phd.block import Block
from phd.config import ModelConfig
from phd.model import Transformer
from phd.segments import Segments
from tests.train.batches import batch_of
from tests.train.many_ranks import run_ranks
from train.compose import load
from train.config import Config
from train.distributed.process_groups import ProcessGroups
from train.engines.activation_checkpointing import checkpoint_activations
from train.engines.fsdp import FsdpEngine
from train.loop import train_step
from train.settings.engine import FsdpConfig

SHAPE: dict[str, Any] = {
    "layers": 4,
    "dim": 32,
    "ffn_dim": 52,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "max_seq_len": 64,
    "window": 3,
    "chunk": 4,
}
TOKENS, TARGETS = torch.randint(0, 64, (2, 2, 64), generator=torch.Generator().manual_seed(0))
SEGMENTS = Segments.of(torch.where(torch.arange(64) < torch.tensor([[20], [64]]), 0, 20))
MODES = ("full", "selective")


def model_of(mode: str = "none", every: int = 1, **settings: Any) -> Transformer:
    model = Transformer(ModelConfig(**SHAPE, **settings)).reset(0)
    config = FsdpConfig(
        activation_checkpointing=mode,  # type: ignore[arg-type]
        checkpoint_every_block=every,
    )
    checkpoint_activations(model, config)
    return model


def step(model: Transformer, segments: Segments | None = None) -> list[Tensor]:
    """The loss and all gradients."""
    total = model.loss(TOKENS, TARGETS, segments=segments).total
    return [total, *torch.autograd.grad(total, list(model.parameters()))]


VARIANTS: dict[str, dict[str, Any]] = {
    "vanilla": {"variant": "vanilla", "K": 1},
    "naive_repeat": {"variant": "naive_repeat", "K": 2},
    "phd_cswa": {"variant": "phd_cswa", "K": 3},
    "hybrid": {"variant": "phd_swa", "K": 2, "norm": "hybrid", "copy_embedding": True},
}


@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["rows", "documents"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_the_same_to_the_last_bit(
    mode: str, variant: str, segments: Segments | None
) -> None:
    for half in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            expected = step(model_of(**VARIANTS[variant]), segments)
            for every in (1, 2):
                found = step(model_of(mode, every, **VARIANTS[variant]), segments)
                assert all(map(torch.equal, found, expected))


@pytest.mark.usefixtures("triton_interpreter")
@pytest.mark.parametrize("mode", MODES)
def test_kernels_that_change_results_in_place_change_none_that_is_kept(mode: str) -> None:
    shape = SHAPE | {"layers": 2, "K": 2, "attention": "fused"}
    plain, checkpointed = (Transformer(ModelConfig(**shape)).reset(0) for _ in range(2))
    checkpoint_activations(checkpointed, FsdpConfig(activation_checkpointing=mode))  # type: ignore[arg-type]
    rows = TOKENS[:1, :24], TARGETS[:1, :24]
    found, expected = (
        torch.autograd.grad(model.loss(*rows).total, list(model.parameters()))
        for model in (checkpointed, plain)
    )
    assert all(map(torch.equal, found, expected))


def counted(function: Callable[[], Any]) -> tuple[dict[Any, int], Any]:
    """How often each operator ran, and what the function returned."""

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            counts[func] = counts.get(func, 0) + 1
            return func(*args, **(kwargs or {}))

    counts: dict[Any, int] = {}
    with Counting():
        return counts, function()


def test_only_what_is_not_kept_is_computed_twice() -> None:
    aten = torch.ops.aten
    flash = aten._scaled_dot_product_flash_attention_for_cpu.default
    counts = {
        mode: counted(lambda mode=mode: step(model_of(mode, variant="phd_cswa", K=3)))[0]
        for mode in ("none", *MODES)
    }
    assert counts["none"][flash] == counts["selective"][flash] == 4
    assert counts["full"][flash] == 8
    assert counts["none"][aten.mm.default] == counts["selective"][aten.mm.default]
    assert counts["full"][aten.mm.default] > counts["none"][aten.mm.default]
    assert counts["selective"][aten.rsqrt_.default] == counts["full"][aten.rsqrt_.default]
    assert counts["selective"][aten.rsqrt_.default] > counts["none"][aten.rsqrt_.default]


def saved_by_autograd(mode: str, every: int) -> int:
    """Bytes that are kept for the backward pass outside of checkpoints' own stores."""
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    model = model_of(mode, every, variant="phd_cswa", K=3)
    with saved_tensors_hooks(note, lambda tensor: tensor):
        model.loss(TOKENS, TARGETS)
    return sum(sizes.values())


def test_every_second_block_is_checkpointed_and_saves_about_half() -> None:
    none, all_blocks = saved_by_autograd("none", 1), saved_by_autograd("full", 1)
    second = saved_by_autograd("full", 2)
    assert all_blocks < 0.3 * none
    assert 0.3 < (second - all_blocks) / (none - all_blocks) < 0.7


@pytest.mark.parametrize("mode", MODES)
def test_parameters_keep_their_names(mode: str) -> None:
    expected = dict(model_of().named_parameters())
    assert dict(model_of(mode).named_parameters()).keys() == expected.keys()


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not:UserWarning")
@pytest.mark.parametrize("mode", MODES)
def test_compiled_blocks_are_one_graph_each_and_equal_eager_ones(mode: str) -> None:
    torch.compiler.reset()
    settings = {"K": 3, "attention": "packed"}
    model = Transformer(ModelConfig(**SHAPE, **settings)).reset(0)
    checkpoint_activations(
        model,
        FsdpConfig(activation_checkpointing=mode, compile=True),  # type: ignore[arg-type]
    )
    counter = CompileCounterWithBackend("aot_eager")
    for block in model.blocks:
        block.compile(backend=counter, fullgraph=True)
    for found, expected in zip(step(model), step(model_of(**settings)), strict=True):
        assert (found - expected).norm() <= 1e-5 * expected.norm()
    # The first block (equal copies), those between, and the last (one copy of queries).
    assert counter.frame_count == 3


# With sharding

SMALL = (
    *("data=files", "data.sources.files.paths=unread.jsonl", "data.lanes=1"),
    *("model=phd_cswa", "model.K=3", "train.max_steps=9", "train.global_batch=4"),
    *("train.seq_len=64", "hooks=quiet", "hooks.sample.tokens=4", "engine.device=cpu"),
    *(f"model.{name}={value}" for name, value in SHAPE.items()),
)
SETTINGS = {
    "full": ("engine.activation_checkpointing=full",),
    "selective": (
        *("engine.activation_checkpointing=selective", "engine.checkpoint_every_block=2"),
        "engine.reshard_after_forward=always",
    ),
}
# Sharding is around the graphs, whatever these are: two blocks and the least attention give the
# fewest and the smallest.
SMALLEST = ("model.layers=2", "model.attention=reference")
COMPILED = {
    "compiled": ("engine.compile=true",),
    # Without an evaluation, whose graphs the first step would compile as well.
    "both": (
        *("engine.compile=true", "engine.activation_checkpointing=selective"),
        "data.holdout=0",
    ),
}


def two_steps(groups: ProcessGroups, config: Config) -> list[np.ndarray]:
    # It traces, functionalises and differentiates as the default backend does, and builds no C++.
    Block.compile = partialmethod(nn.Module.compile, backend="aot_eager")
    engine = FsdpEngine(config, groups)
    rows = torch.randint(0, 64, (4, 65), generator=torch.Generator().manual_seed(0))
    results = [
        train_step(engine, batch_of(rows[groups.rank :: groups.world_size]), 1e-3) for _ in range(2)
    ]
    scalars = [x.numpy() for result in results for x in (result.loss, result.grad_norm)]
    return [*scalars, *(x.numpy(force=True).copy() for x in engine.shards.values())]


def all_steps(groups: ProcessGroups, configs: list[Config]) -> list[list[np.ndarray]]:
    return [two_steps(groups, config) for config in configs]


@pytest.mark.process
@pytest.mark.parametrize("cut", ["fsdp", "ddp"])
def test_sharded_the_steps_stay_the_same_to_the_last_bit(cut: str) -> None:
    configs = [load([*SMALL, f"engine={cut}", *others]) for others in ((), *SETTINGS.values())]
    for expected, *found in run_ranks(2, all_steps, configs):
        for name, arrays in zip(SETTINGS, found, strict=True):
            for ours, theirs in zip(arrays, expected, strict=True):
                np.testing.assert_array_equal(ours, theirs, err_msg=name)


@pytest.mark.compile
@pytest.mark.process
@pytest.mark.parametrize("cut", ["fsdp", "ddp"])
def test_sharded_and_compiled_the_steps_stay_the_same(cut: str) -> None:
    small = [*SMALL, *SMALLEST, f"engine={cut}"]
    configs = [load(small), *(load([*small, *others]) for others in COMPILED.values())]
    for expected, *found in run_ranks(2, all_steps, configs):
        for name, arrays in zip(COMPILED, found, strict=True):
            for ours, theirs in zip(arrays, expected, strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5, err_msg=name)
