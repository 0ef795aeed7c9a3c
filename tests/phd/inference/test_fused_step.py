"""A decoded token's kernels give the logits of the full forward, in Triton's interpreter."""

import os
from dataclasses import replace
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phd.config import ModelConfig, Norm, Variant
from phd.inference.cuda_graph import Decoder
from phd.inference.fused_step import FusedStep, why_not_fused
from phd.inference.prefill import new_cache, prefill
from phd.model import Transformer
from tests.phd.inference.token_twins import has_token_kernels
from tests.phd.small_models import SMALL, model_of, of_variant

pytestmark = pytest.mark.usefixtures("triton_interpreter")


def apart(model: Transformer, tokens: torch.Tensor, lengths: list[int], steps: int) -> float:
    """How far the logits of some steps are from those of the full forward, at most.

    Args:
        tokens: int64 (B, T), the texts.
        lengths: tokens of each text that are in the cache before.
        steps: how many tokens each row gets then.
    """
    full = model.logits(tokens)
    _, cache = prefill(model, tokens[:, : max(lengths)], lengths, capacity=tokens.shape[1])
    step = FusedStep(model.fuse_projections(), cache)
    worst = 0.0
    for _ in range(steps):
        now = list(cache.host_lengths)
        logits = step(torch.stack([tokens[row, n] for row, n in enumerate(now)]))
        expected = torch.stack([full[row, n] for row, n in enumerate(now)])
        assert logits.shape == expected.shape
        worst = max(worst, float((logits - expected).abs().max()))
        cache.advance([1] * len(now))
    return worst


WITHOUT = ("free_pause", "sps")
"""The variants that the kernels cannot do."""

REPEATED = ("naive_repeat", "hidden_decoding")
"""The variants whose rule is that of `pause`."""

CASES = [
    *((variant, "reordered") for variant in get_args(Variant) if variant not in WITHOUT + REPEATED),
    *(("phd_cswa", norm) for norm in get_args(Norm)[1:]),
]


@torch.no_grad()
@pytest.mark.parametrize(("variant", "norm"), CASES)
def test_it_gives_the_logits_of_the_full_forward(variant: Variant, norm: Norm) -> None:
    model = model_of(of_variant(variant, norm=norm, layers=2), torch.float32)
    tokens = torch.randint(0, 17, (2, 13))
    assert apart(model, tokens, lengths=[11, 5], steps=2) < 1e-5  # a chunk ends at 12


# The interpreter takes seconds for each; `make soak-kernels` takes more of them.
@settings(max_examples=int(os.environ.get("CASES", "2")), deadline=None)
@given(config=st.from_type(ModelConfig).filter(has_token_kernels))
@torch.no_grad()
def test_it_does_so_for_every_setting_of_a_model(config: ModelConfig) -> None:
    model = model_of(config, torch.float32)
    tokens = torch.randint(0, 17, (3, 24))
    assert apart(model, tokens, lengths=[1, 22, 13], steps=2) < 2e-5


@torch.no_grad()
def test_it_reads_the_constants_of_mup_and_weights_that_change_in_place() -> None:
    config = of_variant("phd_cswa", layers=2, mup_base_dim=6, mup_base_head_dim=1)
    assert config.query_gain == 0.5
    model = model_of(config, torch.float32).fuse_projections()
    tokens = torch.randint(0, 17, (1, 4))
    _, cache = prefill(model, tokens[:, :3], capacity=4)
    step = FusedStep(model, cache)
    model.norm.weight.mul_(3)
    torch.testing.assert_close(step(tokens[:, 3]), model.logits(tokens)[:, 3], rtol=0, atol=1e-5)


@torch.no_grad()
def test_half_precision_is_as_near_as_its_rounding() -> None:
    dtype, config = torch.bfloat16, replace(SMALL, layers=2)
    exact = model_of(config, torch.float32)
    tokens = torch.randint(0, 17, (2, 3))
    full = exact.logits(tokens)[:, 2]
    model = Transformer(config).load(exact.state_dict()).to(dtype).fuse_projections()
    cache = new_cache(model, 2, capacity=3)
    step = FusedStep(model, cache)
    for n in range(3):
        logits = step(tokens[:, n])
        cache.advance([1, 1])
    assert logits.dtype == dtype
    assert (logits - full).abs().max() < 0.1 * full.std()


def test_it_says_why_it_cannot_be_used() -> None:
    double, single = (model_of(SMALL, dtype) for dtype in (torch.float64, torch.float32))
    reason = why_not_fused(single, new_cache(single, 1, 8))
    assert reason == "the projections are not fused; call Transformer.fuse_projections"
    single.fuse_projections()
    assert why_not_fused(single, new_cache(single, 1, 8)) is None
    reason = why_not_fused(double, new_cache(double, 1, 8))
    assert reason == "no kernel for torch.float64 with model.head_dim=4"
    with torch.autocast("cpu", torch.bfloat16):
        reason = why_not_fused(single, new_cache(single, 1, 8))
    assert reason == "the weights are in torch.float32, and the cache is in torch.bfloat16"
    handle = single.blocks[1].ffn.gate.register_forward_hook(lambda *_: None)
    reason = why_not_fused(single, new_cache(single, 1, 8))
    assert reason == "the model has hooks, adapters or other parts put in place"
    handle.remove()
    assert why_not_fused(single, new_cache(single, 1, 8)) is None


@pytest.mark.parametrize("variant", WITHOUT)
def test_a_rule_without_kernels_is_told_by_name_and_decoded_without_them(variant: Variant) -> None:
    model = model_of(of_variant(variant), torch.float32).fuse_projections()
    logits, cache = prefill(model, torch.arange(9)[None], capacity=10)
    reason = why_not_fused(model, cache)
    assert reason == f"no Triton kernels for the slots that model.variant={variant} sees"
    found = Decoder(model, cache)(logits.argmax(-1))
    text = torch.cat([torch.arange(9), logits.argmax(-1)])[None]
    torch.testing.assert_close(found, model.logits(text)[:, -1], rtol=1e-4, atol=1e-5)


def test_weights_that_are_read_stay_where_they_are() -> None:
    """An optimizer may hold views of them."""
    model = model_of(SMALL, torch.float32)
    before = [weight.data_ptr() for weight in model.parameters()]
    cache = new_cache(model, 1, 8)
    assert why_not_fused(model, cache) is not None
    Decoder(model, cache)(torch.tensor([1]))
    assert [weight.data_ptr() for weight in model.parameters()] == before
