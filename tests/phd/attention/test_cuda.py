"""On a GPU, every backend and the whole model compute what they compute on the CPU."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from phd.attention.attend import attend
from phd.attention.fused import add_hidden_gradients, merge_hidden
from phd.attention.varlen import causal_attention
from phd.config import Backend, ModelConfig
from phd.model import Transformer
from phd.pattern import Pattern
from phd.segments import Segments

pytestmark = [
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs an NVIDIA GPU and a CUDA build of torch"
    ),
    # What torch.compile says of its own code, and of settings that these tests chose.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not:UserWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is dep:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:linear_cross_entropy. forcing allow_retain:UserWarning"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a proto:UserWarning"),
]

PATTERNS = {
    "causal": Pattern("causal"),
    "naive_repeat": Pattern("flat", K=2),
    "phd": Pattern("hidden", K=3),
    "phd_swa": Pattern("hidden", K=2, window=16),
    "phd_swa-long": Pattern("hidden", K=3, window=1000),
    "phd_cswa": Pattern("hidden", K=3, window=16, chunk_tokens=16),
    "phd_cswa-token": Pattern("hidden", K=4, window=20, chunk_tokens=50, span_unit="token"),
}
patterns = pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
last_copy_only = pytest.mark.parametrize("last_copy_only", [False, True])
# Errors allowed, as a share of the largest value: some units in the last place of each dtype.
TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float32: 1e-4}
B, N, G, T, H = 2, 4, 2, 300, 64
STARTS = torch.tensor([[0] + [1] * 129 + [130] * 170, [0] * 256 + [256] * 43 + [299]])


@pytest.fixture(autouse=True)
def compiled_afresh() -> None:
    """Forgets the kernels of the test before: torch compiles one function only so many times."""
    torch.compiler.reset()


def check(
    backend: Backend,
    dtype: torch.dtype,
    pattern: Pattern,
    last_copy_only: bool,
    segments: Segments | None = None,
    heads: tuple[int, int, int] = (N, G, H),
) -> None:
    """Output and gradients on the GPU against the dense definition in float64 on the CPU."""
    Q, K = 1 if last_copy_only else pattern.K, pattern.key_copies
    n, g, h = heads
    shapes = [(B, n, Q, T, h), (B, g, K, T, h), (B, g, K, T, h), (B, n, Q, T, h)]
    rounded = [torch.randn(shape).to(dtype) for shape in shapes]

    def solve(backend: Backend, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        *qkv, dout = tensors
        q, k, v = (x.requires_grad_() for x in qkv)
        here = None if segments is None else segments.to(q.device)
        out = attend(q, k, v, pattern, backend, here)
        return out, *torch.autograd.grad(out, (q, k, v), dout)

    found = solve(backend, [x.cuda() for x in rounded])
    expected = solve("reference", [x.double() for x in rounded])
    for name, ours, exact in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
        assert ours.dtype == dtype
        error = (ours.cpu().double() - exact).abs().max() / exact.abs().max()
        assert error < TOLERANCE[dtype], name


@patterns
@last_copy_only
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_packed_equals_the_dense_definition_on_cuda(
    dtype: torch.dtype, pattern: Pattern, last_copy_only: bool
) -> None:
    check("packed", dtype, pattern, last_copy_only)


@patterns
@last_copy_only
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_flex_equals_the_dense_definition_on_cuda(
    dtype: torch.dtype, pattern: Pattern, last_copy_only: bool
) -> None:
    check("flex", dtype, pattern, last_copy_only)


@patterns
@last_copy_only
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_packed_documents_equal_the_dense_definition_on_cuda(
    dtype: torch.dtype, pattern: Pattern, last_copy_only: bool
) -> None:
    check("packed", dtype, pattern, last_copy_only, Segments.of(STARTS))


@patterns
@last_copy_only
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("segments", [None, Segments.of(STARTS)], ids=["rows", "documents"])
def test_fused_equals_the_dense_definition_on_cuda(
    dtype: torch.dtype, pattern: Pattern, last_copy_only: bool, segments: Segments | None
) -> None:
    check("fused", dtype, pattern, last_copy_only, segments)


@pytest.mark.parametrize(
    "heads",
    [(8, 1, 64), (4, 4, 64), (3, 1, 20), (4, 2, 96), (4, 2, 128), (2, 2, 256)],
    ids=lambda heads: "N{}-G{}-H{}".format(*heads),
)
@pytest.mark.parametrize("name", ["phd_swa", "phd_cswa"])
@last_copy_only
def test_fused_takes_any_heads_on_cuda(
    heads: tuple[int, int, int], name: str, last_copy_only: bool
) -> None:
    check("fused", torch.bfloat16, PATTERNS[name], last_copy_only, heads=heads)


@pytest.mark.parametrize("name", ["phd", "phd_swa", "phd_swa-long", "phd_cswa"])
@pytest.mark.parametrize("segments", [None, Segments.of(STARTS)], ids=["rows", "documents"])
def test_fused_kernels_give_the_same_bits_each_time(name: str, segments: Segments | None) -> None:
    pattern, documents = PATTERNS[name], None if segments is None else segments.to("cuda")
    out, q, dout, dq = (
        torch.randn(B, N, pattern.K, T, H, device="cuda", dtype=torch.bfloat16) for _ in range(4)
    )
    k, v = (torch.randn_like(out[:, :G]) for _ in range(2))
    lse = torch.randn(B, N, pattern.K, T, device="cuda")

    def solve() -> tuple[Tensor, ...]:
        merged = out.clone(), lse.clone()
        gradients = dq.clone(), torch.zeros_like(k), torch.zeros_like(v)
        merge_hidden((q, k, v), merged, pattern, documents)
        add_hidden_gradients(gradients, (q, k, v), (*merged, dout), pattern, documents)
        return *merged, *gradients

    expected = solve()
    for _ in range(5):
        assert all(map(torch.equal, solve(), expected))


@pytest.mark.parametrize("head_dim", [64, 20])
def test_documents_of_one_token_each_run_on_cuda(head_dim: int) -> None:
    segments = Segments.of(torch.arange(9).expand(2, 9)).to("cuda")
    q, k, v = (
        torch.randn(2, heads, 1, 9, head_dim, device="cuda", dtype=torch.bfloat16)
        for heads in (N, G, G)
    )
    out = attend(q, k, v, Pattern("causal"), "packed", segments)
    assert torch.equal(out, v.repeat_interleave(N // G, 1))


@patterns
@last_copy_only
def test_flex_documents_equal_the_dense_definition_on_cuda(
    pattern: Pattern, last_copy_only: bool
) -> None:
    check("flex", torch.float32, pattern, last_copy_only, Segments.of(STARTS))


@pytest.mark.parametrize("backend", ["packed", "fused"])
@pytest.mark.parametrize("documents", [False, True])
def test_attention_does_not_make_the_host_wait_for_the_device(
    documents: bool, backend: Backend
) -> None:
    pattern = Pattern("hidden", K=3, window=16, chunk_tokens=16)
    shapes = [(B, heads, 3, T, H) for heads in (N, G, G)]
    q, k, v = (
        torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for shape in shapes
    )

    def both_ways() -> None:
        segments = Segments.of(STARTS).to("cuda") if documents else None
        out = attend(q, k, v, pattern, backend, segments)
        torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

    both_ways()  # the first call of a shape makes the kernel's plan, and may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        both_ways()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("pattern", [PATTERNS["causal"], PATTERNS["phd_cswa"]], ids=str)
def test_gradients_do_not_depend_on_how_the_upstream_one_lies_in_memory(pattern: Pattern) -> None:
    """One kernel's plan serves all calls with the same q, k and v: it must fit each of them."""
    shapes = [(B, heads, pattern.K, T, H) for heads in (N, G, G, N)]
    q, k, v, dout = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes)
    qkv = [x.requires_grad_() for x in (q, k, v)]
    exact = [x.detach().double().requires_grad_() for x in qkv]
    for order in ((0, 1, 2, 3, 4), (0, 2, 3, 1, 4), (0, 3, 2, 1, 4), (3, 0, 1, 2, 4)):
        back = torch.tensor(order).argsort().tolist()
        upstream = dout.permute(order).contiguous().permute(back)
        found = torch.autograd.grad(attend(q, k, v, pattern), qkv, upstream)
        out = attend(*exact, pattern, "reference")
        expected = torch.autograd.grad(out, exact, upstream.double())
        for name, ours, theirs in zip(("dq", "dk", "dv"), found, expected, strict=True):
            error = (ours.double() - theirs).abs().max() / theirs.abs().max()
            assert error < TOLERANCE[torch.bfloat16], (name, order)


