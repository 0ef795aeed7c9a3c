"""The current CUDA device, on which kernels are launched and memory is allocated."""

from contextlib import AbstractContextManager, nullcontext

import torch


def as_current(device: torch.device) -> AbstractContextManager[object]:
    """A context in which a CUDA device is the current one; any other device needs none.

    Triton's kernels, graphs and streams belong to the current device, whatever their tensors'
    device is.
    """
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
