"""Numbers arrive on a device as they were on the host."""

import pytest
import torch

from phd.transfer import to_device


@pytest.mark.parametrize("x", [1 - 2.0**-53, 0.1, 2.0**-1060])
def test_pythons_numbers_keep_all_of_their_digits(x: float) -> None:
    found = to_device([x], "cpu", torch.float64)
    assert found.dtype == torch.float64
    assert found.tolist() == [x]
    assert to_device(found, "cpu").tolist() == [x]
    assert to_device([[True, False]], "cpu").dtype == torch.bool
    assert to_device([2**60 + 1], "cpu").tolist() == [2**60 + 1]
