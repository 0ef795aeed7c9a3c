"""Documents packed into rows are computed as if each were alone, and never see each other."""

from itertools import product
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from phd.attention.attend import attend
from phd.config import VARIANTS, Backend, CopyPositions, ModelConfig, SpanUnit, Variant
from phd.model import Transformer
from phd.pattern import Pattern
from phd.segments import Segments

claim = settings(derandomize=True, deadline=None, max_examples=80)
SMALL: dict[str, Any] = {
    "window": 5,
    "layers": 2,
    "dim": 16,
    "ffn_dim": 24,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 4,
    "vocab_size": 17,
    "max_seq_len": 39,
}


def rows_of(*rows: list[int]) -> Segments:
    """Rows of documents of these lengths."""
    return Segments.of(
        torch.tensor([[sum(row[:i]) for i, n in enumerate(row) for _ in range(n)] for row in rows])
    )


# With chunks of 4 tokens: documents that begin at a chunk or within one, of one token, of a row.
ROWS = rows_of([1, 1, 8, 4, 3, 20, 2], [39], [12, 26, 1])


def documents_of(segments: Segments) -> list[tuple[int, slice]]:
    """(row, tokens) of every document."""
    return [
        (b, slice(start, start + row.count(start)))
        for b, row in enumerate(segments.starts.tolist())
        for start in sorted(set(row))
    ]


def float64_model(config: ModelConfig) -> Transformer:
    model = Transformer(config).reset(0).double()
    if config.copy_embedding:
        torch.nn.init.normal_(model.copy_embed.weight)
    return model


def random_tokens(config: ModelConfig, segments: Segments) -> Tensor:
    return torch.randint(0, config.vocab_size, segments.starts.shape)


