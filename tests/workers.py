"""The processes that xdist shares the whole suite among are forked from one that has collected it.

Each of them would spend half a minute on what it imports and collects. What their tests fork comes
from a smaller process: a fork copies what it changes, and of all that was collected that is much.
"""

import io
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from functools import partial

import pytest
import torch

from tests.forked_python import (
    can_fork,
    forked_python,
    has_server,
    start_as_ever,
    start_server,
)


def fork_workers(config: pytest.Config) -> None:
    """From now on the suite's processes are forked, until the session ends."""
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    # A fork cannot use CUDA.
    able = sys.platform == "linux" and not torch.cuda.is_available()
    if not (whole and able and can_fork([sys.executable, "-u", "-c", ""], os.environ)):
        return
    stack = ExitStack()
    start_server(partial(collect, config.invocation_params.args))
    stack.enter_context(forked_python())
    config.add_cleanup(stack.close)


def begin_worker(forked: bool) -> None:
    """In a process of the suite: only what its tests ask for is forked."""
    assert has_server() == forked
    start_as_ever()


def collect(arguments: Sequence[str]) -> None:
    """Import all tests. What is wrong with them each of the suite's processes will tell."""
    told = io.StringIO()
    with redirect_stdout(told), redirect_stderr(told):
        code = pytest.main([*arguments, "-n0", "--collect-only", "-q"])
    if code in (pytest.ExitCode.INTERNAL_ERROR, pytest.ExitCode.USAGE_ERROR):
        raise RuntimeError(f"the suite cannot be collected: {told.getvalue()}")
