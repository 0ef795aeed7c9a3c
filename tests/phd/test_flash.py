"""The fused kernels give the log-sum-exp, and a backward that takes a merged one."""

import pytest
import torch
from torch import Tensor

from phd.flash import causal_backward, causal_forward

B, N, G, T, H = 2, 6, 2, 37, 8
SCALE = 0.3


def tensors(dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, ...]:
    """q, k, v, dout."""
    shapes = [(B, heads, T, H) for heads in (N, G, G, N)]
    return tuple(torch.randn(shape, dtype=dtype, device=device) for shape in shapes)


def causal_scores(q: Tensor, k: Tensor) -> Tensor:
    scores = SCALE * q @ k.repeat_interleave(N // G, 1).mT
    return scores.masked_fill(torch.ones(T, T).tril() == 0, -torch.inf)


def test_forward_is_causal_attention_with_its_log_sum_exp() -> None:
    q, k, v, _ = tensors(torch.float64)
    out, lse = causal_forward(q, k, v, SCALE)
    scores = causal_scores(q, k)
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    torch.testing.assert_close(out, scores.softmax(-1) @ v.repeat_interleave(N // G, 1))


def test_backward_gives_the_share_of_its_keys_in_a_merged_attention() -> None:
    """Every query also attends to a key of its own with score 1, elsewhere computed."""
    q, k, v, dout = tensors(torch.float64)
    extra = torch.randn_like(q)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    scores = torch.cat([causal_scores(q, k), torch.ones(B, N, T, 1)], -1)
    p = scores.softmax(-1)
    merged = p[..., :T] @ v.repeat_interleave(N // G, 1) + p[..., T:] * extra
    expected = torch.autograd.grad(merged, leaves, dout)
    merged_lse = scores.logsumexp(-1)
    with torch.no_grad():
        found = causal_backward(dout, q, k, v, merged, merged_lse, SCALE)
    torch.testing.assert_close(tuple(found), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_kernels_of_cuda_take_our_arguments_and_return_our_shapes(dtype: torch.dtype) -> None:
    """On the meta device, which goes the way of CUDA and knows its kernels' shapes."""
    q, k, v, dout = tensors(dtype, "meta")
    out, lse = causal_forward(q, k, v, SCALE)
    assert (out.shape, out.dtype) == (q.shape, dtype)
    assert (lse.shape, lse.dtype) == (q.shape[:3], torch.float32)
    gradients = causal_backward(dout, q, k, v, out, lse, SCALE)
    for gradient, x in zip(gradients, (q, k, v), strict=True):
        assert (gradient.shape, gradient.dtype) == (x.shape, dtype)
