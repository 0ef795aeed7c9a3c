"""One transformer block: attention and SwiGLU, in the four wirings of norms."""

from torch import Tensor, nn
from torch.nn.functional import silu

from phd.attention import attend
from phd.config import ModelConfig
from phd.norm import RMSNorm
from phd.pattern import Pattern
from phd.rope import rotate
from phd.segments import Segments


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

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        last_copy_only: bool,
        segments: Segments | None = None,
    ) -> Tensor:
        """Map the residual stream (B, K, T, D) to the next one.

        x may hold one copy for all K where they are still equal. With `last_copy_only`, only the
        last copy is computed, (B, 1, T, D); the others give their keys and values alone.
        Documents in `segments` do not see each other.
        """
        stream = x[:, -1:] if last_copy_only else x
        seeing = (rope, last_copy_only, segments)
        match self.wiring:
            case "reordered":
                x = stream + self.attention_norm(self.attention(x, *seeing))
                return x + self.ffn_norm(self.ffn(x))
            case "pre":
                x = stream + self.attention(self.attention_norm(x), *seeing)
                return x + self.ffn(self.ffn_norm(x))
            case _:
                x = self.ffn_norm(stream + self.attention(x, *seeing))
                return x + self.ffn(x)


class Attention(nn.Module):
    """Projections, RoPE and `attend`; the same weights for every copy."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.pattern = Pattern.of(config)
        self.backend = config.attention
        self.head_dim = config.head_dim
        queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.q = nn.Linear(config.dim, queries, bias=False)
        self.k = nn.Linear(config.dim, keys, bias=False)
        self.v = nn.Linear(config.dim, keys, bias=False)
        self.o = nn.Linear(queries, config.dim, bias=False)
        if config.norm != "pre":
            self.q_norm = RMSNorm(queries, config.norm_eps)
            self.k_norm = RMSNorm(keys, config.norm_eps)
        if config.norm.startswith("hybrid"):
            self.v_norm = RMSNorm(keys, config.norm_eps)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        last_copy_only: bool,
        segments: Segments | None = None,
    ) -> Tensor:
        """x (B, K or 1, T, D) -> (B, K, T, D), or the last copy's (B, 1, T, D) alone."""
        cos, sin = rope
        K, asked = self.pattern.K, 1 if last_copy_only else self.pattern.K
        q = rotate(self._heads(x[:, -asked:], "q"), cos[:, -asked:], sin[:, -asked:])
        k = rotate(self._heads(x, "k"), cos, sin)
        v = self._heads(x, "v").transpose(1, 2)
        # Copies that are still equal were projected once.
        q, k, v = (y.expand(-1, -1, copies, -1, -1) for y, copies in ((q, asked), (k, K), (v, K)))
        out = attend(q, k, v, self.pattern, self.backend, segments)
        return self.o(out.permute(0, 2, 3, 1, 4).flatten(3))

    def _heads(self, x: Tensor, name: str) -> Tensor:
        """Project and normalise: (B, copies, T, D) -> (B, copies, heads, T, H)."""
        x = self.get_submodule(name)(x)
        norm = f"{name}_norm"
        if norm in self._modules:
            x = self.get_submodule(norm)(x).to(x.dtype)
        return x.unflatten(-1, (-1, self.head_dim)).transpose(2, 3)


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202): down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.up = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.down = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.down(silu(self.gate(x)) * self.up(x))
