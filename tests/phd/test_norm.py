"""RMSNorm on the CPU is the textbook's, in value and gradient, for all layouts."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from phd.norm import RMSNorm

EPS = 0.1  # large enough to matter
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "last copy": lambda x: x[:, -1:],
    "transposed": lambda x: x.transpose(1, 2),
    "equal copies": lambda x: x[:, :1].expand_as(x),
    "row": lambda x: x[0, 0, 0],
}


def norm_of(D: int, dtype: torch.dtype = torch.float64) -> RMSNorm:
    norm = RMSNorm(D, EPS, dtype=dtype)
    nn.init.uniform_(norm.weight, -1.0, 2.0)
    return norm


def textbook(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()


@pytest.mark.parametrize("upstream", ["random", "all ones"])
@pytest.mark.parametrize("D", [1, 7, 16])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_value_and_gradients_are_the_textbooks(
    layout: Callable[[Tensor], Tensor], D: int, upstream: str
) -> None:
    norm, x = norm_of(D), torch.randn(2, 3, 5, D, dtype=torch.float64, requires_grad=True)
    found, expected = norm(layout(x)), textbook(layout(x), norm.weight)
    torch.testing.assert_close(found, expected)
    with torch.no_grad():
        torch.testing.assert_close(norm(layout(x)), expected)
    dout = torch.randn_like(found) if upstream == "random" else torch.ones(()).expand_as(found)
    gradients = (torch.autograd.grad(y, (x, norm.weight), dout) for y in (found, expected))
    torch.testing.assert_close(*gradients)


def test_the_gradients_are_those_of_finite_differences() -> None:
    norm, x = norm_of(5), torch.randn(4, 5, dtype=torch.float64, requires_grad=True)

    def of_weight(x: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(norm, {"weight": weight}, x)

    assert torch.autograd.gradcheck(of_weight, (x, norm.weight))


def test_float32_errs_by_rounding_alone_over_many_rows() -> None:
    norm, x = norm_of(64, torch.float32), torch.randn(5000, 64) * 100
    x.requires_grad_()
    dout = torch.randn_like(x)
    found = torch.autograd.grad(norm(x), (x, norm.weight), dout)
    exact = [y.detach().double().requires_grad_() for y in (x, norm.weight)]
    expected = torch.autograd.grad(textbook(*exact), exact, dout.double())
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


def test_it_stays_in_the_weights_precision_under_autocast() -> None:
    norm, x = norm_of(8, torch.float32), torch.randn(3, 8).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = norm(x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, textbook(x.float(), norm.weight))
    (gradient,) = torch.autograd.grad(found.sum(), x)
    assert gradient.dtype == torch.bfloat16


def test_a_row_of_zeros_stays_zero_with_finite_gradients() -> None:
    norm, x = norm_of(8), torch.zeros(2, 8, dtype=torch.float64, requires_grad=True)
    found = norm(x)
    assert (found == 0).all()
    (gradient,) = torch.autograd.grad(found.sum(), x)
    torch.testing.assert_close(gradient, (norm.weight / EPS**0.5).expand(2, -1).detach())
