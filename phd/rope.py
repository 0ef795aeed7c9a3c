"""Rotary position embedding, with positions for every copy of a token."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from phd.config import ModelConfig


class Rope(nn.Module):
    """The tables of RoPE (arXiv 2104.09864), for every copy of a token.

    Each pair (x_i, x_{i + H/2}) of a head is rotated by the angle position * theta^(-2i/H).

        copies of token n      shared (default)     flattened, K = 3
        s = 0, 1, 2            n   n   n            3n  3n+1  3n+2

    PHD's paper does not say which it uses; `shared` gives the originals vanilla's positions.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("cos", torch.empty(0), persistent=False)
        self.register_buffer("sin", torch.empty(0), persistent=False)
        self.build(torch.get_default_device())

    def build(self, device: torch.device) -> None:
        """Make the tables, float32 (positions, H); again after a model leaves the meta device.

        cos  c_0 .. c_{H/2-1}  c_0 .. c_{H/2-1}      sin  -s_0 .. -s_{H/2-1}  s_0 .. s_{H/2-1}

        Angles are computed in float64: in float32, position 4096 would already err by 2e-4 rad.
        """
        c = self.config
        exponent = torch.arange(0, c.head_dim, 2, device=device, dtype=torch.float64) / c.head_dim
        position = torch.arange(c.rope_positions, device=device, dtype=torch.float64)
        angle = position[:, None] * c.rope_theta**-exponent
        cos = torch.cat([angle.cos(), angle.cos()], 1).float()
        sin = torch.cat([-angle.sin(), angle.sin()], 1).float()
        if (self.cos.shape, self.cos.device, self.cos.dtype) == (cos.shape, cos.device, cos.dtype):
            # In place, because a CUDA graph may read them.
            self.cos.copy_(cos)
            self.sin.copy_(sin)
        else:
            self.cos, self.sin = cos, sin

    def set_copies(self, K: int) -> None:
        """Give tables for K copies of each token from here on."""
        self.config = replace(self.config, K=K)
        if len(self.cos) < self.config.rope_positions:
            self.build(self.cos.device)

    def tables(self, tokens: int, position: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(cos, sin) for all copies of rows of `tokens` tokens: (B or 1, K or 1, 1, T, H).

        `position`, int64 (B or 1, T), are the tokens' positions if they are not 0 .. T-1.
        """
        K = self.config.K if self.config.copy_positions == "flattened" else 1
        if position is not None:
            tokens = self.config.max_seq_len
        assert tokens <= self.config.max_seq_len, (tokens, self.config.max_seq_len)
        cos, sin = (
            x[: tokens * K].unflatten(0, (tokens, K)).transpose(0, 1) for x in (self.cos, self.sin)
        )  # (K or 1, T, H)
        if position is None:
            return cos[None, :, None], sin[None, :, None]
        cos, sin = (x[:, position].transpose(0, 1).unsqueeze(2) for x in (cos, sin))
        return cos, sin

    def at(self, tokens: Tensor, copies: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin), each (B, T * copies, H), of these copies (copies,) of tokens (B, T), int64.

        Tokens past the end of the tables, which are padding, get the last token's.
        """
        position = tokens.clamp(max=self.config.max_seq_len - 1)[..., None]
        if self.config.copy_positions == "flattened":
            position = position * self.config.K + copies
        position = position.expand(*tokens.shape, len(copies)).flatten(1)
        return self.cos[position], self.sin[position]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (B, K or 1, heads, T, H), any strides, by tables (B or 1, K or 1, 1, T, H).

    Returns (B, heads, K, T, H), contiguous, which is attention's layout. Where x holds one copy and
    the tables K, that copy is rotated in K ways.
    """
    x = x.expand(-1, max(x.shape[1], cos.shape[1]), -1, -1, -1)
    return _Rotate.apply(x, cos, sin) if torch.is_grad_enabled() else _rotate(x, cos, sin)


class _Rotate(torch.autograd.Function):
    """Four kernels instead of seven, which write attention's layout; the backward rotates back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        grad = grads[0].transpose(1, 2)
        B, K, heads, T, H = grad.shape
        out = grad.new_empty(B, K, T, heads, H).transpose(2, 3)
        _rotate_into(grad, cos, -sin, out)
        return out, None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    B, K, heads, T, H = x.shape
    out = x.new_empty(B, heads, K, T, H)
    _rotate_into(x, cos, sin, out.transpose(1, 2))
    return out


def _rotate_into(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    # The table holds the sign of the sine, so the other half of a head needs no negation.
    half, cos, sin = x.shape[-1] // 2, cos.to(x.dtype), sin.to(x.dtype)
    out.copy_(x).mul_(cos)
    out[..., :half].addcmul_(x[..., half:], sin[..., :half])
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
