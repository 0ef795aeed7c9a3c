"""The device of a run: its choice, its precision, its memory and its peak speed."""

import ctypes
import re
import resource
import sys
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from conf.errors import ConfigError, Problem
from train.engine_config import EngineConfig

# Dense bf16 peak of one device, FLOP/s, from the makers' data sheets.
PEAK_FLOPS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "MI300X": 1307e12,
}

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def choose_device(config: EngineConfig) -> torch.device:
    """The device that `engine.device` names.

    Raises:
        ConfigError: it is CUDA and there is none.
    """
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise ConfigError([_no_cuda("engine.device")])
    if config.device == "cpu" or not available:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def configure_process(config: EngineConfig, device: torch.device) -> None:
    """Set what holds for the whole process: threads, the allocator, precision; once per process."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    keep_freed_memory()
    if device.type == "cuda":
        # TF32 where a matrix product is float32: 8 times as fast on an A100, 10 bits of mantissa.
        torch.set_float32_matmul_precision("high")


def device_problems(device: str) -> list[Problem]:
    """What is wrong with a command's argument `device`."""
    if device not in ("auto", "cpu", "cuda"):
        return [Problem("device", device, "expected auto, cpu or cuda")]
    if device == "cuda" and not torch.cuda.is_available():
        return [_no_cuda("device")]
    return []


def _no_cuda(key: str) -> Problem:
    return Problem(
        key, "cuda", "this machine has no usable CUDA device", f"choose {key}=cpu or {key}=auto"
    )


def keep_freed_memory() -> None:
    """Tell glibc to reuse the memory of freed tensors instead of giving it back to the system.

    By default every tensor above 32 MiB, and above 128 KiB at first, is mapped anew, and the page
    faults of its first touch cost a training step on the CPU up to a third of its time. Other C
    libraries are left alone.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        # Old glibc takes no more than 32 MiB here.
        _ = mallopt(_M_MMAP_THRESHOLD, 1 << 30) or mallopt(_M_MMAP_THRESHOLD, 1 << 25)
        mallopt(_M_TRIM_THRESHOLD, -1)  # never


def precision(config: EngineConfig, device: torch.device) -> torch.dtype:
    """What the matrix products are computed in; weights and optimizer stay float32."""
    if config.precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if config.precision == "bf16" else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """The context of a forward pass in `dtype`."""
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype)


class AsyncScalars:
    """Scalars that are copied from the device in the background; reading them waits for them alone.

    `item()` would also wait for everything that was queued after them.
    """

    def __init__(self, *scalars: Tensor) -> None:
        values = torch.stack([scalar.detach().double() for scalar in scalars])
        self._event: torch.cuda.Event | None = None
        if values.is_cuda:
            self._values = torch.empty(len(scalars), dtype=torch.float64, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._values = values

    def values(self) -> list[float]:
        """The scalars as numbers."""
        if self._event is not None:
            self._event.synchronize()
        return self._values.tolist()


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bf16 peak, FLOP/s; None where it is not known, never a guess."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    for model, peak in PEAK_FLOPS.items():
        if re.search(rf"\b{model}\b(?! (Laptop|D\b|NVL))", name):
            return peak
    return None


def peak_memory_gib(device: torch.device) -> float:
    """The most memory the process has held so far: on the device, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib / 2**20 if sys.platform == "linux" else kib / 2**30
