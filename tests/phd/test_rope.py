"""RoPE rotates pairs of a head as complex numbers, by the positions that the copies have."""

from typing import get_args

import pytest
import torch
from torch import Tensor

from phd.config import CopyPositions, ModelConfig
from phd.rope import Rope, rotate

K, T, H = 3, 7, 8


def rope_of(positions: CopyPositions) -> Rope:
    config = ModelConfig(K=K, head_dim=H, max_seq_len=T + 2, copy_positions=positions)
    return Rope(config).double()


def rotated(x: Tensor, positions: Tensor, theta: float = 500_000.0) -> Tensor:
    """The textbook: x (B, K, heads, T, H), positions (K, T) -> (B, heads, K, T, H)."""
    frequency = theta ** (-torch.arange(0, H, 2, dtype=torch.float64) / H)
    angle = positions[:, None, :, None] * frequency
    pairs = torch.complex(x[..., : H // 2], x[..., H // 2 :])
    pairs = pairs * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([pairs.real, pairs.imag], -1).transpose(1, 2)


def positions_of(copies: CopyPositions) -> Tensor:
    n, s = torch.arange(T), torch.arange(K)[:, None]
    return n.expand(K, T) if copies == "shared" else n * K + s


@pytest.mark.parametrize("given", [1, K])
@pytest.mark.parametrize("copies", get_args(CopyPositions))
def test_rotation_and_its_gradient_are_the_complex_ones(copies: CopyPositions, given: int) -> None:
    # Not contiguous: what a projection gives, (B, copies, T, heads, H) with heads moved forward.
    x = torch.randn(2, given, T, 5, H, dtype=torch.float64, requires_grad=True)
    ours = rotate(x.transpose(2, 3), *rope_of(copies).tables(T))
    positions = positions_of(copies)
    if copies == "shared":
        positions = positions[:given]
    expected = rotated(x.transpose(2, 3).expand(-1, len(positions), -1, -1, -1), positions)
    assert ours.is_contiguous()
    # The tables are kept in float32.
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)
    dout = torch.randn_like(ours)
    gradients = (torch.autograd.grad(out, x, dout)[0] for out in (ours, expected))
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-6)


def test_the_rotation_backward_is_that_of_finite_differences() -> None:
    cos, sin = rope_of("flattened").tables(T)
    x = torch.randn(1, 1, 2, T, H, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rotate(x, cos, sin), x)


def test_a_score_depends_on_the_distance_alone() -> None:
    cos, sin = rope_of("shared").tables(T)
    q, k = (torch.randn(H, dtype=torch.float64).expand(1, 1, 1, T, H) for _ in "qk")
    scores = (rotate(q, cos, sin) @ rotate(k, cos, sin).mT)[0, 0, 0]
    for distance in range(T):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-5)


def test_tables_are_exact_to_float32_at_the_last_position() -> None:
    last = 2**17 - 1
    rope = Rope(ModelConfig(max_seq_len=last + 1, head_dim=128))
    frequency = 500_000.0 ** (-torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    cos = (last * frequency).cos()
    expected = torch.cat([cos, cos])
    torch.testing.assert_close(rope.cos[last].double(), expected, rtol=0, atol=1e-7)


def test_a_bfloat16_head_stays_bfloat16() -> None:
    x = torch.randn(1, 1, 2, T, H, dtype=torch.bfloat16)
    assert rotate(x, *rope_of("shared").tables(T)).dtype == torch.bfloat16