def check_alone(config: ModelConfig, segments: Segments) -> None:
    """Every document's hidden states in the packed rows are those that it has alone."""
    model, tokens = float64_model(config), random_tokens(config, segments)
    packed = model(tokens, segments)
    for b, where in documents_of(segments):
        alone = model(tokens[b : b + 1, where])[0]
        torch.testing.assert_close(packed[b, where], alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", ["packed", "reference"])
@pytest.mark.parametrize("positions", get_args(CopyPositions))
@pytest.mark.parametrize("unit", get_args(SpanUnit))
@pytest.mark.parametrize("K", [1, 2, 3, 4])
@pytest.mark.parametrize("variant", [v for v in get_args(Variant) if v != "vanilla"])
def test_a_document_in_a_row_is_computed_as_if_it_were_alone(
    variant: Variant, K: int, unit: SpanUnit, positions: CopyPositions, backend: Backend
) -> None:
    chunk = 4 if unit == "token" else 4 * max(K - 1, 1)
    config = ModelConfig(
        variant=variant,
        K=min(K, VARIANTS[variant].most_copies or K),
        chunk=chunk,
        span_unit=unit,
        copy_positions=positions,
        copy_embedding=positions == "flattened",
        attention=backend,
        **SMALL,
    )
    check_alone(config, ROWS)


@claim
@given(config=..., segments=...)
def test_any_model_computes_any_documents_as_if_they_were_alone(
    config: ModelConfig, segments: Segments
) -> None:
    check_alone(config, segments)


@claim
@given(config=..., segments=..., data=st.data())
def test_changing_a_token_changes_no_output_of_another_document(
    config: ModelConfig, segments: Segments, data: st.DataObject
) -> None:
    model, tokens = float64_model(config), random_tokens(config, segments)
    b, where = data.draw(st.sampled_from(documents_of(segments)))
    t = data.draw(st.integers(where.start, where.stop - 1))
    changed = tokens.clone()
    changed[b, t] = (tokens[b, t] + 1) % config.vocab_size
    moved = (model(tokens, segments) != model(changed, segments)).any(-1)
    assert moved[b, t]
    moved[b, where] = False
    assert not moved.any()


@claim
@given(config=..., segments=..., data=st.data())
def test_a_document_gives_no_gradient_to_another(
    config: ModelConfig, segments: Segments, data: st.DataObject
) -> None:
    model, embedded = float64_model(config), []

    def keep(module: torch.nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:  # noqa: ARG001
        embedded.append(output)

    model.embed.register_forward_hook(keep)
    hidden = model(random_tokens(config, segments), segments)
    b, where = data.draw(st.sampled_from(documents_of(segments)))
    queries = hidden[b, where]
    (gradient,) = torch.autograd.grad((queries * torch.randn_like(queries)).sum(), embedded)
    reached = (gradient != 0).any(-1)
    assert reached[b, where].all()
    reached[b, where] = False
    assert not reached.any()


def solve(
    qkv: list[Tensor], dout: Tensor, pattern: Pattern, backend: Backend, segments: Segments
) -> tuple[Tensor, ...]:
    """(out, dq, dk, dv)."""
    q, k, v = qkv
    out = attend(q, k, v, pattern, backend, segments)
    return out, *torch.autograd.grad(out, qkv, dout)


def check_attention(
    pattern: Pattern, segments: Segments, Q: int, dtype: torch.dtype, tolerance: float
) -> None:
    """Packed against the dense mask, out and every gradient, with N = 4 and G = 2 heads."""
    B, T, H = *segments.starts.shape, 6
    shapes = [(B, 4, Q, T, H), *[(B, 2, pattern.key_copies, T, H)] * 2]
    qkv = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    dout = torch.randn(shapes[0], dtype=dtype)
    packed = solve(qkv, dout, pattern, "packed", segments)
    reference = solve(qkv, dout, pattern, "reference", segments)
    torch.testing.assert_close(packed, reference, rtol=tolerance, atol=tolerance)


@settings(claim, max_examples=150)
@given(pattern=..., segments=..., last_copy_only=st.booleans())
def test_packed_documents_equal_the_dense_definition(
    pattern: Pattern, segments: Segments, last_copy_only: bool
) -> None:
    Q = 1 if last_copy_only else pattern.K
    check_attention(pattern, segments, Q, torch.float64, 1e-10)


@settings(claim, max_examples=40)
@given(pattern=..., segments=..., last_copy_only=st.booleans())
def test_packed_documents_in_float32_err_by_its_rounding_alone(
    pattern: Pattern, segments: Segments, last_copy_only: bool
) -> None:
    Q = 1 if last_copy_only else pattern.K
    check_attention(pattern, segments, Q, torch.float32, 1e-5)


@settings(claim, max_examples=30)
@given(pattern=...)
def test_the_mask_is_the_patterns_within_a_document_and_nothing_across(pattern: Pattern) -> None:
    segments = rows_of([1, 4, 2], [7])
    mask, starts = segments.mask(pattern), segments.starts.tolist()
    for b, s, n, r, m in product(*map(range, mask.shape)):
        begin = starts[b][n]
        allowed = begin == starts[b][m] and pattern.allows(n - begin, s, m - begin, r)
        assert mask[b, s, n, r, m] == allowed


@claim
@given(config=..., B=st.integers(1, 2), T=st.integers(1, 40))
def test_rows_of_one_document_each_need_no_segments(config: ModelConfig, B: int, T: int) -> None:
    model = float64_model(config)
    tokens, targets = torch.randint(0, config.vocab_size, (2, B, T))
    weights = list(model.parameters())
    results = []
    for segments in (None, Segments.of(torch.zeros(B, T, dtype=torch.int64))):
        total = model.loss(tokens, targets, 1e-3, segments).total
        results.append([model.logits(tokens, segments), *torch.autograd.grad(total, weights)])
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-11)


def test_lengths_add_up_over_all_rows_and_positions_restart_with_documents() -> None:
    segments = Segments.of(torch.tensor([[0, 0, 2, 2, 2], [0, 1, 1, 3, 4]]))
    assert segments.cu_seqlens.tolist() == [0, 2, 5, 6, 8, 9, 10]
    assert segments.cu_seqlens.dtype == torch.int32
    assert segments.position.tolist() == [[0, 1, 0, 1, 2], [0, 0, 1, 0, 0]]


@claim
@given(segments=..., K=st.integers(1, 4))
def test_repeating_every_token_lengthens_every_document_as_much(segments: Segments, K: int) -> None:
    lengths = [
        [row.count(start) * K for start in sorted(set(row))] for row in segments.starts.tolist()
    ]
    found, expected = segments.repeated(K), rows_of(*lengths)
    for name in ("starts", "cu_seqlens", "cu_seqlens_cpu"):
        assert torch.equal(getattr(found, name), getattr(expected, name))


def test_what_the_host_must_know_stays_there_when_documents_move() -> None:
    segments = ROWS.to("meta")
    assert segments.starts.is_meta
    assert segments.cu_seqlens.is_meta
    assert segments.cu_seqlens_cpu.device.type == "cpu"


def test_expanded_starts_are_made_contiguous_as_pinning_needs_it() -> None:
    starts = torch.tensor([[0, 0, 2, 2, 2]]).expand(3, 5)
    assert not starts.is_contiguous()
    segments = Segments.of(starts)
    for x in (segments, segments.repeated(2)):
        assert x.starts.is_contiguous()
        assert x.cu_seqlens_cpu.is_contiguous()
    assert segments.starts.tolist() == starts.tolist()


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs an NVIDIA GPU and a CUDA build of torch"
)
def test_expanded_starts_move_to_the_gpu() -> None:
    starts = torch.tensor([[0, 0, 2, 2, 2]]).expand(3, 5)
    plain = Segments.of(starts)
    # As a caller may build it, without `of`.
    expanded = Segments(starts, plain.cu_seqlens, plain.cu_seqlens_cpu)
    for segments in (plain, expanded):
        moved = segments.to("cuda")
        assert moved.starts.is_cuda
        assert moved.cu_seqlens.is_cuda
        assert moved.starts.tolist() == starts.tolist()
        assert moved.cu_seqlens_cpu.device.type == "cpu"


@pytest.mark.parametrize("starts", [[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 0, 3], [0, 0, 3, 3]])
def test_starts_that_are_no_documents_are_refused(starts: list[int]) -> None:
    with pytest.raises(AssertionError):
        Segments.of(torch.tensor([starts]))


def test_autocast_does_not_reach_into_isolated_attention() -> None:
    pattern, segments = Pattern("hidden", K=3, window=9), ROWS
    q, k, v = torch.randn(3, 3, 2, 3, 39, 8)
    with torch.autocast("cpu", torch.bfloat16):
        under = attend(q, k, v, pattern, "packed", segments)
    assert torch.equal(under, attend(q, k, v, pattern, "packed", segments))


def test_isolated_bfloat16_errs_by_its_rounding_alone() -> None:
    pattern, segments = Pattern("hidden", K=3, window=9), ROWS
    rounded = [x.requires_grad_() for x in torch.randn(3, 3, 2, 3, 39, 8).bfloat16()]
    exact = [x.detach().double().requires_grad_() for x in rounded]
    dout = torch.randn_like(rounded[0])
    packed = solve(rounded, dout, pattern, "packed", segments)
    reference = solve(exact, dout.double(), pattern, "reference", segments)
    for ours, expected in zip(packed, reference, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours - expected).abs().max() < 2e-2 * expected.abs().max()
