"""Models small enough for slow comparisons, with no weight that hides a mistake."""

import os
from dataclasses import replace
from math import ceil
from typing import Any, get_args

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import nn

from phd.config import (
    VARIANTS,
    CopyInput,
    CopyPositions,
    LoopKeys,
    ModelConfig,
    Norm,
    SpanUnit,
    Variant,
)
from phd.model import Transformer

VOCAB, LIMIT = 17, 64
SPANS = st.integers(1, 8) | st.integers(9, 60) | st.just(1000)

# Among examples of all of them together, some variants would hardly occur.
KINDS = (*get_args(Variant), "loop")
"""All variants, and vanilla with several passes."""
SMALL = ModelConfig(
    K=3,
    window=4,
    chunk=8,
    layers=3,
    dim=16,
    ffn_dim=20,
    heads=4,
    kv_heads=2,
    head_dim=4,
    vocab_size=VOCAB,
    max_seq_len=LIMIT,
)

# Wide enough for the kernels of CUDA.
FOR_CUDA = replace(
    SMALL,
    window=16,
    chunk=32,
    dim=128,
    ffn_dim=256,
    head_dim=64,
    vocab_size=257,
    max_seq_len=600,
)


def examples(usual: int, tests: int = 1) -> settings:
    """Hypothesis's settings: always the same examples, or `make soak-rules`' number of new ones.

    Args:
        tests: how many share that number, and `usual`, between them.
    """
    asked = os.environ.get("CASES")
    each = ceil(int(asked or usual) / tests)
    return settings(derandomize=asked is None, deadline=None, max_examples=each)


@st.composite
def configs(
    draw: st.DrawFn, max_copies: int = 5, kind: str | None = None, **shape: Any
) -> ModelConfig:
    """Every setting of a model of one of `KINDS`, or of any, that is small enough for slow twins.

    Args:
        shape: settings that are not drawn.
    """
    kind = kind or draw(st.sampled_from(KINDS))
    variant: Variant = "vanilla" if kind == "loop" else kind  # type: ignore[assignment]
    most = VARIANTS[variant].most_copies or max_copies
    kv_heads = draw(st.integers(1, 2))
    drawn = ModelConfig(
        variant=variant,
        # With one copy every variant is vanilla.
        K=draw(st.integers(min(2, most), most)) if draw(st.integers(0, 7)) else 1,
        window=draw(st.integers(0, 5) if variant == "sps" else SPANS),
        chunk=draw(SPANS),
        span_unit=draw(st.sampled_from(get_args(SpanUnit))),
        originals_see_hidden=draw(st.booleans()),
        copy_positions=draw(st.sampled_from(get_args(CopyPositions))),
        copy_input=draw(st.sampled_from(["auto", *get_args(CopyInput)])),
        copy_embedding=draw(st.booleans()),
        full_every=draw(st.integers(1, 3)),
        passes=draw(st.integers(2, 3)) if kind == "loop" else 1,
        loop_keys=draw(st.sampled_from(get_args(LoopKeys))),
        layers=draw(st.integers(1, 3)),
        dim=12,
        ffn_dim=20,
        heads=kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([2, 8])),
        vocab_size=17,
        max_seq_len=130,
        norm=draw(st.sampled_from(get_args(Norm))),
        tied=draw(st.booleans()),
        mup_base_dim=draw(st.sampled_from([None, 5, 12])),
        mup_base_head_dim=draw(st.sampled_from([None, 4])),
    )
    return replace(drawn, **shape)


def of_variant(variant: Variant, **others: Any) -> ModelConfig:
    K = min(SMALL.K, VARIANTS[variant].most_copies or SMALL.K)
    return replace(SMALL, **{"variant": variant, "K": K, **others})


def model_of(config: ModelConfig = SMALL, dtype: torch.dtype = torch.float64) -> Transformer:
    """A model without norms of 1 and copy embeddings of 0."""
    model = Transformer(config).reset(0).to(dtype)
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if "norm" in name:
            nn.init.uniform_(weight, 0.5, 1.5, generator=generator)
    if config.copy_embedding:
        nn.init.normal_(model.copy_embed.weight, generator=generator)
    return model
