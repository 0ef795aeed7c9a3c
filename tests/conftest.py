"""The order of the suite: its longest files come first, so that no process is left with one at the
end while the others have nothing to do. `make fast` leaves them out."""

import gc
import os
import re
import signal
import sys
from collections.abc import Generator, Iterator
from functools import cache
from inspect import getmembers
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import forked_python, workers

# Triton reads this when it is imported. Where there is no GPU, its kernels then run on the CPU.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

LONGEST_FIRST = (
    "train/engines/test_compilation.py",
    "train/distributed/test_faults.py",
    "train/engines/test_activation_checkpointing.py",
    "train/distributed/test_run.py",
    "train/distributed/test_soak.py",
    "train/engines/test_tensor_parallel.py",
    "train/engines/test_zero.py",
    "data/test_soak.py",
    "launch/test_preflight.py",
    "train/engines/test_context_parallel.py",
    "train/engines/test_memory.py",
    "train/test_main.py",
    "train/test_plan.py",
    "train/engines/test_parity.py",
    "phd/inference/test_token_kernels.py",
    "launch/test_agent.py",
    "train/test_pretokenize.py",
    "train/engines/test_fsdp.py",
    "train/engines/test_compiled_meshes.py",
    "train/test_compose.py",
    "train/test_export.py",
    "train/benchmarks/test_scale.py",
    "phd/inference/test_compiled_step.py",
    "conf/test_checkout.py",
    "phd/attention/test_fused.py",
    "train/metrics/test_sinks.py",
    "train/test_run.py",
    "phd/attention/test_fused_compiler.py",
    "phd/test_segments.py",
    "data/storage/test_transport.py",
    "train/engines/test_fitting.py",
    "train/sweeps/test_sweep.py",
    "launch/test_launch.py",
    "conf/test_shipped_configs.py",
    "train/checkpoint/test_ranks.py",
    "train/test_loop.py",
    "gpu/test_gpu.py",
    "phd/attention/test_flex.py",
    "train/run_dir/test_power_cut.py",
    "train/metrics/test_hooks.py",
    "train/test_data_in_runs.py",
    "train/distributed/test_watchdog.py",
    "train/start/test_tokenizer_of_weights.py",
    "train/run_dir/test_name.py",
    "launch/test_rendezvous.py",
)
"""By their time on two idle cores, down to 10 s; `pytest --durations=0` tells it."""

collect_ignore = ["train/preloaded.py"]  # a look for doctests would import seconds of DeepSpeed

NEEDS_CUDA = re.compile(r"needs .*\b(GPU|CUDA)\b")
"""The reason for which a test is skipped where there is no GPU."""

WATCHED = re.compile(
    r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|(MASTER|TORCHELASTIC|SLURM|PHD|CUDA)_\w+"
    r"|OMP_NUM_THREADS|XDG_CACHE_HOME"
)
"""Variables that tell a process which rank it is, or where its files and devices are. Libraries set
others for good when they are first imported, and a command puts its checkout on PYTHONPATH."""

RANK = {Path(__file__).parent / name: rank for rank, name in enumerate(LONGEST_FIRST)}


@pytest.hookimpl(tryfirst=True)  # before -m chooses by the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path in RANK:
            item.add_marker("slow")
        if any(NEEDS_CUDA.match(mark.kwargs["reason"]) for mark in item.iter_markers("skipif")):
            item.add_marker("cuda")
    items.sort(key=lambda item: RANK.get(item.path, len(RANK)))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Let the garbage collector rest while everything is imported, which leaves hardly garbage.

    Each of its passes over all that was imported takes up to half a second.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_finish() -> None:
    """Let the garbage collector leave alone what was imported: it is most of all objects."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(config: pytest.Config) -> None:
    """Before xdist starts the processes that it shares the suite among."""
    workers.fork_workers(config)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Before xdist starts one of them."""
    node.workerinput["forked"] = forked_python.has_server()


def pytest_configure(config: pytest.Config) -> None:
    """Let Ctrl-C reach the processes of the tests, also when the suite runs in the background.

    A shell starts background jobs with SIGINT ignored, which all their children inherit.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(config, "workerinput"):
        workers.begin_worker(config.workerinput["forked"])


@pytest.fixture(autouse=True)
def environment_as_it_was() -> Iterator[None]:
    """Fails a test that leaves such variables to the tests after it in the same process."""
    before = dict(os.environ)
    yield
    changed = {name for name, _ in before.items() ^ os.environ.items()}
    assert not [name for name in changed if WATCHED.fullmatch(name)]


@pytest.fixture
def streams_as_they_were() -> Iterator[None]:
    """Puts the standard streams back that a test has replaced."""
    before = sys.stdin, sys.stdout, sys.stderr
    yield
    sys.stdin, sys.stdout, sys.stderr = before


@pytest.fixture
def triton_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skips a test that runs Triton's kernels on the CPU where they are compiled for a GPU."""
    if "TRITON_INTERPRET" not in os.environ:
        pytest.skip("runs in Triton's interpreter, which stands in where there is no GPU")
    # The interpreter of Triton 3.6 and 3.7 keeps bfloat16 as integers of its bits, and multiplies
    # those; it converts them right. A product in float32 is what a tensor core computes.
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot = InterpreterBuilder.create_dot

    def widened(x: TensorHandle) -> TensorHandle:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *more: object):  # type: ignore[no-untyped-def]
        return dot(self, widened(a), widened(b), *more)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)

    # At each call of a function it lists all of Triton's language anew, a quarter of its time.
    @cache
    def members(package: object) -> list[tuple[str, object]]:
        return getmembers(package, tl.core.is_builtin)

    def patch_builtin(package: object, *more: Any) -> None:
        for name, member in members(package):
            if getattr(package, name) is member:  # else a caller has done it
                interpreter._patch_attr(package, name, member, *more)

    monkeypatch.setattr(interpreter, "_patch_builtin", patch_builtin)
