"""Tensor parallelism: matrices cut over neighbouring ranks, applied to a model from outside.

    embed (V, D)            by rows: the vocabulary        reduce-scatter to tokens
    blocks
      attention             gathers the tokens
        q, k, v             columnwise: heads
        q_norm, k_norm      of the heads that are here     `reordered`: one sum over the ranks
        o                   rowwise                        reduce-scatter to tokens
      attention_norm        of the tokens that are here
      ffn                   gathers the tokens
        gate, up            columnwise
        down                rowwise                        reduce-scatter to tokens
      ffn_norm              of the tokens that are here
    norm                    of the tokens that are here
    loss                    gathers the tokens; the head by rows, as the embedding

Between these, the residual stream x (B, K or 1, T / t, D) is cut over tokens.

Parts of the model get another class. Their weights become DTensors over the tensor ranks, so that
FSDP2 and checkpoints know what part of which matrix a rank has; all else is plain tensors of this
rank.

What the ranks send each other, and the gradients of it:

    verb             forward              backward
    gather           all-gather           reduce-scatter
    scatter_sum      reduce-scatter       all-gather
    product_sum      a product, and that  all-gather, and two products

Megatron-LM's sequence parallelism (arXiv 2205.05198, figure 5) calls these g and its conjugate.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.nn import functional as F

from phd.block import Attention, AttentionContext, Block, FeedForward
from phd.linear import Linear
from phd.loss import IGNORED, Loss, rows_at_once
from phd.loss_memory import fused_rows_at_once
from phd.model import ModelWithLoss, RowPart, Transformer
from phd.norm import RMSNorm
from phd.segments import Segments
from train.torch_private import all_gather_rows, all_reduce, reduce_scatter_rows

# The ranks


@dataclass(frozen=True)
class TensorRanks:
    """The ranks among which each matrix is cut.

    Attributes:
        mesh: of the one axis `tensor`.
        size: t, how many ranks there are.
        rank: this one among them.
        group: the name of their process group.
    """

    mesh: DeviceMesh
    size: int
    rank: int
    group: str

    @classmethod
    def of(cls, mesh: DeviceMesh) -> "TensorRanks":
        """The ranks of a mesh of one axis."""
        return cls(mesh, mesh.size(), mesh.get_local_rank(), mesh.get_group().group_name)

    def gather(self, x: Tensor) -> Tensor:
        """The tokens (..., T / t, D) of all ranks: (..., T, D)."""
        return _Gather.apply(x, self.size, self.group)

    def gather_for_product(self, x: Tensor) -> Tensor:
        """`gather` of what a matrix product takes: autocast's dtype is sent where it is on."""
        return self.gather(_for_product(x))

    def product_sum(self, x: Tensor, weight: Tensor) -> Tensor:
        """This rank's tokens of the sum of all ranks' products.

        Args:
            x: (..., T, in / t).
            weight: (out, in / t).

        Returns:
            (..., T / t, out).
        """
        return _ProductSum.apply(_for_product(x), _for_product(weight), self.size, self.group)

    def scatter_sum(self, x: Tensor) -> Tensor:
        """This rank's tokens (..., T / t, D) of the sum of the x (..., T, D) of all ranks."""
        return _ScatterSum.apply(x, self.size, self.group)

    def sum(self, x: Tensor) -> Tensor:
        """The sum of the x of all ranks, without a gradient."""
        return all_reduce(x, "sum", self.group)

    def max(self, x: Tensor) -> Tensor:
        """The largest of the x of all ranks, without a gradient."""
        return all_reduce(x, "max", self.group)


