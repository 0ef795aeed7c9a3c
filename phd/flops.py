"""Floating-point operations of a model, counting only what its pattern needs."""

from collections import Counter
from dataclasses import replace
from functools import lru_cache
from itertools import count
from typing import NamedTuple

from phd.config import ModelConfig
from phd.pattern import Pattern, patterns_of


class Flops(NamedTuple):
    """Forward multiply-adds of one row, each counted as two operations."""

    linear: int  # projections, feed-forwards, LM head
    attention: int  # scores and weighted values of the pairs that the pattern allows

    @property
    def total(self) -> int:
        return self.linear + self.attention


def forward_flops(config: ModelConfig, *documents: int) -> Flops:
    """FLOPs of one forward pass over a row of isolated documents with these numbers of tokens.

    A matrix product of R rows by an (in, out) weight costs 2 R in out; a (query, key) pair costs
    4 H per head, for the score and for the weighted value. Norms, RoPE, softmax and the embedding
    are not counted, as is customary (arXiv 2204.02311, appendix B). Work that the model skips is
    not counted either: the last layer computes only keys and values for all copies but the last,
    the first layer projects copies once where they are still equal, hidden copies that nobody sees
    have no keys, the LM head runs on one copy. Every pass of a loop projects keys, also those of
    the first pass.
    """
    lengths, tokens = Counter(documents), sum(documents)
    K, H, D = config.K, config.head_dim, config.dim
    query = 2 * D * config.heads * H
    keys = 2 * 2 * D * config.kv_heads * H
    output = query
    ffn = 3 * 2 * D * config.ffn_dim
    linear = attention = 0
    for layer, pattern in enumerate(patterns_of(config)):
        queries = 1 if layer == config.depth - 1 else K
        distinct = K if layer else config.distinct_inputs
        linear += min(queries, distinct) * query + queries * (output + ffn)
        linear += min(pattern.key_copies, distinct) * keys
        pairs = sum(n * _pairs(pattern, length, queries) for length, n in lengths.items())
        attention += 4 * H * config.heads * pairs
    return Flops(linear * tokens + 2 * D * config.vocab_size * tokens, attention)


def training_flops(config: ModelConfig, *documents: int) -> int:
    """FLOPs of training on documents of so many tokens: forward, and twice that for the backward.

    The one count that plans, limits and metrics take. A row whose documents are not isolated is one
    document. Padding and the recomputation of checkpointed activations are no useful work, and no
    part of it.
    """
    return 3 * forward_flops(config, *documents).total


def layers_at_flops(config: ModelConfig, flops: int, *documents: int) -> int:
    """The fewest layers with which this model takes at least so many `training_flops`."""
    enough = (
        layers
        for layers in count(1)
        if training_flops(replace(config, layers=layers), *documents) >= flops
    )
    return next(enough)


def training_flops_per_token(config: ModelConfig, *documents: int) -> float:
    """`training_flops` per token of these documents."""
    return training_flops(config, *documents) / sum(documents)


@lru_cache(maxsize=1 << 16)
def _pairs(pattern: Pattern, tokens: int, queries: int) -> int:
    """`Pattern.pairs`, kept: training counts the documents of every step."""
    return pattern.pairs(tokens, queries)
