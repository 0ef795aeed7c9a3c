"""The loss is plain cross-entropy, summed, with its gradients, and never holds all logits."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

import phd.loss
from phd import loss_memory
from phd.loss import (
    IGNORED,
    Method,
    chunked_cross_entropy,
    cross_entropy_per_target,
    fused_cross_entropy,
    method_for,
    next_token_loss,
)
from phd.loss_memory import fused_loss_bytes, fused_rows_at_once
from phd.torch_private import HAS_LINEAR_CROSS_ENTROPY

claim = settings(derandomize=True, deadline=None, max_examples=60)


class Batch(NamedTuple):
    hidden: Tensor  # (B, T, D)
    weight: Tensor  # (V, D)
    targets: Tensor  # (B, T)


def batch(
    B: int = 2, T: int = 11, D: int = 8, V: int = 13, dtype: torch.dtype = torch.float64
) -> Batch:
    generator = torch.Generator().manual_seed(B * T + V)
    hidden = torch.randn(B, T, D, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator, dtype=dtype).requires_grad_()
    targets = torch.randint(0, V, (B, T), generator=generator)
    ignored = torch.rand(B, T, generator=generator) < 0.3
    return Batch(hidden, weight, targets.masked_fill(ignored, IGNORED))


def textbook(hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float = 0.0) -> Tensor:
    counted = targets != IGNORED
    logits = (hidden @ weight.T)[counted]
    penalty = z_loss * logits.logsumexp(-1).square().sum()
    return F.cross_entropy(logits, targets[counted], reduction="sum") + penalty


def own(hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float = 0.0) -> Tensor:
    return chunked_cross_entropy(hidden.flatten(0, 1), weight, targets.flatten(), z_loss)[0]


def fused(hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float = 0.0) -> Tensor:
    return fused_cross_entropy(hidden.flatten(0, 1), weight, targets.flatten(), z_loss)[0]


def through(loss: Callable[..., Tensor], b: Batch, *args: float) -> tuple[Tensor, ...]:
    """(value, gradient of hidden, gradient of weight), the value scaled as an average would be."""
    total = loss(*b, *args) / 7
    return total.detach(), *torch.autograd.grad(total, (b.hidden, b.weight))


@pytest.mark.parametrize("rows", [3, 1024])
def test_the_loss_of_each_target_is_that_of_the_textbook(
    monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    monkeypatch.setattr(phd.loss, "ROWS_AT_ONCE", rows)
    b = batch()
    each = cross_entropy_per_target(*b)
    assert not each.requires_grad
    logits = (b.hidden @ b.weight.T).transpose(1, 2)
    textbooks = F.cross_entropy(logits, b.targets, reduction="none", ignore_index=IGNORED)
    torch.testing.assert_close(each, textbooks.detach())
    with torch.autocast("cpu", torch.bfloat16):
        half = cross_entropy_per_target(b.hidden.float(), b.weight.float(), b.targets)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.double(), each, rtol=0.05, atol=0.05)


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="needs torch's fused loss")
def test_torchs_loss_is_plain_cross_entropy() -> None:
    found = through(lambda *b: next_token_loss(*b).total, batch())
    torch.testing.assert_close(found, through(textbook, batch()), rtol=1e-12, atol=1e-12)


@claim
@given(
    rows=st.integers(1, 40),
    V=st.integers(1, 9),
    at_once=st.integers(1, 400),
    z_loss=st.sampled_from([0.0, 1e-4, 0.3]),
)
def test_our_chunked_loss_is_the_textbook_in_chunks_of_any_size(
    rows: int, V: int, at_once: int, z_loss: float
) -> None:
    b = batch(B=1, T=rows, V=V)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(phd.loss, "LOGITS_AT_ONCE", at_once)
        found = through(own, b, z_loss)
    torch.testing.assert_close(found, through(textbook, b, z_loss), rtol=1e-11, atol=1e-12)


def error(ours: Tensor, exact: Tensor) -> float:
    return ((ours.double() - exact).norm() / exact.norm()).item()


@pytest.mark.usefixtures("triton_interpreter")
@pytest.mark.parametrize("z_loss", [0.0, 0.3])
@pytest.mark.parametrize("rows", [1, 3, 4, 11, 100])
def test_the_fused_loss_is_the_textbook_in_chunks_of_any_size(
    rows: int, z_loss: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_memory, "ROWS", rows)
    monkeypatch.setattr(loss_memory, "ROW_TILE", 1)
    b = batch(B=1, V=70, dtype=torch.float32)
    exact = through(textbook, Batch(b.hidden.double(), b.weight.double(), b.targets), z_loss)
    for ours, theirs in zip(through(fused, b, z_loss), exact, strict=True):
        assert ours.dtype == torch.float32
        assert error(ours, theirs) < 1e-6


@pytest.mark.usefixtures("triton_interpreter")
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("frozen", [None, "hidden", "weight"])
def test_in_bfloat16_the_fused_loss_is_as_exact_as_plain_operations(
    weight_dtype: torch.dtype, frozen: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It sums in float32, and gives each gradient that is needed in the dtype of its tensor."""
    monkeypatch.setattr(loss_memory, "ROWS", 16)
    monkeypatch.setattr(loss_memory, "ROW_TILE", 8)
    b = batch(B=1, T=60, V=100, D=32, dtype=torch.bfloat16)
    exact = through(textbook, Batch(b.hidden.double(), b.weight.double(), b.targets), 1e-4)
    plain = [error(ours, theirs) for ours, theirs in zip(through(own, b, 1e-4), exact, strict=True)]
    hidden, weight = b.hidden.detach(), b.weight.detach().to(weight_dtype)
    hidden.requires_grad_(frozen != "hidden")
    weight.requires_grad_(frozen != "weight")
    total = fused(hidden, weight, b.targets, 1e-4) / 7
    total.backward()
    assert error(total.detach(), exact[0]) < 1.1 * plain[0] + 1e-6
    for x, theirs, most in zip((hidden, weight), exact[1:], plain[1:], strict=True):
        assert (x.grad is None) == (not x.requires_grad)
        if x.grad is not None:
            assert x.grad.dtype == x.dtype
            assert error(x.grad, theirs) < 1.1 * most < 1e-2


