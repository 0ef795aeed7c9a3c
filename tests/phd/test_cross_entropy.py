"""Triton's kernel gives cross-entropy and its gradient by their formulas, and compiles for GPUs."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from phd.cross_entropy import STAGES, WARPS, block_columns, cross_entropy_rows
from phd.loss import IGNORED
from tests.gpu_compiler import Build, compile_for_gpus

pytestmark = pytest.mark.usefixtures("triton_interpreter")
claim = settings(
    derandomize=True,
    deadline=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
# A few blocks and their edges, and a remainder as that of 100,352 logits: a quarter of a block.
SIZES = st.integers(1, 40) | st.sampled_from([512, 1000, 4096, 4097, 8191, 8192, 18_432])


def formula(logits: Tensor, targets: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
    """(losses, their gradient) in float64."""
    logits = logits.double().requires_grad_()
    lse, chosen = logits.logsumexp(1), logits.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    losses = torch.stack([lse - chosen, z_loss * lse**2]) * (targets != IGNORED)
    return losses.detach(), *torch.autograd.grad(losses.sum(), logits)


def drawn(rows: int, V: int, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(logits, targets), some of them ignored."""
    logits = (torch.randn(rows, V, dtype=torch.float64) * scale).to(dtype)
    targets = torch.randint(0, V, (rows,))
    return logits, targets.masked_fill(torch.rand(rows) < 0.3, IGNORED)


def check(logits: Tensor, targets: Tensor, z_loss: float) -> None:
    """The kernel's results: losses to float32's digits, gradients to those of the logits."""
    expected, gradient = formula(logits, targets, z_loss)
    found = cross_entropy_rows(logits, targets, IGNORED, z_loss, gradient=True)
    torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=2e-6)
    # float16 has no smaller number than 6e-8. Where 1 is taken away, float32's error of 1 remains.
    unit = torch.finfo(logits.dtype).eps
    atol = 6e-8 + 2e-7 * gradient.abs().max().item()
    torch.testing.assert_close(logits.double(), gradient, rtol=max(unit, 5e-6), atol=atol)


@dtypes
@claim
@given(
    rows=st.integers(1, 5),
    V=SIZES,
    padding=st.integers(0, 70),
    z_loss=st.sampled_from([0.0, 1e-4, 0.3]),
    scale=st.sampled_from([0.0, 1.0, 30.0]),
)
def test_losses_and_gradient_are_those_of_the_formula(
    dtype: torch.dtype, rows: int, V: int, padding: int, z_loss: float, scale: float
) -> None:
    logits, targets = drawn(rows, V, scale, dtype)
    padded = torch.full((rows, V + padding), torch.nan, dtype=dtype)
    padded[:, :V] = logits
    check(padded[:, :V], targets, z_loss)


@dtypes
@pytest.mark.parametrize("offset", [-2e4, 2e4])
def test_large_logits_neither_overflow_nor_lose_digits(dtype: torch.dtype, offset: float) -> None:
    logits, targets = drawn(4, 1000, 40.0, dtype)
    check(logits + offset, targets, 0.0)


def test_a_logit_of_minus_infinity_has_no_probability() -> None:
    """Half precision rounds large negative logits to it."""
    logits, targets = drawn(3, 700, 1.0, torch.float16)
    logits[:, ::2] = -torch.inf
    targets.fill_(1)
    check(logits, targets, 1e-4)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("strange", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_visible(strange: float) -> None:
    logits, targets = drawn(1, 700, 1.0, torch.bfloat16)
    targets.fill_(1)
    logits[0, 600] = strange
    losses = cross_entropy_rows(logits, targets, IGNORED, 0.0, gradient=True)
    assert not losses[0].isfinite()
    assert not logits.isfinite().all()


def test_an_ignored_row_counts_nowhere_whatever_its_logits_are() -> None:
    logits = torch.full((2, 600), torch.nan)
    losses = cross_entropy_rows(logits, torch.full((2,), IGNORED), IGNORED, 0.3, gradient=True)
    assert (losses == 0).all()
    assert (logits == 0).all()


@pytest.mark.parametrize("target", [-1, 600, 2**40])
def test_a_target_outside_of_the_vocabulary_makes_the_loss_nan(target: int) -> None:
    losses = cross_entropy_rows(
        torch.zeros(1, 600), torch.tensor([target]), IGNORED, 0.0, gradient=False
    )
    assert losses[0].isnan()


def test_without_a_gradient_the_logits_stay() -> None:
    logits, targets = drawn(3, 1000, 1.0, torch.float32)
    before, expected = logits.clone(), formula(logits, targets, 0.3)[0]
    losses = cross_entropy_rows(logits, targets, IGNORED, 0.3, gradient=False)
    assert torch.equal(logits, before)
    torch.testing.assert_close(losses.double(), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.process
def test_it_compiles_for_gpus_with_two_programs_to_a_multiprocessor() -> None:
    V, builds = 100_352, []
    targets, losses = (torch.empty(8, dtype=d, device="meta") for d in (torch.int64, torch.float32))
    for dtype, gradient in ((torch.bfloat16, True), (torch.bfloat16, False), (torch.float32, True)):
        logits = torch.empty(8, dtype=dtype, device="meta")
        constants = {
            "IGNORED": IGNORED,
            "GRADIENT": gradient,
            "COLUMNS": block_columns(V, dtype),
            "STAGES": STAGES,
        }
        arguments = [logits, targets, losses, 8192, V, V, 1e-4]
        builds.append(Build("phd.cross_entropy:_kernel", arguments, constants, warps=WARPS))
    for build, compiled in zip(builds, compile_for_gpus(builds), strict=True):
        for one in compiled:
            assert one.spilled_bytes == 0, (build, one)
            assert one.registers * 32 * WARPS * 2 <= 65_536, (build, one)  # of a multiprocessor
