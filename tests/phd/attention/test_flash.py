"""The fused kernels give the log-sum-exp, and a backward that takes a merged one."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

import phd.torch_private
from phd.attention.causal_kernels import CAUSAL_KERNELS, HALF
from phd.attention.flash import causal_backward, causal_forward, varlen_backward, varlen_forward
from phd.attention.varlen import isolated_backward, isolated_forward
from phd.segments import Segments

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


FLASH = next(kernel for kernel in CAUSAL_KERNELS if kernel.name == "FlashAttention-2")


@pytest.mark.parametrize("dtype", HALF)
def test_the_kernels_of_documents_take_our_arguments_and_return_our_shapes(
    dtype: torch.dtype,
) -> None:
    q, k, v, dout = tensors(dtype, "meta")
    cu_seqlens = SEGMENTS.cu_seqlens.to("meta")
    out, lse = varlen_forward(FLASH, q, k, v, SCALE, cu_seqlens, 29)
    assert (out.shape, out.dtype) == (q.shape, dtype)
    assert (lse.shape, lse.dtype) == (q.shape[:3], torch.float32)
    gradients = varlen_backward(FLASH, dout, q, k, v, out, lse, SCALE, cu_seqlens, 29)
    for gradient, x in zip(gradients, (q, k, v), strict=True):
        assert (gradient.shape, gradient.dtype) == (x.shape, dtype)


SEGMENTS = Segments.of(torch.tensor([[0] * 8 + [8] * 29, [0] * 20 + [20] * 16 + [36]]))


class FlashAttention:
    """The variable-length kernels as they are documented, by the CPU's kernel, a document a time.

    q (tokens, heads, H); k, v likewise; lse (heads, tokens).
    """

    def _flash_attention_forward(  # type: ignore[no-untyped-def]
        self, q, k, v, cu_seqlens, cu_seqlens_k, longest, longest_k, dropout, causal, debug, *,
        scale,
    ) -> list[Tensor]:  # fmt: skip
        self.check(cu_seqlens, cu_seqlens_k, longest, longest_k, dropout, causal)
        assert debug is False
        parts = []
        for at in (slice(*ends) for ends in pairwise(cu_seqlens.tolist())):
            one_q, one_k, one_v = (x[None, at].transpose(1, 2) for x in (q, k, v))
            parts.append(causal_forward(one_q, one_k, one_v, scale))
        outs, lses = zip(*parts, strict=True)
        return [torch.cat(outs, 2)[0].transpose(0, 1), torch.cat(lses, 2)[0]]

    def _flash_attention_backward(  # type: ignore[no-untyped-def]
        self, dout, q, k, v, out, lse, cu_seqlens, cu_seqlens_k, longest, longest_k, dropout,
        causal, seed, offset, *, scale,
    ) -> list[Tensor]:  # fmt: skip
        self.check(cu_seqlens, cu_seqlens_k, longest, longest_k, dropout, causal)
        assert seed.shape == offset.shape == (2,)
        parts = []
        for at in (slice(*ends) for ends in pairwise(cu_seqlens.tolist())):
            one_dout, one_q, one_k, one_v, one_out = (
                x[None, at].transpose(1, 2) for x in (dout, q, k, v, out)
            )
            parts.append(
                causal_backward(one_dout, one_q, one_k, one_v, one_out, lse[None, :, at], scale)
            )
        return [torch.cat(x, 2)[0].transpose(0, 1) for x in zip(*parts, strict=True)]

    def check(  # type: ignore[no-untyped-def]
        self, cu_seqlens, cu_seqlens_k, longest, longest_k, dropout, causal
    ) -> None:
        assert cu_seqlens is cu_seqlens_k
        assert longest == longest_k == max(cu_seqlens.diff())
        assert (dropout, causal) == (0.0, True)

    def __getattr__(self, name: str) -> object:
        return getattr(torch.ops.aten, name)


@pytest.mark.parametrize("head_dim", [8, 6])
def test_one_kernel_for_all_documents_gives_what_a_kernel_for_each_gives(
    head_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel of CUDA stood in for by its contract: what is checked is how we lay rows out."""
    q, k, v, dout = (x[..., :head_dim] for x in tensors(torch.float64))
    out, lse = isolated_forward(q, k, v, SCALE, SEGMENTS)
    merged = out + torch.randn_like(out), lse + torch.rand_like(lse)
    expected = isolated_backward(dout, (q, k, v), merged, SCALE, SEGMENTS)
    monkeypatch.setattr(phd.torch_private, "aten", FlashAttention())
    found = varlen_forward(FLASH, q, k, v, SCALE, SEGMENTS.cu_seqlens, 29)
    torch.testing.assert_close(found, (out, lse))
    found_gradients = varlen_backward(FLASH, dout, q, k, v, *merged, SCALE, SEGMENTS.cu_seqlens, 29)
    torch.testing.assert_close(found_gradients, expected)
    # The fake kernels, which tracing uses, declare one layout for both.
    for ours, theirs in zip((*found, *found_gradients), (out, lse, *expected), strict=True):
        assert ours.stride() == theirs.stride()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_tracing_expects_the_layouts_that_the_kernels_return(dtype: torch.dtype) -> None:
    q, k, v, dout = tensors(dtype)
    operators = torch.ops.phd
    where = (SCALE, SEGMENTS.cu_seqlens, SEGMENTS.cu_seqlens_cpu)
    out, lse = isolated_forward(q, k, v, SCALE, SEGMENTS)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(operators.isolated_forward, (q, k, v, *where), test_utils=tests)
    inputs = (dout, q, k, v, out, lse, *where)
    torch.library.opcheck(operators.isolated_backward, inputs, test_utils=tests)
