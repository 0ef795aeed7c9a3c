"""One transformer block: attention and SwiGLU, in the four wirings of norms."""

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

        All slots of x give keys and values. Returns x itself where all of them are computed.
        """

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Rotate queries and keys by RoPE, and attend.

        q (B, K or 1, N, T', H) of the selected slots, k and v (B, K or 1, G, T, H) of all slots;
        returns (B, N, K or 1, T', H).
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

    A* normalises the whole q and k projections (`reordered`), and v as well (`hybrid`,
    arXiv 2503.04598); the other blocks of `hybrid_star` are as `hybrid`.
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
        stream = context.select_queries(x)
        match self.wiring:
            case "reordered":
                x = stream + self.attention_norm(self._attention_of(x, context))
                return x + self.ffn_norm(self.ffn(x))
            case "pre":
                x = stream + self._attention_of(self.attention_norm(x), context)
                return x + self.ffn(self.ffn_norm(x))
            case _:
                x = self.ffn_norm(stream + self._attention_of(x, context))
                return x + self.ffn(x)

    def _attention_of(self, x: Tensor, context: AttentionContext) -> Tensor:
        # Selecting is a slice, so doing it twice costs nothing. With `pre`, attention reads another
        # tensor than the stream; with the others, one slice for both would change the order in
        # which gradients are summed, and so their last bits.
        return self.attention(context.select_queries(x), x, context)


class Attention(nn.Module):
    """Projections to queries, keys and values, and back; the same weights for every copy."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.q = Linear(config.dim, queries)
        self.k = Linear(config.dim, keys)
        self.v = Linear(config.dim, keys)
        self.o = Linear(queries, config.dim)
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        self.v_norm: RMSNorm | None = None
        if config.norm != "pre":
            self.q_norm = RMSNorm(queries, config.norm_eps)
            self.k_norm = RMSNorm(keys, config.norm_eps)
        if config.norm.startswith("hybrid"):
            self.v_norm = RMSNorm(keys, config.norm_eps)

    def forward(self, x_queries: Tensor, x: Tensor, context: AttentionContext) -> Tensor:
        """Queries of x_queries (B, K or 1, T', D), keys and values of x (B, K or 1, T, D).

        Returns (B, K or 1, T', D). Where both are one tensor, so may be the three projections.
        """
        if x_queries is x:
            q, k, v = project_all(x, (self.q, self.k, self.v))
        else:
            q, (k, v) = self.q(x_queries), project_all(x, (self.k, self.v))
        q, k, v = (
            self._split_heads(y, norm)
            for y, norm in ((q, self.q_norm), (k, self.k_norm), (v, self.v_norm))
        )
        out = context.attend(q, k, v)
        return self.o(out.permute(0, 2, 3, 1, 4).flatten(3))

    def _split_heads(self, x: Tensor, norm: RMSNorm | None) -> Tensor:
        """Normalise a projection: (B, copies, T, heads * H) -> (B, copies, heads, T, H)."""
        if norm is not None:
            # The norm computes in float32; attention runs in what autocast made of the projection.
            x = norm(x).to(x.dtype)
        return x.unflatten(-1, (-1, self.head_dim)).transpose(2, 3)


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
