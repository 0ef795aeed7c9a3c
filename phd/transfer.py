"""Small tensors from the host to a device, without waiting for it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def to_device(
    values: Tensor | Sequence[Any],
    device: torch.device | str,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The values as a tensor on a device; the host does not wait for the copy.

    Args:
        values: a tensor, or (nested) numbers on the host.
        dtype: None: that of the tensor, or PyTorch's own for such numbers.
    """
    if not isinstance(values, Tensor):
        # With its dtype from the start: PyTorch's own for Python's floats is float32.
        values = torch.tensor(values, dtype=dtype, device="cpu")
    x = values if dtype is None else values.to(dtype)
    if x.device.type == "cpu" and torch.device(device).type == "cuda":
        # From pageable memory the copy would wait for the device. The allocator of pinned memory
        # does not give this memory away before the copy is done.
        x = x.contiguous().pin_memory()
    return x.to(device, non_blocking=True)
