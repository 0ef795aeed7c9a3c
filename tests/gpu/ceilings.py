"""What the device can do at most: a large product, and a copy."""

import sys
from collections.abc import Callable
from statistics import median
from time import perf_counter

import torch

from tests.gpu.lines import tell


def seconds(work: Callable[[], object], device: torch.device, turns: int = 10) -> float:
    """The median over some turns, after two that are not counted."""
    spent = []
    for _ in range(turns + 2):
        _wait(device)
        start = perf_counter()
        work()
        _wait(device)
        spent.append(perf_counter() - start)
    return median(spent[2:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(device: torch.device) -> None:
    """Print a row for each ceiling; on the CPU both are smaller."""
    cuda = device.type == "cuda"
    size, dtype = (8192, torch.bfloat16) if cuda else (512, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    taken = seconds(lambda: a @ b, device)
    name = f"{str(dtype).removeprefix('torch.')} product of {size} x {size}"
    tell({"what": name, "ms": taken * 1e3, "TFLOP/s": 2 * size**3 / taken / 1e12, "TB/s": None})
    source = torch.empty(2**30 if cuda else 2**26, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    taken = seconds(lambda: target.copy_(source), device)
    # Each byte is read and written.
    moved = 2 * source.numel() / taken / 1e12
    name = f"copy of {source.numel() >> 20} MiB"
    tell({"what": name, "ms": taken * 1e3, "TFLOP/s": None, "TB/s": moved})


if __name__ == "__main__":
    main(torch.device(sys.argv[1]))
