"""The kernels that draw tokens draw what `Sampler` draws on the CPU, and compile for GPUs."""

import pytest
import torch

from phd.config import SamplingConfig
from phd.inference.kernels.inverse_cdf import BLOCK, draw_by_inverse_cdf
from phd.inference.sampling import FIXED_POINT, NOT_FINITE, Sampler
from tests.gpu_compiler import Build, compile_for_gpus

interpreted = pytest.mark.usefixtures("triton_interpreter")
TEMPERATURES = [0.0, 0.7, 1.0, 3.0, 1e-30, 0.0, 0.2]
ROWS = len(TEMPERATURES)


def both(logits: torch.Tensor, uniforms: torch.Tensor) -> list[torch.Tensor]:
    sampler = Sampler([SamplingConfig(temperature=t) for t in TEMPERATURES], torch.device("cpu"))
    temperature = torch.tensor(TEMPERATURES)
    found = draw_by_inverse_cdf(logits, temperature, uniforms, FIXED_POINT, NOT_FINITE)
    return [sampler.draw(logits, uniforms), found]


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [1, 17, BLOCK, 3 * BLOCK + 5])
def test_the_same_number_draws_the_same_token(vocabulary: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(ROWS, vocabulary, generator=generator).mul(2).to(dtype)
    for _ in range(5):
        expected, found = both(logits, torch.rand(ROWS, generator=generator, dtype=torch.float64))
        assert torch.equal(found, expected)


@interpreted
@pytest.mark.parametrize("u", [0.0, 1 - 2.0**-53, 1.0])
def test_the_ends_draw_tokens_that_are_not_masked(u: float) -> None:
    logits = torch.randn(ROWS, 3 * BLOCK, generator=torch.Generator().manual_seed(0)) * 1e-3
    logits[:, : BLOCK + 3] = logits[:, -BLOCK - 3 :] = -torch.inf
    expected, found = both(logits, torch.full((ROWS,), u, dtype=torch.float64))
    assert torch.equal(found, expected)
    assert found[2] == (2 * BLOCK - 4 if u else BLOCK + 3)


@interpreted
@pytest.mark.parametrize("vocabulary", [1, BLOCK - 1, BLOCK, 2 * BLOCK + 3])
def test_no_number_draws_a_token_beyond_the_vocabulary(vocabulary: int) -> None:
    uniforms = torch.tensor([0.5, 1.0, 1 - 2.0**-53, 2.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    for found in both(torch.zeros(ROWS, vocabulary), uniforms):
        assert found[1:4].tolist() == [vocabulary - 1] * 3
        assert found.max() < vocabulary


@interpreted
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_give_no_token(wrong: float) -> None:
    logits = torch.randn(ROWS, 2 * BLOCK)
    logits[:3, BLOCK + 7] = wrong
    expected, found = both(logits, torch.rand(ROWS, dtype=torch.float64))
    assert (found == NOT_FINITE).tolist() == [True] * 3 + [False] * (ROWS - 3)
    assert torch.equal(found, expected)


@pytest.mark.process
def test_the_kernels_compile_for_gpus_without_spilling_registers() -> None:
    logits, peaks, places, sums, uniforms = (
        torch.empty(8, device="meta", dtype=dtype)
        for dtype in (torch.bfloat16, torch.float32, torch.int32, torch.int64, torch.float64)
    )
    name, builds = "phd.inference.kernels.inverse_cdf:", []
    for V, blocks, width in ((100_352, 98, 128), (50_001, 49, 64)):
        both_widths = {"BLOCK": BLOCK, "WIDTH": width}
        builds += [
            Build(f"{name}peak_kernel", [logits, peaks, places, V], {"BLOCK": BLOCK}),
            Build(f"{name}sum_kernel", [logits, peaks, peaks, sums, V, FIXED_POINT], both_widths),
            Build(
                f"{name}draw_kernel",
                [logits, peaks, places, sums, peaks, uniforms, sums, V, blocks, FIXED_POINT, -1],
                both_widths,
            ),
        ]
    for build, compiled in zip(builds, compile_for_gpus(builds), strict=True):
        for one in compiled:
            assert one.spilled_bytes == 0, (build, one)
