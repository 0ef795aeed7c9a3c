"""What a process of a run consists of: command, machine, libraries and source revision."""

import json
import os
import platform
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from time import strftime
from typing import Any

import torch

from conf.redaction import redacted_argument
from train.run_dir.snapshot import Revision

PACKAGES = (
    "torch",
    "numpy",
    "sentencepiece",
    "datasets",
    "hydra-core",
    "wandb",
    "deepspeed",
    "transformers",
    "triton",
    "torchao",
)
LAUNCHED_BY = "LAUNCHED_BY"  # the variable in which `python -m launch` hands on what was typed
DRIVER_FILE = Path("/proc/driver/nvidia/version")


TIME = "%Y-%m-%d %H:%M:%S %z"
"""How the time of a start is written."""


def environment(revision: Revision) -> dict[str, Any]:
    """The machine, the versions of packages, and the source revision of this process.

    What is not there is null: the driver of a machine without a GPU, a package that is not
    installed, the `launcher` of a process that was started without one.
    """
    return {
        "time": strftime(TIME),
        "command": _without_secrets(sys.argv),  # as Hydra got it
        "argv": _without_secrets(sys.orig_argv),  # as it was typed, with Python's own options
        "launcher": _without_secrets(json.loads(os.environ.get(LAUNCHED_BY, "null"))),
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory_bytes() / 2**30, 1),
        "threads": torch.get_num_threads(),
        **_devices(),
        "revision": revision.commit,
        "changed": revision.dirty,  # uncommitted changes; they are in source/
        "packages": {name: _version(name) for name in PACKAGES},
    }


def _without_secrets(arguments: list[str] | None) -> list[str] | None:
    return None if arguments is None else [*map(redacted_argument, arguments)]


def processor() -> str:
    """The name of the processor, as /proc/cpuinfo has it on Linux."""
    # On Arm, /proc/cpuinfo names no model.
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def memory_bytes() -> int:
    """The memory of this machine, without swap."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _devices() -> dict[str, Any]:
    """The GPUs of this machine that this process may use, and the libraries that drive them."""
    if not torch.cuda.is_available():
        return {
            "device": "cpu",
            "devices": 0,
            "device_memory_gib": None,
            "driver": None,
            "cuda": torch.version.cuda,
            "cudnn": None,
            "nccl": None,
        }
    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    nccl = torch.cuda.nccl.version() if torch.distributed.is_nccl_available() else None
    return {
        "device": device.name,
        "devices": torch.cuda.device_count(),
        "device_memory_gib": round(device.total_memory / 2**30, 1),
        "driver": driver(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, nccl)) if nccl else None,
    }


def driver() -> str | None:
    """The version of NVIDIA's driver; None if it cannot be found out."""
    # NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024
    if found := driver_in(_read(DRIVER_FILE)):
        return found
    # Some containers have the driver's tools without its file.
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.partition("\n")[0].strip() or None


def driver_in(text: str) -> str | None:
    """The version in the text of /proc/driver/nvidia/version.

    >>> driver_in("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 2024")
    '550.54.15'
    >>> driver_in("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release")
    '580.95.05'
    """
    first = text.partition("\n")[0]
    numbers = [word for word in first.split() if word.replace(".", "").isdigit() and "." in word]
    return numbers[0] if numbers else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _version(package: str) -> str | None:
    """The version of a package; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
