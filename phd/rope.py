"""Rotary position embedding, with positions for every copy of a token."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from phd.config import ModelConfig
from phd.segments import Segments


class Rope(nn.Module):
    """Turns each pair (x_i, x_{i + H/2}) of a head by position * theta^(-2i/H) (arXiv 2104.09864).

        copies of token n      shared (default)     flattened, K = 3
        s = 0, 1, 2            n   n   n            3n  3n+1  3n+2

    The paper does not say which; `shared` leaves the originals where vanilla puts them.
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
        """
        c = self.config
        exponent = torch.arange(0, c.head_dim, 2, device=device, dtype=torch.float64) / c.head_dim
        position = torch.arange(c.rope_positions, device=device, dtype=torch.float64)
        angle = position[:, None] * c.rope_theta**-exponent
        self.cos = torch.cat([angle.cos(), angle.cos()], 1).float()
        self.sin = torch.cat([-angle.sin(), angle.sin()], 1).float()

    def tables(self, tokens: int, segments: Segments | None = None) -> tuple[Tensor, Tensor]:
        """(cos, sin) for all copies of rows of `tokens` tokens: (B or 1, K or 1, 1, T, H).

        With segments, positions begin anew with each document.
        """
        assert tokens <= self.config.max_seq_len, (tokens, self.config.max_seq_len)
        K = self.config.K if self.config.copy_positions == "flattened" else 1
        cos, sin = (
            x[: tokens * K].unflatten(0, (tokens, K)).transpose(0, 1) for x in (self.cos, self.sin)
        )  # (K or 1, T, H)
        if segments is None:
            return cos[None, :, None], sin[None, :, None]
        cos, sin = (x[:, segments.position].transpose(0, 1).unsqueeze(2) for x in (cos, sin))
        return cos, sin

    def at(self, tokens: Tensor, copies: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin), each (B, T * copies, H), of these copies (copies,) of tokens (B, T), int64.

        Tokens behind the end of the tables, which only fill a row, get the last one's.
        """
        place = tokens.clamp(max=self.config.max_seq_len - 1)[..., None]
        if self.config.copy_positions == "flattened":
            place = place * self.config.K + copies
        place = place.expand(*tokens.shape, len(copies)).flatten(1)
        return self.cos[place], self.sin[place]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x (B, K, heads, T, H), any strides, by tables (B or 1, K or 1, 1, T, H).

    Returns (B, heads, K, T, H), contiguous: the layout that attention wants. Where x holds one
    copy and the tables K, that copy is turned K ways.
    """
    x = x.expand(-1, max(x.shape[1], cos.shape[1]), -1, -1, -1)
    return _Rotate.apply(x, cos, sin) if torch.is_grad_enabled() else _rotated(x, cos, sin)


class _Rotate(torch.autograd.Function):
    """Four kernels instead of seven, straight into attention's layout; backward turns back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        grad = grads[0].transpose(1, 2)
        B, K, heads, T, H = grad.shape
        out = grad.new_empty(B, K, T, heads, H).transpose(2, 3)
        _turn(grad, cos, -sin, out)
        return out, None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    B, K, heads, T, H = x.shape
    out = x.new_empty(B, heads, K, T, H)
    _turn(x, cos, sin, out.transpose(1, 2))
    return out


def _turn(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    out.copy_(x * cos.to(x.dtype))
    out.addcmul_(x.roll(x.shape[-1] // 2, -1), sin.to(x.dtype))
