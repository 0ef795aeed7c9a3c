"""The kernels of a decoded token's attention equal the slow step, and compile for GPUs."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phd.config import ModelConfig
from tests.phd.inference.token_twins import Twins

interpreted = pytest.mark.usefixtures("triton_interpreter")


@interpreted
@settings(derandomize=True, deadline=None, max_examples=12)
@given(
    config=...,
    lengths=st.lists(st.integers(0, 4) | st.integers(5, 120), min_size=1, max_size=2),
    tokens=st.integers(1, 3),
    spare=st.integers(0, 7),
    splits=st.integers(1, 5),
)
def test_tokens_equal_the_slow_step(
    config: ModelConfig, lengths: list[int], tokens: int, spare: int, splits: int
) -> None:
    twins = Twins(replace(config, layers=2), lengths, max(lengths) + tokens + spare)
    for _ in range(tokens):
        twins.add_token(splits)