@pytest.mark.usefixtures("triton_interpreter")
@pytest.mark.parametrize("loss", [fused, own])
def test_a_bfloat16_weight_that_accumulates_in_float32_gets_float32(
    loss: Callable[..., Tensor],
) -> None:
    b = batch(B=1, T=30, V=100, D=32, dtype=torch.bfloat16)
    single = b.weight.detach().float().requires_grad_()
    b.weight.grad_dtype = torch.float32
    for weight in (b.weight, single):
        (loss(b.hidden, weight, b.targets) / 7).backward()
    assert b.weight.grad is not None
    assert b.weight.grad.dtype == torch.float32
    assert torch.equal(b.weight.grad, single.grad)


@pytest.mark.usefixtures("triton_interpreter")
def test_half_precision_does_not_round_the_scale_of_the_gradients() -> None:
    """A mean over 1111 targets, which bfloat16 would take for one over 1112 or 1108."""
    b = batch(B=1, T=30, V=100, D=32, dtype=torch.bfloat16)
    for loss in (fused, own):
        (plain,) = torch.autograd.grad(loss(*b), b.hidden)
        (mean,) = torch.autograd.grad(loss(*b) / 1111, b.hidden)
        torch.testing.assert_close(mean, (plain.double() / 1111).bfloat16(), rtol=0, atol=0)


@pytest.mark.usefixtures("triton_interpreter")
def test_held_out_targets_cost_no_gradient(tmp_path: Path) -> None:
    b = batch(B=1, T=16, V=3000, D=128, dtype=torch.float32)
    with torch.no_grad():
        total = fused(*b, 1e-4)
        largest = largest_allocation(lambda: fused(*b, 1e-4), tmp_path / "trace.json")
    assert not total.requires_grad
    assert error(total, textbook(*b, 1e-4)) < 1e-6
    assert largest < b.weight.nbytes


@pytest.mark.usefixtures("triton_interpreter")
def test_the_fused_operator_keeps_torchs_contract() -> None:
    """Its schema, and what it says of shapes and dtypes without computing."""
    hidden, weight, targets = batch(B=1, V=70, dtype=torch.float32)
    fused(hidden, weight, targets)  # registers the operator
    for needs in ((True, True), (False, True), (False, False)):
        torch.library.opcheck(
            torch.ops.phd.linear_cross_entropy,
            (hidden[0].detach(), weight.detach(), targets[0], IGNORED, 1e-4, *needs),
        )


