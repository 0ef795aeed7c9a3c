"""What the model's tests share: random configs, patterns and documents, and the same numbers."""

from typing import get_args

import pytest
import torch
from hypothesis import strategies as st

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
from phd.pattern import Pattern
from phd.segments import Segments

SPANS = st.integers(1, 8) | st.integers(9, 60) | st.just(1000)


@st.composite
def configs(draw: st.DrawFn, max_copies: int = 5) -> ModelConfig:
    """Every setting of a model that is small enough to compute slowly."""
    variant = draw(st.sampled_from(get_args(Variant)))
    kv_heads = draw(st.integers(1, 2))
    return ModelConfig(
        variant=variant,
        K=draw(st.integers(1, VARIANTS[variant].most_copies or max_copies)),
        window=draw(st.integers(0, 5) if variant == "sps" else SPANS),
        chunk=draw(SPANS),
        span_unit=draw(st.sampled_from(get_args(SpanUnit))),
        originals_see_hidden=draw(st.booleans()),
        copy_positions=draw(st.sampled_from(get_args(CopyPositions))),
        copy_input=draw(st.sampled_from(["auto", *get_args(CopyInput)])),
        copy_embedding=draw(st.booleans()),
        full_every=draw(st.integers(1, 3)),
        passes=draw(st.integers(1, 3)) if variant == "vanilla" else 1,
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


@st.composite
def documents(draw: st.DrawFn) -> Segments:
    """Rows of one length, each cut anywhere."""
    T = draw(st.integers(1, 40) | st.integers(41, 130))
    starts = torch.zeros(draw(st.integers(1, 3)), T, dtype=torch.int64)
    for row in starts:
        for n in draw(st.sets(st.integers(0, T - 1), max_size=6)):
            row[n] = n
    return Segments.of(starts.cummax(1).values)


# Tests ask for them by annotation: `@given(config=...)`, `@given(pattern=..., segments=...)`.
st.register_type_strategy(ModelConfig, configs())
st.register_type_strategy(Pattern, configs(max_copies=8).map(lambda c: Pattern.of(c, 0)))
st.register_type_strategy(Segments, documents())


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same numbers, whichever tests ran before it."""
    torch.manual_seed(0)
