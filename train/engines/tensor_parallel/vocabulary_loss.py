"""Next-token cross-entropy whose vocabulary is cut over the tensor ranks.

    h (R, D), all rows on every rank
      | head, this rank's V / t rows
    logits (R, V / t)  --max-->  all-reduce  --exp-->  sum and the target's logit  -->  all-reduce
      |                                                                                     |
      |  their gradient takes their place       <-------------  log-sum-exp  ---------------+
    d_hidden, this rank's part of a sum (R, D)        d_weight (V / t, D), complete

A rank never has the logits of the whole vocabulary, nor of all rows: as in `phd.loss`, those of a
chunk of rows are computed, used for the loss and for its gradients, and dropped.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from phd.loss import IGNORED, Loss, rows_at_once
from phd.loss_memory import fused_rows_at_once
from phd.model import ModelWithLoss, RowPart
from phd.segments import Segments
from train.engines.tensor_parallel.ranks import TensorRanks


class VocabularyLoss(ModelWithLoss):
    """A model and its loss, of which every tensor rank computes a part. All get the same loss."""

    ranks: TensorRanks

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor,
        segments: Segments | None = None,
        part: RowPart | None = None,
        *,
        per_target: bool = False,
    ) -> Loss:
        """tokens, targets (B, T), the same on all tensor ranks -> sums over the targets."""
        hidden = self.ranks.gather_for_product(self.model(tokens, segments, part))
        return vocabulary_loss(
            hidden.flatten(0, -2),
            self.model.head_weight,
            targets,
            self.z_loss,
            self.ranks,
            per_target=per_target,
        )


def vocabulary_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    z_loss: float,
    ranks: TensorRanks,
    *,
    per_target: bool = False,
) -> Loss:
    """`phd.loss.next_token_loss` of rows that all ranks have, under a head that is cut.

    Args:
        hidden: (R, D), R = B T. Its gradient is this rank's part of a sum over the ranks.
        weight: (V / t, D), this rank's rows of the LM head.
        targets: int64 (B, T).
        z_loss: as in `next_token_loss`.
        ranks: which hold the parts of the vocabulary in their order.
        per_target: also give the loss of each target.
    """
    enabled = torch.is_grad_enabled()
    needs = enabled and hidden.requires_grad, enabled and weight.requires_grad
    total, cross_entropy, each = _VocabularyLoss.apply(
        hidden, weight, targets.flatten(), z_loss, ranks, needs
    )
    count = (targets != IGNORED).sum()
    return Loss(total, cross_entropy, count, each.view_as(targets) if per_target else None)


class _Sums(NamedTuple):
    """What the forward pass computes: sums over targets, their gradients, and the loss of each."""

    total: Tensor
    cross_entropy: Tensor
    each: Tensor
    d_hidden: Tensor
    d_weight: Tensor


class _VocabularyLoss(torch.autograd.Function):
    """The loss, whose backward only scales what the forward has computed."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        z_loss: float,
        ranks: TensorRanks,
        needs: tuple[bool, bool],
    ) -> tuple[Tensor, Tensor, Tensor]:
        sums = _chunked_sums(hidden, weight, targets, z_loss, ranks, needs)
        ctx.needs = needs
        ctx.save_for_backward(sums.d_hidden, sums.d_weight)
        ctx.mark_non_differentiable(sums.cross_entropy, sums.each)
        return sums.total, sums.cross_entropy, sums.each

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        scale = grads[0]
        d_hidden, d_weight = ctx.saved_tensors
        # As in `phd.loss`: half precision would round the scale, which is mostly 1 / targets.
        scaled = (d_hidden.to(d_weight.dtype) * scale).to(d_hidden.dtype) if ctx.needs[0] else None
        return scaled, d_weight * scale if ctx.needs[1] else None, None, None, None, None


def _chunked_sums(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    z_loss: float,
    ranks: TensorRanks,
    needs: tuple[bool, bool],
) -> _Sums:
    """The sums, a chunk of rows at a time."""
    exact = torch.promote_types(hidden.dtype, torch.float32)
    # Not views of one tensor, which FSDP's hooks refuse.
    total, cross_entropy = (hidden.new_zeros((), dtype=exact) for _ in range(2))
    d_hidden = torch.empty_like(hidden if needs[0] else hidden[:0])
    d_weight = torch.zeros_like(weight if needs[1] else weight[:0], dtype=exact)
    head, each = weight.to(hidden.dtype), []
    step = _rows_at_once(hidden, len(weight))
    for start in range(0, len(hidden), step):
        h, y = hidden[start : start + step], targets[start : start + step, None]
        chunk = _Chunk.of((h @ head.T).to(exact), y, ranks)
        each.append(chunk.loss)
        cross_entropy += chunk.loss.sum()
        total += (chunk.loss + z_loss * chunk.lse.square() * chunk.counted).sum()
        if not any(needs):
            continue
        p = chunk.gradient(z_loss).to(h.dtype)
        if needs[0]:
            d_hidden[start : start + step] = p @ head
        if needs[1]:
            d_weight += p.T @ h
    return _Sums(total, cross_entropy, torch.cat(each), d_hidden, d_weight)


class _Chunk(NamedTuple):
    """Some rows of logits.

    Attributes:
        exp: (R, V / t), exp(logits - the row's largest).
        sum: (R, 1), of exp over the whole vocabulary.
        lse: (R, 1), the log-sum-exp over the whole vocabulary.
        place: int64 (R, 1), where in this rank's part the target is.
        mine: bool (R, 1), whether the target is in this rank's part.
        counted: bool (R, 1).
        loss: (R, 1), 0 where the target is ignored.
    """

    exp: Tensor
    sum: Tensor
    lse: Tensor
    place: Tensor
    mine: Tensor
    counted: Tensor
    loss: Tensor

    @classmethod
    def of(cls, logits: Tensor, targets: Tensor, ranks: TensorRanks) -> "_Chunk":
        """From this rank's logits (R, V / t), whose memory it takes, and targets (R, 1)."""
        part = logits.shape[1]
        index = targets - ranks.rank * part
        mine, counted = (index >= 0) & (index < part), targets != IGNORED
        index = index.clamp(0, part - 1)
        peak = ranks.max(logits.amax(1, keepdim=True))
        logits = logits.sub_(peak)
        chosen = logits.gather(1, index) * mine
        exp = logits.exp_()
        sums, chosen = ranks.sum(torch.stack([exp.sum(1, keepdim=True), chosen]))
        log_sum = sums.log()
        return cls(exp, sums, peak + log_sum, index, mine, counted, (log_sum - chosen) * counted)

    def gradient(self, z_loss: float) -> Tensor:
        """d (loss + z-loss) / d logits = p (1 + 2 z lse) - one_hot(target), in the place of exp."""
        p = self.exp.mul_((1 + 2 * z_loss * self.lse) / self.sum)
        return p.scatter_add_(1, self.place, -self.mine.to(p.dtype)).mul_(self.counted)


def _rows_at_once(hidden: Tensor, part: int) -> int:
    """How many rows' logits are held at a time, of a part of the vocabulary."""
    if hidden.device.type == "cuda":  # where a chunk of few rows would wait for the collectives
        return fused_rows_at_once(len(hidden), part, hidden.dtype)
    return rows_at_once(part)
