"""What the model's tests share: random configs and patterns, and the same numbers every time."""

from typing import get_args

import pytest
import torch
from hypothesis import strategies as st

from phd.config import CopyPositions, ModelConfig, Norm, SpanUnit, Variant
from phd.pattern import Pattern

SPANS = st.integers(1, 8) | st.integers(9, 60) | st.just(1000)


@st.composite
def configs(draw: st.DrawFn, max_copies: int = 5) -> ModelConfig:
    """Every setting of a model that is small enough to compute slowly."""
    variant = draw(st.sampled_from(get_args(Variant)))
    kv_heads = draw(st.integers(1, 2))
    return ModelConfig(
        variant=variant,
        K=1 if variant == "vanilla" else draw(st.integers(1, max_copies)),
        window=draw(SPANS),
        chunk=draw(SPANS),
        span_unit=draw(st.sampled_from(get_args(SpanUnit))),
        copy_positions=draw(st.sampled_from(get_args(CopyPositions))),
        copy_embedding=draw(st.booleans()),
        layers=draw(st.integers(1, 3)),
        dim=12,
        ffn_dim=20,
        heads=kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([2, 8])),
        vocab_size=17,
        max_seq_len=48,
        norm=draw(st.sampled_from(get_args(Norm))),
        tied=draw(st.booleans()),
    )


# Tests ask for them by annotation: `@given(config=...)`, `@given(pattern=...)`.
st.register_type_strategy(ModelConfig, configs())
st.register_type_strategy(Pattern, configs(max_copies=8).map(Pattern.of))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same numbers, whichever tests ran before it."""
    torch.manual_seed(0)
