"""The device of a run: choice, settings of the process, precision, memory and peak FLOP/s."""

import ctypes
import os
import resource
import sys
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path

import torch
from torch import Tensor

from conf.errors import ConfigError
from train.engines.accelerators import ACCELERATORS, accelerator_of_device
from train.settings.engine import EngineConfig, no_cuda

# The memory limit of a container, in the second and in the first version of Linux's control groups.
CGROUP_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # from malloc.h


def choose_device(config: EngineConfig) -> torch.device:
    """The device that `engine.device` names; `auto` is CUDA where there is a device.

    Raises:
        ConfigError: `cuda` is set, and there is no CUDA device.
    """
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise ConfigError([no_cuda("engine.device")])
    if config.device == "cpu" or not available:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def configure_process(config: EngineConfig, device: torch.device) -> None:
    """Set the threads, the allocator and TF32 of this process, for all engines in it."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    keep_freed_memory()
    if device.type == "cuda":
        # Float32 matrix products use TF32: on an A100 156 instead of 19.5 TFLOP/s, with 10 bits of
        # mantissa as in float16.
        torch.set_float32_matmul_precision("high")


def keep_freed_memory() -> None:
    """Have glibc reuse the memory of freed tensors instead of returning it to the system.

    By default glibc maps a large tensor anew each time: above 128 KiB at first, above 32 MiB always
    (mallopt(3), M_MMAP_THRESHOLD). The page faults of the first touch took up to a third of a
    training step on the CPU. Other C libraries are not changed.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        # Some versions of glibc refuse a threshold of more than 32 MiB.
        _ = mallopt(_M_MMAP_THRESHOLD, 1 << 30) or mallopt(_M_MMAP_THRESHOLD, 1 << 25)
        mallopt(_M_TRIM_THRESHOLD, -1)  # -1: never shrink the heap


def precision(config: EngineConfig, device: torch.device) -> torch.dtype:
    """The dtype of matrix products. Weights and the optimizer's state are always float32.

    That of the products which are not float8, and of the results of those that are, with `fp8`.
    """
    if config.precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.float32 if config.precision == "fp32" else torch.bfloat16


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """The context of a forward pass whose matrix products have `dtype`."""
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def device_memory(device: torch.device, processes: int = 1) -> int:
    """The bytes that a device has in total; on the CPU, this process's part of the machine's.

    Args:
        processes: how many share the machine's memory.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return machine_memory() // processes


def machine_memory() -> int:
    """The bytes of this machine's memory, or those that a container may have of it."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in CGROUP_LIMITS:
        with suppress(OSError, ValueError):  # no such file, or `max`
            found = min(found, int(path.read_text()))
    return found


class AsyncScalars:
    """Scalars that are copied to the host asynchronously.

    Reading them waits for the work that was queued before them. `item()` would also wait for
    everything that has been queued since, such as the next step.
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
        """Wait for the copy, and return the scalars."""
        if self._event is not None:
            self._event.synchronize()
        return self._values.tolist()


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bf16 peak in FLOP/s; None if it is not in the table.

    It is the measure with `engine.precision=fp8`, too, whose products have twice this peak, and all
    other work has not. So the MFU of two precisions compares their speeds.
    """
    if device.type != "cuda":
        return None
    model = accelerator_of_device(torch.cuda.get_device_name(device))
    return None if model is None else ACCELERATORS[model].peak_flops


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this process in GiB: allocated on CUDA, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "linux" else peak / 2**30  # KiB on Linux, bytes on macOS
