"""A compiled step decodes what the full forward gives, by few graphs of few kernels."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code

from phd.config import ModelConfig
from phd.inference import compiled_step
from phd.inference.compiled_step import CompiledStep
from phd.inference.cuda_graph import Decoder
from phd.inference.prefill import make_room, prefill
from tests.phd.small_models import model_of, of_variant

pytestmark = [
    pytest.mark.compile,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch's own, of its compiler
]
TOKENS = torch.randint(0, 17, (3, 40), generator=torch.Generator().manual_seed(0))
LAYERS = {"layers": 3, "max_seq_len": 40}


@pytest.fixture(autouse=True)
def small_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs of a layer, where a model has three."""
    monkeypatch.setattr(compiled_step, "MOST_LAYERS", 1)
    monkeypatch.setattr(compiled_step, "SIZES", (2, 1))


def decode_and_compare(config: ModelConfig, backend: Callable[..., Any], capacity: int) -> None:
    """Six tokens of unequal rows, in a cache that may have to grow."""
    model = model_of(config)
    full = model.logits(TOKENS)
    for rows in (2, 3):
        lengths = [9, 4, 6][:rows]
        _, cache = prefill(model, TOKENS[:rows, :9], lengths, capacity=capacity)
        step = CompiledStep(model, cache, backend)
        for _ in range(6):
            make_room(model, cache)
            token = torch.stack([TOKENS[row, n] for row, n in enumerate(lengths)])
            logits = step(token)
            cache.advance([1] * rows)
            expected = torch.stack([full[row, n] for row, n in enumerate(lengths)])
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)
            lengths = [n + 1 for n in lengths]


@torch.no_grad()
@pytest.mark.parametrize(
    ("settings", "graphs"),
    [
        ({"variant": "naive_repeat", "layers": 4}, 2),  # two layers in a graph
        ({"variant": "phd_swa", "window": 50}, 2),  # its ring grows with the cache
        # More queries than share a mask; the first block has a wiring of its own.
        ({"variant": "phd_cswa", "K": 18, "norm": "hybrid_star"}, 3),
    ],
    ids=str,
)
def test_it_has_few_graphs_for_all_lengths_capacities_and_rows(
    settings: dict[str, Any], graphs: int
) -> None:
    torch.compiler.reset()
    config = of_variant(**LAYERS | settings)
    counter = CompileCounterWithBackend("aot_eager")
    for capacity in (9, 30):
        decode_and_compare(config, counter, capacity)
    assert counter.frame_count == graphs


@torch.no_grad()
def test_more_models_are_compiled_than_torch_would() -> None:
    torch.compiler.reset()
    with torch._dynamo.config.patch(recompile_limit=2):
        for heads in (1, 2, 3, 4):
            model = model_of(of_variant("vanilla", layers=1, heads=heads, kv_heads=1))
            _, cache = prefill(model, TOKENS[:, :9])
            counter = CompileCounterWithBackend("eager")
            make_room(model, cache)
            logits = CompiledStep(model, cache, counter)(TOKENS[:, 9])
            torch.testing.assert_close(logits, model.logits(TOKENS)[:, 9], rtol=0, atol=1e-9)
            assert counter.frame_count == 1
        assert torch._dynamo.config.recompile_limit == 2


@torch.no_grad()
def test_a_layer_is_few_kernels() -> None:
    torch.compiler.reset()
    model = model_of(of_variant("phd_cswa", K=2, **LAYERS))
    full = model.logits(TOKENS)
    _, cache = prefill(model, TOKENS[:1, :9], capacity=20)
    logits, code = run_and_get_code(Decoder(model, cache, compiled=True), TOKENS[:1, 9])
    torch.testing.assert_close(logits, full[:1, 9], rtol=0, atol=1e-9)
    between, last = map(kernels, code)
    assert between["products"] == 7
    assert last["products"] == 8
    assert between["attention"] == last["attention"] == 2
    assert 1 <= between["fused"] <= 9
    assert 1 <= last["fused"] <= 10


def kernels(code: str) -> dict[str, int]:
    """The calls in a graph's code."""
    calls = {
        "products": r"extern_kernels\.\w+\(",
        "attention": r"= torch\.ops\.aten\._scaled_dot_product_flash_attention_for_cpu\.default\(",
        "fused": r"^ +(?:\w+\.)?cpp_fused_\w+\(",
    }
    return {name: len(re.findall(call, code, re.MULTILINE)) for name, call in calls.items()}
