"""The shape of a PHD model and the rule that its attention follows; needs no torch."""

import re
from dataclasses import dataclass, fields, replace
from math import ceil, inf, sqrt
from typing import Any, Literal, NamedTuple, get_args, get_origin

from conf.errors import Problem
from conf.settings import Settings, above, at_least, without_effect

Variant = Literal[
    "vanilla",
    "naive_repeat",
    "phd",
    "phd_swa",
    "phd_cswa",
    "pause",
    "free_pause",
    "sps",
    "hidden_decoding",
]
SpanUnit = Literal["hidden", "token"]
CopyInput = Literal["token", "learned", "table"]
LoopKeys = Literal["first", "own"]
CopyPositions = Literal["shared", "flattened"]
Norm = Literal["reordered", "pre", "hybrid", "hybrid_star"]
Backend = Literal["auto", "reference", "packed", "fused", "flex"]
HeadInit = Literal["embedding", "fan_in"]


class Traits(NamedTuple):
    """What sets a variant apart, besides who attends to whom (`phd.pattern.Pattern.of`).

    Attributes:
        copy_input: what hidden copies are fed where `model.copy_input` is `auto`.
        window: whether the variant uses `model.window`.
        chunk: whether it uses `model.chunk`.
        most_copies: the largest K that makes sense; None: any.
    """

    copy_input: CopyInput = "token"
    window: bool = False
    chunk: bool = False
    most_copies: int | None = None


VARIANTS: dict[Variant, Traits] = {
    "vanilla": Traits(most_copies=1),
    "naive_repeat": Traits(),
    "phd": Traits(),
    "phd_swa": Traits(window=True),
    "phd_cswa": Traits(window=True, chunk=True),
    "pause": Traits("learned"),
    # No slot sees a hidden copy, so of several only the last would be of use.
    "free_pause": Traits("learned", most_copies=2),
    "sps": Traits("learned", window=True),
    "hidden_decoding": Traits("table"),
}

