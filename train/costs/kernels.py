"""Seconds that a rank computes in a step, by part, from the rates of its device.

A product takes as long as its FLOPs or its bytes, whichever is more (the roofline, Williams et al.
2009); attention as its FLOPs; all else as its bytes. FLOPs are those of `phd.flops`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, NamedTuple

from phd.config import ModelConfig
from phd.pattern import Pattern, patterns_of
from train.costs.cluster import RatesConfig

RESIDUAL = 4
"""Bytes of a number of the residual stream, which is float32."""

LOGITS_PASSES = 3
"""How often the logits are read or written, in the dtype of the products: docs/speed.md."""

OPTIMIZER_BYTES = 32
"""Moved for each parameter in a step: AdamW reads weight, gradient and two moments and writes all
but the gradient, and the norm reads the gradient. All are float32."""

EAGER = 4
"""How many times the bytes of norms, activations, RoPE and residuals are moved where no compiler
fuses them: what is left of an eager and a compiled step of `1b2` on an H200 (354 and 293 ms,
docs/speed.md) without products, attention, loss and optimizer."""


Recompute = Literal["none", "selective", "full"]


class Seconds(NamedTuple):
    """Of one direction through a part of the model.

    Attributes:
        products: matrix products.
        attention: its kernels.
        other: norms, RoPE, activations, residuals and the loss's softmax.
    """

    products: float = 0.0
    attention: float = 0.0
    other: float = 0.0

    @property
    def total(self) -> float:
        return sum(self)

    def plus(self, more: "Seconds") -> "Seconds":
        """Both together, part by part."""
        return Seconds(*(a + b for a, b in zip(self, more, strict=True)))


class Stage(NamedTuple):
    """A part of the model that is computed as a whole: the embedding, a block, the head."""

    forward: Seconds
    backward: Seconds


class Product(NamedTuple):
    """(rows, inner) times (inner, outer)."""

    rows: int
    inner: int
    outer: int

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.inner * self.outer

    def seconds(self, rates: RatesConfig, itemsize: int) -> float:
        """By its FLOPs or its bytes, whichever take longer."""
        numbers = self.rows * self.inner + self.inner * self.outer + self.rows * self.outer
        by_bytes = numbers * itemsize / rates.memory
        return max(self.flops / rates.products, by_bytes)


@dataclass(frozen=True)
class MicroBatch:
    """What a rank computes of a micro-batch.

    Attributes:
        model: the shape.
        rows: of the micro-batch.
        seq_len: T, the tokens of a row on all context ranks together.
        context: ranks over which the tokens of a row are dealt.
        tensor: ranks over which matrices are cut.
        itemsize: bytes of a number in the products.
        compiled: whether blocks are compiled.
        recompute: what the backward pass computes again.
    """

    model: ModelConfig
    rows: int
    seq_len: int
    context: int = 1
    tensor: int = 1
    itemsize: int = 2
    compiled: bool = True
    recompute: Recompute = "none"

    @property
    def tokens(self) -> int:
        """Of a rank: B T / c."""
        return self.rows * self.seq_len // self.context


class Copies(NamedTuple):
    """How many copies of a token a layer computes what for, as `phd.flops` counts them.

    Attributes:
        queries: attend, and go on through the output projection and the feed-forward.
        projected: have a query projection of their own.
        keys: have keys and values.
        projected_keys: have a projection of their own for them.
        inputs: come into the layer.
    """

    queries: int
    projected: int
    keys: int
    projected_keys: int
    inputs: int


def copies_of(model: ModelConfig, layer: int, pattern: Pattern) -> Copies:
    """Of a layer with this pattern, counted through all passes."""
    queries = 1 if layer == model.depth - 1 else model.K
    inputs = model.K if layer else model.distinct_inputs
    keys = pattern.key_copies
    return Copies(queries, min(queries, inputs), keys, min(keys, inputs), inputs)


def block_products(batch: MicroBatch, copies: Copies) -> list[Product]:
    """The products of a block's forward pass on a tensor rank: columnwise in, rowwise out."""
    model, tokens, t = batch.model, batch.tokens, batch.tensor
    D, F = model.dim, model.ffn_dim // t
    query, key = model.heads * model.head_dim // t, model.kv_heads * model.head_dim // t
    return [
        Product(copies.projected * tokens, D, query),
        Product(copies.projected_keys * tokens, D, key),
        Product(copies.projected_keys * tokens, D, key),
        Product(copies.queries * tokens, query, D),
        Product(copies.queries * tokens, D, F),
        Product(copies.queries * tokens, D, F),
        Product(copies.queries * tokens, F, D),
    ]


