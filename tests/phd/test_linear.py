"""Transposed and fused products give the same result as plain ones."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from phd.linear import (
    LARGE_WEIGHT,
    TRANSPOSED_ROWS,
    Linear,
    RowRange,
    fuse_weights,
    is_faster_transposed,
    project,
    project_all,
    transposed_product,
    transposed_rows,
)

FAN_IN, FAN_OUT = 24, 40
LAYOUTS = ("contiguous", "transposed", "expanded")


def laid_out(layout: str, rows: int, fan_in: int, dtype: torch.dtype) -> Tensor:
    return {
        "contiguous": torch.randn(1, rows, fan_in, dtype=dtype),
        "transposed": torch.randn(1, fan_in, rows, dtype=dtype).mT,
        "expanded": torch.randn(1, 1, fan_in, dtype=dtype).expand(1, rows, fan_in),
    }[layout]


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 16, 48, 49])
@pytest.mark.parametrize("fan_in", [FAN_IN, 20_000])  # large weights go other ways
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_number_of_rows_in_any_layout_is_the_product(
    rows: int, layout: str, fan_in: int
) -> None:
    for dtype, atol in ((torch.float64, 1e-10), (torch.float32, 2e-3)):
        weight = torch.randn(FAN_OUT, fan_in, dtype=dtype)
        x = laid_out(layout, rows, fan_in, dtype)
        with torch.no_grad():
            found = project(x, weight)
        # Kernels of attention read rows, not columns.
        assert found.is_contiguous()
        torch.testing.assert_close(found, linear(x, weight), rtol=0, atol=atol)


@pytest.mark.parametrize("rows", [1, 2, 3, 16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_transposed_product_is_the_product_on_every_processor(rows: int, layout: str) -> None:
    weight = torch.randn(FAN_OUT, FAN_IN, dtype=torch.float64)
    x = laid_out(layout, rows, FAN_IN, torch.float64)
    found = transposed_product(x, weight)
    assert found.is_contiguous()
    torch.testing.assert_close(found, linear(x, weight), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rows", TRANSPOSED_ROWS.values(), ids=TRANSPOSED_ROWS)
def test_which_rows_take_the_transposed_product(rows: RowRange) -> None:
    taken = [n for n in range(100) if is_faster_transposed(rows, n, LARGE_WEIGHT - 1)]
    assert taken == list(range(rows.first, rows.last + 1))
    taken = [n for n in range(100) if is_faster_transposed(rows, n, LARGE_WEIGHT)]
    assert taken == list(range(rows.first_large, rows.last + 1))


def test_the_processor_is_known_by_its_vendor() -> None:
    if not (cpuinfo := Path("/proc/cpuinfo")).exists():
        pytest.skip("no /proc/cpuinfo here")
    vendors = [vendor for vendor in TRANSPOSED_ROWS if vendor in cpuinfo.read_text()]
    assert transposed_rows() == (TRANSPOSED_ROWS[vendors[0]] if vendors else None)


def test_half_precision_and_gradients_go_the_usual_way() -> None:
    layer, x = Linear(FAN_IN, FAN_OUT), torch.randn(2, FAN_IN)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        torch.testing.assert_close(layer(x), linear(x, layer.weight), rtol=0.02, atol=0.02)
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    torch.testing.assert_close(layer.weight.grad, x.sum(0).expand(FAN_OUT, -1))


def layers() -> nn.ModuleList:
    return nn.ModuleList(Linear(FAN_IN, fan_out) for fan_out in (40, 8, 16)).double()


def products(of: nn.ModuleList, x: Tensor) -> tuple[int, list[Tensor]]:
    """How many products of matrices there were, and what came of them."""
    with torch.profiler.profile() as profile, torch.no_grad():
        found = project_all(x, list(of))  # type: ignore[arg-type]
    return sum(event.name == "aten::mm" for event in profile.events()), list(found)


@pytest.mark.parametrize("rows", [1, 5])
def test_layers_with_fused_weights_are_one_product(rows: int) -> None:
    x, several = torch.randn(1, 1, rows, FAN_IN, dtype=torch.float64), layers()
    weights = {name: weight.clone() for name, weight in several.state_dict().items()}
    count, expected = products(several, x)
    assert count == 3
    fuse_weights(list(several))  # type: ignore[arg-type]
    assert several.state_dict().keys() == weights.keys()
    assert all(torch.equal(x, weights[name]) for name, x in several.state_dict().items())
    count, found = products(several, x)
    assert count == 1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    # A part that begins later is fused as well; with a gap it is not.
    assert products(several[1:], x)[0] == 1
    assert products(several[::2], x)[0] == 2


def test_layers_that_others_have_put_in_place_are_called() -> None:
    """An adapter for instance, or a layer that an engine gathers as it is called."""

    class Adapter(Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    x, several = torch.randn(2, FAN_IN, dtype=torch.float64), layers()
    several[1] = Adapter(FAN_IN, 8).double()
    fuse_weights(list(several))  # type: ignore[arg-type]
    _, found = products(several, x)
    torch.testing.assert_close(found, [layer(x) for layer in several])


def test_layers_with_hooks_are_called() -> None:
    x, several = torch.randn(2, FAN_IN, dtype=torch.float64), layers()
    fuse_weights(list(several))  # type: ignore[arg-type]
    handle = several[1].register_forward_hook(lambda *call: 2 * call[2])
    count, found = products(several, x)
    assert count == 3
    torch.testing.assert_close(found, [layer(x) for layer in several])
    handle.remove()
    assert products(several, x)[0] == 1


def test_fused_weights_stay_where_they_are() -> None:
    several = layers()
    before = [layer.weight.data_ptr() for layer in several]
    for moves in (True, False):
        fuse_weights(list(several))  # type: ignore[arg-type]
        after = [layer.weight.data_ptr() for layer in several]
        assert (after != before) == moves
        before = after
    several.float().double()
    fuse_weights(list(several))  # type: ignore[arg-type]
    assert products(several, torch.randn(2, FAN_IN, dtype=torch.float64))[0] == 1


def test_layers_that_have_moved_are_multiplied_one_by_one() -> None:
    x, several = torch.randn(2, FAN_IN, dtype=torch.float64), layers()
    fuse_weights(list(several))  # type: ignore[arg-type]
    count, found = products(several.float(), x.float())
    assert count == 3
    torch.testing.assert_close(found, [layer(x.float()) for layer in several])


def test_fused_layers_still_get_a_gradient_each() -> None:
    x, several = torch.randn(2, FAN_IN, dtype=torch.float64), layers()
    fuse_weights(list(several))  # type: ignore[arg-type]
    sum(y.sum() * n for n, y in enumerate(project_all(x, list(several)), 1)).backward()  # type: ignore[arg-type,union-attr]
    for n, layer in enumerate(several, 1):
        torch.testing.assert_close(layer.weight.grad, n * x.sum(0).expand(len(layer.weight), -1))
