"""Tokens are drawn from the distribution that the settings leave, each row by its own."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from conf.errors import ConfigError
from phd.config import SamplingConfig
from phd.inference.sampling import NOT_FINITE, Sampler

LOGITS = torch.tensor([1.0, 3.0, -1.0, 2.5, 0.0, 2.0])
DRAWS = 10_000
CPU = torch.device("cpu")
# The numbers of [0, 1) that are the most likely to be rounded into the wrong token, and one beyond.
EXTREMES = torch.tensor([0.0, 2.0**-60, 0.5, 1 - 2.0**-53, 1.0], dtype=torch.float64)


def shares(logits: Tensor, **settings: Any) -> Tensor:
    """How often each token comes up, to 1 / `DRAWS`.

    The numbers are evenly spread, so a frequency is off by at most one draw at each end of a
    token's interval.
    """
    uniforms = (torch.arange(DRAWS, dtype=torch.float64) + 0.5) / DRAWS
    # The settings of one row for all: the rows differ in their numbers alone.
    sampler = Sampler([SamplingConfig(**settings)] * DRAWS, CPU)
    drawn = sampler.draw(logits.expand(DRAWS, -1), uniforms)
    return drawn.bincount(minlength=len(logits)) / DRAWS


def nucleus(probabilities: Tensor, top_p: float) -> list[int]:
    """The fewest most likely tokens that together reach `top_p`; of equal ones the first."""
    kept: list[int] = []
    for token in probabilities.argsort(descending=True, stable=True).tolist():
        if probabilities[kept].sum() >= top_p:
            break
        kept.append(token)
    return kept


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, [0, 1, 2, 3, 4, 5]),
        ({"top_k": 1}, [1]),
        ({"top_k": 3}, [1, 3, 5]),
        ({"top_k": 100}, [0, 1, 2, 3, 4, 5]),
        ({"top_p": 1.0}, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_tokens_come_up_as_often_as_their_share_of_those_kept(
    settings: dict[str, Any], kept: list[int], temperature: float
) -> None:
    expected = torch.zeros(len(LOGITS))
    expected[kept] = (LOGITS[kept] / temperature).softmax(-1)
    found = shares(LOGITS, temperature=temperature, **settings)
    torch.testing.assert_close(found, expected, rtol=0, atol=2 / DRAWS)
    assert not found[expected == 0].any()


@pytest.mark.parametrize("vocabulary", [1, 2, 3, 16, 17, 300])
def test_vocabularies_of_any_size_are_drawn_from(vocabulary: int) -> None:
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(0))
    found = shares(logits, temperature=0.7)
    torch.testing.assert_close(found, (logits / 0.7).softmax(-1), rtol=0, atol=2 / DRAWS)


@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.5, 0.7, 0.9, 0.99])
@pytest.mark.parametrize("logits", [LOGITS, torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, 1.0])])
def test_top_p_keeps_the_nucleus(logits: Tensor, top_p: float) -> None:
    found = shares(logits, temperature=1.0, top_p=top_p)
    assert set(found.nonzero().flatten().tolist()) == set(nucleus(logits.softmax(-1), top_p))


def test_top_p_is_of_what_top_k_leaves() -> None:
    top_p = 0.6
    among = LOGITS.softmax(-1).topk(2)
    kept = [among.indices[i].item() for i in nucleus(among.values / among.values.sum(), top_p)]
    assert len(kept) < len(nucleus(LOGITS.softmax(-1), top_p))
    found = shares(LOGITS, temperature=1.0, top_k=2, top_p=top_p)
    assert found.nonzero().flatten().tolist() == sorted(kept)


def test_tokens_that_tie_with_the_last_of_top_k_are_kept() -> None:
    found = shares(torch.tensor([1.0, 0.0, 1.0, 1.0, -1.0]), temperature=1.0, top_k=2)
    assert found.nonzero().flatten().tolist() == [0, 2, 3]


@pytest.mark.parametrize("temperature", [0.0, 1e-30, 1e-6])
def test_a_vanishing_temperature_leaves_the_most_likely_token(temperature: float) -> None:
    assert shares(LOGITS, temperature=0.2)[1] < 1
    assert shares(LOGITS, temperature=temperature)[1] == 1
    assert shares(LOGITS * 1e30, temperature=temperature)[1] == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 1e-3])  # near 0, all weights are near the largest
@pytest.mark.parametrize("settings", [{}, {"top_k": 7}, {"top_p": 0.5}])
def test_the_ends_of_the_interval_draw_the_first_and_the_last_token_that_is_kept(
    settings: dict[str, Any], scale: float, dtype: torch.dtype
) -> None:
    """Whatever is masked before the first and after the last token."""
    logits = torch.randn(100_000, generator=torch.Generator().manual_seed(0)).mul(scale).to(dtype)
    logits[:500] = logits[-500:] = -torch.inf
    sampler = Sampler([SamplingConfig(temperature=1.0, **settings)] * 5, CPU)
    drawn = sampler.draw(logits.expand(5, -1), EXTREMES)
    weights = logits.float().softmax(-1)
    if "top_k" in settings:
        kept = (logits >= logits.topk(7).values[-1]).nonzero().flatten()
    elif "top_p" in settings:
        order = weights.double().argsort(descending=True, stable=True)
        kept = order[: int((weights[order].double().cumsum(-1) < 0.5).sum()) + 1].sort().values
    else:
        kept = logits.isfinite().nonzero().flatten()
    assert drawn[0] == drawn[1] == kept[0]
    assert drawn[3] == drawn[4] == kept[-1]
    assert bool(torch.isin(drawn, kept).all())


def test_a_row_is_drawn_as_it_is_alone() -> None:
    """Beside rows with all other settings, the same number draws the same token."""
    kinds = [
        SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p)
        for temperature, top_k, top_p in product((0.0, 0.3, 1.0), (None, 1, 5, 90), (None, 0.4, 1))
    ]
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(len(kinds), 70, generator=generator).mul(2).bfloat16()  # has ties
    for _ in range(5):
        uniforms = torch.rand(len(kinds), generator=generator, dtype=torch.float64)
        together = Sampler(kinds, CPU).draw(logits, uniforms)
        alone = [
            Sampler([kind], CPU).draw(logits[i : i + 1], uniforms[i : i + 1])
            for i, kind in enumerate(kinds)
        ]
        assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_give_no_token(temperature: float, wrong: float) -> None:
    logits = torch.stack([LOGITS, LOGITS])
    logits[1, 4] = wrong
    sampler = Sampler([SamplingConfig(temperature=temperature)] * 2, CPU)
    drawn = sampler.draw(logits, torch.tensor([0.5, 0.5], dtype=torch.float64))
    assert (drawn == NOT_FINITE).tolist() == [False, True]


def test_all_impossible_settings_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        SamplingConfig(temperature=-1.0, top_k=0, top_p=1.5)
    assert list(map(str, caught.value.problems)) == [
        "temperature=-1.0: expected 0, or a number above 1e-30",
        "top_k=0: expected an integer of at least 1",
        "top_p=1.5: expected a number above 0 and up to 1, or null",
    ]