@given(
    rows=st.integers(1, 1 << 20),
    V=st.integers(1, 300_000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_chunks_are_even_and_fit(rows: int, V: int, dtype: torch.dtype) -> None:
    step = fused_rows_at_once(rows, V, dtype)
    assert 1 <= step <= min(rows, loss_memory.ROWS)
    assert step * V * dtype.itemsize <= loss_memory.LOGITS_BYTES
    chunks = -(-rows // step)
    last = rows - (chunks - 1) * step
    assert 0 <= step - last <= chunks * loss_memory.ROW_TILE
    assert chunks == 1 or step % loss_memory.ROW_TILE == 0


def test_the_paper_model_needs_less_than_4_gb() -> None:
    """16,384 rows of size 1b2; `test_loss_cuda.py` measures it."""
    shape = 16_384, 2048, 100_352
    assert fused_rows_at_once(16_384, 100_352, torch.bfloat16) == 8192
    for dtype in (torch.bfloat16, torch.float32):
        for weight_dtype in {dtype, torch.float32}:
            assert 2e9 < fused_loss_bytes(*shape, dtype, weight_dtype) < 4e9


def test_the_fastest_exact_method_is_chosen() -> None:
    half, single, double = torch.bfloat16, torch.float32, torch.float64
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for weight, z_loss in ((single, 0.0), (half, 1e-4)):
        assert method_for(cuda, half, weight, z_loss) == Method.FUSED
        assert method_for(cuda, single, single, z_loss) == Method.FUSED
        assert method_for(cpu, half, weight, z_loss) == Method.CHUNKED
    assert method_for(cuda, double, double, 1e-4) == Method.CHUNKED
    assert method_for(cuda, half, single, 0.0, has_triton=False) == Method.CHUNKED
    found = {method_for(cpu, dtype, dtype, 0.0) for dtype in (single, double)}
    assert found == {Method.TORCH if HAS_LINEAR_CROSS_ENTROPY else Method.CHUNKED}


@pytest.mark.parametrize("z_loss", [0.0, 0.3])
def test_ignored_targets_count_nowhere(z_loss: float) -> None:
    hidden, weight, targets = batch()
    counted = targets != IGNORED
    found = next_token_loss(hidden, weight, targets, z_loss)
    alone = next_token_loss(hidden[counted][None], weight, targets[counted][None], z_loss)
    assert found.targets == counted.sum()
    torch.testing.assert_close(found, alone)
    (gradient,) = torch.autograd.grad(found.total, hidden)
    assert (gradient[~counted] == 0).all()
    assert (gradient[counted] != 0).any(-1).all()


@pytest.mark.parametrize("z_loss", [0.0, 0.3])
def test_a_row_without_targets_costs_nothing(z_loss: float) -> None:
    hidden, weight, targets = batch()
    found = next_token_loss(hidden, weight, torch.full_like(targets, IGNORED), z_loss)
    gradients = torch.autograd.grad(found.total, (hidden, weight))
    assert found.total == found.cross_entropy == found.targets == 0
    assert all((gradient == 0).all() for gradient in gradients)


def test_cross_entropy_is_reported_without_the_z_loss() -> None:
    b = batch()
    found = next_token_loss(*b, z_loss=0.3)
    torch.testing.assert_close(found.cross_entropy, textbook(*b).detach())
    torch.testing.assert_close(found.total, textbook(*b, 0.3))
    assert not found.cross_entropy.requires_grad


def test_sums_of_micro_batches_add_up() -> None:
    b = batch(B=4)
    whole = next_token_loss(*b)
    parts = [next_token_loss(b.hidden[i : i + 1], b.weight, b.targets[i : i + 1]) for i in range(4)]
    for name in ("total", "cross_entropy", "targets"):
        total, shares = getattr(whole, name), [getattr(part, name) for part in parts]
        torch.testing.assert_close(torch.stack(shares).sum(), total)


@pytest.mark.parametrize("z_loss", [0.0, 1e-4])
@pytest.mark.parametrize("weights", ["bfloat16", "autocast"])
def test_totals_of_bfloat16_rows_are_held_in_float32(weights: str, z_loss: float) -> None:
    dtype = torch.bfloat16 if weights == "bfloat16" else torch.float32
    b = batch(B=1, T=2000, D=32, V=100, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=weights == "autocast"):
        found = next_token_loss(*b, z_loss)
    hidden, weight = (x.bfloat16().double() for x in (b.hidden, b.weight))
    expected = textbook(hidden, weight, b.targets, z_loss)
    assert found.total.dtype == found.cross_entropy.dtype == torch.float32
    # Logits round at 2^-9, at random: the sum of many is far better than any one of them.
    assert found.total.item() == pytest.approx(expected.item(), rel=2e-4)


def test_autocast_gradients_add_up_in_float32_over_many_chunks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    b = batch(B=1, T=4000, D=32, V=100, dtype=torch.float32)
    expected = through(textbook, b)
    monkeypatch.setattr(phd.loss, "LOGITS_AT_ONCE", 200)
    with torch.autocast("cpu", torch.bfloat16):
        found = through(lambda *b: next_token_loss(*b).total, b)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() < 1e-2 * theirs.norm()


def largest_allocation(step: Callable[[], object], trace: Path) -> int:
    """Bytes of the largest single allocation, inside torch's own kernels as well."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    profiler.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    return max(event["args"]["Bytes"] for event in events if event["name"] == "[memory]")


@pytest.mark.parametrize("z_loss", [0.0, 1e-4], ids=["torchs", "own"])
def test_only_a_chunk_of_the_logits_is_ever_held(
    z_loss: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, vocabulary = 4096, 512
    monkeypatch.setattr(phd.loss, "LOGITS_AT_ONCE", 64 * vocabulary)
    b = batch(B=1, T=rows, D=16, V=vocabulary, dtype=torch.float32)
    trace, logits = tmp_path / "trace.json", 4 * rows * vocabulary
    found = largest_allocation(lambda: next_token_loss(*b, z_loss).total.backward(), trace)
    plain = largest_allocation(lambda: textbook(*b, z_loss).backward(), trace)
    assert found <= logits // 8 < plain
