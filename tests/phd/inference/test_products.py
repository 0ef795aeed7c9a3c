"""Kernels of products and of sublayers' ends equal PyTorch's operators, and compile for GPUs."""

import pytest
import torch
from torch.nn.functional import linear, rms_norm, silu

from phd.inference.kernels.products import (
    MOST_ROWS,
    gated_product,
    partial_products,
    product,
    product_blocks,
    product_launch,
    silu_and_multiply,
    whole_blocks,
)
from phd.inference.kernels.residual import SublayerEnd, end_sublayer, warps_of
from tests.gpu_compiler import SHARED_BYTES, Build, compile_for_gpus

interpreted = pytest.mark.usefixtures("triton_interpreter")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@interpreted
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("rows", "D", "outs"), [(1, 48, 40), (3, 300, 17), (17, 256, 16), (64, 520, 96), (70, 32, 24)]
)
def test_a_product_is_linear(rows: int, D: int, outs: int, dtype: torch.dtype) -> None:
    x, weight = torch.randn(rows, D, dtype=dtype), torch.randn(outs, D, dtype=dtype) / D**0.5
    expected = linear(x.double(), weight.double())
    found, parts = product(x, weight), partial_products(x, weight)
    assert found.dtype == dtype
    assert parts.dtype == (dtype if rows > MOST_ROWS else torch.float32)
    tolerance = TOLERANCE[dtype]
    for y in (found, parts.double().sum(0)):
        torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)


@interpreted
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("rows", "D", "F"), [(1, 48, 40), (5, 300, 17), (64, 40, 130), (70, 32, 24)]
)
def test_a_gated_product_is_swiglu(rows: int, D: int, F: int, dtype: torch.dtype) -> None:
    x, weight = torch.randn(rows, D, dtype=dtype), torch.randn(2 * F, D, dtype=dtype) / D**0.5
    gate, up = linear(x.double(), weight.double()).split(F, 1)
    tolerance = 2 * TOLERANCE[dtype]
    torch.testing.assert_close(
        gated_product(x, weight).double(), silu(gate) * up, rtol=tolerance, atol=tolerance
    )


@interpreted
def test_a_large_weight_is_read_whole() -> None:
    """More tiles than the stages of the loop, several programs, and splits that end early."""
    x, weight = torch.randn(2, 1100), torch.randn(70, 1100)
    torch.testing.assert_close(product(x, weight), x @ weight.T, rtol=1e-4, atol=1e-4)
    parts = partial_products(x, weight)
    assert len(parts) > 2
    torch.testing.assert_close(parts.sum(0), x @ weight.T, rtol=1e-4, atol=1e-4)


ENDS = {
    "nothing": SublayerEnd(),
    "reordered": SublayerEnd(of_output=torch.rand(24) + 0.5),
    "pre": SublayerEnd(of_sum=torch.rand(24) + 0.5),
    "hybrid": SublayerEnd(of_sum=torch.rand(24) + 0.5, normed_stream=True),
    "reordered, before the head": SublayerEnd(torch.rand(24) + 0.5, torch.rand(24) + 0.5),
}


@interpreted
@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("has_output", [True, False])
def test_a_sublayer_ends_as_its_wiring_says(name: str, has_output: bool) -> None:
    end = ENDS[name]
    if not has_output:
        end = end._replace(of_output=None, normed_stream=False)
    x, parts = torch.randn(3, 24), torch.randn(3, 3, 24)
    y, total = parts.sum(0), x
    if has_output:
        total = x + (y if end.of_output is None else rms_norm(y, (24,), end.of_output, 1e-3))
    read = total if end.of_sum is None else rms_norm(total, (24,), end.of_sum, 1e-3)
    stream = x.clone()
    h = end_sublayer(stream, parts if has_output else None, end, 1e-3, torch.float16)
    torch.testing.assert_close(stream, read if end.normed_stream else total)
    torch.testing.assert_close(h, read.half())


@interpreted
def test_silu_and_multiply_takes_the_gate_first() -> None:
    both = torch.randn(3, 2 * 1500)
    gate, up = both.split(1500, 1)
    torch.testing.assert_close(silu_and_multiply(both), silu(gate) * up)


# (D, outs, gated, whole) of 1b2: down; gate and up; the head.
SHAPES = [(8192, 2048, False, False), (2048, 8192, True, True), (2048, 100352, False, True)]


@pytest.mark.process
@pytest.mark.parametrize("capability", [80, 89])
def test_the_widest_products_fit_into_the_shared_memory_of_smaller_gpus(capability: int) -> None:
    shared = SHARED_BYTES[capability]
    builds = []
    for D, outs, gated, whole in SHAPES:
        x = torch.empty(MOST_ROWS, D, device="meta", dtype=torch.bfloat16)
        weight = torch.empty(outs * (1 + gated), D, device="meta", dtype=torch.bfloat16)
        blocks = whole_blocks(MOST_ROWS, outs, D, 2, shared, gated=gated)
        if not whole:
            blocks = product_blocks(MOST_ROWS, outs, D, 2, shared)
        launch, _ = product_launch(x, weight, blocks, gated=gated)
        options = launch.options["num_warps"], launch.options["num_stages"]
        kernel = "phd.inference.kernels.products:few_rows_kernel"
        builds.append(Build(kernel, launch.arguments, launch.constants, *options))
    for compiled in compile_for_gpus(builds, [capability]):
        assert compiled[0].shared_bytes <= shared


@pytest.mark.process
def test_the_kernels_compile_for_gpus_without_spilling_registers() -> None:
    builds = []
    for rows in (1, 16, MOST_ROWS):
        for D, outs, gated, whole in SHAPES:
            x = torch.empty(rows, D, device="meta", dtype=torch.bfloat16)
            weight = torch.empty(outs * (1 + gated), D, device="meta", dtype=torch.bfloat16)
            blocks, dtype = whole_blocks(rows, outs, D, 2, gated=gated), torch.bfloat16
            if not whole:
                blocks, dtype = product_blocks(rows, outs, D, 2), torch.float32
            launch, _ = product_launch(x, weight, blocks, gated=gated, dtype=dtype)
            builds.append(
                Build(
                    "phd.inference.kernels.products:few_rows_kernel",
                    launch.arguments,
                    launch.constants,
                    launch.options["num_warps"],
                    launch.options["num_stages"],
                )
            )
    x, h, weight = (
        torch.empty(8, device="meta", dtype=dtype)
        for dtype in (torch.float32, torch.bfloat16, torch.bfloat16)
    )
    flags = dict.fromkeys(("NORMS_OUTPUT", "NORMS_SUM", "NORMED_STREAM"), True)
    for D, width in ((768, 1024), (2048, 2048), (8192, 8192)):
        builds.append(
            Build(
                "phd.inference.kernels.residual:end_kernel",
                [x, h, weight, weight, h, 1e-6],
                {"D": D, "WIDTH": width, "PARTS": 4, **flags},
                warps_of(width),
            )
        )
    for build, compiled in zip(builds, compile_for_gpus(builds), strict=True):
        for one in compiled:
            assert one.spilled_bytes == 0, (build, one)
