"""A few rows are multiplied another way, to the same result."""

import pytest
import torch
from torch.nn.functional import linear

from phd.linear import Linear, project

FAN_IN, FAN_OUT = 24, 40


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("fan_in", [FAN_IN, 20_000])  # one row goes another way with large weights
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "expanded"])
def test_any_number_of_rows_in_any_layout_is_the_product(
    rows: int, layout: str, fan_in: int
) -> None:
    weight = torch.randn(FAN_OUT, fan_in, dtype=torch.float64)
    x = {
        "contiguous": torch.randn(1, rows, fan_in, dtype=torch.float64),
        "transposed": torch.randn(1, fan_in, rows, dtype=torch.float64).mT,
        "expanded": torch.randn(1, 1, fan_in, dtype=torch.float64).expand(1, rows, fan_in),
    }[layout]
    with torch.no_grad():
        found = project(x, weight)
    # Kernels of attention read rows, not columns.
    assert found.is_contiguous()
    torch.testing.assert_close(found, linear(x, weight), rtol=0, atol=1e-10)


def test_half_precision_and_gradients_go_the_usual_way() -> None:
    layer, x = Linear(FAN_IN, FAN_OUT), torch.randn(2, FAN_IN)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        torch.testing.assert_close(layer(x), linear(x, layer.weight), rtol=0.02, atol=0.02)
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    torch.testing.assert_close(layer.weight.grad, x.sum(0).expand(FAN_OUT, -1))
