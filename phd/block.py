"""One transformer block: attention and SwiGLU, in the four wirings of norms."""

from torch import Tensor, nn
from torch.nn.functional import silu

from phd.attention.context import AttentionContext
from phd.config import ModelConfig
from phd.linear import Linear, project_all
from phd.norm import RMSNorm


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

    def forward(self, x: Tensor, view: AttentionContext) -> Tensor:
        """Map the residual stream (B, K, T, D) to the next one, of the slots that the view asks.

        x may hold one copy for all K where they are still equal.
        """
        stream = view.select_queries(x)
        match self.wiring:
            case "reordered":
                x = stream + self.attention_norm(self.attention(x, view))
                return x + self.ffn_norm(self.ffn(x))
            case "pre":
                x = stream + self.attention(self.attention_norm(x), view)
                return x + self.ffn(self.ffn_norm(x))
            case _:
                x = self.ffn_norm(stream + self.attention(x, view))
                return x + self.ffn(x)


class Attention(nn.Module):
    """Projections around what a view makes of them; the same weights for every copy."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.q = Linear(config.dim, queries)
        self.k = Linear(config.dim, keys)
        self.v = Linear(config.dim, keys)
        self.o = Linear(queries, config.dim)
        if config.norm != "pre":
            self.q_norm = RMSNorm(queries, config.norm_eps)
            self.k_norm = RMSNorm(keys, config.norm_eps)
        if config.norm.startswith("hybrid"):
            self.v_norm = RMSNorm(keys, config.norm_eps)

    def forward(self, x: Tensor, view: AttentionContext) -> Tensor:
        """x (B, K or 1, T, D) -> the slots that the view asks, (B, K or 1, T', D)."""
        selected = view.select_queries(x)
        if selected is x:
            q, k, v = project_all(x, (self.q, self.k, self.v))
        else:
            q, (k, v) = self.q(selected), project_all(x, (self.k, self.v))
        out = view.attend(*(self._heads(y, name) for y, name in zip((q, k, v), "qkv", strict=True)))
        return self.o(out.permute(0, 2, 3, 1, 4).flatten(3))

    def _heads(self, x: Tensor, name: str) -> Tensor:
        """Normalise a projection: (B, copies, T, heads * H) -> (B, copies, heads, T, H)."""
        norm = self._modules.get(f"{name}_norm")
        if norm is not None:
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
