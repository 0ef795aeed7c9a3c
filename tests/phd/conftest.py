"""What the model's tests share: random configs, patterns and documents, and the same numbers."""

import pytest
import torch
from hypothesis import strategies as st

from phd.config import ModelConfig
from phd.pattern import Pattern
from phd.segments import Segments
from tests.phd.small_models import configs


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
