"""Text is drawn from the distribution that the settings leave, and repeatably."""

from typing import Any

import pytest
import torch
from torch import Tensor

from conf.errors import ConfigError
from phd.config import ModelConfig
from phd.inference.sampling import Sampling, generate
from phd.model import Transformer

LOGITS = torch.tensor([1.0, 3.0, -1.0, 2.5, 0.0, 2.0])
DRAWS = 40_000


def frequencies(sampling: Sampling) -> Tensor:
    """How often each token comes up."""
    rows = LOGITS.expand(DRAWS, -1)
    drawn = sampling.draw(rows, torch.Generator().manual_seed(0))
    return drawn.bincount(minlength=len(LOGITS)) / DRAWS


def nucleus(probabilities: Tensor, top_p: float) -> list[int]:
    """The fewest most likely tokens that together reach `top_p`."""
    kept: list[int] = []
    for token in probabilities.argsort(descending=True).tolist():
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
    found = frequencies(Sampling(temperature=temperature, **settings))
    # Five standard deviations of the least certain frequency.
    torch.testing.assert_close(found, expected, rtol=0, atol=5 * 0.5 / DRAWS**0.5)
    assert not found[expected == 0].any()


@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.5, 0.7, 0.9, 0.99])
def test_top_p_keeps_the_nucleus(top_p: float) -> None:
    found = frequencies(Sampling(temperature=1.0, top_p=top_p))
    assert set(found.nonzero().flatten().tolist()) == set(nucleus(LOGITS.softmax(-1), top_p))


def test_top_p_is_of_what_top_k_leaves() -> None:
    top_p = 0.6
    among = LOGITS.softmax(-1).topk(2)
    kept = [among.indices[i].item() for i in nucleus(among.values / among.values.sum(), top_p)]
    assert len(kept) < len(nucleus(LOGITS.softmax(-1), top_p))
    found = frequencies(Sampling(temperature=1.0, top_k=2, top_p=top_p))
    assert found.nonzero().flatten().tolist() == sorted(kept)


def test_a_vanishing_temperature_leaves_the_most_likely_token() -> None:
    warm, cold, none = (frequencies(Sampling(temperature=t)) for t in (0.2, 1e-6, 0.0))
    assert warm[1] < 1
    assert cold[1] == none[1] == 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generation_is_a_full_forward_pass_and_a_draw_for_each_token(temperature: float) -> None:
    """Of texts of unequal length at once; a full context goes on from its last half."""
    config = ModelConfig(layers=2, dim=16, ffn_dim=24, head_dim=8, vocab_size=31, max_seq_len=9)
    model, sampling = Transformer(config).reset(0), Sampling(temperature=temperature)
    prompts = [torch.randint(0, 31, (n,)) for n in (3, 7, 1, 9, 12)]
    generators = [torch.Generator().manual_seed(i) for i in range(5)]
    found = torch.stack(list(generate(model, prompts, sampling, generators, max_tokens=20)), 1)
    texts = [prompt if len(prompt) <= 9 else prompt[-4:] for prompt in prompts]
    generators = [torch.Generator().manual_seed(i) for i in range(5)]
    expected = []
    for _ in range(20):
        texts = [text if len(text) <= 9 else text[-4:] for text in texts]
        rows = [model.logits(text[None])[:, -1] for text in texts]
        new = [
            sampling.draw(row, generator) for row, generator in zip(rows, generators, strict=True)
        ]
        texts = [torch.cat(pair) for pair in zip(texts, new, strict=True)]
        expected.append(torch.cat(new))
    assert torch.equal(found, torch.stack(expected, 1))


def test_a_text_does_not_depend_on_those_beside_it() -> None:
    config = ModelConfig(layers=2, dim=16, ffn_dim=24, head_dim=8, vocab_size=31, max_seq_len=40)
    model, sampling = Transformer(config).reset(0), Sampling(temperature=1.0)
    prompts = [torch.randint(0, 31, (n,)) for n in (3, 7, 1)]

    def written(*chosen: int) -> list[list[int]]:
        generators = [torch.Generator().manual_seed(i) for i in chosen]
        texts = generate(model, [prompts[i] for i in chosen], sampling, generators, max_tokens=60)
        return torch.stack(list(texts), 1).tolist()

    assert written(0, 1, 2) == [*written(0), *written(1), *written(2)]


def test_all_impossible_settings_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        Sampling(temperature=-1.0, top_k=0, top_p=1.5)
    assert list(map(str, caught.value.problems)) == [
        "temperature=-1.0: expected 0, or a number above 1e-30",
        "top_k=0: expected an integer of at least 1",
        "top_p=1.5: expected a number above 0 and up to 1, or null",
    ]
