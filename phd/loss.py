"""Next-token cross-entropy whose memory does not grow with the vocabulary."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from phd.torch_private import HAS_LINEAR_CROSS_ENTROPY, summed_linear_cross_entropy

IGNORED = -100  # a target that never counts, as in torch's own losses

# The most logits that are held at a time: 2^24 in float32 are 64 MiB.
LOGITS_AT_ONCE = 1 << 24
# The most rows of logits at a time: more make no product faster. Torch's own choice of 128 rows (at
# V = 4096 and D = 256) makes the loss 7 % slower on two cores.
ROWS_AT_ONCE = 1024


class Loss(NamedTuple):
    """Sums over the counted targets: those of ranks and micro-batches add up to the whole's.

    Attributes:
        total: what to minimise: cross-entropy plus the weighted z-loss, nats; a scalar tensor.
        cross_entropy: the cross-entropy alone, nats, detached.
        targets: how many targets were counted; an int64 scalar tensor.
    """

    total: Tensor
    cross_entropy: Tensor
    targets: Tensor


def next_token_loss(hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float = 0.0) -> Loss:
    """Sum of -log softmax(weight h)[target] + z_loss * logsumexp(weight h)^2 over the targets.

    Args:
        hidden: (B, T, D).
        weight: (V, D), the LM head.
        targets: int64 (B, T); those that are `IGNORED` do not count.
        z_loss: weight of the squared log-partition (PaLM, arXiv 2204.02311, uses 1e-4).
    """
    hidden, targets = hidden.flatten(0, -2), targets.flatten()
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    count = (targets != IGNORED).sum()
    # Torch's own computes the sum in the dtype of `hidden`: in bfloat16 only three digits are left.
    exact = hidden.dtype == weight.dtype and hidden.dtype.itemsize >= 4
    if z_loss == 0 and exact and HAS_LINEAR_CROSS_ENTROPY:
        total = summed_linear_cross_entropy(
            hidden, weight, targets, IGNORED, rows_at_once(weight.shape[0])
        )
        return Loss(total, total.detach(), count)
    total, cross_entropy = chunked_cross_entropy(hidden, weight, targets, z_loss)
    return Loss(total, cross_entropy, count)


def rows_at_once(vocab_size: int) -> int:
    """How many rows' logits are held at a time."""
    return max(1, min(ROWS_AT_ONCE, LOGITS_AT_ONCE // vocab_size))


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float
) -> tuple[Tensor, Tensor]:
    """(total, cross-entropy) of rows (R, D), a chunk of rows at a time.

    The forward computes the gradients, too, while it holds the logits of a chunk. So logits are
    computed once, and never all of them are held.
    """
    return _Chunked.apply(hidden, weight, targets, z_loss, torch.is_grad_enabled())


class _Chunked(torch.autograd.Function):
    """`chunked_cross_entropy`, whose backward only scales what the forward has computed."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float, needs_grad: bool
    ) -> tuple[Tensor, Tensor]:
        exact = torch.promote_types(hidden.dtype, torch.float32)
        # Two tensors and not two views of one: FSDP's hooks refuse views of one tensor.
        total, cross_entropy = (hidden.new_zeros((), dtype=exact) for _ in range(2))
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight if needs_grad else weight[:0], dtype=exact)
        head = weight.to(hidden.dtype)
        step = rows_at_once(weight.shape[0])
        for h, d, y in zip(
            hidden.split(step), d_hidden.split(step), targets.split(step), strict=True
        ):
            logits = (h @ head.T).to(exact)
            counted = (y != IGNORED)[:, None]
            y = y[:, None].clamp(min=0)
            lse = logits.logsumexp(1, keepdim=True)
            loss = (lse - logits.gather(1, y)).mul_(counted).sum()
            cross_entropy += loss
            total += loss + (z_loss * lse**2).mul_(counted).sum()
            if not needs_grad:
                continue
            # d loss / d logits = p (1 + 2 z lse) - one_hot(target)
            p = logits.sub_(lse).exp_().mul_(1 + 2 * z_loss * lse)
            p.scatter_add_(1, y, -torch.ones_like(lse)).mul_(counted)
            p = p.to(h.dtype)
            d.copy_(p @ head)
            d_weight += p.T @ h
        if needs_grad:
            ctx.save_for_backward(d_hidden, d_weight.to(weight.dtype))
        ctx.mark_non_differentiable(cross_entropy)
        return total, cross_entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * grads[0].to(d_hidden.dtype), d_weight * grads[0], None, None, None
