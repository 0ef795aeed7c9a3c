"""Initial weights are a function of the seed and a parameter's name, drawn as the table says."""

from math import sqrt
from typing import Any

import pytest
import torch

from phd.config import ModelConfig
from phd.model import Transformer


def built(seed: int = 0, **settings: Any) -> Transformer:
    return Transformer(ModelConfig(**settings)).reset(seed)


def weights(model: Transformer) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters())


@pytest.mark.parametrize(
    "settings",
    [
        {"variant": "vanilla", "K": 1},
        {"variant": "naive_repeat", "K": 3},
        {"variant": "phd_cswa", "K": 5, "copy_positions": "flattened"},
        {"variant": "phd_swa", "K": 3, "copy_embedding": True},
    ],
)
def test_every_variant_of_a_size_starts_from_the_same_weights(settings: dict[str, Any]) -> None:
    expected, found = weights(built(K=2)), weights(built(**settings))
    assert set(found) - {"copy_embed.weight"} == set(expected)
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name


def test_a_seed_gives_its_own_weights_again_and_no_others() -> None:
    first, again, other = (weights(built(seed)) for seed in (1, 1, 2))
    for name, weight in first.items():
        assert torch.equal(weight, again[name])
        assert "norm" in name or not torch.equal(weight, other[name]), name


def test_reset_neither_reads_nor_moves_the_global_generator() -> None:
    expected, model = weights(built()), Transformer(ModelConfig())
    torch.manual_seed(123)
    before = torch.get_rng_state()
    model.reset(0)
    assert torch.equal(torch.get_rng_state(), before)
    for name, weight in expected.items():
        assert torch.equal(weights(model)[name], weight), name


@pytest.mark.parametrize("copy_input", ["learned", "table"])
def test_what_hidden_copies_are_fed_is_drawn_as_the_embedding_is(copy_input: Any) -> None:
    found = weights(built(copy_input=copy_input))["copy_input.weight"]
    std = 1 / sqrt(2.5 * ModelConfig().dim)
    cut = 0.986578  # of a normal distribution cut off at 3 sigma
    assert found.std().item() == pytest.approx(cut * std, rel=0.15 if len(found) == 1 else 0.02)
    assert found.abs().max() <= 3 * std


def test_no_two_parameters_are_alike() -> None:
    of_tables = weights(built(copy_input="table"))
    drawn = [w.flatten()[:64].tolist() for n, w in of_tables.items() if "norm" not in n]
    assert len({tuple(w) for w in drawn}) == len(drawn)


@pytest.mark.parametrize("head_init", ["embedding", "fan_in"])
@pytest.mark.parametrize(("norm", "base"), [("reordered", None), ("hybrid_star", 40)])
def test_scales_are_those_of_the_table(norm: Any, base: int | None, head_init: Any) -> None:
    layers, D = 3, 160
    shape: dict[str, Any] = {"layers": layers, "dim": D, "ffn_dim": 320, "tied": False}
    shape |= {"norm": norm, "mup_base_dim": base}
    model = built(**shape, copy_embedding=True, copy_input="learned", head_init=head_init)
    std = 1 / sqrt(2.5 * D)
    # The standard deviation of a normal distribution cut off at 3 sigma.
    cut = 0.98658
    for name, weight in weights(model).items():
        if "norm" in name:
            assert (weight == 1).all(), name
        elif name == "copy_embed.weight":
            assert (weight == 0).all()
        else:
            output = "attention.o." in name or "ffn.down." in name
            sigma = std / sqrt(2 * layers) if output else std
            if not name.startswith("blocks."):
                sigma = 1 / sqrt(2.5 * (base or D))
            if name == "head.weight" and head_init == "fan_in":
                sigma = 1 / sqrt(base or D)
            # 160 numbers for a learned vector, and 10,000 at least for all else.
            few = 10 if name == "copy_input.weight" else 1
            assert weight.std().item() == pytest.approx(cut * sigma, rel=0.02 * few), name
            assert weight.mean().item() == pytest.approx(0, abs=0.02 * few * sigma), name
            assert 2.9 * sigma / few**0.5 < weight.abs().max() <= 3 * sigma, name


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_from_the_meta_device_is_the_one_built_directly(tied: bool) -> None:
    config = ModelConfig(K=3, copy_positions="flattened", max_seq_len=16, tied=tied)
    direct, tokens = Transformer(config).reset(7), torch.arange(16)[None]
    with torch.device("meta"):
        drawn, loaded = Transformer(config), Transformer(config)
    drawn.to_empty(device="cpu").reset(7)
    loaded.to_empty(device="cpu").load(weights(direct))
    for model in (drawn, loaded):
        assert torch.equal(model.logits(tokens), direct.logits(tokens))


def test_loading_copies_the_weights() -> None:
    source = built(1)
    copied = built(2).load(weights(source))
    source.embed.weight.data.zero_()
    assert torch.equal(copied.embed.weight, built(1).embed.weight)