def test_vanilla_computes_what_pytorchs_attention_computes() -> None:
    q, k, v = (torch.randn(B, heads, T, H, device="cuda").bfloat16() for heads in (N, G, G))
    qkv = [x.requires_grad_() for x in (q, k, v)]
    results = []
    for attention in (
        lambda: causal_attention(q, k, v),
        lambda: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
    ):
        out = attention()
        results.append([out, *torch.autograd.grad(out, qkv, torch.ones_like(out))])
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).abs().max() < TOLERANCE[torch.bfloat16] * theirs.abs().max()


SETTINGS: dict[str, Any] = {"K": 3, "layers": 3, "dim": 128, "head_dim": 32, "vocab_size": 512}


def loss_and_gradients(
    model: Transformer, rows: Tensor, segments: Segments | None = None
) -> list[Tensor]:
    total = model.loss(rows[:, :-1], rows[:, 1:], segments=segments).total
    return [total, *torch.autograd.grad(total, list(model.parameters()))]


@pytest.mark.parametrize("backend", ["packed", "fused", "flex"])
def test_a_training_step_under_autocast_is_close_to_float32s_on_the_cpu(backend: Backend) -> None:
    model = Transformer(ModelConfig(**SETTINGS, attention=backend)).reset(0)
    rows = torch.randint(0, 512, (2, 201))
    plain = Transformer(ModelConfig(**SETTINGS)).reset(0)
    expected = loss_and_gradients(plain, rows)
    model.cuda()
    with torch.autocast("cuda", torch.bfloat16):
        found = loss_and_gradients(model, rows.cuda())
    assert found[0].dtype == torch.float32
    for ours, exact in zip(found, expected, strict=True):
        assert (ours.cpu() - exact).norm() < 5e-2 * exact.norm()


def test_the_compiled_step_equals_the_eager_one() -> None:
    model = Transformer(ModelConfig(**SETTINGS)).reset(0).cuda()
    rows = torch.randint(0, 512, (2, 201), device="cuda")
    expected = loss_and_gradients(model, rows)
    model.compile()
    torch.testing.assert_close(loss_and_gradients(model, rows), expected, rtol=1e-3, atol=1e-4)


def test_the_compiled_step_over_documents_equals_the_eager_one() -> None:
    model = Transformer(ModelConfig(**SETTINGS)).reset(0).cuda()
    rows = torch.randint(0, 512, (2, T + 1), device="cuda")
    segments = Segments.of(STARTS).to("cuda")
    expected = loss_and_gradients(model, rows, segments)
    model.compile()
    found = loss_and_gradients(model, rows, segments)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_weights_drawn_on_the_gpu_are_those_drawn_on_the_cpu() -> None:
    with torch.device("cuda"):
        model = Transformer(ModelConfig(**SETTINGS)).reset(0)
    expected = Transformer(ModelConfig(**SETTINGS)).reset(0).state_dict()
    for name, weight in model.state_dict().items():
        assert weight.is_cuda
        assert torch.equal(weight.cpu(), expected[name]), name
