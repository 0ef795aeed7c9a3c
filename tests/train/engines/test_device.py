"""The device, its precision and its peak are what the settings and the makers say."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from train.engines.accelerators import ACCELERATORS, accelerator
from train.engines.device import (
    autocast,
    choose_device,
    configure_process,
    peak_flops,
    peak_memory_gib,
    precision,
)
from train.settings.engine import EngineConfig

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def test_the_cpu_is_taken_where_it_is_asked_for_or_all_there_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert choose_device(EngineConfig(device="cpu")) == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device(EngineConfig(device="auto")) == CPU


def test_cuda_that_is_not_there_is_refused_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"engine\.device='cuda': .* choose engine\.device=cpu or"):
        choose_device(EngineConfig(device="cuda"))


def test_threads_are_those_asked_for_or_left_alone() -> None:
    torch.set_num_threads(2)
    configure_process(EngineConfig(device="cpu"), CPU)
    assert torch.get_num_threads() == 2
    configure_process(EngineConfig(device="cpu", threads=1), CPU)
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize(
    ("setting", "device", "dtype"),
    [
        ("auto", CPU, torch.float32),
        ("auto", CUDA, torch.bfloat16),
        ("fp32", CUDA, torch.float32),
        ("bf16", CPU, torch.bfloat16),
    ],
)
def test_the_precision_is_the_devices_or_the_one_asked_for(
    setting: str, device: torch.device, dtype: torch.dtype
) -> None:
    assert precision(EngineConfig(precision=setting), device) is dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_computes_matrix_products_in_the_dtype(dtype: torch.dtype) -> None:
    with autocast(CPU, dtype):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is dtype
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA GB200", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_the_peak_is_the_models_or_unknown(
    name: str, peak: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert peak_flops(CUDA) == peak
    assert peak_flops(CPU) is None


def test_a_name_that_contains_another_comes_before_it() -> None:
    names = list(ACCELERATORS)
    for i, name in enumerate(names):
        assert not any(earlier in name for earlier in names[:i]), name
        assert accelerator(name.lower().replace(" ", "-")) == name


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's own figure")
def test_the_peak_of_memory_is_the_kernels_high_water_mark() -> None:
    status = Path("/proc/self/status").read_text().splitlines()
    [kib] = [int(line.split()[1]) for line in status if line.startswith("VmHWM:")]
    assert peak_memory_gib(CPU) == pytest.approx(kib / 2**20, rel=0.01)


@pytest.mark.process
@pytest.mark.skipif(sys.platform != "linux", reason="page faults are counted on Linux")
def test_freed_memory_is_used_again_without_page_faults() -> None:
    # In a process of its own: glibc's settings concern the heap of the main thread.
    code = """
import resource
import torch
from train.engines.device import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)  # 64 MiB: above the threshold at which glibc maps memory anew
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
given_back = faults()
keep_freed_memory()
# One tensor may leave a gap whose alignment makes it too small for the next, a few times.
print(given_back, min(faults() for _ in range(12)))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    given_back, kept = map(int, run.stdout.split())
    assert kept < given_back / 10