class _Gather(torch.autograd.Function):
    """All-gather; each rank computes with all of it, so the gradients of the ranks are summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, group: str) -> Tensor:
        ctx.size, ctx.group = size, group
        return _gathered(x, size, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _summed(grads[0], ctx.size, ctx.group), None, None


class _ScatterSum(torch.autograd.Function):
    """Reduce-scatter; each rank has added to all tokens, so it needs the gradients of all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, group: str) -> Tensor:
        ctx.size, ctx.group = size, group
        return _summed(x, size, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _gathered(grads[0], ctx.size, ctx.group), None, None


class _ProductSum(torch.autograd.Function):
    """A rowwise product and `_ScatterSum`, of which only the operands are kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, size: int, group: str) -> Tensor:
        ctx.size, ctx.group = size, group
        ctx.save_for_backward(x, weight)
        return _operator(x, weight, size, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        dy = _gathered(grads[0], ctx.size, ctx.group)
        needs_x, needs_weight, *_ = ctx.needs_input_grad
        dx = dy @ weight if needs_x else None
        dweight = dy.flatten(0, -2).T @ x.flatten(0, -2) if needs_weight else None
        return dx, dweight, None, None


# One operator, so that activation checkpointing can keep the sum, and not what is summed: t times
# as large, and needed by nothing else.


@torch.library.custom_op("train::product_sum", mutates_args=())
def _operator(x: Tensor, weight: Tensor, size: int, group: str) -> Tensor:
    return product_sum(x, weight, size, group)


@_operator.register_fake
def _(x: Tensor, weight: Tensor, size: int, group: str) -> Tensor:  # noqa: ARG001
    *rows, tokens, _ = x.shape
    return x.new_empty(*rows, tokens // size, len(weight))


PRODUCT_SUM = torch.ops.train.product_sum.default


def product_sum(x: Tensor, weight: Tensor, size: int, group: str) -> Tensor:
    """x (..., T, in / t) times the transpose of weight (out, in / t), summed: (..., T / t, out)."""
    return _summed(F.linear(x, weight), size, group)


def _for_product(x: Tensor) -> Tensor:
    """x in autocast's dtype where autocast is on."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def _gathered(x: Tensor, size: int, group: str) -> Tensor:
    # The collective puts one rank's tensor after the other.
    return torch.cat(all_gather_rows(x.contiguous(), size, group).chunk(size), -2)


def _summed(x: Tensor, size: int, group: str) -> Tensor:
    return reduce_scatter_rows(torch.cat(x.chunk(size, -2)), size, group)


# The parts of a model that compute with a part of their weight


class TensorParallel(nn.Module):
    """A module that knows the tensor ranks. Such a class is set on a module that exists already."""

    ranks: TensorRanks


class LocalWeight(TensorParallel):
    """A module that computes with this rank's part of its weight.

    Attributes:
        placement: how the weight is cut over the tensor ranks, or that each of them has all of it.
    """

    placement: Placement

    def _part(self) -> Tensor:
        """This rank's part, whose gradient finds its way back to the DTensor.

        A weight that all ranks have is used by each of them for other tokens or other heads, so its
        gradient is the sum of theirs. FSDP2 asks for that sum once a step. Where FSDP2 holds a
        shard of the part, this is the shard: it looks the parameter up by this name.
        """
        weight: Any = self._parameters["weight"]
        if weight.device_mesh.ndim > 1:
            return weight
        whole = self.placement.is_replicate()
        return weight.to_local(grad_placements=[Partial() if whole else self.placement])

    weight: Any = property(_part)


class LocalLinear(LocalWeight, Linear):
    """Columnwise: of all tokens, this rank's outputs. The weight is cut by rows (out / t, in)."""


class RowwiseLinear(LocalWeight, Linear):
    """Of this rank's inputs, this rank's tokens of all outputs. The weight is (out, in / t)."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., T, in / t) -> (..., T / t, out)."""
        return self.ranks.product_sum(x, self.operand(x.device.type))


class LocalEmbedding(LocalWeight, nn.Embedding):
    """A table that every rank has."""


class VocabularyEmbedding(LocalWeight, nn.Embedding):
    """A table whose rows are cut over the ranks; the result is of this rank's tokens."""

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens, int (..., T), the same on all ranks -> (..., T / t, D)."""
        weight: Tensor = self.weight
        index = tokens - self.ranks.rank * len(weight)
        mine = (index >= 0) & (index < len(weight))
        # One rank adds the row and the others add 0, so this sum is exact in any precision.
        rows = F.embedding(index.clamp(0, len(weight) - 1), weight) * mine[..., None]
        return self.ranks.scatter_sum(rows)


class LocalNorm(LocalWeight, RMSNorm):
    """RMSNorm of this rank's tokens, or of its heads one by one."""


class CutNorm(LocalWeight, RMSNorm):
    """RMSNorm over features that are cut over the ranks."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., F / t) -> (..., F / t) in float32 or wider."""
        weight = self.scaled_weight
        (features,) = self.normalized_shape
        return _CutNorm.apply(x.to(weight.dtype), weight, self.eps, features, self.ranks)


class _CutNorm(torch.autograd.Function):
    """weight * x^ with x^ = x / sqrt(sum(x^2) / F + eps), where the sum is over all ranks.

    With g = weight * dy, dx = (g - x^ sum(g x^) / F) / sqrt(...): that sum is over all ranks, too.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, eps: float, features: int, ranks: TensorRanks
    ) -> Tensor:
        squares = ranks.sum(x.square().sum(-1, keepdim=True))
        scale = torch.rsqrt(squares / features + eps)
        ctx.features, ctx.ranks = features, ranks
        ctx.save_for_backward(x, weight, scale)
        return x * scale * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        x, weight, scale = ctx.saved_tensors
        normed, dy = x * scale, grads[0]
        dweight = (dy * normed).flatten(0, -2).sum(0)
        g = dy * weight
        common = ctx.ranks.sum((g * normed).sum(-1, keepdim=True)) / ctx.features
        return (g - normed * common) * scale, dweight, None, None, None


class TensorAttention(TensorParallel, Attention):
    """Attention of this rank's heads, which see all tokens."""

    def forward(self, x: Tensor, keys: Tensor, context: AttentionContext) -> Tensor:
        """As in `Attention`, for this rank's tokens of x and keys, (B, K or 1, T / t, D) each."""
        whole = self.ranks.gather_for_product(x)
        same = keys is x
        return super().forward(
            whole, whole if same else self.ranks.gather_for_product(keys), context
        )


class TensorFeedForward(TensorParallel, FeedForward):
    """This rank's part of the inner width, for all tokens."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., T / t, D) -> (..., T / t, D)."""
        return super().forward(self.ranks.gather_for_product(x))


# The loss


class VocabularyLoss(ModelWithLoss):
    """A model and its loss, of which every tensor rank computes a part. All get the same loss.

        h (R, D), all rows on every rank
          | head, this rank's V / t rows
        logits (R, V / t)  --max-->  all-reduce  --exp-->  sum, target's logit  -->  all-reduce
          |                                                                              |
          |  their gradient takes their place       <---------  log-sum-exp  ------------+
        d_hidden, this rank's part of a sum (R, D)        d_weight (V / t, D), complete

    A rank never has the logits of the whole vocabulary, nor of all rows: as in `phd.loss`, those of
    a chunk of rows are computed, used for the loss and for its gradients, and dropped.
    """

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


# The plan


class Cut(NamedTuple):
    """How a module computes with its weight, and how that is cut over the tensor ranks."""

    kind: type[LocalWeight]
    placement: Placement


EACH_OWN_TOKENS = Cut(LocalNorm, Replicate())
EACH_OWN_HEADS = Cut(LocalNorm, Replicate())
COLUMNWISE, ROWWISE = Cut(LocalLinear, Shard(0)), Cut(RowwiseLinear, Shard(1))
VOCABULARY = Cut(VocabularyEmbedding, Shard(0))


def parallelize_tensor(model_with_loss: ModelWithLoss, ranks: TensorRanks) -> None:
    """Cut a model on the meta device over the tensor ranks, in place; names stay what they are."""
    model = model_with_loss.model
    for name, cut in plan(model):
        _cut(model.get_submodule(name), cut, ranks)
    for block in model.blocks:
        assert isinstance(block, Block)
        for module, kind in ((block.attention, TensorAttention), (block.ffn, TensorFeedForward)):
            _become(module, kind, ranks)
    _become(model_with_loss, VocabularyLoss, ranks)


def plan(model: Transformer) -> Iterator[tuple[str, Cut]]:
    """The cut of each module with a weight."""
    config = model.config
    yield "embed", VOCABULARY
    if hasattr(model, "copy_input"):
        one = Cut(LocalEmbedding, Replicate())
        yield "copy_input", VOCABULARY if config.hidden_input == "table" else one
    if hasattr(model, "copy_embed"):
        yield "copy_embed", Cut(LocalEmbedding, Replicate())
    for name, module in model.blocks.named_modules(prefix="blocks"):
        _, _, last = name.rpartition(".")
        match last:
            case "q" | "k" | "v" | "gate" | "up":
                yield name, COLUMNWISE
            case "o" | "down":
                yield name, ROWWISE
            case "q_norm" | "k_norm" | "v_norm" if module is not None:
                per_head = config.norm.startswith("hybrid")
                yield name, EACH_OWN_HEADS if per_head else Cut(CutNorm, Shard(0))
            case "attention_norm" | "ffn_norm":
                yield name, EACH_OWN_TOKENS
    yield "norm", EACH_OWN_TOKENS
    if hasattr(model, "head"):
        yield "head", COLUMNWISE


def _cut(module: nn.Module, cut: Cut, ranks: TensorRanks) -> None:
    """Have a module hold, and compute with, its part of the weight."""
    weight = module.get_parameter("weight")
    shape = list(weight.shape)
    if isinstance(cut.placement, Shard):
        assert shape[cut.placement.dim] % ranks.size == 0, (shape, ranks.size)
        shape[cut.placement.dim] //= ranks.size
    part = DTensor.from_local(
        weight.new_empty(shape),
        ranks.mesh,
        [cut.placement],
        run_check=False,
        shape=weight.shape,
        stride=weight.stride(),
    )
    _become(module, cut.kind, ranks)
    module.placement = cut.placement  # type: ignore[assignment]
    module._parameters["weight"] = nn.Parameter(part)


def _become(module: nn.Module, kind: type[nn.Module], ranks: TensorRanks) -> None:
    """Give an existing module another class, as FSDP2 does: names and hooks stay."""
    assert issubclass(kind, type(module)), (kind, type(module))
    module.__class__ = kind
    module.ranks = ranks  # type: ignore[assignment]