def attention_flops(batch: MicroBatch, pattern: Pattern, queries: int) -> int:
    """Forward FLOPs of a layer's attention on a rank, which has 1/(c t) of them."""
    model = batch.model
    pairs = batch.rows * pattern.pairs(batch.seq_len, queries)
    return 4 * model.head_dim * model.heads * pairs // (batch.context * batch.tensor)


def local_bytes(batch: MicroBatch, pattern: Pattern) -> int:
    """Bytes that the kernel of rules 2 and 3 moves: q, and out twice; hidden keys and values."""
    model, local = batch.model, pattern.local_copies
    if not local:
        return 0
    heads = 3 * local * model.heads + 2 * (pattern.K - 1) * model.kv_heads
    return batch.tokens * heads * model.head_dim * batch.itemsize // batch.tensor


def other_bytes(batch: MicroBatch, copies: Copies) -> tuple[int, int]:
    """Bytes that norms, residuals, RoPE and SwiGLU of a block move, forward and backward.

    With sequence parallelism a tensor rank has its part of all of them.

        a norm and its residual   reads a result and the stream, writes the stream and a result
        q and k                   read and written, by norm and RoPE in one
        SwiGLU                    reads gate and up, writes their product; backward reads these two
                                  and a gradient, and writes two
    """
    model, item = batch.model, batch.itemsize
    norms = 2 * copies.queries * model.dim * 2 * (item + RESIDUAL)
    heads = copies.queries * model.heads + copies.keys * model.kv_heads
    rotated = 2 * item * heads * model.head_dim
    gated = copies.queries * model.ffn_dim * item
    scale = (1 if batch.compiled else EAGER) * batch.tokens
    forward, backward = norms + rotated + 3 * gated, 2 * (norms + rotated) + 5 * gated
    return scale * forward // batch.tensor, scale * backward // batch.tensor


@lru_cache(maxsize=4096)
def block_stage(batch: MicroBatch, copies: Copies, pattern: Pattern, rates: RatesConfig) -> Stage:
    """The seconds of a block."""
    memory = rates.memory
    products = sum(p.seconds(rates, batch.itemsize) for p in block_products(batch, copies))
    kernel = attention_flops(batch, pattern, copies.queries) / rates.attention
    local = local_bytes(batch, pattern) / memory
    forward_bytes, backward_bytes = other_bytes(batch, copies)
    forward = Seconds(products, kernel + local, forward_bytes / memory)
    backward = Seconds(2 * products, 2 * (kernel + local), backward_bytes / memory)
    return Stage(forward, backward.plus(_again(forward, batch.recompute)))


def _again(forward: Seconds, recompute: Recompute) -> Seconds:
    """What the backward pass computes again."""
    match recompute:
        case "none":
            return Seconds()
        case "selective":
            return Seconds(other=forward.other)
        case "full":
            return forward


def head_stage(batch: MicroBatch, rates: RatesConfig) -> Stage:
    """The seconds of the LM head and the loss, on the last copy."""
    vocabulary = batch.model.vocab_size // batch.tensor
    product = Product(batch.tokens, batch.model.dim, vocabulary).seconds(rates, batch.itemsize)
    size = batch.tokens * vocabulary * batch.itemsize
    once = LOGITS_PASSES * size / rates.memory / 3
    return Stage(Seconds(product, 0.0, once), Seconds(2 * product, 0.0, 2 * once))


def block_stages(
    batch: MicroBatch, rates: RatesConfig, checkpoint_every: int = 1
) -> Iterator[Stage]:
    """The blocks of all passes; every `checkpoint_every`-th one computes something again."""
    for layer, pattern in enumerate(patterns_of(batch.model)):
        copies = copies_of(batch.model, layer, pattern)
        recompute = recompute_of(batch, layer, checkpoint_every)
        yield block_stage(replace(batch, recompute=recompute), copies, pattern, rates)


def recompute_of(batch: MicroBatch, layer: int, checkpoint_every: int) -> Recompute:
    """What is computed again of a block; they are numbered through all passes."""
    checkpointed = layer % batch.model.layers % checkpoint_every == 0
    return batch.recompute if checkpointed else "none"


def optimizer_s(parameters: float, rates: RatesConfig) -> float:
    """Seconds of AdamW and the norm of the gradient, on a rank's shard of the parameters."""
    return OPTIMIZER_BYTES * parameters / rates.memory
