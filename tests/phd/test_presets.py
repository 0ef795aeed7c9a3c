"""Every size that ships has the shape and the number of parameters that its paper gives."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from phd.config import ModelConfig
from phd.model import count_parameters

SIZES = Path(__file__).parents[2] / "conf" / "size"
PARAMETERS = {
    "151m": 151_418_880,
    "550m": 550_583_808,
    "1b2": 1_178_707_968,
    "7b": 7_298_617_344,
}


def preset(size: str, **settings: object) -> ModelConfig:
    shape = OmegaConf.load(SIZES / f"{size}.yaml")
    return ModelConfig(**{"variant": "vanilla", "K": 1, **shape, **settings})


@pytest.mark.parametrize(("size", "parameters"), PARAMETERS.items())
def test_a_preset_has_its_papers_parameters(size: str, parameters: int) -> None:
    assert sum(count_parameters(preset(size)).values()) == parameters


def test_the_default_size_is_small_enough_for_a_laptop() -> None:
    assert 1e6 <= sum(count_parameters(preset("tiny")).values()) <= 4e6


@pytest.mark.parametrize("path", sorted(SIZES.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_preset_is_labelled_with_its_files_name(path: Path) -> None:
    assert preset(path.stem).size == path.stem


@pytest.mark.parametrize("K", [2, 5])
def test_copies_have_no_parameters_of_their_own(K: int) -> None:
    vanilla = count_parameters(preset("151m"))
    assert count_parameters(preset("151m", variant="phd_cswa", K=K)) == vanilla
    embedded = count_parameters(preset("151m", variant="phd_cswa", K=K, copy_embedding=True))
    assert embedded == {**vanilla, "embedding": vanilla["embedding"] + K * 768}


def test_parameters_are_counted_by_what_they_are_for() -> None:
    V, D, F, layers, N, G, H = 100352, 4096, 11008, 32, 32, 32, 128
    assert count_parameters(preset("7b")) == {
        "embedding": V * D,
        "attention": layers * 2 * D * (N + G) * H,
        "feed-forward": layers * 3 * D * F,
        "norms": layers * (2 * D + (N + G) * H) + D,
        "head": V * D,
    }
