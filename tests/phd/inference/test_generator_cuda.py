"""On a GPU, requests that share a batch get what each gets alone, and the host runs ahead."""

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from phd.config import VARIANTS, SamplingConfig, Variant
from phd.inference.generator import Generator, Request
from phd.inference.sampling import Sampler
from phd.model import Transformer
from tests.phd.small_models import FOR_CUDA

pytestmark = [
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs an NVIDIA GPU and a CUDA build of torch"
    ),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a proto:UserWarning"),
]
variants = pytest.mark.parametrize("variant", get_args(Variant))


def model_of(variant: Variant) -> Transformer:
    K = min(3, VARIANTS[variant].most_copies or 3)
    return Transformer(replace(FOR_CUDA, variant=variant, K=K)).reset(0).cuda().fuse_projections()


def requests_of(count: int, **settings: Any) -> list[Request]:
    """Prompts of unequal lengths, and texts some of which end early."""
    tokens = torch.randint(0, 257, (count, 300), generator=torch.Generator().manual_seed(0))
    return [
        Request(
            tokens[n, : 5 + 40 * n].tolist(),
            max_tokens=5 + 7 * n,
            sampling=SamplingConfig(**settings),
            seed=n,
            stop_ids=(1, 2, 3),
        )
        for n in range(count)
    ]


def logits_of(model: Transformer, request: Request, tokens: list[int]) -> Tensor:
    """Those of a full forward pass from which the tokens were drawn, (tokens, V)."""
    text = torch.tensor([*request.prompt, *tokens], device="cuda")
    return model.logits(text[None])[0, len(request.prompt) - 1 : -1].double().cpu()


@torch.no_grad()
@variants
def test_requests_get_the_most_likely_tokens(variant: Variant) -> None:
    model, requests = model_of(variant), requests_of(8, temperature=0)
    written = Generator(model, batch=3).generate(requests)
    for request, tokens in zip(requests, written, strict=True):
        assert len(tokens) == request.max_tokens or tokens[-1] in request.stop_ids
        logits = logits_of(model, request, tokens)
        chosen = logits.gather(-1, torch.tensor(tokens)[:, None]).squeeze(-1)
        assert (logits.amax(-1) - chosen).max() < 2e-3  # rounding may decide between two


@torch.no_grad()
@variants
def test_requests_get_the_tokens_that_their_own_numbers_draw(variant: Variant) -> None:
    model, requests = model_of(variant), requests_of(8, temperature=0.8)
    written = Generator(model, batch=3).generate(requests)
    for request, tokens in zip(requests, written, strict=True):
        own = torch.Generator().manual_seed(request.seed)
        u = torch.rand(request.max_tokens, generator=own, dtype=torch.float64)[: len(tokens)]
        shares = (logits_of(model, request, tokens) / 0.8).softmax(-1)
        chosen = torch.tensor(tokens)[:, None]
        above = shares.cumsum(-1).gather(-1, chosen).squeeze(-1)
        below = above - shares.gather(-1, chosen).squeeze(-1)
        assert (below - 1e-3 <= u).all()
        assert (u <= above + 1e-3).all()


@variants
def test_the_host_waits_for_nothing_but_tokens_that_it_reads(variant: Variant) -> None:
    """Neither a prefill nor a decoded token makes it wait; the wait for an event is no error."""
    generator = Generator(model_of(variant), batch=3, capacity=600)
    kinds: list[dict[str, Any]] = [{"temperature": 0}, {}, {"top_k": 9}, {"top_p": 0.9}]
    requests = [request for kind in kinds for request in requests_of(4, **kind)]
    generator.generate(requests[:3])  # captures the graph
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = generator.generate(requests)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(found)


@variants
def test_writing_leaves_all_parameters_where_they_are(variant: Variant) -> None:
    """An optimizer, or FSDP, may hold the same memory."""
    model = model_of(variant)
    before = {name: (x.data_ptr(), x.detach().clone()) for name, x in model.named_parameters()}
    Generator(model, batch=2).generate(requests_of(3))
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    for name, (address, values) in before.items():
        assert after[name].data_ptr() == address, name
        assert torch.equal(after[name], values), name


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_need_not_be_on_the_current_device() -> None:
    model, requests = model_of("phd_cswa"), requests_of(4, temperature=0)
    expected = Generator(model, batch=2).generate(requests)
    model.to("cuda:1").rope.build(torch.device("cuda:1"))
    assert torch.cuda.current_device() == 0
    assert Generator(model, batch=2).generate(requests) == expected


@pytest.mark.parametrize("vocabulary", [257, 100_352])
@pytest.mark.parametrize("cuts", [{}, {"top_k": 20}, {"top_p": 0.9}])
def test_the_same_number_draws_the_same_token_on_the_cpu(
    cuts: dict[str, Any], vocabulary: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [SamplingConfig(temperature=t) for t in (0, 1e-30, 0.5)]
    rows += [SamplingConfig(temperature=t, **cuts) for t in (0.5, 1.0, 0)]
    logits = torch.randn(6, vocabulary, generator=generator).mul(2).bfloat16()  # has ties
    for _ in range(20):
        uniforms = torch.rand(6, generator=generator, dtype=torch.float64)
        expected = Sampler(rows, torch.device("cpu")).draw(logits, uniforms)
        device = torch.device("cuda")
        found = Sampler(rows, device).draw(logits.to(device), uniforms.to(device))
        assert torch.equal(found.cpu(), expected)
