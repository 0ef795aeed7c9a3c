"""The order of the suite: its longest files come first, so that no process is left with one at the
end while the others have nothing to do. `make fast` leaves them out."""

import signal
from pathlib import Path

import pytest

LONGEST_FIRST = (
    "train/distributed/test_soak.py",
    "train/engines/test_zero.py",
    "train/distributed/test_faults.py",
    "train/engines/test_activation_checkpointing.py",
    "train/test_run.py",
    "train/distributed/test_run.py",
    "train/test_main.py",
    "train/metrics/test_sinks.py",
    "train/engines/test_fsdp.py",
    "phd/inference/test_cuda_graph.py",
    "train/engines/test_parity.py",
    "launch/test_agent.py",
    "train/engines/test_memory.py",
    "train/test_generate.py",
    "train/test_compose.py",
    "train/test_export.py",
    "train/test_pretokenize.py",
    "train/checkpoint/test_ranks.py",
    "data/test_soak.py",
    "train/checkpoint/test_store.py",
    "train/test_plan.py",
    "train/test_data_in_runs.py",
    "data/storage/test_transport.py",
    "train/test_loop.py",
    "phd/attention/test_flex.py",
    "train/distributed/test_watchdog.py",
    "phd/test_segments.py",
    "conf/test_shipped_configs.py",
    "phd/test_compiled_model.py",
    "train/engines/test_engine.py",
    "phd/inference/test_prefill.py",
    "train/benchmarks/test_inference.py",
)
"""By their time on two idle cores, down to 10 s; `pytest --durations=0` tells it."""

collect_ignore = ["train/preloaded.py"]  # a look for doctests would import seconds of DeepSpeed

RANK = {Path(__file__).parent / name: rank for rank, name in enumerate(LONGEST_FIRST)}


@pytest.hookimpl(tryfirst=True)  # before -m chooses by the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path in RANK:
            item.add_marker("slow")
    items.sort(key=lambda item: RANK.get(item.path, len(RANK)))


def pytest_configure() -> None:
    """Let Ctrl-C reach the processes of the tests, also when the suite runs in the background.

    A shell starts background jobs with SIGINT ignored, which all their children inherit.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
