"""What a run says about the command, machine and libraries that it ran with."""

import json
import os
import platform
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from train.run_dir import environment as module
from train.run_dir.environment import PACKAGES, driver, environment
from train.run_dir.snapshot import Revision

TELL = (
    "import json, sys; from train.run_dir.environment import environment;"
    "from train.run_dir.snapshot import Revision;"
    "sys.argv[1:] = ['changed']; print(json.dumps(environment(Revision())))"
)


def test_the_machine_is_named() -> None:
    found = environment(Revision("abc", None, True))
    assert found["host"] == socket.gethostname()
    assert found["processor"]
    assert found["cores"] == os.cpu_count()
    pages = Path("/proc/meminfo")
    if pages.exists():
        total = int(pages.read_text().split()[1]) / 2**20
        assert found["memory_gib"] == pytest.approx(total, rel=0.02)
    assert (found["revision"], found["changed"]) == ("abc", True)
    assert found["cuda"] == torch.version.cuda


def test_the_versions_of_packages_are_those_that_are_installed() -> None:
    found = environment(Revision())["packages"]
    assert set(PACKAGES) >= {"torch", "transformers", "deepspeed"}
    for name, version in found.items():
        try:
            assert version == metadata.version(name)
        except metadata.PackageNotFoundError:
            assert version is None


@pytest.mark.process
def test_the_command_line_is_told_as_it_was_typed() -> None:
    """Hydra's front end changes `sys.argv`; what was typed stays, quotes and options included."""
    typed = [sys.executable, "-X", "utf8", "-c", TELL, "model.K=3", "run.name=a b", "x='y,z'"]
    variables = os.environ | {module.LAUNCHED_BY: '["python", "-m", "launch", "local"]'}
    shown = subprocess.run(typed, env=variables, capture_output=True, text=True, check=True)
    found = json.loads(shown.stdout)
    assert found["argv"] == typed
    assert found["command"] == ["-c", "changed"]
    assert found["launcher"] == ["python", "-m", "launch", "local"]
    assert found["python"] == platform.python_version()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_machine_without_a_gpu_says_so() -> None:
    found = environment(Revision())
    assert (found["device"], found["devices"]) == ("cpu", 0)
    assert [found[name] for name in ("device_memory_gib", "driver", "nccl")] == [None] * 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_gpu_is_named_with_its_libraries() -> None:
    found = environment(Revision())
    assert found["device"] == torch.cuda.get_device_name()
    assert found["devices"] == torch.cuda.device_count()
    assert found["driver"]
    assert found["cudnn"] == torch.backends.cudnn.version()
    assert found["nccl"].split(".") == [str(number) for number in torch.cuda.nccl.version()]


def test_the_driver_is_found_by_its_file_or_its_tool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, tool = tmp_path / "version", tmp_path / "nvidia-smi"
    monkeypatch.setattr(module, "DRIVER_FILE", file)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert driver() is None
    tool.write_text("#!/bin/sh\necho NVIDIA-SMI has failed >&2\nexit 9\n")
    tool.chmod(0o755)
    assert driver() is None
    tool.write_text("#!/bin/sh\necho 570.1.2\necho 570.1.2\n")
    assert driver() == "570.1.2"
    file.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 2024\n")
    assert driver() == "550.54.15"
