"""The packed backend equals the dense definition, in value and gradient, on any input."""

from dataclasses import dataclass
from typing import Literal, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import phd.attention.attend
import phd.attention.fused
import phd.attention.packed
import phd.attention.tiles
from phd.attention.attend import attend, resolve_backend
from phd.config import Backend, SpanUnit
from phd.pattern import Pattern
from tests.phd.small_models import SPANS, examples

PHD = Pattern("hidden", K=2)
SPS = Pattern("hidden", K=2, window=3, span_unit="token", originals_see_hidden=True)

RULES = ("causal", "flat", "stream", "hidden", "originals")

Layout = Literal["contiguous", "token_major", "equal_copies"]
Upstream = Literal["random", "token_major", "all_ones"]


@dataclass(frozen=True)
class Case:
    """One attention problem; the gradient fed into it is `upstream`."""

    pattern: Pattern
    T: int
    Q: int
    B: int = 2
    G: int = 2
    heads_per_group: int = 2
    H: int = 4
    spread: float = 1.0
    layout: Layout = "contiguous"
    upstream: Upstream = "random"


@st.composite
def patterns(draw: st.DrawFn, rule: str) -> Pattern:
    """Patterns of a rule; `originals`: those in which originals see hidden copies."""
    K = draw(st.integers(2, 8))
    if rule in ("causal", "flat", "stream"):
        return Pattern(rule, draw(st.sampled_from([K, K, 1])))  # type: ignore[arg-type]
    originals = rule == "originals"
    window = draw(SPANS if originals else SPANS | st.none())
    chunk = None if window is None else draw(st.integers(1, 60) | st.none())
    return Pattern("hidden", K, window, chunk, draw(st.sampled_from(get_args(SpanUnit))), originals)


@st.composite
def cases(draw: st.DrawFn, rule: str, whole: bool) -> Case:
    pattern = draw(patterns(rule))
    return Case(
        pattern,
        T=draw(st.integers(1, 130)),
        Q=pattern.K if whole else 1,
        B=draw(st.integers(1, 2)),
        G=draw(st.integers(1, 2)),
        heads_per_group=draw(st.integers(1, 3)),
        H=draw(st.sampled_from([2, 3, 8])),
        spread=draw(st.sampled_from([1.0, 1000.0])),
        layout=draw(st.sampled_from(get_args(Layout))),
        upstream=draw(st.sampled_from(get_args(Upstream))),
    )


def arranged(x: Tensor, layout: Layout) -> Tensor:
    """x (B, heads, copies, T, H) as a model hands it over: other strides, or copies still equal."""
    match layout:
        case "contiguous":
            return x
        case "token_major":
            return x.transpose(1, 3).contiguous().transpose(1, 3)
        case "equal_copies":
            return x[:, :, :1].expand_as(x)


