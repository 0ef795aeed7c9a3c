"""The processes that xdist shares the suite among are forked from one that has collected it.

Each of them would spend half a minute on what it imports and collects.
"""

import io
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from functools import partial

import pytest
import torch

from tests.forked_python import forked_python, start_as_ever, start_server


def fork_workers(config: pytest.Config) -> None:
    """From now on the suite's processes are forked, until the session ends."""
    if torch.cuda.is_available():  # which a fork cannot use
        return
    stack = ExitStack()
    start_server(partial(collect, config.invocation_params.args))
    stack.enter_context(forked_python())
    config.add_cleanup(stack.close)


def begin_worker() -> None:
    """In a process of the suite: only what its tests ask for is forked."""
    start_as_ever()


def collect(arguments: Sequence[str]) -> None:
    """Import all tests. What is wrong with them each of the suite's processes will tell."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        pytest.main([*arguments, "-n0", "--collect-only", "-q"])
