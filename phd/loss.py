"""Next-token cross-entropy whose memory does not grow with the number of rows times the vocabulary.

The logits of a chunk of rows are computed, used for the loss and for its gradients, and dropped:

    h (rows, D) --- head ---> logits (rows, V) --- softmax ---> loss
                                   |  their gradient takes their place
          d_hidden = d_logits head (rows, D)      d_weight += d_logits^T h (V, D)

So the forward pass computes the gradients, and the backward pass only scales them.
"""

from enum import Enum, auto
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from phd.torch_private import (
    HAS_LINEAR_CROSS_ENTROPY,
    HAS_TRITON,
    summed_linear_cross_entropy,
)

IGNORED = -100  # a target that never counts, as in torch's own losses

# The most logits that are held at a time on the CPU: 2^24 in float32 are 64 MiB.
LOGITS_AT_ONCE = 1 << 24
# The most rows of logits at a time there: more make no product faster. Torch's own choice of 128
# rows (at V = 4096 and D = 256) makes the loss 7 % slower on two cores.
ROWS_AT_ONCE = 1024


class Loss(NamedTuple):
    """Sums over the counted targets: those of ranks and micro-batches add up to the whole's.

    Attributes:
        total: what to minimise: cross-entropy plus the weighted z-loss, nats; a scalar tensor.
        cross_entropy: the cross-entropy alone, nats, detached.
        targets: how many targets were counted; an int64 scalar tensor.
        per_target: the cross-entropy of each target, nats; None where it was not asked for.
    """

    total: Tensor
    cross_entropy: Tensor
    targets: Tensor
    per_target: Tensor | None = None


class Method(Enum):
    """A way to compute the loss; `method_for` chooses."""

    FUSED = auto()
    TORCH = auto()
    CHUNKED = auto()


def method_for(
    device: torch.device,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    z_loss: float,
    has_triton: bool = HAS_TRITON,
) -> Method:
    """The fastest way that is exact, for hidden states of `dtype`.

    | method | where | why |
    | --- | --- | --- |
    | `FUSED` | on CUDA with Triton, but for float64 | large products, one kernel between them |
    | `TORCH` | else, in float32 and float64 without z-loss | torch's `linear_cross_entropy` |
    | `CHUNKED` | else | takes any dtype and the z-loss, in any version of torch |

    `python train/bench.py head` measures them, and those that are never taken. Torch's returns the
    sum in bfloat16 for bfloat16 and adds up d_weight in it, a chunk after the other: three digits
    are left. Liger's `fused_linear_cross_entropy` takes 512 rows at a time at V = 100,352 and
    D = 2048, and lets the host wait for the device. A plain product with `torch.compile` is as fast
    as `FUSED`, but holds all logits: 3.3 GB of 16,384 rows.
    """
    single = dtype.itemsize >= 4
    if device.type == "cuda" and has_triton and dtype != torch.float64:
        return Method.FUSED
    if HAS_LINEAR_CROSS_ENTROPY and z_loss == 0 and single and dtype == weight_dtype:
        return Method.TORCH
    return Method.CHUNKED


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
    match method_for(hidden.device, hidden.dtype, weight.dtype, z_loss):
        case Method.FUSED:
            total, cross_entropy = fused_cross_entropy(hidden, weight, targets, z_loss)
        case Method.TORCH:
            total = summed_linear_cross_entropy(
                hidden, weight, targets, IGNORED, rows_at_once(weight.shape[0])
            )
            cross_entropy = total.detach()
        case Method.CHUNKED:
            total, cross_entropy = chunked_cross_entropy(hidden, weight, targets, z_loss)
    return Loss(total, cross_entropy, count)


