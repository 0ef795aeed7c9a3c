"""Drawing the next token of each row of a batch, on the device."""

from collections.abc import Sequence
from math import isqrt

import torch
from torch import Tensor
from torch.nn import functional as F

from phd.config import SamplingConfig
from phd.torch_private import HAS_TRITON
from phd.transfer import to_device

# What is drawn from logits that are not finite. No device can raise an error without a wait.
NOT_FINITE = -1
# Weights of 1 and less as integers in units of 2^-40: the sum of 2^22 of them fits in 64 bits.
FIXED_POINT = 2.0**40


class Sampler:
    """Draws tokens by the inverse of the cumulative distribution, each row by its own settings.

        weights   |  a  |   b   | c |      d      |     a uniform number u of [0, 1) falls
                  0            u * sum          sum     into one of them

    Weights are integers, whose sums do not depend on the order of summation. So a row's token
    depends neither on the rows beside it nor on the device, apart from rounding. On CUDA three
    kernels draw rows without `top_k` and `top_p`.

    Args:
        rows: how each row is sampled.
        device: where the logits will be.
    """

    def __init__(self, rows: Sequence[SamplingConfig], device: torch.device) -> None:
        is_greedy = [row.temperature == 0 for row in rows]
        drawn = [row for row in rows if row.temperature]
        self.all_greedy = not drawn
        self._is_greedy = to_device(is_greedy, device) if any(is_greedy) and drawn else None
        temperatures = [[row.temperature or 1.0] for row in rows]
        self._temperature = to_device(temperatures, device, torch.float32)
        # 0 for all tokens, here and below.
        self._most = max((row.top_k or 0 for row in drawn), default=0)
        self._top_k = to_device([[row.top_k or 0] for row in rows], device)
        self._top_p: Tensor | None = None
        # By rounding, the tokens before the last could seem to reach 1 together.
        nuclei = [row.top_p if row.top_p and row.top_p < 1 else 2.0 for row in rows]
        if min(nuclei) < 1:
            self._top_p = to_device([[p] for p in nuclei], device, torch.float64)
        # 0 where a row is greedy; None: the kernels cannot draw these rows.
        self._in_kernels: Tensor | None = None
        if HAS_TRITON and device.type == "cuda" and drawn and not self._most and min(nuclei) >= 1:
            given = [row.temperature for row in rows]
            self._in_kernels = to_device(given, device, torch.float32)

    def draw(self, logits: Tensor, uniforms: Tensor | None) -> Tensor:
        """Logits (B, V) -> token ids, int64 (B,), or `NOT_FINITE`.

        Args:
            uniforms: float64 (B,) on the device, a number of [0, 1) for each row; unused, and may
                be None, where all temperatures are 0.
        """
        if self._in_kernels is not None:
            # Triton comes with CUDA builds alone.
            from phd.inference.kernels.inverse_cdf import draw_by_inverse_cdf

            assert uniforms is not None
            return draw_by_inverse_cdf(logits, self._in_kernels, uniforms, FIXED_POINT, NOT_FINITE)
        largest, likeliest = logits.max(-1)
        tokens = likeliest
        if not self.all_greedy:
            assert uniforms is not None
            tokens = _inverse_cdf(self._weights(logits, largest), uniforms)
            if self._is_greedy is not None:
                tokens = torch.where(self._is_greedy, likeliest, tokens)
        return torch.where(largest.isfinite(), tokens, NOT_FINITE)

    def _weights(self, logits: Tensor, largest: Tensor) -> Tensor:
        """exp(logits / temperature) of the tokens that are kept, int64 (B, V)."""
        # Less the largest first: a small temperature would make the others overflow.
        x = (logits.float() - largest.float()[:, None]).div_(self._temperature)
        if self._most:
            k = min(self._most, x.shape[-1])
            least = x.topk(k).values.gather(-1, (self._top_k - 1).clamp_(0, k - 1))
            x = x.masked_fill_((x < least) & (self._top_k > 0), -torch.inf)
        weights = x.exp_().mul_(FIXED_POINT).long()
        return weights if self._top_p is None else self._nucleus(weights, self._top_p)

    @staticmethod
    def _nucleus(weights: Tensor, top_p: Tensor) -> Tensor:
        """The weights without those of tokens before which others already reach `top_p`."""
        ordered, order = weights.sort(dim=-1, descending=True, stable=True)
        sums = ordered.cumsum(-1)
        is_out = (sums - ordered).double() >= top_p * sums[:, -1:].double()
        return torch.empty_like(weights).scatter_(-1, order, ordered.masked_fill_(is_out, 0))


def _inverse_cdf(weights: Tensor, uniforms: Tensor) -> Tensor:
    """The first place whose cumulative weight exceeds u times the sum.

    The place is found among blocks first and then in its block, because a GPU sums many short rows
    faster than a few long ones.

    Args:
        weights: int64 (B, V), with a sum above 0.
        uniforms: float64 (B,), of [0, 1).
    """
    B, V = weights.shape
    width = isqrt(V - 1) + 1
    blocks = F.pad(weights, (0, -V % width)).view(B, -1, width)
    sums = blocks.sum(-1).cumsum(-1)
    total = sums[:, -1:]
    # Less than the sum, whatever u: else the place would be beyond the last token.
    level = torch.minimum((uniforms[:, None] * total).long(), total - 1)
    # Where weights are not numbers, there is no such block.
    block = torch.searchsorted(sums, level, right=True).clamp_(max=sums.shape[-1] - 1)
    own = blocks.gather(1, block[..., None].expand(-1, -1, width)).squeeze(1).cumsum(-1)
    # From the level less what comes before the block.
    level = level - sums.gather(-1, block) + own[:, -1:]
    return (block * width + torch.searchsorted(own, level, right=True)).squeeze(-1)
