"""The table of causal kernels: what it chooses, on any GPU, and that it runs what it has chosen."""

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from phd.attention import flash
from phd.attention.attend import attend
from phd.attention.causal_kernels import CAUSAL_KERNELS, CausalKernel, Platform, causal_kernel
from phd.attention.varlen import causal_attention
from phd.pattern import Pattern
from phd.segments import Segments

A100, ADA, HOPPER = (Platform("cuda", c, cudnn=91900) for c in ((8, 0), (8, 9), (9, 0)))
BLACKWELL, GEFORCE = (Platform("cuda", c, cudnn=91900) for c in ((10, 0), (12, 0)))
VOLTA, CPU = Platform("cuda", (7, 0), cudnn=91900), Platform("cpu")
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
EFFICIENT, CPU_FLASH = "PyTorch's memory-efficient kernel", "PyTorch's CPU flash kernel"
FA2, FA3, FA4 = (f"FlashAttention-{version}" for version in (2, 3, 4))


@pytest.mark.parametrize(
    ("platform", "dtype", "head_dim", "rows", "documents"),
    [
        (HOPPER, BF16, 64, "cuDNN", FA2),
        (HOPPER, FP16, 128, "cuDNN", FA2),
        (HOPPER, BF16, 6, "cuDNN", FA2),
        (BLACKWELL, BF16, 96, "cuDNN", FA2),
        (replace(BLACKWELL, capability=(10, 3)), BF16, 96, "cuDNN", FA2),
        (HOPPER, BF16, 129, FA2, FA2),
        (HOPPER, BF16, 256, FA2, FA2),
        (HOPPER, BF16, 257, EFFICIENT, EFFICIENT),
        (HOPPER, FP32, 64, EFFICIENT, EFFICIENT),
        # cuDNN refuses: too old, switched off, or asked for a deterministic backward.
        (replace(HOPPER, cudnn=91300), BF16, 64, FA2, FA2),
        (replace(HOPPER, cudnn=0), BF16, 64, FA2, FA2),
        (replace(HOPPER, deterministic=True), BF16, 64, FA2, FA2),
        # Other FlashAttentions, where they are active; they have replaced FlashAttention-2.
        (replace(HOPPER, flash_attention=3), BF16, 64, "cuDNN", FA3),
        (replace(HOPPER, flash_attention=3), BF16, 192, FA3, FA3),
        (replace(HOPPER, flash_attention=3, cudnn=0), BF16, 64, FA3, FA3),
        (replace(HOPPER, flash_attention=4, cudnn=0), BF16, 64, FA4, FA4),
        (replace(BLACKWELL, flash_attention=4), BF16, 128, "cuDNN", FA4),
        (replace(BLACKWELL, flash_attention=4), BF16, 192, EFFICIENT, EFFICIENT),
        (A100, BF16, 128, FA2, FA2),
        (A100, FP32, 128, EFFICIENT, EFFICIENT),
        (A100, BF16, 256, FA2, FA2),
        (ADA, BF16, 192, FA2, FA2),
        (ADA, BF16, 200, EFFICIENT, EFFICIENT),
        (GEFORCE, BF16, 64, FA2, FA2),
        (VOLTA, FP16, 64, EFFICIENT, EFFICIENT),
        (VOLTA, FP32, 64, EFFICIENT, EFFICIENT),
        (CPU, FP32, 64, CPU_FLASH, CPU_FLASH),
        (CPU, BF16, 64, CPU_FLASH, CPU_FLASH),
        (CPU, FP64, 3, CPU_FLASH, CPU_FLASH),
    ],
)
def test_the_table_chooses(
    platform: Platform, dtype: torch.dtype, head_dim: int, rows: str, documents: str
) -> None:
    assert causal_kernel(platform, dtype, head_dim).name == rows
    assert causal_kernel(platform, dtype, head_dim, documents=True).name == documents


def test_cudnn_is_passed_over_for_one_token_and_for_lengths_that_change() -> None:
    assert causal_kernel(HOPPER, BF16, 64, tokens=2).name == "cuDNN"
    assert causal_kernel(HOPPER, BF16, 64, tokens=1).name == FA2
    assert causal_kernel(HOPPER, BF16, 64, varying_length=True).name == FA2


@pytest.mark.parametrize("platform", [VOLTA, HOPPER, Platform("mps")], ids=str)
def test_what_no_kernel_can_do_is_refused_by_name(platform: Platform) -> None:
    dtype = FP64 if platform == HOPPER else BF16
    name = "float64" if dtype == FP64 else "bfloat16"
    with pytest.raises(ValueError, match=rf"in {name} with model.head_dim=64 on .*choose"):
        causal_kernel(platform, dtype, 64)


def test_wherever_half_precision_runs_float32_runs_too() -> None:
    """And what is chosen for documents has both directions of a variable-length path, or none."""
    capabilities = [(7, 0), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)]
    for capability, dtype, H in product(capabilities, (FP16, FP32), (1, 64, 128, 224, 256, 512)):
        for documents in (False, True):
            platform = Platform("cuda", capability, 91900)
            chosen = causal_kernel(platform, dtype, H, documents=documents)
            assert chosen.runs_on(platform, dtype, H)
            assert (chosen.varlen_forward is None) == (chosen.varlen_backward is None)
            # On one document after another a kernel that plans every shape would be of no use.
            assert not documents or not chosen.plans


