"""On a GPU, decoding equals the full forward pass, without waiting for the device."""

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch

from phd.attention.flash import LONG_PROMPT, causal_forward, prompt_forward
from phd.config import VARIANTS, Norm, SpanUnit, Variant
from phd.inference.cached_attention import attend_cached
from phd.inference.cuda_graph import Decoder
from phd.inference.fused_rows import has_fused_rows
from phd.inference.prefill import decode, extend, prefill
from phd.model import Transformer
from tests.phd.inference.token_twins import Twins
from tests.phd.small_models import FOR_CUDA

pytestmark = [
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs an NVIDIA GPU and a CUDA build of torch"
    ),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a proto:UserWarning"),
]
variants = pytest.mark.parametrize("variant", get_args(Variant))
LAYER_OF_1B2 = {"dim": 2048, "ffn_dim": 8192, "heads": 32, "kv_heads": 8, "head_dim": 64}


def model_of(variant: Variant, **others: Any) -> Transformer:
    K = min(3, VARIANTS[variant].most_copies or 3)
    return (
        Transformer(replace(FOR_CUDA, **{"variant": variant, "K": K, **others}))
        .reset(0)
        .cuda()
        .fuse_projections()
    )


def tokens_of(rows: int, tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, FOR_CUDA.vocab_size, (rows, tokens), generator=generator).cuda()


def in_half_precision(model: Transformer) -> tuple[Transformer, Transformer]:
    """The model with weights rounded to bfloat16, in bfloat16 and in float32."""
    half = model.to(torch.bfloat16)
    exact = Transformer(model.config).load(half.state_dict()).float().cuda()
    for x in (half, exact):
        x.rope.build(torch.device("cuda"))
    return half, exact


def assert_near(logits: torch.Tensor, exact: torch.Tensor) -> None:
    """Apart by a few roundings of each layer's bfloat16, 2^-9 each, and all of them like noise."""
    off = logits.float() - exact
    assert off.std() < 0.02 * exact.std()
    assert off.abs().max() < 0.1 * exact.std()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 4, 300])
def test_the_kernel_for_few_queries_equals_attention(dtype: torch.dtype, rows: int) -> None:
    q, k, v = (torch.randn(2, n, m, 96, device="cuda") for n, m in ((4, rows), (2, 999), (2, 999)))
    q, k, v = (x.to(dtype) for x in (q, k, v))
    visible = torch.randint(1, 1000, (2, rows), device="cuda")
    for limit in (visible, None):
        out, lse = attend_cached(q, k, v, limit)
        scores = q.double() @ k.double().repeat_interleave(2, 1).mT * 96**-0.5
        if limit is not None:
            hidden = torch.arange(999, device="cuda") >= limit[:, None, :, None]
            scores = scores.masked_fill(hidden, -torch.inf)
        exact = scores.softmax(-1) @ v.double().repeat_interleave(2, 1)
        tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(out.double(), exact, rtol=0, atol=tolerance)
        torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=0, atol=10 * tolerance)


@pytest.mark.parametrize("tokens", [LONG_PROMPT, LONG_PROMPT + 1])
def test_a_long_prompt_is_attended_to_as_a_short_one(tokens: int) -> None:
    """Where there is cuDNN, in its kernel, filled up."""
    q, k, v = (
        torch.randn(1, n, tokens, 96, device="cuda", dtype=torch.bfloat16) for n in (4, 2, 2)
    )
    out, lse = prompt_forward(q, k, v, 96**-0.5)
    assert out.shape == q.shape
    expected = causal_forward(q, k, v, 96**-0.5, varying_length=True)
    torch.testing.assert_close(out, expected[0], rtol=0, atol=2e-2)
    torch.testing.assert_close(lse, expected[1], rtol=0, atol=1e-2)


