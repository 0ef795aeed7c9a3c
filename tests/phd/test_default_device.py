"""The default device has no effect: tensors are made on the device of the model and its inputs."""

from collections.abc import Iterator
from typing import get_args

import pytest
import torch
from torch import Tensor

from phd.config import Variant
from phd.flops import forward_flops
from phd.inference.generator import Generator, Request
from phd.inference.prefill import decode, extend, prefill
from phd.initialization import initial_weights
from phd.model import Transformer
from phd.segments import Segments
from tests.phd.small_models import SMALL, model_of, of_variant

variants = pytest.mark.parametrize("variant", get_args(Variant))
needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs an NVIDIA GPU and a CUDA build of torch"
)
TOKENS = torch.randint(0, 17, (2, 30), generator=torch.Generator().manual_seed(0))
STARTS = torch.tensor([[0] * 10 + [10] * 20, [0] * 30])
# Tensors on the meta device have no values, so a result that depends on one cannot be right.
ELSEWHERE = "meta"


def results(model: Transformer) -> Iterator[Tensor]:
    """What comes of a training step, and of every case of inference."""
    loss = model.loss(TOKENS, TOKENS, 1e-4, Segments.of(STARTS))
    yield from (loss.total, *torch.autograd.grad(loss.total, list(model.parameters())))
    for lengths in ([9, 9], [9, 4]):
        logits, cache = prefill(model, TOKENS[:, :9], lengths)
        yield logits
        yield decode(model, TOKENS[:, 10], cache)
        yield extend(model, TOKENS[:, 11:20], cache, [9, 9], keep=2)
        yield extend(model, TOKENS[:, 20:23], cache, [3, 1])
        yield from (*cache.originals, *cache.ring, cache.lengths)
    prompts = (TOKENS[0, :9].tolist(), TOKENS[1, :4].tolist())
    requests = [Request(prompt, max_tokens=70, seed=n) for n, prompt in enumerate(prompts)]
    written = Generator(model).generate(requests)
    yield torch.tensor(written, device="cpu")


@variants
def test_training_and_inference_on_the_cpu_do_not_use_the_default_device(variant: Variant) -> None:
    model = model_of(of_variant(variant))
    expected = list(results(model))
    with torch.device(ELSEWHERE):
        found = list(results(model))
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_initial_weights_are_drawn_on_the_cpu_whatever_the_default_device_is() -> None:
    expected = dict(initial_weights(Transformer(SMALL), seed=3))
    with torch.device(ELSEWHERE):
        found = dict(initial_weights(Transformer(SMALL), seed=3))
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.device.type == "cpu"
        assert torch.equal(value, expected[name]), name


@variants
def test_flops_are_counted_without_the_default_device(variant: Variant) -> None:
    expected = forward_flops(of_variant(variant), 30)
    with torch.device(ELSEWHERE):
        assert forward_flops(of_variant(variant), 30) == expected


@needs_cuda
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
def test_a_model_on_the_cpu_runs_while_cuda_is_the_default_device() -> None:
    model = model_of(of_variant("phd_cswa"))
    expected = list(results(model))
    with torch.device("cuda"):
        found = list(results(model))
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


@needs_cuda
def test_a_model_built_under_cuda_starts_from_the_same_weights() -> None:
    expected = dict(Transformer(SMALL).reset(3).named_parameters())
    with torch.device("cuda"):
        model = Transformer(SMALL).reset(3)
    for name, weight in model.named_parameters():
        assert weight.is_cuda
        assert torch.equal(weight.cpu(), expected[name]), name