def test_the_process_on_the_cpu_is_described_by_its_type_alone() -> None:
    assert Platform.of(torch.device("cpu")) == CPU


ON_CUDA = [kernel for kernel in CAUSAL_KERNELS if kernel.type == "cuda"]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kernel", ON_CUDA, ids=lambda kernel: kernel.name)
def test_the_kernels_of_cuda_take_our_arguments_and_return_our_shapes(
    kernel: CausalKernel, causal: bool
) -> None:
    """On the meta device, which knows the operators' signatures and shapes."""
    keys = 37 if causal else 74
    for dtype in kernel.dtypes:
        q, k, v, dout = (
            torch.empty(2, heads, T, 8, dtype=dtype, device="meta")
            for heads, T in ((6, 37), (2, keys), (2, keys), (6, 37))
        )
        out, lse = kernel.forward(q, k, v, 0.3, causal=causal)
        assert (out.shape, out.dtype) == (q.shape, dtype)
        assert (lse.shape, lse.dtype) == (q.shape[:3], FP32)
        gradients = kernel.backward(dout, q, k, v, out, lse, 0.3, causal=causal)
        for gradient, x in zip(gradients, (q, k, v), strict=True):
            assert (gradient.shape, gradient.dtype) == (x.shape, dtype)


# The operators, here on the CPU


def inputs(layout: Callable[[Tensor], Tensor], dtype: torch.dtype = FP64) -> list[Tensor]:
    """q, k, v, and the dout, out and lse of a merged attention; G = 2, N = 6."""
    q, k, v, dout, more = (
        layout(torch.randn(2, heads, 11, 6, dtype=dtype)) for heads in (6, 2, 2, 6, 6)
    )
    out, lse = flash.causal_forward(q, k, v, 0.3)
    return [q, k, v, dout, out + more, lse + 0.5]


