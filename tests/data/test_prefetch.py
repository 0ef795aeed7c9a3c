import threading
import time
from collections.abc import Iterator
from itertools import count, islice

import pytest

from data.prefetch import Prefetch, WaitEndedError
from tests.patience import PATIENCE_S


def prefetch_threads() -> int:
    return sum(thread.name == "prefetch" for thread in threading.enumerate())


@pytest.mark.parametrize("depth", [1, 2, 7])
def test_items_come_in_their_order_and_end_where_they_end(depth: int) -> None:
    with Prefetch(range(50), depth) as ahead:
        assert list(ahead) == list(range(50))
        assert list(ahead) == []


def test_no_more_than_depth_items_are_made_ahead() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for i in count():
            made.append(i)
            yield i

    with Prefetch(items(), depth=3) as ahead:
        for consumed in range(1, 5):
            assert next(ahead) == consumed - 1
            deadline = time.monotonic() + PATIENCE_S
            while len(made) < consumed + 3 and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(0.01)
            assert len(made) == consumed + 3


def test_an_error_comes_to_the_consumer_after_the_items_before_it() -> None:
    def items() -> Iterator[int]:
        yield from (0, 1)
        raise ValueError("data.source.paths='x': gone")

    with Prefetch(items(), depth=4) as ahead:
        assert list(islice(ahead, 2)) == [0, 1]
        for _ in range(2):
            with pytest.raises(ValueError, match="gone"):
                next(ahead)


@pytest.mark.parametrize("consumed", [0, 1, 5])
def test_a_consumer_that_stops_early_leaves_no_thread(consumed: int) -> None:
    before = prefetch_threads()
    with Prefetch(count(), depth=2) as ahead:
        assert len(list(islice(ahead, consumed))) == consumed
        assert prefetch_threads() == before + 1
    assert prefetch_threads() == before


def test_it_can_be_closed_after_the_end_and_twice() -> None:
    ahead = Prefetch(range(1), depth=1)
    assert list(ahead) == [0]
    ahead.close()
    ahead.close()


def test_a_stop_ends_the_wait_and_closing_takes_no_longer() -> None:
    stalled = threading.Event()

    def items() -> Iterator[int]:
        yield 1
        stalled.wait()

    told = threading.Event()
    ahead = Prefetch(items(), depth=2, stop_requested=told.is_set)
    assert next(ahead) == 1
    threading.Timer(0.1, told.set).start()
    with pytest.raises(WaitEndedError):
        next(ahead)  # would wait for ever
    assert told.is_set()
    stalled.set()
    ahead.close()


def test_what_is_ready_is_given_even_after_a_stop() -> None:
    with Prefetch(range(3), depth=3, stop_requested=lambda: True) as ahead:
        time.sleep(0.1)
        assert list(ahead) == [0, 1, 2]