def leaves(case: Case, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k, v."""
    N, K = case.G * case.heads_per_group, case.pattern.key_copies
    shapes = [(N, case.Q), (case.G, K), (case.G, K)]
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(case.B, heads, copies, case.T, case.H, dtype=dtype, generator=generator)
        for heads, copies in shapes
    )
    return [x.requires_grad_() for x in (q * case.spread, k, v)]


def solve(case: Case, backend: Backend, qkv: list[Tensor]) -> tuple[Tensor, ...]:
    """(out, dq, dk, dv)."""
    q, k, v = (arranged(x, case.layout) for x in qkv)
    out = attend(q, k, v, case.pattern, backend)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    match case.upstream:
        case "random":
            total = (out * weight.sin()).sum()
        case "token_major":
            total = (out.transpose(1, 3) * weight.view_as(out.transpose(1, 3))).sum()
        case "all_ones":
            total = out.sum()
    return out, *torch.autograd.grad(total, qkv)


@pytest.mark.parametrize("whole", [False, True], ids=["last_copy", "all_copies"])
@pytest.mark.parametrize("rule", RULES)
@examples(250, tests=2 * len(RULES))
@given(data=st.data(), at_once=st.sampled_from([1, 10_000, phd.attention.tiles.SCORES_AT_ONCE]))
def test_packed_equals_the_dense_definition(
    rule: str, whole: bool, data: st.DataObject, at_once: int
) -> None:
    case = data.draw(cases(rule, whole))
    qkv = leaves(case)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(phd.attention.tiles, "SCORES_AT_ONCE", at_once)
        packed = solve(case, "packed", qkv)
    reference = solve(case, "reference", qkv)
    for name, ours, expected in zip(("out", "dq", "dk", "dv"), packed, reference, strict=True):
        atol = 1e-12 * case.spread**2  # scores round as they grow, and dk grows again with q
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=atol, msg=f"{name}: {{}}".format)


@pytest.mark.parametrize("Q", [1, 3])
@pytest.mark.parametrize(
    "pattern",
    [
        Pattern("flat", K=3),
        Pattern("hidden", K=3),
        Pattern("hidden", K=3, window=3, chunk_tokens=2),
        Pattern("hidden", K=3, window=3, chunk_tokens=2, originals_see_hidden=True),
        Pattern("causal", K=3),
    ],
)
def test_packed_gradients_are_those_of_finite_differences(pattern: Pattern, Q: int) -> None:
    qkv = leaves(Case(pattern, T=5, Q=Q, B=1, G=1, H=2))
    assert torch.autograd.gradcheck(lambda q, k, v: attend(q, k, v, pattern, "packed"), qkv)


@pytest.mark.parametrize("pattern", [Pattern("flat", K=3), Pattern("hidden", K=3, window=9)])
@pytest.mark.parametrize("Q", [1, 3])
def test_packed_in_bfloat16_errs_by_bfloat16s_rounding_alone(pattern: Pattern, Q: int) -> None:
    case = Case(pattern, T=100, Q=Q, H=8)
    rounded = [x.detach().requires_grad_() for x in leaves(case, torch.bfloat16)]
    exact = [x.detach().double().requires_grad_() for x in rounded]
    packed, reference = solve(case, "packed", rounded), solve(case, "reference", exact)
    for ours, expected in zip(packed, reference, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours - expected).abs().max() < 2e-2 * expected.abs().max()


def test_autocast_does_not_reach_into_the_packed_backend() -> None:
    case = Case(Pattern("hidden", K=3, window=9), T=40, Q=3)
    qkv = leaves(case, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        under = solve(case, "packed", qkv)
    for ours, expected in zip(under, solve(case, "packed", qkv), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("device", ["cpu", "cuda", "meta"])
@pytest.mark.parametrize("has_triton", [True, False])
def test_a_named_backend_is_taken_and_auto_is_fused_where_triton_compiles(
    device: str, has_triton: bool
) -> None:
    for backend in get_args(Backend):
        chosen = "fused" if device == "cuda" and has_triton else "packed"
        expected = chosen if backend == "auto" else backend
        assert resolve_backend(backend, device, torch.bfloat16, 64, has_triton, PHD) == expected


def test_auto_is_packed_where_there_is_no_fused_kernel() -> None:
    for dtype, head_dim in ((torch.float64, 64), (torch.float32, 129), (torch.bfloat16, 257)):
        assert resolve_backend("auto", "cuda", dtype, head_dim, True, PHD) == "packed"
    given = "cuda", torch.bfloat16, 64, True, SPS
    assert resolve_backend("auto", *given) == "packed"


def test_fused_without_triton_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phd.attention.packed, "HAS_TRITON", False)
    q = torch.randn(1, 2, 2, 8, 4)
    with pytest.raises(ValueError, match=r"^model\.attention=fused: .*triton is not installed"):
        attend(q, q, q, Pattern("hidden", K=2), "fused")


def test_fused_on_the_cpu_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests run in Triton's interpreter, which users do not."""
    monkeypatch.setattr(phd.attention.fused, "IS_INTERPRETED", False)
    q = torch.randn(1, 2, 2, 8, 4)
    with pytest.raises(ValueError, match=r"^model\.attention=fused: .* device cpu; .*=packed"):
        attend(q, q, q, Pattern("hidden", K=2), "fused")


def test_fused_refuses_originals_that_see_hidden_copies_by_name() -> None:
    q = torch.randn(1, 2, 2, 8, 4)
    with pytest.raises(ValueError, match=r"^model\.attention=fused: .*originals see hid.*packed"):
        attend(q, q, q, SPS, "fused")


def test_auto_computes_what_packed_computes() -> None:
    case = Case(Pattern("hidden", K=3, window=9), T=40, Q=3)
    qkv = leaves(case)
    for ours, expected in zip(solve(case, "auto", qkv), solve(case, "packed", qkv), strict=True):
        assert torch.equal(ours, expected)
