"""The device's speed at a large matrix product and a copy: the ceilings of the other benchmarks."""

import torch

from train.benchmarks.timing import Times, Work

NAME = "product"

SIDES = {"cpu": 1024, "cuda": 8192}
"""Rows and columns of the matrices: float32 on the CPU, bfloat16 on CUDA."""

COPY = "copy"

COPIED_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}
"""Of the copy: more than any cache holds, and on CUDA enough for half a millisecond."""


def product_work(device: torch.device) -> Work:
    """A product of two square matrices."""
    side = SIDES[device.type]
    a, b = (torch.randn(side, side, device=device, dtype=dtype_of(device)) for _ in range(2))
    return lambda: a @ b


def product_flops_per_s(times: Times, device: torch.device) -> float:
    """The speed of the work `NAME` among these times."""
    return 2 * SIDES[device.type] ** 3 / times.typical_s(NAME)


def copy_work(device: torch.device) -> Work:
    """A copy within the device's memory."""
    source = torch.zeros(COPIED_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


def copied_bytes_per_s(times: Times, device: torch.device) -> float:
    """Bytes read plus written per second by the work `COPY` among these times."""
    return 2 * COPIED_BYTES[device.type] / times.typical_s(COPY)


def dtype_of(device: torch.device) -> torch.dtype:
    """What the benchmarks of training compute in on a device."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def conditions(device: torch.device) -> str:
    """Precision, device and ceiling in words, for titles."""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    dtype, side = str(dtype_of(device)).removeprefix("torch."), SIDES[device.type]
    return f"{dtype}, {where}; the product is {side} x {side}"
