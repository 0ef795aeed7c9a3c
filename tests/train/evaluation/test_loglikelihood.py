"""Log-likelihoods through the cache equal those of the full forward pass."""

from random import Random

import pytest
import torch

from conf.errors import ConfigError
from phd.config import ModelConfig
from phd.model import Transformer
from train.evaluation import loglikelihood
from train.evaluation.loglikelihood import (
    Likelihood,
    StoppedError,
    loglikelihoods,
    planned,
)

VOCAB = 40
Pairs = list[tuple[list[int], list[int]]]

VARIANTS = {
    "vanilla": {"variant": "vanilla", "K": 1},
    "naive_repeat": {"variant": "naive_repeat", "K": 2},
    "phd": {"variant": "phd", "K": 3},
    "phd_swa": {"variant": "phd_swa", "K": 2, "window": 3},
    "phd_cswa": {"variant": "phd_cswa", "K": 3, "window": 3, "chunk": 8},
}


def model_of(variant: str, max_seq_len: int = 64) -> Transformer:
    config = ModelConfig(
        **VARIANTS[variant],
        layers=2,
        dim=16,
        ffn_dim=24,
        heads=2,
        kv_heads=1,
        head_dim=8,
        vocab_size=VOCAB,
        max_seq_len=max_seq_len,
    )
    return Transformer(config).reset(1).eval()


@torch.no_grad()
def full(model: Transformer, pair: tuple[list[int], list[int]]) -> Likelihood:
    """The slow twin: one forward pass over the whole text."""
    before, after = pair
    whole = (before + after)[-(model.config.max_seq_len + 1) :]
    logits = model.logits(torch.tensor([whole[:-1]]))[0, -len(after) :].double()
    nats = logits.log_softmax(1).gather(1, torch.tensor(after)[:, None]).sum()
    return Likelihood(nats.item(), logits.argmax(1).tolist() == after)


def questions(seed: int, shots: int = 0, count: int = 9) -> Pairs:
    """Contexts of unequal lengths after `shots` equal tokens, each with 2 to 4 continuations."""
    rng = Random(seed)

    def some(most: int) -> list[int]:
        return [rng.randrange(VOCAB) for _ in range(rng.randint(1, most))]

    begin = [rng.randrange(VOCAB) for _ in range(shots)]
    return [
        (context, some(7))
        for context in ([*begin, *some(12)] for _ in range(count))
        for _ in range(rng.randint(2, 4))
    ]


def measured(model: Transformer, pairs: Pairs) -> list[Likelihood]:
    found = loglikelihoods(model, pairs)
    return [found[place] for place in range(len(pairs))]


def assert_equal(found: list[Likelihood], wanted: list[Likelihood]) -> None:
    assert [x.is_greedy for x in found] == [x.is_greedy for x in wanted]
    nats = [x.nats for x in found], [x.nats for x in wanted]
    torch.testing.assert_close(*nats, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_they_are_those_of_the_full_forward_pass(variant: str) -> None:
    model = model_of(variant)
    pairs = [*questions(1), *questions(2, shots=40), ([3], [4])]
    assert max(batch.shared for batch in planned(pairs, 64)) >= 40
    assert_equal(measured(model, pairs), [full(model, pair) for pair in pairs])


def test_a_greedy_continuation_is_told() -> None:
    model, context = model_of("phd_cswa"), [1, 2, 3]
    with torch.no_grad():
        best = model.logits(torch.tensor([context]))[0, -1].argmax().item()
        then = model.logits(torch.tensor([[*context, best]]))[0, -1].argmax().item()
    after = [[best, then], [best, (then + 1) % VOCAB], [best]]
    found = measured(model, [(context, tokens) for tokens in after])
    assert [x.is_greedy for x in found] == [True, False, True]


def test_contexts_that_do_not_fit_lose_their_first_tokens() -> None:
    model, pairs = model_of("phd_cswa", max_seq_len=16), questions(3, shots=10)
    assert max(len(a) + len(b) for a, b in pairs) > 17
    assert_equal(measured(model, pairs), [full(model, pair) for pair in pairs])
    with pytest.raises(ConfigError, match="max_seq_len=16: a task has a text of 17 tokens"):
        loglikelihoods(model, [([1], [2] * 17)])


def test_no_batch_or_piece_changes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pairs = model_of("phd_cswa"), questions(4, shots=35)
    whole = measured(model, pairs)
    monkeypatch.setattr(loglikelihood, "BATCH_TOKENS", 300)
    monkeypatch.setattr(loglikelihood, "LOGITS", 1)
    monkeypatch.setattr(loglikelihood, "SMALLEST_PIECE", 2)
    assert len(list(planned(pairs, 64))) > 2
    assert_equal(measured(model, pairs), whole)


def test_a_context_is_read_once_and_what_all_begin_with_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of 9 contexts of 40 equal tokens and up to 12 more, no token is fed twice."""
    model, pairs = model_of("vanilla"), questions(5, shots=40)
    fed = 0
    embedded = model.embedded

    def counting(tokens: torch.Tensor) -> torch.Tensor:
        nonlocal fed
        fed += tokens.numel()
        return embedded(tokens)

    monkeypatch.setattr(model, "embedded", counting)
    measured(model, pairs)
    contexts = {tuple(before) for before, _ in pairs}
    padded = 9 * max(len(context) - 40 for context in contexts)
    assert fed <= 40 + 12 + padded + len(pairs) * 6 < sum(map(len, contexts))


@pytest.mark.parametrize("world_size", [2, 5])
def test_ranks_share_the_contexts_and_make_the_same_calls(
    world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a batch has fewer contexts than there are ranks: blocks may gather weights."""
    model, pairs = model_of("phd_swa"), [*questions(1), *questions(2, shots=40, count=8)]
    whole = measured(model, pairs)
    monkeypatch.setattr(loglikelihood, "BATCH_TOKENS", 400)
    monkeypatch.setattr(loglikelihood, "PIECE", 2)
    calls = [0] * world_size
    found: dict[int, Likelihood] = {}
    for rank in range(world_size):

        def count(*_: object, rank: int = rank) -> None:
            calls[rank] += 1

        hook = model.blocks[0].register_forward_hook(count)
        of_rank = loglikelihoods(model, pairs, rank=rank, world_size=world_size)
        hook.remove()
        assert len(of_rank) < len(pairs)
        found |= of_rank
    assert len(set(calls)) == 1
    assert_equal([found[place] for place in range(len(pairs))], whole)


@pytest.mark.parametrize("asked", [1, 2])
def test_a_stop_ends_it(asked: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loglikelihood, "BATCH_TOKENS", 60)
    left = iter([False] * (asked - 1))
    with pytest.raises(StoppedError):
        loglikelihoods(model_of("vanilla"), questions(6), stop_requested=lambda: next(left, True))


def test_the_clusters_of_contexts_are_those_that_begin_alike() -> None:
    pairs = [*questions(7, shots=50), *questions(8), *questions(9, shots=40)]
    found = sorted((batch.shared, len(batch.contexts)) for batch in planned(pairs, 99))
    assert [contexts for _, contexts in found] == [9, 9, 9]
    assert [shared // 10 for shared, _ in found] == [0, 4, 5]


def test_what_is_not_finite_is_nan() -> None:
    model = model_of("vanilla")
    with torch.no_grad():
        model.embed.weight[3] = torch.nan
    assert loglikelihoods(model, [([1], [2, 3])])[0].nats != 0
    assert torch.tensor(loglikelihoods(model, [([3], [2])])[0].nats).isnan()