NAME = re.compile(
    r"(?P<vanilla>vanilla)|loop-(?P<passes>\d+)(-(?P<loop_keys>own))?|"
    rf"(?P<variant>{'|'.join(name for name in VARIANTS if name != 'vanilla')})-(?P<K>\d+)"
    r"(-(?P<window>\d+)(?P<unit>t?)(-(inf|(?P<chunk>\d+)t?))?)?"
)
"""The names of variants that `ModelConfig.name` gives; W and C may be left out."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Settings):
    """Everything that decides what the network computes.

    The first settings, up to `attention`, are PHD's own (arXiv 2504.14992, section 3); `model=`
    chooses files of conf/model/ that set them. The others are the size of the OLMo 2 transformer
    that PHD is built on (arXiv 2501.00656); `size=` chooses files of conf/size/ that set them.

    Attributes:
        variant: which slots may attend to which; `phd.pattern.Pattern` draws them.
        K: how often each token enters the network: its original and K - 1 hidden copies.
            `free_pause` has at most 2.
        window: W, how many hidden copies a hidden copy sees among the hidden copies, itself
            included. Only `phd_swa`, `phd_cswa` and `sps` use it. With `sps` it is how many tokens
            back hidden copies are seen, and may be 0.
        chunk: C, the length of a chunk. Hidden copies of different chunks do not attend to each
            other. Only `phd_cswa` uses it.
        span_unit: whether W and C count `hidden` copies or `token`s. Only `phd_swa` and `phd_cswa`
            use it.
        originals_see_hidden: originals, too, see the W hidden copies before them. Only `phd_swa`
            and `phd_cswa` use it; with `sps` they always do.
        copy_positions: the RoPE position of copy s of token n. `shared`: n, the same for all
            copies; `flattened`: n*K + s.
        copy_input: what hidden copies are fed. `token`: the token's embedding, as the original;
            `learned`: one learned vector, the same for all tokens and hidden copies; `table`: the
            token's embedding in a table of the copy's own; `auto`: what the variant's authors feed,
            which is `learned` with `pause`, `free_pause` and `sps`, `table` with `hidden_decoding`,
            and `token` with all others.
        copy_embedding: add one learned vector per copy to what it is fed.
        full_every: of so many layers, one sees all copies, and so does the last layer. In the
            others each copy sees its own copy's past alone, which is cheaper. Only
            `hidden_decoding` uses it.
        passes: how often a token goes through the whole stack of layers: the output of a pass is
            the input of the next. Only `vanilla` has several; `model=loop` sets them.
        loop_keys: which keys and values the passes see. `first`: those of the first pass, which
            alone are kept in the KV cache. `own`: each pass those of its own, which are all kept.
        attention: the implementation of attention. `reference` is the definition, with a dense
            mask; `packed` is fast everywhere; `fused` is `packed` with Triton kernels for hidden
            copies, on CUDA only; `flex` is FlexAttention, on CUDA only; `auto` is `fused` on CUDA
            where Triton is installed, else `packed`.
        size: the name of the size, which becomes part of the run's name.
        layers: how many transformer blocks the model has.
        dim: D, the width of the residual stream.
        ffn_dim: the width of the feed-forward network, which is that of each of SwiGLU's two
            inner projections (OLMo's `mlp_hidden_size` counts both together).
        heads: N, the number of query heads.
        kv_heads: G, the number of key/value heads; must divide `heads`.
        head_dim: H, the width of a head; must be even, for RoPE.
        vocab_size: V, the rows of the embedding. The tokenizer may have fewer pieces.
        max_seq_len: the most tokens that a row may have; RoPE's table is this long.
        rope_theta: RoPE's base.
        norm: where the RMSNorms are; `phd.block.Block` draws the four wirings. `hybrid` and
            `hybrid_star` normalise queries, keys and values per head.
        norm_eps: the epsilon that RMSNorm adds to the mean square.
        tied: whether the LM head uses the embedding's weights.
        head_init: the standard deviation of an untied head's initial weights. `embedding`: that of
            the embedding, 1/sqrt(2.5 D); `fan_in`: 1/sqrt(D), as OLMo's `full_megatron` has it. A
            tied head is the embedding.
        mup_base_dim: the D of a narrower model whose best learning rate is known or searched, from
            which muP (arXiv 2203.03466, table 8) takes it over: with m = dim / mup_base_dim, the
            matrices of the blocks have 1/m of the learning rate, the logits are divided by m, and
            the embedding starts as that of the narrower model. `ffn_dim` and `heads` * `head_dim`
            are to grow as `dim` does. null: the standard parametrisation.
        mup_base_head_dim: the H of that model; with muP, queries are multiplied by
            sqrt(mup_base_head_dim / head_dim), so that the scale of attention goes as 1/H and not
            as 1/sqrt(H). null: `head_dim`; wider models mostly have more heads of the same width.
    """

    variant: Variant = "phd_cswa"
    K: int = 2
    window: int = 16
    chunk: int = 32
    span_unit: SpanUnit = "hidden"
    originals_see_hidden: bool = False
    copy_positions: CopyPositions = "shared"
    copy_input: Literal["auto", "token", "learned", "table"] = "auto"
    copy_embedding: bool = False
    full_every: int = 1
    passes: int = 1
    loop_keys: LoopKeys = "first"
    attention: Backend = "auto"

    size: str = "tiny"
    layers: int = 3  # these shapes are the size `tiny`; conf/size/ has those of the papers
    dim: int = 256
    ffn_dim: int = 768
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    vocab_size: int = 4096
    max_seq_len: int = 4096
    rope_theta: float = 500_000.0  # as in OLMo 2
    norm: Norm = "reordered"
    norm_eps: float = 1e-6
    tied: bool = True
    head_init: HeadInit = "embedding"
    mup_base_dim: int | None = None
    mup_base_head_dim: int | None = None

    def problems(self) -> list[Problem]:
        """Every reason why these values cannot make a model."""
        found = [
            Problem(f"model.{f.name}", value, f"expected one of {', '.join(get_args(f.type))}")
            for f in fields(self)
            if get_origin(f.type) is Literal
            and (value := getattr(self, f.name)) not in get_args(f.type)
        ]
        # A Hugging Face config reaches this class without `conf.validation`, which checks types.
        for name in (f.name for f in fields(self) if f.type is int):
            may_be_0 = name == "window" and self.variant not in ("phd_swa", "phd_cswa")
            found += at_least(self, "model", 0 if may_be_0 else 1, name)
        return [
            *found,
            *at_least(self, "model", 1, "mup_base_dim", "mup_base_head_dim"),
            *self._shape_problems(),
            *above(self, "model", 1, "rope_theta"),
            *above(self, "model", 0, "norm_eps"),
        ]

    def unused(self) -> list[Problem]:
        """The settings that the variant, a tied head, or a model without muP has no use for."""
        found, variant, traits = [], f"model.variant={self.variant}", VARIANTS[self.variant]
        if not traits.window:
            reason, hint = f"{variant} has no window", "choose model=phd_swa or phd_cswa"
            names = ("window", "span_unit", "originals_see_hidden")
            found += without_effect(self, "model", reason, hint, *names)
        if self.variant == "sps":
            hint = "choose model=phd_swa"
            reason = f"{variant} counts its window in tokens"
            found += without_effect(self, "model", reason, hint, "span_unit")
            reason = f"with {variant} originals always see hidden copies"
            found += without_effect(self, "model", reason, hint, "originals_see_hidden")
        if not traits.chunk:
            reason = f"{variant} has no chunks"
            found += without_effect(self, "model", reason, "choose model=phd_cswa", "chunk")
        if self.variant != "hidden_decoding":
            hint = "choose model=hidden_decoding"
            reason = f"all layers of {variant} have one rule"
            found += without_effect(self, "model", reason, hint, "full_every")
        if self.variant == "vanilla":
            reason, hint = f"{variant} feeds each token once", "choose another variant"
            found += without_effect(self, "model", reason, hint, "copy_positions", "copy_input")
        if self.passes == 1:
            hint = "choose model=loop"
            reason = "model.passes=1 makes no loop"
            found += without_effect(self, "model", reason, hint, "loop_keys")
        if self.tied:
            reason = "model.tied=true makes the head the embedding"
            found += without_effect(self, "model", reason, "set model.tied=false", "head_init")
        if self.mup_base_dim is None:
            reason = "model.mup_base_dim=null is the standard parametrisation"
            hint = "set model.mup_base_dim"
            found += without_effect(self, "model", reason, hint, "mup_base_head_dim")
        return found

    def _shape_problems(self) -> list[Problem]:
        found = []
        if self.variant == "vanilla" and self.K != 1:
            hint = "set model.K=1 or choose model=naive_repeat, phd, phd_swa or phd_cswa"
            found.append(
                Problem(
                    "model.K",
                    self.K,
                    "vanilla feeds each token once",
                    hint,
                    others=("model.variant",),
                )
            )
        if self.variant == "free_pause" and self.K > 2:
            reason = (
                "no slot of free_pause sees a hidden copy, so all but the last would be computed "
                "for nothing"
            )
            hint = "set model.K=2 or choose model=pause or phd"
            found.append(Problem("model.K", self.K, reason, hint, others=("model.variant",)))
        if self.passes > 1 and self.variant != "vanilla":
            reason = f"model.variant={self.variant} goes through the layers once"
            hint = "set model.passes=1 or choose model=loop"
            found.append(
                Problem("model.passes", self.passes, reason, hint, others=("model.variant",))
            )
        if self.kv_heads >= 1 and self.heads % self.kv_heads:
            reason = (
                f"must divide model.heads={self.heads}, because each key/value head serves the "
                "same number of query heads"
            )
            found.append(Problem("model.kv_heads", self.kv_heads, reason, others=("model.heads",)))
        if self.head_dim % 2:
            reason = "must be even, because RoPE rotates pairs of dimensions"
            found.append(Problem("model.head_dim", self.head_dim, reason))
        return found

    @property
    def rope_positions(self) -> int:
        """The length of RoPE's table: `flattened` copies need K positions for each token."""
        return self.max_seq_len * (self.K if self.copy_positions == "flattened" else 1)

    @property
    def hidden_input(self) -> CopyInput:
        """What hidden copies are fed: `copy_input`, or where it is `auto` the variant's own.

        Without hidden copies it is `token`, which takes no parameters.
        """
        if self.K == 1:
            return "token"
        if self.copy_input == "auto":
            return VARIANTS[self.variant].copy_input
        return self.copy_input

    @property
    def distinct_inputs(self) -> int:
        """How many copies of a token differ in what they are fed: all K, or 1 where none does."""
        return self.K if self.copy_embedding or self.hidden_input != "token" else 1

    @property
    def width_ratio(self) -> float:
        """m of muP, how much wider the model is than its base; 1 without muP."""
        return 1.0 if self.mup_base_dim is None else self.dim / self.mup_base_dim

    @property
    def query_gain(self) -> float:
        """What queries are multiplied by, on top of attention's 1/sqrt(H)."""
        if self.mup_base_dim is None or self.mup_base_head_dim is None:
            return 1.0
        return sqrt(self.mup_base_head_dim / self.head_dim)

    @property
    def depth(self) -> int:
        """How many layers a token goes through: those of all passes."""
        return self.layers * self.passes

    @property
    def cached_layers(self) -> int:
        """How many layers have keys and values in the KV cache."""
        return self.depth if self.loop_keys == "own" else self.layers

    @property
    def kind(self) -> tuple[str, int]:
        """The variant and its K, by which benchmarks name a model: a loop's K is its passes."""
        return ("loop", self.passes) if self.passes > 1 else (self.variant, self.K)

    def has_streams(self, layer: int) -> bool:
        """Whether each copy sees its own copy's past alone in a layer."""
        is_full = layer == self.layers - 1 or (layer + 1) % self.full_every == 0
        return self.variant == "hidden_decoding" and self.K > 1 and not is_full

    @property
    def chunk_tokens(self) -> int | None:
        """Tokens in one chunk; None where chunks do not apply."""
        if not VARIANTS[self.variant].chunk or self.K == 1:
            return None
        return self.chunk if self.span_unit == "token" else ceil(self.chunk / (self.K - 1))

    @property
    def vanilla_twin(self) -> "ModelConfig":
        """The plain transformer of the same size, which costs are compared with."""
        return replace(self, variant="vanilla", K=1, passes=1)

    def as_variant(self, name: str) -> "ModelConfig":
        """The model of this size of a variant, which the paper's name of it tells.

        >>> ModelConfig(window=4).as_variant("phd_cswa-3").name
        'phd_cswa-3-4-32'

        Args:
            name: as `name` gives it; what is left out of it, as W and C here, is as in this model.

        Raises:
            ValueError: there is no such variant.
        """
        found = NAME.fullmatch(name)
        if not found:
            raise ValueError("expected vanilla, or a variant with its K, such as phd_cswa-2")
        if found["vanilla"]:
            return self.vanilla_twin
        if found["passes"]:
            keys: LoopKeys = "own" if found["loop_keys"] else "first"
            passes = int(found["passes"])
            return replace(self, variant="vanilla", K=1, passes=passes, loop_keys=keys)
        given = {key: int(n) for key in ("K", "window", "chunk") if (n := found[key])}
        unit: SpanUnit = "token" if found["unit"] else "hidden"
        span_unit = unit if found["window"] else self.span_unit
        # The pattern has matched one of the names of `Variant`.
        values: dict[str, Any] = {"variant": found["variant"], **given, "span_unit": span_unit}
        values["passes"] = 1
        return replace(self, **values)

    @property
    def name(self) -> str:
        """The paper's name: `phd_cswa-K-W-C`, `phd_swa-K-W-inf`, `phd-K`; `sps-K-w`, `loop-K`."""
        unit = "t" if self.span_unit == "token" else ""
        match self.variant:
            case "vanilla" if self.passes > 1:
                return f"loop-{self.passes}" + ("-own" if self.loop_keys == "own" else "")
            case "vanilla":
                return "vanilla"
            case "phd_swa":
                return f"phd_swa-{self.K}-{self.window}{unit}-inf"
            case "phd_cswa":
                return f"phd_cswa-{self.K}-{self.window}{unit}-{self.chunk}{unit}"
            case "sps":
                return f"sps-{self.K}-{self.window}"
            case _:
                return f"{self.variant}-{self.K}"


@dataclass(frozen=True, kw_only=True)
class SamplingConfig(Settings):
    """How the next token is sampled.

    Attributes:
        temperature: divides the logits; 0 always takes the most likely token.
        top_k: sample from the k most likely tokens; None: all.
        top_p: sample from the fewest most likely tokens that together reach this probability
            (nucleus sampling, arXiv 1904.09751); None: all.
    """

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None

    def problems(self) -> list[Problem]:
        """Every impossible setting."""
        found = []
        if self.temperature != 0 and not 1e-30 <= self.temperature < inf:
            expected = "expected 0, or a number above 1e-30"
            found.append(Problem("temperature", self.temperature, expected))
        found += at_least(self, "", 1, "top_k")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            expected = "expected a number above 0 and up to 1, or null"
            found.append(Problem("top_p", self.top_p, expected))
        return found
