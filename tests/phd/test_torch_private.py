"""What `phd.torch_private` assumes of this version of torch."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

from phd import torch_private
from phd.attention.causal_kernels import Platform, causal_kernel
from phd.loss import IGNORED

needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs an NVIDIA GPU and a CUDA build of torch"
)
needs_fused_loss = pytest.mark.skipif(
    not torch_private.HAS_LINEAR_CROSS_ENTROPY, reason="needs torch's linear_cross_entropy"
)
B, N, G, T, H = 2, 4, 2, 37, 8
SCALE = 0.3


def inputs(
    dtype: torch.dtype = torch.float64, device: str = "cpu", groups: int = G
) -> list[Tensor]:
    """q, k, v, dout."""
    shapes = [(B, heads, T, H) for heads in (N, groups, groups, N)]
    return [torch.randn(shape, dtype=dtype, device=device) for shape in shapes]


def dense(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor | float = 0.0
) -> list[Tensor]:
    """out and lse by the formula."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = (SCALE * q @ k.mT + bias).masked_fill(~mask, -torch.inf)
    return [scores.softmax(-1) @ v, scores.logsumexp(-1)]


def merged_with_another_key(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> list[Tensor]:
    """out, lse, dq, dk, dv where each query also sees a key with score 1 and value 1.

    The gradients are those of q, k and v alone, which a kernel has to give for the merged result.
    """
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    T = q.shape[2]
    out, lse = dense(*leaves, torch.ones(T, T, dtype=torch.bool, device=q.device).tril())
    share = torch.sigmoid(1 - lse)[..., None]
    merged = torch.lerp(out, torch.ones_like(out), share)
    gradients = torch.autograd.grad(merged, leaves, dout.double())
    merged_lse = torch.logaddexp(lse, torch.ones_like(lse))
    return [x.detach() for x in (merged, merged_lse, *gradients)]


def check(found, expected, tolerance: float) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        theirs = theirs.to(ours.dtype)
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


# The CPU's kernels


@pytest.mark.parametrize("causal", [True, False])
def test_the_cpus_flash_kernel_returns_the_log_sum_exp_of_grouped_heads(causal: bool) -> None:
    q, k, v, _ = inputs()
    mask = torch.ones(T, T, dtype=torch.bool)
    expected = dense(q, k, v, mask.tril() if causal else mask)
    check(torch_private.cpu_flash_forward(q, k, v, SCALE, causal=causal), expected, 1e-12)


@pytest.mark.parametrize("rows", [1, B])
def test_the_cpus_flash_kernel_adds_a_bias_that_broadcasts(rows: int) -> None:
    q, k, v, _ = inputs()
    bias = torch.randn(rows, 1, T, T, dtype=torch.float64)
    bias = bias.masked_fill(torch.rand(rows, 1, T, T) < 0.3, -torch.inf)
    bias[..., 0] = 0.0
    found = torch_private.cpu_flash_forward(q, k, v, SCALE, causal=False, bias=bias)
    check(found, dense(q, k, v, torch.ones(T, T, dtype=torch.bool), bias), 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_cpus_flash_kernel_holds_the_log_sum_exp_in_float32(dtype: torch.dtype) -> None:
    q, k, v, _ = inputs(dtype)
    out, lse = torch_private.cpu_flash_forward(q, k, v, SCALE, causal=True)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)


def test_the_cpus_flash_backward_accepts_a_merged_result() -> None:
    q, k, v, dout = inputs()
    out, lse, *gradients = merged_with_another_key(q, k, v, dout)
    found = torch_private.cpu_flash_backward(dout, q, k, v, out, lse, SCALE)
    check(found, gradients, 1e-10)


def test_layer_norms_backward_accepts_any_mean_and_deviation() -> None:
    x, dy = torch.randn(2, 5, 7, dtype=torch.float64)
    weight = torch.rand(7, dtype=torch.float64)
    mean, scale = torch.randn(2, 5, 1, dtype=torch.float64)
    normalised, g = (x - mean) * scale, weight * dy
    means = [y.mean(-1, keepdim=True) for y in (g, g * normalised)]
    expected = (g - means[0] - normalised * means[1]) * scale, (dy * normalised).sum(0)
    found = torch_private.layer_norm_backward(dy, x, mean, scale, weight)
    check(found, expected, 1e-12)


@needs_fused_loss
@pytest.mark.parametrize("rows_at_once", [1, 3, 100, None])
def test_the_fused_loss_is_the_sum_over_counted_targets(rows_at_once: int | None) -> None:
    hidden, weight = (torch.randn(n, 8, dtype=torch.float64).requires_grad_() for n in (11, 13))
    targets = torch.randint(0, 13, (11,))
    targets[::4] = IGNORED
    expected = F.cross_entropy(hidden @ weight.T, targets, reduction="sum", ignore_index=IGNORED)
    found = torch_private.summed_linear_cross_entropy(
        hidden, weight, targets, IGNORED, rows_at_once
    )
    for ours, theirs in zip(
        (found, *torch.autograd.grad(found, (hidden, weight))),
        (expected, *torch.autograd.grad(expected, (hidden, weight))),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_products_add_up_in_float32(dtype: torch.dtype, device: str) -> None:
    """Also transposed and padded ones, as the loss has them; NaN is overwritten at first."""
    factors = [
        (torch.randn(40, 72).to(device, dtype)[:, :70].T, torch.randn(40, 24).to(device, dtype))
        for _ in range(3)
    ]
    total = torch.full((70, 24), torch.nan, device=device)
    place = total.data_ptr()
    for i, (a, b) in enumerate(factors):
        torch_private.add_product(total, a, b, first=i == 0)
    expected = sum(a.double() @ b.double() for a, b in factors)
    assert (total.dtype, total.data_ptr()) == (torch.float32, place)
    tolerance = 1e-2 if dtype == torch.float32 and device == "cuda" else 1e-5  # TensorFloat-32
    torch.testing.assert_close(total.double(), expected, rtol=tolerance, atol=tolerance)


@needs_cuda
def test_a_product_is_added_on_cuda_without_a_copy_of_the_total() -> None:
    a, b = (torch.randn(64, n, device="cuda", dtype=torch.bfloat16) for n in (50_000, 256))
    total = torch.zeros(50_000, 256, device="cuda")
    torch_private.add_product(total, a.T, b, first=False)  # cuBLAS allocates its workspace
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch_private.add_product(total, a.T, b, first=False)
    assert torch.cuda.max_memory_allocated() - before < total.nbytes // 2


def test_the_recompile_limit_holds_during_a_call_alone() -> None:
    limits = []

    def function() -> None:
        limits.append(torch._dynamo.config.recompile_limit)

    before = torch._dynamo.config.recompile_limit
    torch_private.with_recompile_limit(function, before + 5)()
    assert (limits, torch._dynamo.config.recompile_limit) == ([before + 5], before)


# CUDA's kernels


CUDA_KERNELS = {
    "cudnn": (torch_private.cuda_cudnn_forward, torch_private.cuda_cudnn_backward, torch.bfloat16),
    "flash": (torch_private.cuda_flash_forward, torch_private.cuda_flash_backward, torch.bfloat16),
    "efficient": (
        torch_private.cuda_efficient_forward,
        torch_private.cuda_efficient_backward,
        torch.float32,
    ),
}
kernels = pytest.mark.parametrize(
    ("forward", "backward", "dtype"), CUDA_KERNELS.values(), ids=CUDA_KERNELS
)


@kernels
def test_cudas_kernels_take_our_arguments_and_return_our_shapes(forward, backward, dtype) -> None:
    """On the meta device, which knows the operators' signatures and shapes."""
    q, k, v, dout = inputs(dtype, "meta")
    out, lse = forward(q, k, v, SCALE)
    assert (out.shape, out.dtype) == (q.shape, dtype)
    assert (lse.shape, lse.dtype) == (q.shape[:3], torch.float32)
    for gradient, x in zip(backward(dout, q, k, v, out, lse, SCALE), (q, k, v), strict=True):
        assert (gradient.shape, gradient.dtype) == (x.shape, dtype)


def test_cudas_varlen_kernel_takes_our_arguments_and_returns_our_shapes() -> None:
    q, k, v, dout = (x.transpose(1, 2).flatten(0, 1) for x in inputs(torch.bfloat16, "meta"))
    cu_seqlens = torch.empty(4, dtype=torch.int32, device="meta")
    out, lse = torch_private.cuda_varlen_forward(q, k, v, SCALE, cu_seqlens, T)
    assert out.shape == q.shape
    assert (lse.shape, lse.dtype) == ((N, B * T), torch.float32)
    gradients = torch_private.cuda_varlen_backward(dout, q, k, v, out, lse, SCALE, cu_seqlens, T)
    assert [gradient.shape for gradient in gradients] == [x.shape for x in (q, k, v)]


# The order in which we pass arguments: the same in torch 2.11 and in 2.13.
POSITIONAL = {
    "_scaled_dot_product_cudnn_attention": "query key value attn_bias compute_log_sumexp dropout_p "
    "is_causal return_debug_mask",
    "_scaled_dot_product_cudnn_attention_backward": "grad_out query key value out logsumexp "
    "philox_seed philox_offset attn_bias cum_seq_q cum_seq_k max_q max_k dropout_p is_causal",
    "_scaled_dot_product_flash_attention": "query key value dropout_p is_causal return_debug_mask",
    "_scaled_dot_product_flash_attention_backward": "grad_out query key value out logsumexp "
    "cum_seq_q cum_seq_k max_q max_k dropout_p is_causal philox_seed philox_offset",
    "_flash_attention_forward": "query key value cum_seq_q cum_seq_k max_q max_k dropout_p "
    "is_causal return_debug_mask",
    "_flash_attention_backward": "grad_out query key value out logsumexp cum_seq_q cum_seq_k max_q "
    "max_k dropout_p is_causal rng_state unused",
    "_scaled_dot_product_efficient_attention": "query key value attn_bias compute_log_sumexp "
    "dropout_p is_causal",
    "_scaled_dot_product_efficient_attention_backward": "grad_out_ query key value attn_bias out "
    "logsumexp philox_seed philox_offset dropout_p grad_input_mask is_causal",
}


@pytest.mark.parametrize("name", POSITIONAL)
def test_the_operators_have_the_arguments_that_we_pass(name: str) -> None:
    arguments = getattr(torch.ops.aten, name).default._schema.arguments
    positional = [a.name for a in arguments if not a.kwarg_only]
    assert positional == POSITIONAL[name].split()
    assert "scale" in [a.name for a in arguments if a.kwarg_only]


def skip_where_it_cannot_run(forward) -> None:
    """cuDNN's attention is for the GPUs and versions that the table of kernels names."""
    if forward is torch_private.cuda_cudnn_forward:
        platform = Platform.of(torch.device("cuda"))
        if causal_kernel(platform, torch.bfloat16, H).name != "cuDNN":
            pytest.skip(f"needs cuDNN 9.15.1 and compute capability 9 or 10, not {platform}")


@needs_cuda
@kernels
@pytest.mark.parametrize("heads_per_key", [1, 2, 6])
@pytest.mark.parametrize("T", [37, 256])
def test_cudas_kernels_return_the_log_sum_exp_and_accept_a_merged_result(
    forward, backward, dtype, heads_per_key: int, T: int
) -> None:
    """With as many query heads for a key head as K copies of them make."""
    skip_where_it_cannot_run(forward)
    q, k, v, dout = (
        torch.randn(B, G * heads, T, H, device="cuda").to(dtype)
        for heads in (heads_per_key, 1, 1, heads_per_key)
    )
    tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-4
    mask = torch.ones(T, T, dtype=torch.bool, device="cuda").tril()
    check(forward(q, k, v, SCALE), dense(*(x.double() for x in (q, k, v)), mask), tolerance)
    out, lse, *gradients = merged_with_another_key(q, k, v, dout)
    found = backward(dout, q, k, v, out.to(dtype), lse.float(), SCALE)
    check(found, gradients, 2 * tolerance)


@needs_cuda
@kernels
def test_cudas_kernels_read_keys_that_are_slices_of_all_copies(forward, backward, dtype) -> None:
    """q, out and dout token-major, too, as the last layer has them."""
    skip_where_it_cannot_run(forward)
    tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-4
    q, k, v, dout = inputs(dtype, "cuda")
    q, dout = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, dout))
    k, v = (torch.stack([x, torch.full_like(x, 1e4)], 2)[:, :, 0] for x in (k, v))
    out, lse, *gradients = merged_with_another_key(q, k, v, dout)
    merged = torch.empty_like(q).copy_(out)
    check(backward(dout, q, k, v, merged, lse.float(), SCALE), gradients, 2 * tolerance)
    mask = torch.ones(T, T, dtype=torch.bool, device="cuda").tril()
    found = forward(q, k, v, SCALE)
    check(found, dense(*(x.double() for x in (q, k, v)), mask), tolerance)
    if forward is torch_private.cuda_cudnn_forward:
        assert found[0].stride() == q.stride()


