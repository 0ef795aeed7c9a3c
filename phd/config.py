"""The shape of a PHD model and the rule its attention follows, as one torch-free value."""

from dataclasses import dataclass, fields, replace
from math import ceil
from typing import Literal, get_args

Variant = Literal["vanilla", "naive_repeat", "phd", "phd_swa", "phd_cswa"]
SpanUnit = Literal["hidden", "token"]
CopyPositions = Literal["shared", "flattened"]
Norm = Literal["reordered", "pre", "hybrid", "hybrid_star"]
Backend = Literal["auto", "reference", "packed", "flex"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything that decides what the network computes.

    The first block is PHD's (arXiv 2504.14992, section 3), the second the size of the OLMo 2
    transformer it is built on (arXiv 2501.00656). `conf/model/` sets the first, `conf/size/`
    the second; both live under `model.` on the command line.

    Attributes:
        variant: which slots may attend to which; see `phd.pattern.Pattern`.
        K: copies of each token, the original included (>= 1).
        window: W, how far hidden copies see each other, itself included (>= 1); `phd_swa` and
            `phd_cswa` only.
        chunk: C, the length of a chunk; hidden copies of different chunks never meet;
            `phd_cswa` only.
        span_unit: what W and C count: `hidden` copies (the default) or `token`s.
        copy_positions: RoPE position of copy s of token n: `shared` n, or `flattened` n*K + s.
        copy_embedding: add one learned vector per copy to the token embedding.
        attention: the backend; `auto` is `packed`.
        size: the name of the preset, a label for run names.
        layers: number of transformer blocks.
        dim: D, the width of the residual stream.
        ffn_dim: the width of *one* of SwiGLU's two inner projections.
        heads: N, query heads.
        kv_heads: G, key/value heads; divides N.
        head_dim: H; even, for RoPE.
        vocab_size: V, rows of the embedding. The tokenizer may use fewer.
        max_seq_len: tokens for which RoPE's table is built.
        rope_theta: RoPE's base.
        norm: the wiring of norms; see `phd.block.Block`.
        norm_eps: RMSNorm's epsilon.
        tied: the LM head shares the embedding's weights.
    """

    variant: Variant = "phd_cswa"
    K: int = 2
    window: int = 16
    chunk: int = 32
    span_unit: SpanUnit = "hidden"
    copy_positions: CopyPositions = "shared"
    copy_embedding: bool = False
    attention: Backend = "auto"

    size: str = "tiny"
    layers: int = 3
    dim: int = 256
    ffn_dim: int = 768
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    vocab_size: int = 4096
    max_seq_len: int = 4096
    rope_theta: float = 500_000.0
    norm: Norm = "reordered"
    norm_eps: float = 1e-6
    tied: bool = True

    def __post_init__(self) -> None:
        if problems := self.problems():
            raise ValueError("; ".join(problems))

    def problems(self) -> list[str]:
        """Every way in which these values cannot make a model, one sentence each."""
        found = [
            f"model.{f.name}={getattr(self, f.name)!r}: expected one of {', '.join(options)}"
            for f, options in ((f, get_args(f.type)) for f in fields(self))
            if options and getattr(self, f.name) not in options
        ]
        found += [
            f"model.{f.name}={getattr(self, f.name)}: expected an integer of at least 1"
            for f in fields(self)
            if f.type is int and getattr(self, f.name) < 1
        ]
        if self.variant == "vanilla" and self.K != 1:
            found.append(
                f"model.K={self.K}: vanilla feeds each token once; set model.K=1 or choose "
                "model=naive_repeat, phd, phd_swa or phd_cswa"
            )
        if self.kv_heads >= 1 and self.heads % self.kv_heads:
            found.append(
                f"model.kv_heads={self.kv_heads}: must divide model.heads={self.heads}, "
                "because each key/value head serves the same number of query heads"
            )
        if self.head_dim % 2:
            found.append(f"model.head_dim={self.head_dim}: RoPE turns pairs, so it must be even")
        if self.rope_theta <= 1:
            found.append(f"model.rope_theta={self.rope_theta}: expected a number above 1")
        if self.norm_eps <= 0:
            found.append(f"model.norm_eps={self.norm_eps}: expected a number above 0")
        return found

    @property
    def rope_positions(self) -> int:
        """Length of RoPE's table: `flattened` copies need K positions for each token."""
        return self.max_seq_len * (self.K if self.copy_positions == "flattened" else 1)

    @property
    def chunk_tokens(self) -> int | None:
        """Tokens in one chunk; None where chunks do not apply."""
        if self.variant != "phd_cswa" or self.K == 1:
            return None
        return self.chunk if self.span_unit == "token" else ceil(self.chunk / (self.K - 1))

    @property
    def vanilla_twin(self) -> "ModelConfig":
        """The plain transformer of the same size, which every price is compared with."""
        return replace(self, variant="vanilla", K=1)

    @property
    def name(self) -> str:
        """The paper's name of the variant: `phd_cswa-K-W-C`, `phd_swa-K-W-inf`, `phd-K`."""
        unit = "t" if self.span_unit == "token" else ""
        match self.variant:
            case "vanilla":
                return "vanilla"
            case "naive_repeat" | "phd":
                return f"{self.variant}-{self.K}"
            case "phd_swa":
                return f"phd_swa-{self.K}-{self.window}{unit}-inf"
            case "phd_cswa":
                return f"phd_cswa-{self.K}-{self.window}{unit}-{self.chunk}{unit}"
