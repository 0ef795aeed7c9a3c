"""Processes that a benchmark starts."""

import os
import time

import pytest

from tests.fork_server import fork_server
from train.benchmarks.gloo_ranks import on_processes

pytestmark = pytest.mark.process


def one_of_them_fails(number: int, how: str) -> int:
    if number == 0:
        time.sleep(600)  # it waits for the other
    if how == "dies":
        os._exit(3)
    raise ValueError("seven apples")


@pytest.mark.parametrize(
    ("how", "told"),
    [("dies", "process 1 died"), ("raises", r"process 1 failed:(.|\n)*ValueError: seven apples")],
    ids=["dies", "raises"],
)
def test_a_process_that_fails_ends_those_that_wait_for_it(how: str, told: str) -> None:
    fork_server()  # one that has imported what these processes need
    with pytest.raises(RuntimeError, match=told):
        on_processes(2, one_of_them_fails, how, start="forkserver")


def twice(number: int, by: int) -> int:
    return number * by


def test_results_come_in_the_order_of_processes() -> None:
    fork_server()
    assert on_processes(3, twice, 2, start="forkserver") == [0, 2, 4]
    assert on_processes(1, twice, 2, start="spawn") == [0]
