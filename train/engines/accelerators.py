"""The GPUs whose peak speed and memory are known; needs no torch."""

import re
from typing import NamedTuple


class Accelerator(NamedTuple):
    """A model of GPU.

    Attributes:
        peak_flops: dense bf16 peak of one device in FLOP/s, from the data sheets, which often state
            twice as much for sparse matrices.
        memory_gib: what its driver lets a program have, which is less than its name says.
        capability: CUDA's compute capability; None: it is no CUDA device.
    """

    peak_flops: float
    memory_gib: float
    capability: tuple[int, int] | None


ACCELERATORS = {
    "A100-40GB": Accelerator(312e12, 39.4, (8, 0)),
    "A100": Accelerator(312e12, 79.1, (8, 0)),  # with 80 GB
    "H100 PCIe": Accelerator(756e12, 79.1, (9, 0)),
    "H100": Accelerator(989e12, 79.1, (9, 0)),
    "H200": Accelerator(989e12, 139.7, (9, 0)),
    "B200": Accelerator(2250e12, 178.3, (10, 0)),
    "L40S": Accelerator(362e12, 44.4, (8, 9)),
    "RTX 4090": Accelerator(165e12, 23.5, (8, 9)),
    "MI300X": Accelerator(1307e12, 191.6, None),
}
"""A name that contains another one stands before it."""


def accelerator(name: str) -> str | None:
    """The key of `ACCELERATORS` that a user means; None if there is none.

    >>> accelerator("h100"), accelerator("rtx4090"), accelerator("H100-PCIe"), accelerator("K80")
    ('H100', 'RTX 4090', 'H100 PCIe', None)
    """
    return next((key for key in ACCELERATORS if _plain(key) == _plain(name)), None)


def accelerator_of_device(name: str) -> str | None:
    """The key of `ACCELERATORS` for a device that calls itself `name`; None if there is none.

    >>> accelerator_of_device("NVIDIA H100 80GB HBM3"), accelerator_of_device("NVIDIA GB200")
    ('H100', None)
    """
    for key in ACCELERATORS:
        # Laptop, D and NVL variants have other peaks than the model that they are named after.
        if re.search(rf"\b{key}\b(?! (Laptop|D\b|NVL))", name):
            return key
    return None


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
