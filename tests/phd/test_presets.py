"""The shapes that the papers give have the parameters that the papers give."""

from typing import Any, NamedTuple

import pytest

from phd.config import ModelConfig
from phd.model import count_parameters


class Shape(NamedTuple):
    layers: int
    dim: int
    ffn_dim: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool = True
    vocab_size: int = 100352


SHAPES = {
    "151m": Shape(12, 768, 2048, 12, 3, 64),
    "550m": Shape(16, 1536, 4096, 16, 4, 96),
    "1b2": Shape(16, 2048, 8192, 32, 8, 64),
    "7b": Shape(32, 4096, 11008, 32, 32, 128, tied=False),
}
PARAMETERS = {
    "151m": 151_418_880,
    "550m": 550_583_808,
    "1b2": 1_178_707_968,
    "7b": 7_298_617_344,
}


def parameters(size: str, **settings: Any) -> dict[str, int]:
    vanilla: dict[str, Any] = {"variant": "vanilla", "K": 1}
    return count_parameters(ModelConfig(**vanilla | SHAPES[size]._asdict() | settings))


@pytest.mark.parametrize("size", SHAPES)
def test_a_preset_has_its_papers_parameters(size: str) -> None:
    assert sum(parameters(size).values()) == PARAMETERS[size]


def test_the_default_shape_is_small_enough_for_a_laptop() -> None:
    assert 1e6 <= sum(count_parameters(ModelConfig()).values()) <= 4e6


@pytest.mark.parametrize("K", [2, 5])
def test_copies_have_no_parameters_of_their_own(K: int) -> None:
    vanilla = parameters("151m")
    assert parameters("151m", variant="phd_cswa", K=K) == vanilla
    embedded = parameters("151m", variant="phd_cswa", K=K, copy_embedding=True)
    assert embedded == {**vanilla, "embedding": vanilla["embedding"] + K * SHAPES["151m"].dim}


def test_parameters_are_counted_by_what_they_are_for() -> None:
    layers, D, F, N, G, H, _, V = SHAPES["7b"]
    assert parameters("7b") == {
        "embedding": V * D,
        "attention": layers * 2 * D * (N + G) * H,
        "feed-forward": layers * 3 * D * F,
        "norms": layers * (2 * D + (N + G) * H) + D,
        "head": V * D,
    }
