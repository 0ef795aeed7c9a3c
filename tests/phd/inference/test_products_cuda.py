"""On a GPU, the products of a token and the ends of its sublayers are right at real shapes."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import rms_norm, silu

pytest.importorskip("triton")

from phd.inference.kernels.products import (
    MOST_ROWS,
    gated_product,
    partial_products,
    product,
)
from phd.inference.kernels.residual import SublayerEnd, end_sublayer

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs an NVIDIA GPU and a CUDA build of torch"
)
ROWS = (1, 2, 16, 17, 32, 64, 70)
"""Of each tile that a product has for its rows, and more than the kernel takes."""

SUM_TOLERANCE = 1e-4
"""Of sums of up to 8192 products near 1 in all: a tensor core cuts off what is below 2^-24 of its
sum at each of a thousand steps. In TF32 they would be wrong by 1e-3."""

TOLERANCE = {torch.float32: SUM_TOLERANCE, torch.bfloat16: 1e-2}
dtypes = pytest.mark.parametrize("dtype", TOLERANCE)


class Operands(NamedTuple):
    x: Tensor
    weight: Tensor


def operands(rows: int, D: int, outs: int, dtype: torch.dtype) -> Operands:
    """Random ones, whose products are near 1."""
    generator = torch.Generator("cuda").manual_seed(rows)
    x, weight = (
        torch.randn(n, D, device="cuda", dtype=dtype, generator=generator) for n in (rows, outs)
    )
    return Operands(x, weight / D**0.5)


def check(found: Tensor, expected: Tensor, tolerance: float, what: object) -> None:
    torch.testing.assert_close(
        found.double(),
        expected,
        rtol=tolerance,
        atol=tolerance,
        msg=lambda text: f"{what}: {text}",
    )


@dtypes
@pytest.mark.parametrize(("D", "outs"), [(2048, 3072), (8192, 2048), (1536, 1536)])
def test_a_product_equals_that_in_float64(D: int, outs: int, dtype: torch.dtype) -> None:
    for rows in ROWS:
        x, weight = operands(rows, D, outs, dtype)
        expected = x.double() @ weight.double().T
        found, parts = product(x, weight), partial_products(x, weight)
        assert found.dtype == dtype
        assert parts.dtype == (dtype if rows > MOST_ROWS else torch.float32)
        check(found, expected, TOLERANCE[dtype], rows)
        # Partial sums are rounded nowhere.
        check(parts.double().sum(0), expected, TOLERANCE[parts.dtype], (rows, len(parts)))


@dtypes
def test_a_gated_product_equals_that_in_float64(dtype: torch.dtype) -> None:
    for rows in ROWS:
        x, weight = operands(rows, 2048, 2 * 8192, dtype)
        gate, up = (x.double() @ weight.double().T).split(8192, 1)
        # cuBLAS's products are rounded before SwiGLU, and both factors of it are up to 5.
        tolerance = (5 if rows > MOST_ROWS else 3) * TOLERANCE[dtype]
        check(gated_product(x, weight), silu(gate) * up, tolerance, rows)


@dtypes
@pytest.mark.parametrize("D", [1536, 2048])
def test_a_sublayer_ends_as_in_float64_after_any_number_of_parts(
    D: int, dtype: torch.dtype
) -> None:
    several = set()
    for rows in ROWS:
        output = partial_products(*operands(rows, 8192, D, dtype))
        several.add(len(output) > 1)
        x = torch.randn(rows, D, device="cuda")
        of_output, of_sum = (torch.rand(2, D, device="cuda") + 0.5).to(dtype)
        stream, end = x.clone(), SublayerEnd(of_output, of_sum)
        h = end_sublayer(stream, output, end, 1e-6, dtype)
        assert h.dtype == dtype
        y = rms_norm(output.double().sum(0), (D,), of_output.double(), 1e-6)
        total = x.double() + y
        check(stream, total, 1e-5, rows)
        normed = rms_norm(total, (D,), of_sum.double(), 1e-6)
        check(h, normed, 1e-5 if dtype == torch.float32 else 1e-2, rows)
    assert several == {True, False}