@torch.no_grad()
@variants
@pytest.mark.parametrize("compiled", [False, True])
def test_a_graph_decodes_what_the_full_forward_gives(variant: Variant, compiled: bool) -> None:
    torch.compiler.reset()
    model, tokens = model_of(variant), tokens_of(2, 330)
    full = model.logits(tokens)
    lengths = [250, 239]
    # It grows on the way, and is captured again.
    _, cache = prefill(model, tokens[:, :250], lengths, piece=100, capacity=255)
    decoder = Decoder(model, cache, compiled=compiled)
    assert decoder.kind == ("compiled" if compiled else "fused")
    for _ in range(70):
        logits = decoder(torch.stack([tokens[row, n] for row, n in enumerate(lengths)]))
        expected = torch.stack([full[row, n] for row, n in enumerate(lengths)])
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-3)
        lengths = [n + 1 for n in lengths]
    assert cache.host_lengths == cache.lengths.tolist() == lengths


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 25])  # 1 and 75 slots: Triton's products, and cuBLAS's
@pytest.mark.parametrize("norm", get_args(Norm))
def test_a_graph_decodes_every_wiring(norm: Norm, rows: int) -> None:
    model, tokens = model_of("phd_cswa", norm=norm), tokens_of(rows, 60)
    full = model.logits(tokens)
    _, cache = prefill(model, tokens[:, :40], capacity=60)
    decoder = Decoder(model, cache)
    assert decoder.kind == "fused"
    for n in range(40, 60):
        torch.testing.assert_close(decoder(tokens[:, n]), full[:, n], rtol=0, atol=1e-3)


@torch.no_grad()
def test_a_model_whose_projections_are_not_fused_keeps_its_weights_where_they_are() -> None:
    model, tokens = Transformer(replace(FOR_CUDA, K=2)).reset(0).cuda(), tokens_of(1, 9)
    before = [weight.data_ptr() for weight in model.parameters()]
    _, cache = prefill(model, tokens, capacity=20)
    decoder = Decoder(model, cache)
    decoder(tokens[:, 0])
    assert decoder.kind == "eager"
    assert [weight.data_ptr() for weight in model.parameters()] == before


@torch.no_grad()
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_graph_decodes_on_a_device_that_is_not_the_current_one() -> None:
    model, tokens = model_of("phd_cswa").to("cuda:1"), tokens_of(2, 40).to("cuda:1")
    model.fuse_projections().rope.build(tokens.device)
    full = model.logits(tokens)
    _, cache = prefill(model, tokens[:, :30], capacity=40)
    decoder = Decoder(model, cache)
    for n in range(30, 40):
        torch.testing.assert_close(decoder(tokens[:, n]), full[:, n], rtol=0, atol=1e-3)


@torch.no_grad()
@variants
def test_several_tokens_at_once_are_those_one_by_one(variant: Variant) -> None:
    model, tokens = model_of(variant), tokens_of(2, 300)
    full = model.logits(tokens)
    _, cache = prefill(model, tokens[:, :200])
    logits = extend(model, tokens[:, 200:240], cache, [40, 17], keep=10)
    torch.testing.assert_close(logits[0], full[0, 230:240], rtol=0, atol=1e-3)
    torch.testing.assert_close(logits[1], full[1, 207:217], rtol=0, atol=1e-3)


@torch.no_grad()
@variants
@pytest.mark.parametrize("copies", [2, 16])
def test_a_prompt_in_pieces_gives_what_the_full_forward_gives(
    variant: Variant, copies: int
) -> None:
    model = model_of(variant, K=min(copies, VARIANTS[variant].most_copies or copies))
    tokens = tokens_of(2, 300)
    full = model.logits(tokens)
    logits, cache = prefill(model, tokens[:, :203], piece=90)
    torch.testing.assert_close(logits, full[:, 202], rtol=0, atol=1e-3)
    logits = extend(model, tokens[:, 203:250], cache, keep=20)
    torch.testing.assert_close(logits, full[:, 230:250], rtol=0, atol=1e-3)


@torch.no_grad()
@variants
def test_the_host_does_not_wait_for_a_prompt(variant: Variant) -> None:
    model, tokens = model_of(variant), tokens_of(2, 80)
    with torch.autocast("cuda", torch.bfloat16):
        prefill(model, tokens, piece=50)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            prefill(model, tokens, piece=50)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@torch.no_grad()
@variants
def test_the_host_does_not_wait_for_a_decoded_token(variant: Variant) -> None:
    model, tokens = model_of(variant), tokens_of(2, 40)
    _, cache = prefill(model, tokens, capacity=100)
    decode(model, tokens[:, 0], cache)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for n in range(5):
            decode(model, tokens[:, n], cache)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@torch.no_grad()
