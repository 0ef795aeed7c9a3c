"""A decoded token on CUDA: all copies of it in nine kernels a layer, most of them Triton's.

    kernel            reads                                  writes
    partial_products  h, the weights of q, k and v           partial sums of the projections
    place_token       the projections                        q; k and v into the cache
    attend_token (2)  q, the cache                           the output of attention
    partial_products  the output, the weight of o            partial sums of y
    end_sublayer      the residual stream, y                 the stream, h
    gated_product     h, the weights of gate and up          SwiGLU
    partial_products  SwiGLU, the weight of down             partial sums of y
    end_sublayer      the residual stream, y                 the stream, h

Rows are slots: row b*K + s is copy s of the new token of row b of the cache. The weights are read
once for all rows, as they are: nothing is converted on the way. With more than
`phd.inference.kernels.products.MOST_ROWS` rows, cuBLAS multiplies, and SwiGLU is a tenth kernel.

Triton compiles a kernel for each shape of the model, not for lengths or capacities, and keeps it in
its cache on disk. Nothing on the host depends on lengths, so a CUDA graph of a step serves all.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from phd.attention.blocks import has_local_kernels
from phd.attention.packed import fused_obstacle
from phd.block import Block
from phd.inference.cache import KVCache
from phd.inference.kernels.placement import QkvNorms, place_token
from phd.inference.kernels.products import gated_product, partial_products, product
from phd.inference.kernels.residual import SublayerEnd, end_sublayer
from phd.inference.kernels.token_attention import attend_token
from phd.inference.kernels.token_cache import TokenCache, new_hidden_copies
from phd.linear import Linear, are_adjacent, fused_weight
from phd.model import Transformer, is_plain


class FusedLayer(NamedTuple):
    """The weights of a block, as its kernels read them: q, k, v as one, gate and up as one."""

    norms: QkvNorms
    qkv: Tensor
    o: Tensor
    gate_up: Tensor
    down: Tensor
    after_attention: SublayerEnd
    after_ffn: SublayerEnd


class FusedStep:
    """The work of one new token of each row of a cache.

    It keeps the weights of a model that `why_not_fused` does not object to. A model that has moved,
    or whose weights were replaced, needs a new step.
    """

    def __init__(self, model: Transformer, cache: KVCache) -> None:
        self.model, self.cache = model, cache
        blocks = [block for block in model.blocks if isinstance(block, Block)]
        starts = [_norm_before(block) for block in blocks]
        self.before = SublayerEnd(of_sum=starts[0])
        self.layers = [
            _fused_layer(block, following)
            for block, following in zip(blocks, [*starts[1:], model.norm.weight], strict=True)
        ]

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        """Tokens, int64 (B,) -> logits (B, V) after them; the cache gets their keys and values.

        The caller adds 1 to the lengths.
        """
        model, cache, eps = self.model, self.cache, self.model.norm.eps
        B, K, D, dtype = len(tokens), model.config.K, model.config.dim, cache.dtype
        stream = model.embedded(tokens[:, None]).expand(B, K, 1, D).reshape(B * K, D).contiguous()
        h = end_sublayer(stream, None, self.before, eps, dtype)
        pattern, new = cache.pattern, new_hidden_copies(cache)
        for i, layer in enumerate(self.layers):
            last = i == len(self.layers) - 1
            kv, qkv = TokenCache.of(cache, i, new), partial_products(h, layer.qkv)
            q = place_token(qkv, layer.norms, model.rope, kv, pattern, last_copy_only=last)
            out = attend_token(q, kv, pattern)
            if last:
                stream = stream.view(B, K, D)[:, -1].contiguous()
            y = partial_products(out, layer.o)
            h = end_sublayer(stream, y, layer.after_attention, eps, dtype)
            y = partial_products(gated_product(h, layer.gate_up), layer.down)
            end = layer.after_ffn
            if last and model.norm.gain != 1:  # now, for the weight may have changed in place
                end = end._replace(of_sum=model.norm.scaled_weight)
            h = end_sublayer(stream, y, end, eps, dtype)
        return product(h, model.head_weight)


def why_not_fused(model: Transformer, cache: KVCache) -> str | None:
    """Why the kernels cannot compute a model's token, in words; None: they can."""
    dtype, weights = cache.dtype, {w.dtype for w in _products(model)}
    device, H = model.embed.weight.device, model.config.head_dim
    if weights != {dtype}:
        named = " and ".join(sorted(str(x) for x in weights))
        return f"the weights are in {named}, and the cache is in {dtype}"
    if (obstacle := fused_obstacle(device, dtype, H)) is not None:
        return obstacle
    pattern = cache.pattern
    is_one = all(of_layer == pattern for of_layer in cache.patterns)
    if not (is_one and has_local_kernels(pattern) and pattern.key_copies == pattern.K):
        return f"no Triton kernels for the slots that model.variant={model.config.variant} sees"
    if model.config.passes > 1:
        return f"no Triton kernels for model.passes={model.config.passes}"
    if not is_plain(model):
        return "the model has hooks, adapters or other parts put in place"
    # Not done here: weights that move are lost to an optimizer with views of them.
    if not all(are_adjacent(layers) for block in model.blocks for layers in _fused_in(block)):
        return "the projections are not fused; call Transformer.fuse_projections"
    return None


def _fused_in(block: nn.Module) -> tuple[Sequence[Linear], Sequence[Linear]]:
    """The layers of a block whose weights are read as one."""
    assert isinstance(block, Block)
    attention, ffn = block.attention, block.ffn
    return (attention.q, attention.k, attention.v), (ffn.gate, ffn.up)


def _products(model: Transformer) -> list[Tensor]:
    """The weights of all products, and the embedding."""
    layers = [layer.weight for layer in model.modules() if isinstance(layer, Linear)]
    return [*layers, model.embed.weight]


def _norm_before(block: Block) -> Tensor | None:
    """The weight of the norm between the residual stream and attention, if there is one."""
    return block.attention_norm.weight if block.wiring == "pre" else None


def _fused_layer(block: Block, following: Tensor | None) -> FusedLayer:
    """A block, and the norm between the residual stream after it and what reads that next."""
    attention, ffn = block.attention, block.ffn
    match block.wiring:
        case "reordered":
            after_attention = SublayerEnd(of_output=block.attention_norm.weight)
            after_ffn = SublayerEnd(of_output=block.ffn_norm.weight, of_sum=following)
        case "pre":
            after_attention = SublayerEnd(of_sum=block.ffn_norm.weight)
            after_ffn = SublayerEnd(of_sum=following)
        case wiring:
            assert wiring == "hybrid", wiring
            after_attention = SublayerEnd(of_sum=block.ffn_norm.weight, normed_stream=True)
            after_ffn = SublayerEnd(of_sum=following)
    qkv, gate_up = _fused_in(block)
    return FusedLayer(
        QkvNorms.of(attention),
        fused_weight(qkv),
        attention.o.weight,
        fused_weight(gate_up),
        ffn.down.weight,
        after_attention,
        after_ffn,
    )
