"""Requests that share a batch get the tokens that each gets alone, in order."""

import os
import random
from collections import defaultdict
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from conf.errors import ConfigError
from phd.config import VARIANTS, Norm, SamplingConfig, Variant
from phd.inference.generator import (
    FinishReason,
    Generator,
    NewToken,
    Request,
    _prefilled_together,
)
from phd.inference.sampling import Sampler
from phd.model import Transformer
from tests.phd.small_models import LIMIT, VOCAB, model_of, of_variant

variants = pytest.mark.parametrize("variant", get_args(Variant))
GREEDY = SamplingConfig(temperature=0)


@torch.no_grad()
def alone(model: Transformer, request: Request) -> list[int]:
    """What a request gets: a full forward pass and a draw by its own numbers for each token."""
    limit = model.config.max_seq_len
    uniforms = torch.rand(
        request.max_tokens,
        generator=torch.Generator().manual_seed(request.seed),
        dtype=torch.float64,
    )
    sampler = Sampler([request.sampling], torch.device("cpu"))
    text, new = torch.tensor(request.prompt), []
    for u in uniforms:
        text = text if len(text) <= limit else text[-(limit // 2) :]
        new.append(sampler.draw(model.logits(text[None])[:, -1], u[None]).item())
        text = torch.cat([text, torch.tensor(new[-1:])])
        if new[-1] in request.stop_ids:
            break
    return new


def drawn_request(rng: random.Random, limit: int) -> Request:
    """A request of any kind; some fill the context, some more than once."""
    length = rng.choice([1, 2, rng.randint(1, limit), limit - 1, limit, limit + 3])
    return Request(
        [rng.randrange(VOCAB) for _ in range(length)],
        max_tokens=rng.choice([1, 2, rng.randint(1, 12), rng.randint(limit // 2, limit)]),
        sampling=SamplingConfig(
            temperature=rng.choice([0, 0.7, 3.0]),
            top_k=rng.choice([None, 3]),
            top_p=rng.choice([None, 0.8]),
        ),
        seed=rng.randrange(1 << 40),
        stop_ids=rng.choice([(), (3,), (0, 5)]),
    )


def as_on_cuda(generator: Generator) -> Generator:
    """Rows are fixed and launches run ahead, as on a GPU."""
    generator._is_fixed, generator._ahead = True, 1
    return generator


def drawn_model(rng: random.Random, variant: Variant) -> Transformer:
    K = rng.randint(1, VARIANTS[variant].most_copies or 4)
    return model_of(
        of_variant(
            variant,
            K=K,
            window=rng.randint(1, 9),
            chunk=rng.randint(1, 12),
            norm=rng.choice(get_args(Norm)),
            layers=rng.randint(1, 2),
            max_seq_len=rng.randint(2, 16),
        )
    )


@variants
@pytest.mark.parametrize("on_cuda", [False, True], ids=["in order", "ahead"])
@pytest.mark.parametrize("seed", range(2))
def test_requests_that_come_and_go_get_what_they_get_alone(
    variant: Variant, on_cuda: bool, seed: int
) -> None:
    rng = random.Random(f"{variant} {seed}")
    model = drawn_model(rng, variant)
    limit = model.config.max_seq_len
    requests = [drawn_request(rng, limit) for _ in range(6)]
    generator = Generator(model, batch=rng.randint(1, 4), capacity=rng.choice([None, limit]))
    if on_cuda:
        as_on_cuda(generator)
    found: dict[int, list[NewToken]] = defaultdict(list)
    cancelled: set[int] = set()
    submitted = 0
    while submitted < len(requests) or generator.unfinished:
        while submitted < len(requests) and rng.random() < 0.4:
            assert generator.submit(requests[submitted]) == submitted
            submitted += 1
        if submitted and rng.random() < 0.03:
            number = rng.randrange(submitted)
            generator.cancel(number)
            cancelled.add(number)
        for new in generator.step():
            assert new.request not in cancelled
            found[new.request].append(new)
    for number, request in enumerate(requests):
        expected = alone(model, request)
        tokens = [new.token for new in found[number]]
        if number in cancelled:
            assert tokens == expected[: len(tokens)]
            continue
        assert tokens == expected
        *before, last = (new.finish_reason for new in found[number])
        assert not any(before)
        is_stop = tokens[-1] in request.stop_ids
        assert last is (FinishReason.STOP if is_stop else FinishReason.LENGTH)


@pytest.mark.parametrize("on_cuda", [False, True], ids=["in order", "ahead"])
def test_a_row_takes_the_next_request_as_soon_as_it_is_free(on_cuda: bool) -> None:
    generator = Generator(model_of(), batch=2)
    if on_cuda:
        as_on_cuda(generator)
    for max_tokens in (20, 2, 2, 2, 2, 2):
        generator.submit(Request([1, 2], max_tokens=max_tokens))
    finished = [new.request for new in generator if new.finish_reason]
    # The short ones together have ten tokens, so they are done before the long one's twelfth.
    assert finished == [1, 2, 3, 4, 5, 0]


def test_the_batch_stays_where_it_is_so_that_one_graph_serves_all_requests() -> None:
    generator = as_on_cuda(Generator(model_of(of_variant("phd_swa")), batch=3, capacity=40))
    addresses = set()
    for length in (5, 9, 3, 30, 1, 7):
        generator.submit(Request([1] * length, max_tokens=9, sampling=GREEDY))
    for _ in generator:
        cache = generator._cache
        assert cache is not None
        assert cache.capacity == 40
        assert max(cache.host_lengths) < 40
        assert cache.host_lengths == cache.lengths.tolist()
        tensors = (*cache.originals, *cache.ring, cache.lengths)
        addresses.add(tuple(x.data_ptr() for x in tensors))
    assert len(addresses) == 1


def test_a_cancelled_request_gets_no_more_tokens() -> None:
    generator = as_on_cuda(Generator(model_of(), batch=2))
    for _ in range(3):
        generator.submit(Request([1, 2], max_tokens=5, sampling=GREEDY))
    generator.cancel(2)  # it waits
    found = []
    for new in generator:
        found.append(new.request)
        if found == [0, 1, 0]:
            generator.cancel(1)
            generator.cancel(1)
    assert found == [0, 1, 0, 0, 0, 0]
    assert generator.unfinished == 0
    generator.cancel(0)  # too late, which is no mistake
    assert generator.generate([Request([1, 2], max_tokens=3)])


def test_an_iteration_that_is_left_loses_nothing() -> None:
    generator = Generator(model_of(), batch=3)
    for _ in range(3):
        generator.submit(Request([1, 2], max_tokens=3, sampling=GREEDY))
    found = [next(iter(generator)).request for _ in range(4)]
    found += [new.request for new in generator.step()]
    assert found == [0, 1, 2, 0, 1, 2, 0, 1, 2]


def test_impossible_requests_are_refused() -> None:
    generator = Generator(model_of(), capacity=20)
    hint = "shorten the prompt, lower max_tokens, or give the generator more capacity"
    assert generator.submit(Request([1] * 11, max_tokens=10)) == 0
    for request, problems in {
        Request((), max_tokens=0): [
            "prompt: has no token; begin with the separator",
            "max_tokens=0: expected an integer of at least 1",
        ],
        Request((1, 17), max_tokens=3): [
            "prompt: token 17 is not in the vocabulary; model.vocab_size=17"
        ],
        Request((1,) * 12, max_tokens=10): [
            f"capacity=20: a prompt of 12 tokens with max_tokens=10 needs 21; {hint}"
        ],
        # Only the last half of the context is used of it.
        Request((1,) * (LIMIT + 1), max_tokens=1): [
            f"capacity=20: a prompt of 32 tokens with max_tokens=1 needs 32; {hint}"
        ],
    }.items():
        with pytest.raises(ConfigError) as caught:
            generator.submit(request)
        assert list(map(str, caught.value.problems)) == problems
    assert generator.unfinished == 1
    generator.cancel(0)
    possible = Request((1,), max_tokens=1)
    with pytest.raises(ConfigError):
        generator.generate([possible, request])
    assert generator.unfinished == 0
    assert len(generator.generate([possible] * 3)) == 3


def test_a_damaged_model_is_told_and_writes_nothing() -> None:
    model = model_of()
    with torch.no_grad():
        model.norm.weight[3] = torch.nan
    for sampling in (GREEDY, SamplingConfig()):
        generator = Generator(model)
        generator.submit(Request([1], max_tokens=3, sampling=sampling))
        with pytest.raises(FloatingPointError, match="request 0: the model's logits of new token "):
            generator.step()
        assert generator.unfinished == 0
        assert not list(generator)


@pytest.mark.parametrize("on_cuda", [False, True], ids=["in order", "ahead"])
@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_a_request_without_finite_logits_is_finished_and_the_others_lose_nothing(
    wrong: int, on_cuda: bool
) -> None:
    model = model_of(of_variant("phd", tied=False))
    requests = [Request([n, 5, 6], max_tokens=6, sampling=GREEDY) for n in (1, 2, 3)]
    expected = Generator(model, batch=3).generate(requests)
    damaged = 16  # no text but the wrong one has this token
    assert damaged not in [token for tokens in expected for token in tokens]
    with torch.no_grad():
        model.embed.weight[damaged] = torch.nan
    requests[wrong] = Request([damaged, 5, 6], max_tokens=6, sampling=GREEDY)
    generator = Generator(model, batch=3)
    if on_cuda:
        as_on_cuda(generator)
    for request in requests:
        generator.submit(request)
    with pytest.raises(FloatingPointError, match=f"request {wrong}: "):
        list(generator)
    assert generator.unfinished == 2
    found: dict[int, list[int]] = defaultdict(list)
    for _ in range(10):  # a token that is lost would never come
        for new in generator.step():
            found[new.request].append(new.token)
    assert generator.unfinished == 0
    assert found == {n: tokens for n, tokens in enumerate(expected) if n != wrong}


def test_numbers_that_differ_beyond_float32_draw_different_tokens() -> None:
    """All tokens are equally likely, so token n begins at n / 17."""
    model = model_of()
    with torch.no_grad():
        model.norm.weight.zero_()
    generator = Generator(model, batch=2 * VOCAB)
    numbers = [n / VOCAB + side * 1e-11 for n in range(1, VOCAB) for side in (-1, 1)]
    for _ in numbers:
        generator.submit(Request([1, 2], max_tokens=2))
    for text, u in zip(generator._waiting, numbers, strict=True):
        text._uniforms = [u, u]
    expected = [n - below for n in range(1, VOCAB) for below in (1, 0)]
    for _ in range(2):  # of the prompt, and of a decoded token
        assert [new.token for new in generator.step()] == expected


class Largest(TorchDispatchMode):
    """The most values of a tensor that an operator returns."""

    values = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        found = func(*args, **kwargs or {})
        if isinstance(found, Tensor):
            self.values = max(self.values, found.numel())
        return found


@pytest.mark.usefixtures("triton_interpreter")
def test_long_prompts_of_unequal_lengths_go_through_the_fused_kernels() -> None:
    """A mask among all hidden copies would be the largest tensor by far."""
    config = of_variant("phd_swa", K=7, window=10_000, layers=1, max_seq_len=300)
    model = model_of(replace(config, attention="fused"), torch.float32)
    requests = [Request([1] * n, max_tokens=1, sampling=GREEDY) for n in (150, 160)]
    with Largest() as largest:
        Generator(model, batch=2).generate(requests)
    assert largest.values < (6 * 150) ** 2 / 10


def test_prompts_share_a_prefill_that_has_little_padding_or_masks() -> None:
    def groups(lengths: list[int], **settings: Any) -> list[list[int]]:
        generator = Generator(model_of(of_variant(**settings), torch.float32), batch=9)
        generator._make_room(1)
        found = _prefilled_together(lengths, generator._shares_prefill)
        return [[lengths[i] for i in group] for group in found]

    lengths = [500, 9, 200, 3, 200, 60, 130, 70]
    together = [[3, 9, 60], [70, 130], [200, 200], [500]]
    assert groups(lengths, variant="phd_swa") == together
    assert groups(lengths, variant="vanilla") == together
    assert groups([9, 3, 60], variant="phd_swa", K=100) == [[3, 9], [60]]
    assert groups([3, 9, 11], variant="phd_swa", K=100) == [[3, 9], [11]]
    if "TRITON_INTERPRET" in os.environ:  # one length each, where the fused kernels serve
        found = groups(lengths, variant="phd_swa", attention="fused")
        assert found == [[3, 9, 60], [70], [130], [200, 200], [500]]


@pytest.mark.parametrize("variant", ["naive_repeat", "phd", "phd_cswa"])
def test_nothing_is_read_from_the_device_before_the_tokens_are(variant: Variant) -> None:
    """Fake tensors have no values: to read one is an error."""
    with FakeTensorMode():
        generator = as_on_cuda(Generator(Transformer(of_variant(variant)), batch=3))
        for sampling in (SamplingConfig(top_k=3), SamplingConfig(top_p=0.5), GREEDY):
            for length in (5, 9):
                generator.submit(Request([1] * length, max_tokens=length, sampling=sampling))
        for text in generator._waiting:
            text._uniforms = [0.5] * 9  # the host's own numbers, which are tensors at first
        for _ in range(13):
            assert generator._fill_rows() or generator._decode()
        assert generator.unfinished == 6
        assert not generator._waiting
        with pytest.raises(DataDependentOutputException):
            generator.step()


def test_the_first_token_is_there_before_the_second_is_launched() -> None:
    generator = as_on_cuda(Generator(model_of(), batch=2))
    read = []
    for _ in range(2):
        generator.submit(Request([1, 2], max_tokens=4, sampling=GREEDY))
        read += [len(generator.step()) for _ in range(3)]
    # A request alone: its first token, none yet, its second. After another has come: the third,
    # the other's first, and one of each.
    assert read == [1, 0, 1, 1, 1, 2]