@variants
@pytest.mark.parametrize("kind", ["fused", "eager"])
def test_half_precision_is_near(variant: Variant, kind: str) -> None:
    model, tokens = model_of(variant), tokens_of(2, 60)
    full = model.logits(tokens)
    if kind == "fused":  # its kernels convert no weights
        model.to(torch.bfloat16).fuse_projections().rope.build(tokens.device)
    with torch.autocast("cuda", torch.bfloat16):
        _, cache = prefill(model, tokens[:, :40], capacity=60)
        decoder = Decoder(model, cache)
        assert decoder.kind == kind
        for n in range(40, 60):
            off = (decoder(tokens[:, n]).float() - full[:, n]).abs().max()
            assert off < 0.1 * full.std()


@torch.no_grad()
@pytest.mark.parametrize("span_unit", get_args(SpanUnit))
@pytest.mark.parametrize("variant", ["phd_swa", "phd_cswa"])
def test_half_precision_is_near_after_a_long_prompt_of_many_copies(
    variant: Variant, span_unit: SpanUnit
) -> None:
    """Filled up for cuDNN where there is cuDNN, and the hidden copies in training's kernel."""
    tokens = LONG_PROMPT + 4
    model = model_of(variant, K=16, span_unit=span_unit, max_seq_len=tokens + 50)
    half, exact = in_half_precision(model)
    text = tokens_of(2, tokens + 50)
    full = exact.logits(text)
    with torch.autocast("cuda", torch.bfloat16):
        logits, cache = prefill(half, text[:, :tokens])
        assert has_fused_rows(cache)
        assert_near(logits, full[:, tokens - 1])
        # They read what the prompt has left in the cache.
        assert_near(extend(half, text[:, tokens:], cache, keep=50), full[:, tokens:])


@torch.no_grad()
@pytest.mark.parametrize("K", [2, 16])
def test_half_precision_is_near_at_the_shape_of_1b2s_layers(K: int) -> None:
    model = model_of("phd_cswa", K=K, layers=2, **LAYER_OF_1B2)
    half, exact = in_half_precision(model)
    text = tokens_of(2, 60)
    full = exact.logits(text)
    with torch.autocast("cuda", torch.bfloat16):
        _, cache = prefill(half, text[:, :40], [40, 33], capacity=60)
        decoder = Decoder(half, cache)
        assert decoder.kind == "fused"
        for n in range(20):
            now = [40 + n, 33 + n]
            logits = decoder(torch.stack([text[row, at] for row, at in enumerate(now)]))
            assert_near(logits, torch.stack([full[row, at] for row, at in enumerate(now)]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("variant", get_args(Variant))
def test_the_kernels_of_a_token_equal_the_slow_step(
    variant: Variant, head_dim: int, dtype: torch.dtype
) -> None:
    K = min(3, VARIANTS[variant].most_copies or 3)
    config = replace(FOR_CUDA, variant=variant, K=K, head_dim=head_dim, layers=2)
    twins = Twins(config, [300, 0, 63, 32, 511], 600, dtype, "cuda")
    for _ in range(3):
        twins.add_token()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", get_args(Norm))
@pytest.mark.parametrize(("K", "span_unit"), [(2, "hidden"), (16, "token"), (256, "token")])
def test_the_kernels_of_a_token_take_any_norm_and_many_copies(
    K: int, span_unit: SpanUnit, norm: Norm, dtype: torch.dtype
) -> None:
    others = {"norm": norm, "copy_positions": "flattened", "layers": 2}
    config = replace(FOR_CUDA, variant="phd_cswa", K=K, span_unit=span_unit, **others)
    twins = Twins(config, [100, 31], 130, dtype, "cuda")
    for _ in range(2):
        twins.add_token()


def test_the_kernels_of_a_token_give_the_same_bits_every_time() -> None:
    config = replace(FOR_CUDA, variant="phd_cswa", K=16, layers=2)
    twins = Twins(config, [300, 5], 600, torch.bfloat16, "cuda")
    qkv = torch.randn(32, 512, dtype=torch.bfloat16)
    # The first call changes the ring, and the later ones write the same into it.
    _, second = (twins.fast_output(qkv, 0, last=False, splits=None) for _ in range(2))
    ring = twins.fast.ring[0].clone()
    third = twins.fast_output(qkv, 0, last=False, splits=None)
    assert torch.equal(second, third)
    assert torch.equal(ring, twins.fast.ring[0])
