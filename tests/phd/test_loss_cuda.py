"""On a GPU, the loss is that of float64 on the CPU, within its memory, without waiting."""

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from phd import loss_memory
from phd.loss import IGNORED, chunked_cross_entropy, fused_cross_entropy, next_token_loss
from phd.loss_memory import fused_loss_bytes

pytestmark = [
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs an NVIDIA GPU and a CUDA build of torch"
    ),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a proto:UserWarning"),
]
# Of the norm, as a share: a few units in the last place of each dtype.
TOLERANCE = {torch.bfloat16: 6e-3, torch.float16: 1e-3, torch.float32: 1e-5}
WORKSPACE = 128 << 20  # of cuBLAS, which allocates it once, and of small tensors


class Batch(NamedTuple):
    hidden: Tensor  # (1, T, D)
    weight: Tensor  # (V, D)
    targets: Tensor  # (1, T)


@pytest.fixture(autouse=True)
def single_precision_products() -> Iterator[None]:
    """A run in this process may have chosen TensorFloat-32, which has hardly more digits than half
    precision."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def batch(T: int, D: int, V: int, dtype: torch.dtype, weight_dtype: torch.dtype) -> Batch:
    hidden = torch.randn(1, T, D, device="cuda").to(dtype)
    weight = (torch.randn(V, D, device="cuda") * D**-0.5).to(weight_dtype)
    targets = torch.randint(0, V, (1, T), device="cuda")
    targets = targets.masked_fill(torch.rand(1, T, device="cuda") < 0.1, IGNORED)
    return Batch(hidden.requires_grad_(), weight.requires_grad_(), targets)


def error(ours: Tensor, exact: Tensor) -> float:
    ours, exact = ours.double().cpu(), exact.double().cpu()
    return ((ours - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("V", [70, 1000, 4096, 50_257])
def test_the_loss_and_its_gradients_are_those_of_float64(
    V: int, dtype: torch.dtype, z_loss: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_memory, "ROWS", 256)  # three chunks
    b = batch(600, 64, V, dtype, dtype)
    found = next_token_loss(*b, z_loss=z_loss)
    gradients = torch.autograd.grad(found.total / 7, (b.hidden, b.weight))
    hidden, weight = (x.detach().double().cpu().requires_grad_() for x in (b.hidden, b.weight))
    targets = b.targets.cpu()
    logits = (hidden @ weight.T)[targets != IGNORED]
    cross_entropy = F.cross_entropy(logits, targets[targets != IGNORED], reduction="sum")
    total = cross_entropy + z_loss * logits.logsumexp(-1).square().sum()
    exact = torch.autograd.grad(total / 7, (hidden, weight))
    assert found.total.dtype == found.cross_entropy.dtype == torch.float32
    assert error(found.total.detach(), total.detach()) < TOLERANCE[dtype] / 10
    assert error(found.cross_entropy, cross_entropy.detach()) < TOLERANCE[dtype] / 10
    for ours, theirs, x in zip(gradients, exact, (b.hidden, b.weight), strict=True):
        assert ours.dtype == x.dtype
        assert error(ours, theirs) < TOLERANCE[dtype]


def test_at_the_papers_vocabulary_it_is_as_exact_as_plain_operations() -> None:
    """Rows in two chunks, a float32 weight, and the logits of 100,352 pieces."""
    b = batch(2 * 8192, 128, 100_352, torch.bfloat16, torch.float32)
    hidden, targets = b.hidden.flatten(0, 1), b.targets.flatten()
    gradients = {}
    for method in (fused_cross_entropy, chunked_cross_entropy):
        total = method(hidden, b.weight, targets, 1e-4)[0]
        gradients[method] = [
            total.detach(),
            *torch.autograd.grad(total / 1111, (b.hidden, b.weight)),
        ]
    exact_weight = b.weight.detach().bfloat16().double().requires_grad_()
    exact_hidden = b.hidden.detach().double().requires_grad_()
    total = chunked_cross_entropy(exact_hidden.flatten(0, 1), exact_weight, targets, 1e-4)[0]
    exact = [total.detach(), *torch.autograd.grad(total / 1111, (exact_hidden, exact_weight))]
    for ours, plain, theirs in zip(*gradients.values(), exact, strict=True):
        assert error(ours, theirs) < 1.1 * error(plain, theirs) + 1e-6


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_size_1b2_needs_no_more_memory_than_told_and_less_than_4_gb(
    weight_dtype: torch.dtype,
) -> None:
    rows, D, V = 4 * 4096, 2048, 100_352
    b = batch(rows, D, V, torch.bfloat16, weight_dtype)
    told = fused_loss_bytes(rows, D, V, torch.bfloat16, weight_dtype)

    def step() -> tuple[Tensor, ...]:
        total = next_token_loss(*b, z_loss=1e-4).total
        return torch.autograd.grad(total / rows, (b.hidden, b.weight))

    step()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    most = torch.cuda.max_memory_allocated() - before
    assert 0.95 * told < most < told + WORKSPACE
    assert most < 4e9
    with torch.no_grad():
        torch.cuda.reset_peak_memory_stats()
        next_token_loss(*b)
    logits = 8192 * V * 2
    copy = 2 * V * D if weight_dtype == torch.float32 else 0
    assert torch.cuda.max_memory_allocated() - before < logits + copy + WORKSPACE


def test_the_host_does_not_wait_for_the_device() -> None:
    b = batch(600, 64, 1000, torch.float32, torch.float32)

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            found = next_token_loss(*b, z_loss=1e-4)
        torch.autograd.grad(found.total / found.targets, (b.hidden, b.weight))
        with torch.no_grad():
            next_token_loss(*b)

    step()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_same_numbers_every_time() -> None:
    b = batch(600, 64, 5000, torch.bfloat16, torch.bfloat16)
    runs = []
    for _ in range(2):
        total = next_token_loss(*b).total
        runs.append([total, *torch.autograd.grad(total, (b.hidden, b.weight))])
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))
