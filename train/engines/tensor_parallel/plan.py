"""Which part of a model is cut in which way over the tensor ranks.

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
"""

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from phd.block import Block
from phd.model import ModelWithLoss, Transformer
from train.engines.tensor_parallel.modules import (
    CutNorm,
    LocalEmbedding,
    LocalLinear,
    LocalNorm,
    LocalWeight,
    RowwiseLinear,
    TensorAttention,
    TensorFeedForward,
    VocabularyEmbedding,
)
from train.engines.tensor_parallel.ranks import TensorRanks
from train.engines.tensor_parallel.vocabulary_loss import VocabularyLoss


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
