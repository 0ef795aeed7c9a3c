"""Prefill by the kernels of training, in Triton's interpreter, equals the full forward pass."""

import os
from collections import Counter
from dataclasses import replace
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from phd.config import ModelConfig
from phd.inference.fused_rows import has_fused_rows
from phd.inference.prefill import extend, new_cache, prefill
from phd.model import Transformer
from tests.phd.small_models import SMALL, model_of, of_variant

CASES = int(os.environ.get("CASES", "8"))
FIRST = int(os.environ.get("SEED", "0"))

interpreted = pytest.mark.usefixtures("triton_interpreter")


def random_config(random: Random) -> ModelConfig:
    K = random.choice([2, 2, 3, 4, 6])
    return replace(
        SMALL,
        variant=random.choice(["phd", "phd_swa", "phd_swa", "phd_cswa", "phd_cswa"]),
        K=K,
        window=random.choice([1, 2, random.randint(1, 12), random.randint(1, 30), 1000]),
        chunk=random.choice([random.randint(1, 12), random.randint(1, 60)]),
        span_unit=random.choice(["hidden", "hidden", "token"]),
        layers=random.randint(1, 3),
        head_dim=random.choice([4, 8]),
        kv_heads=random.choice([1, 2, 4]),
        attention="fused",
    )


def twins(config: ModelConfig) -> tuple[Transformer, Transformer]:
    """The model in float32 with the fused kernels, and in float64 without them."""
    model, exact = model_of(config, torch.float32), Transformer(replace(config, attention="packed"))
    return model, exact.double().load(dict(model.named_parameters()))


def compare(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


@interpreted
@torch.no_grad()
@pytest.mark.parametrize("seed", range(FIRST, FIRST + CASES))
def test_logits_are_those_of_the_full_forward(seed: int) -> None:
    random = Random(seed)
    model, exact = twins(random_config(random))
    B, T = random.choice([1, 2]), random.randint(2, 32)
    tokens = torch.randint(0, 17, (B, T), generator=torch.Generator().manual_seed(seed))
    full = exact.logits(tokens)
    done, piece = random.randint(1, T), random.choice([None, None, 5, 11])
    logits, cache = prefill(model, tokens[:, :done], piece=piece)
    compare(logits, full[:, done - 1])
    while done < T:
        new = random.randint(1, T - done)
        keep = random.randint(0, new)
        logits = extend(model, tokens[:, done : done + new], cache, keep=keep)
        done += new
        compare(logits, full[:, done - keep : done])


@interpreted
@torch.no_grad()
def test_half_precision_is_as_near_as_the_full_forward_itself() -> None:
    model, exact = twins(of_variant("phd_cswa", attention="fused"))
    tokens = torch.randint(0, 17, (2, 30), generator=torch.Generator().manual_seed(0))
    full = exact.logits(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = exact.float().logits(tokens).float()
        _, cache = prefill(model, tokens[:, :13], capacity=30)
        found = extend(model, tokens[:, 13:], cache, keep=10).float()
    assert cache.originals[0].dtype == torch.bfloat16
    off = (found - full[:, -10:]).abs().max()
    assert off < 2 * (rounded - full).abs().max()


class Operators(TorchDispatchMode):
    """Counts the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if not func.is_view:
            self.count[str(func)] += 1
        return func(*args, **kwargs or {})


def operators(config: ModelConfig, tokens: int) -> Counter[str]:
    model = model_of(config, torch.float32)
    with Operators() as mode:
        prefill(model, torch.zeros(1, tokens, dtype=torch.long))
    return mode.count


@interpreted
@pytest.mark.parametrize("variant", ["phd", "phd_swa", "phd_cswa"])
def test_the_number_of_operators_does_not_grow_with_tokens_or_copies(variant: Any) -> None:
    config = of_variant(variant, attention="fused", window=20, chunk=40, max_seq_len=400)
    # More rows than the CPU has another product for; the ring is written without a break.
    sizes = (5, 60), (5, 260), (9, 150)
    counts = [operators(replace(config, K=K), tokens) for K, tokens in sizes]
    assert counts[0] == counts[1] == counts[2]


def test_it_is_chosen_where_there_are_kernels_for_it() -> None:
    def chosen(dtype: torch.dtype, **settings: Any) -> bool:
        return has_fused_rows(new_cache(model_of(of_variant(**settings), dtype), 1, 8))

    interpreted = "TRITON_INTERPRET" in os.environ
    assert chosen(torch.float32, variant="phd_cswa", attention="fused") == interpreted
    assert not chosen(torch.float64, variant="phd_cswa", attention="fused")
    assert not chosen(torch.float32, variant="phd_cswa")  # the CPU
    assert not chosen(torch.float32, variant="vanilla", attention="fused")
    assert not chosen(torch.float32, variant="naive_repeat", attention="fused")