@needs_cuda
@pytest.mark.parametrize("lengths", [[5, 30, 2, T], [1] * (B * T)], ids=["mixed", "one token"])
def test_cudas_varlen_kernel_keeps_documents_apart(lengths: list[int]) -> None:
    q, k, v, _ = (x.transpose(1, 2).flatten(0, 1) for x in inputs(torch.bfloat16, "cuda"))
    cu_seqlens = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
    out, lse = torch_private.cuda_varlen_forward(q, k, v, SCALE, cu_seqlens, max(lengths))
    for start, stop in pairwise(cu_seqlens.tolist()):
        mask = torch.ones(stop - start, stop - start, dtype=torch.bool, device="cuda").tril()
        document = (x[None, start:stop].transpose(1, 2).double() for x in (q, k, v))
        expected_out, expected_lse = dense(*document, mask)
        check([out[start:stop].transpose(0, 1)], [expected_out[0]], 3e-2)
        check([lse[:, start:stop]], [expected_lse[0]], 3e-2)


def test_hooks_and_a_replaced_forward_are_seen() -> None:
    layer = nn.Linear(2, 2)
    assert not torch_private.has_hooks(layer)
    for register in (layer.register_forward_hook, layer.register_forward_pre_hook):
        for with_kwargs in (True, False):
            handle = register(lambda *_: None, with_kwargs=with_kwargs)
            assert torch_private.has_hooks(layer)
            handle.remove()
            assert not torch_private.has_hooks(layer)
    layer.forward = lambda x: x
    assert torch_private.has_hooks(layer)


@pytest.mark.compile
def test_marked_dimensions_are_compiled_once_for_all_sizes_but_one() -> None:
    for marked, graphs in ((True, 2), (False, 4)):
        torch.compiler.reset()
        counter = CompileCounter()
        doubled = torch.compile(lambda x: x * 2, backend=counter, dynamic=False)
        for rows, columns in ((2, 4), (3, 4), (3, 7), (1, 7)):
            x = torch.ones(rows, columns)
            if marked:
                torch_private.mark_dynamic(x, 0, 1)
            assert torch.equal(doubled(x), x * 2)
        assert counter.frame_count == graphs