@torch.no_grad()
def cross_entropy_per_target(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(weight h)[target] of each target, without gradients.

    Args:
        hidden, weight, targets: as in `next_token_loss`.

    Returns:
        (B, T), float32, or float64 for such hidden states; 0 where the target is `IGNORED`.
    """
    rows = hidden.flatten(0, -2)
    if torch.is_autocast_enabled(rows.device.type):
        rows = rows.to(torch.get_autocast_dtype(rows.device.type))
    exact = torch.promote_types(rows.dtype, torch.float32)
    head, found = weight.to(rows.dtype), []
    step = rows_at_once(weight.shape[0])
    for h, y in zip(rows.split(step), targets.flatten().split(step), strict=True):
        logits = (h @ head.T).to(exact)
        of_target = logits.gather(1, y[:, None].clamp(min=0)).squeeze(1)
        found.append((logits.logsumexp(1) - of_target).mul_(y != IGNORED))
    return torch.cat(found).view_as(targets)


def rows_at_once(vocab_size: int) -> int:
    """How many rows' logits are held at a time; the fused loss has `phd.loss_memory`'s number."""
    return max(1, min(ROWS_AT_ONCE, LOGITS_AT_ONCE // vocab_size))


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float
) -> tuple[Tensor, Tensor]:
    """(total, cross-entropy) of rows (R, D), a chunk of rows at a time."""
    needs = _needed_gradients(hidden, weight)
    return _LinearCrossEntropy.apply(hidden, weight, targets, z_loss, needs, False)


def fused_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float
) -> tuple[Tensor, Tensor]:
    """`chunked_cross_entropy` of large chunks in which Triton passes over the logits.

    The logits are rounded to the dtype of `hidden`, as those of a plain product are; what follows
    is in float32. A product that returns float32 logits would read and write twice the bytes, and
    its gain is lost: d_logits have to be rounded for the products that follow. d_weight is summed
    in float32, within a chunk and over chunks.

    `hidden` is in half precision or float32, on CUDA (or in Triton's interpreter).
    """
    needs = _needed_gradients(hidden, weight)
    return _LinearCrossEntropy.apply(hidden, weight, targets, z_loss, needs, True)


def _needed_gradients(hidden: Tensor, weight: Tensor) -> tuple[bool, bool]:
    enabled = torch.is_grad_enabled()
    return enabled and hidden.requires_grad, enabled and weight.requires_grad


class Sums(NamedTuple):
    """What the forward pass computes: the sums of `Loss` and the gradients of its total.

    Attributes:
        total, cross_entropy: scalars, float32 or float64.
        d_hidden: (R, D), in the dtype of the hidden states.
        d_weight: (V, D), in that of the scalars, whatever the weight's is.

    A gradient that is not needed has no rows.
    """

    total: Tensor
    cross_entropy: Tensor
    d_hidden: Tensor
    d_weight: Tensor


class _LinearCrossEntropy(torch.autograd.Function):
    """The loss, whose backward only scales what the forward has computed."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        z_loss: float,
        needs: tuple[bool, bool],
        fused: bool,
    ) -> tuple[Tensor, Tensor]:
        if fused:
            # Here, because Triton need not be installed where this is not used.
            from phd.cross_entropy import linear_cross_entropy

            sums = Sums(*linear_cross_entropy(hidden, weight, targets, IGNORED, z_loss, *needs))
        else:
            sums = _chunked_sums(hidden, weight, targets, z_loss, *needs)
        ctx.needs = needs
        ctx.save_for_backward(sums.d_hidden, sums.d_weight)
        ctx.mark_non_differentiable(sums.cross_entropy)
        return sums.total, sums.cross_entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, scale: Tensor, _: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        d_hidden, d_weight = ctx.saved_tensors
        # The scale is mostly 1 / targets, which half precision would round: all of d_hidden would
        # be wrong by the same factor. Autograd rounds d_weight to what the weight accumulates in.
        scaled = (d_hidden.to(d_weight.dtype) * scale).to(d_hidden.dtype)
        d_weight = d_weight * scale if ctx.needs[1] else None
        return scaled if ctx.needs[0] else None, d_weight, None, None, None, None


def _chunked_sums(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    z_loss: float,
    needs_d_hidden: bool,
    needs_d_weight: bool,
) -> Sums:
    """The sums by torch's operations: on any device, in any dtype."""
    exact = torch.promote_types(hidden.dtype, torch.float32)
    # Two tensors and not two views of one: FSDP's hooks refuse views of one tensor.
    total, cross_entropy = (hidden.new_zeros((), dtype=exact) for _ in range(2))
    d_hidden = torch.empty_like(hidden if needs_d_hidden else hidden[:0])
    d_weight = torch.zeros_like(weight if needs_d_weight else weight[:0], dtype=exact)
    head = weight.to(hidden.dtype)
    step = rows_at_once(weight.shape[0])
    for start in range(0, len(hidden), step):
        h, y = hidden[start : start + step], targets[start : start + step]
        logits = (h @ head.T).to(exact)
        counted = (y != IGNORED)[:, None]
        y = y[:, None].clamp(min=0)
        lse = logits.logsumexp(1, keepdim=True)
        loss = (lse - logits.gather(1, y)).mul_(counted).sum()
        cross_entropy += loss
        total += loss + (z_loss * lse**2).mul_(counted).sum()
        if not (needs_d_hidden or needs_d_weight):
            continue
        # d loss / d logits = p (1 + 2 z lse) - one_hot(target)
        p = logits.sub_(lse).exp_().mul_(1 + 2 * z_loss * lse)
        p.scatter_add_(1, y, -torch.ones_like(lse)).mul_(counted)
        p = p.to(h.dtype)
        if needs_d_hidden:
            d_hidden[start : start + step] = p @ head
        if needs_d_weight:
            d_weight += p.T @ h
    return Sums(total, cross_entropy, d_hidden, d_weight)
