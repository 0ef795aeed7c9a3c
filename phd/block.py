"""One transformer block: attention and SwiGLU, in the four wirings of norms."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor, nn
from torch.nn.functional import silu

from phd.config import ModelConfig
from phd.linear import Linear, project_all
from phd.norm import RMSNorm


class AttentionContext(Protocol):
    """What one layer's attention works on: whole rows in training, a cache at inference."""

    def select_queries(self, x: Tensor) -> Tensor:
        """The slots of x (B, K or 1, T, D) that the layer computes, (B, K or 1, T', D).

        Returns x itself where all of them are computed.
        """

    def select_keys(self, x: Tensor) -> Tensor:
        """What gives keys and values (B, K or 1, T, D): x itself where all its slots do."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Rotate queries and keys by RoPE, and attend.

        q (B, K or 1, N, T', H), k and v (B, K or 1, G, T, H) of the slots that are selected for
        them; returns (B, N, K or 1, T', H).
        """


class Block(nn.Module):
    """Attention A and feed-forward F around the residual stream; n is RMSNorm.

        reordered (OLMo 2)    pre (Llama)          hybrid               hybrid_star, block 0
        x --+-- A* -- n --    x --+-- n -- A --    x --+-- A* ------    x --+-- n -- A* --
            |           |         |           |        |           |        |            |
            +---------- + ->      +---------- + ->     +---------- + ->     +----------- + ->
        x --+-- F -- n ---    x --+-- n -- F --    x -- n --+-- F --    x --+-- n -- F ---
            |           |         |           |             |      |        |            |
            +---------- + ->      +---------- + ->          +----- + ->     +----------- + ->

    A* normalises q and k (`reordered`), and v as well (`hybrid`, arXiv 2503.04598); the other
    blocks of `hybrid_star` are as `hybrid`. `Attention` says over what.
    """

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        star = config.norm == "hybrid_star" and index == 0
        self.wiring = "pre" if star else config.norm.removesuffix("_star")
        self.attention = Attention(config)
        self.ffn = FeedForward(config)
        if self.wiring != "hybrid":
            self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        """Map the residual stream (B, K or 1, T, D) to the next one, (B, K or 1, T', D).

        The result holds the slots that the context selects. x may hold one copy for all K where
        they are still equal.
        """
        stream, keys = context.select_queries(x), context.select_keys(x)
        match self.wiring:
            case "reordered":
                x = stream + self.attention_norm(self.attention(x, keys, context))
                return x + self.ffn_norm(self.ffn(x))
            case "pre":
                normed = self.attention_norm(x)
                keys = normed if keys is x else self.attention_norm(keys)
                x = stream + self.attention(normed, keys, context)
                return x + self.ffn(self.ffn_norm(x))
            case _:
                x = self.ffn_norm(stream + self.attention(x, keys, context))
                return x + self.ffn(x)


class Attention(nn.Module):
    """Projections to queries, keys and values, and back; the same weights for every copy.

        reordered              hybrid, hybrid_star          pre
        n( q1 q2 q3 q4 )       n(q1) n(q2) n(q3) n(q4)      q1 q2 q3 q4
        n( k1 k2 )             n(k1) n(k2)                  k1 k2
           v1 v2               n(v1) n(v2)                  v1 v2

    `reordered` normalises a whole projection, as OLMo 2 does. `hybrid` normalises each head, as
    HybridNorm's own code does (BryceZhuo/HybridNorm, `OLMoBlock.attention`): one weight of length H
    serves all query heads, one all key heads and one all value heads.

    muP multiplies the queries by `ModelConfig.query_gain` then.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim, self.query_gain = config.head_dim, config.query_gain
        self.norm_per_head = config.norm.startswith("hybrid")
        queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.q = Linear(config.dim, queries)
        self.k = Linear(config.dim, keys)
        self.v = Linear(config.dim, keys)
        self.o = Linear(queries, config.dim)
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        self.v_norm: RMSNorm | None = None
        if self.norm_per_head:
            self.q_norm, self.k_norm, self.v_norm = (
                RMSNorm(config.head_dim, config.norm_eps) for _ in range(3)
            )
        elif config.norm == "reordered":
            self.q_norm = RMSNorm(queries, config.norm_eps)
            self.k_norm = RMSNorm(keys, config.norm_eps)

    def forward(self, x: Tensor, keys: Tensor, context: AttentionContext) -> Tensor:
        """Queries of the slots of x that the context selects, keys and values of `keys`.

        Both are (B, K or 1, T, D); returns (B, K or 1, T', D). Where all of x are queries and keys,
        so may be the three projections one.
        """
        # Selecting is a slice, so that the block does it again for the stream costs nothing. With
        # `pre`, attention reads another tensor than the stream; with the others, one slice for both
        # would change the order in which gradients are summed, and so their last bits.
        queries = context.select_queries(x)
        if queries is keys:
            q, k, v = project_all(keys, (self.q, self.k, self.v))
        else:
            q, (k, v) = self.q(queries), project_all(keys, (self.k, self.v))
        q, k, v = (
            self._split_heads(y, norm)
            for y, norm in ((q, self.q_norm), (k, self.k_norm), (v, self.v_norm))
        )
        if self.query_gain != 1:
            q = q * self.query_gain
        out = context.attend(q, k, v)
        return self.o(out.permute(0, 2, 3, 1, 4).flatten(3))

    def _split_heads(self, x: Tensor, norm: RMSNorm | None) -> Tensor:
        """Normalise a projection: (B, copies, T, heads * H) -> (B, copies, heads, T, H)."""
        # The norm computes in float32; attention runs in what autocast made of the projection.
        if norm is not None and not self.norm_per_head:
            x = norm(x).to(x.dtype)
        x = x.unflatten(-1, (-1, self.head_dim))
        if norm is not None and self.norm_per_head:
            x = norm(x).to(x.dtype)
        return x.transpose(2, 3)


def is_old_hybrid(config: ModelConfig, shapes: Mapping[str, Sequence[int]]) -> bool:
    """Whether weights of these shapes, by name, are of the form that `hybrid` had at first.

    It normalised the whole projections, with weights as long as these. With one head, that and
    what `Attention` does are the same.
    """
    shape = shapes.get("blocks.0.attention.q_norm.weight")
    whole = (config.heads * config.head_dim,)
    return config.norm.startswith("hybrid") and config.heads > 1 and shape == whole


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202): down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Linear(config.dim, config.ffn_dim)
        self.up = Linear(config.dim, config.ffn_dim)
        self.down = Linear(config.ffn_dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        gate, up = project_all(x, (self.gate, self.up))
        return self.down(silu(gate) * up)