def token_major(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def slices(x: Tensor) -> Tensor:
    """As the originals' keys are: a slice of all copies."""
    return torch.stack([x, x], 2)[:, :, 0]


layouts = pytest.mark.parametrize("layout", [Tensor.contiguous, token_major, slices])


@layouts
def test_the_operators_compute_what_the_kernels_compute(layout: Callable[[Tensor], Tensor]) -> None:
    q, k, v, dout, out, lse = inputs(layout)
    forward, backward = torch.ops.phd.causal_forward, torch.ops.phd.causal_backward
    torch.testing.assert_close(
        forward(q, k, v, 0.3, False), flash.causal_forward(q, k, v, 0.3), rtol=0, atol=0
    )
    torch.testing.assert_close(
        backward(dout, q, k, v, out, lse, 0.3),
        tuple(flash.causal_backward(dout, q, k, v, out, lse, 0.3)),
        rtol=0,
        atol=0,
    )


@layouts
def test_the_operators_compute_attention_to_all_keys_as_the_kernels_do(
    layout: Callable[[Tensor], Tensor],
) -> None:
    q, k, v, dout, out, lse = inputs(layout)
    k, v = (torch.cat([x, x], 2) for x in (k, v))
    forward, backward = torch.ops.phd.causal_forward, torch.ops.phd.causal_backward
    torch.testing.assert_close(
        forward(q, k, v, 0.3, True, causal=False),
        flash.noncausal_forward(q, k, v, 0.3),
        rtol=0,
        atol=0,
    )
    torch.testing.assert_close(
        backward(dout, q, k, v, out, lse, 0.3, True, causal=False),
        tuple(flash.noncausal_backward(dout, q, k, v, out, lse, 0.3)),
        rtol=0,
        atol=0,
    )


@layouts
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_tracing_expects_the_layouts_that_the_operators_return(
    dtype: torch.dtype, layout: Callable[[Tensor], Tensor]
) -> None:
    q, k, v, dout, out, lse = inputs(layout, dtype)
    tests = ("test_schema", "test_faketensor")
    for operator, arguments in (
        (torch.ops.phd.causal_forward, (q, k, v, 0.3, False)),
        (torch.ops.phd.causal_backward, (dout, q, k, v, out, lse, 0.3)),
    ):
        torch.library.opcheck(operator, arguments, test_utils=tests)
        for result, like in zip(operator(*arguments), (q, k, v), strict=False):
            if result.shape == like.shape:
                assert result.stride() == torch.empty_like(like).stride()


@layouts
def test_a_kernel_gets_what_cudnn_assumes(
    layout: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padded heads, `out` and `dout` laid out as q, and a contiguous log-sum-exp.

    The CPU's kernel stands in for cuDNN's and checks what that one takes for granted.
    """
    seen: list[Tensor] = []

    def forward(q, k, v, scale, *, causal):
        assert all(x.stride(-1) == 1 and x.shape[-1] == 8 for x in (q, k, v))
        return cpu.forward(q, k, v, scale, causal=causal)

    def backward(dout, q, k, v, out, lse, scale, *, causal):
        seen.extend([dout, out])
        assert dout.stride() == out.stride() == torch.empty_like(q).stride()
        assert lse.is_contiguous()
        return cpu.backward(dout, q, k, v, out, lse, scale, causal=causal)

    q, k, v, dout, out, lse = inputs(layout)
    expected = flash.causal_backward(dout, q, k, v, out, lse, 0.3)
    cpu = causal_kernel(CPU, FP64, 6)
    picky = replace(cpu, forward=forward, backward=backward, alignment=8)
    monkeypatch.setattr(flash, "causal_kernel", lambda *_, **__: picky)
    torch.testing.assert_close(
        torch.ops.phd.causal_forward(q, k, v, 0.3, False), flash.causal_forward(q, k, v, 0.3)
    )
    strided = lse.transpose(1, 2).contiguous().transpose(1, 2)
    found = torch.ops.phd.causal_backward(dout.expand_as(dout), q, k, v, out, strided, 0.3)
    torch.testing.assert_close(found, tuple(expected))
    assert len(seen) == 2


def test_lengths_that_plans_are_made_for_are_few_and_near() -> None:
    planned = {T: flash.planned_tokens(T) for T in range(flash.LONG_PROMPT, 4 * flash.LONG_PROMPT)}
    assert all(T <= length <= T * 17 / 16 for T, length in planned.items())
    assert len(set(planned.values())) == 33


@layouts
@pytest.mark.parametrize("tokens", [63, 64, 65, 127])
def test_a_long_prompt_is_filled_up_for_a_kernel_that_plans(
    tokens: int, layout: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = (layout(torch.randn(2, n, tokens, 6, dtype=FP64)) for n in (6, 2, 2))
    expected = flash.causal_forward(q, k, v, 0.3)
    planning = replace(causal_kernel(CPU, FP64, 6), plans=True)
    monkeypatch.setattr(flash, "causal_kernel", lambda *_, **__: planning)
    monkeypatch.setattr(flash, "LONG_PROMPT", 64)
    out, lse = flash.prompt_forward(q, k, v, 0.3)
    torch.testing.assert_close((out, lse), expected, rtol=0, atol=1e-12)
    is_filled_up = out.untyped_storage().nbytes() > expected[0].nbytes
    assert is_filled_up == (tokens in (65, 127))


def test_a_tensor_that_lies_right_is_not_copied() -> None:
    x = torch.randn(1, 4, 5, 8)
    assert flash._laid_out_like(x, x) is x
    # One row: its stride means nothing, and cuDNN's plans compare it all the same.
    odd = x.as_strided(x.shape, (7, *x.stride()[1:]))
    found = flash._laid_out_like(x, odd)
    assert found.stride() == x.stride()
    assert found.data_ptr() == x.data_ptr()


# Vanilla and naive repetition


@pytest.mark.parametrize("Q", [1, 2])
def test_causal_attention_is_pytorchs(Q: int) -> None:
    """Out of `attend` as alone, and with the gradients."""
    shapes = [(2, 6, Q, 9, 4), (2, 2, Q, 9, 4), (2, 2, Q, 9, 4)]
    q, k, v = (torch.randn(shape, dtype=FP64, requires_grad=True) for shape in shapes)
    flat = [x.transpose(2, 3).flatten(2, 3) for x in (q, k, v)]
    expected = scaled_dot_product_attention(*flat, is_causal=True, enable_gqa=True)
    pattern = Pattern("causal") if Q == 1 else Pattern("flat", K=Q)
    found = attend(q, k, v, pattern).transpose(2, 3).flatten(2, 3)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(causal_attention(*flat), expected, rtol=0, atol=0)
    dout = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, (q, k, v), dout),
        torch.autograd.grad(expected, (q, k, v), dout),
        rtol=0,
        atol=0,
    )


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("documents", [False, True])
def test_causal_attention_is_traced_whole(documents: bool) -> None:
    torch.compiler.reset()
    segments = Segments.of(torch.tensor([[0, 0, 2, 2, 2]])) if documents else None
    q, k, v = (torch.randn(1, heads, 5, 4, requires_grad=True) for heads in (4, 2, 2))

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return causal_attention(q, k, v, segments)

    traced = torch.compile(attention, backend="aot_eager", fullgraph=True)
    results = []
    for call in (attention, traced):
        out = call(q, k, v)
        results.append([out, *torch.autograd.grad(out.sin().sum(), (q, k, v))])
    torch.testing.assert_close(*results)


@pytest.mark.compile
def test_the_operators_are_traced_whole() -> None:
    """As on CUDA, where they stand for the kernels."""
    torch.compiler.reset()
    q, k, v, dout, out, lse = inputs(Tensor.contiguous, FP32)

    def both(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
        result = flash._forward(q, k, v, 0.3, False)
        return *result, *flash._backward(dout, q, k, v, out, lse, 0.3)

    traced = torch.compile(both, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(traced(q, k, v, dout), both(q, k, v, dout))
