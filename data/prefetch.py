"""Batches made ready in the background while the model computes."""

from collections.abc import Callable, Iterable, Iterator
from queue import Empty, SimpleQueue
from threading import Event, Semaphore, Thread
from typing import Generic, TypeVar

T = TypeVar("T")

POLL_S = 0.2
"""Seconds between two calls of `stop_requested`, and so the delay of a stop."""

CLOSE_TIMEOUT_S = 5.0
"""Seconds that closing waits for the item that is being made; a stalled server may take longer."""


class WaitEndedError(Exception):
    """The consumer was asked to stop while it waited."""


def never() -> bool:
    """No stop is ever requested."""
    return False


class Prefetch(Generic[T]):
    """The items of another iterable in their order, up to `depth` of them made in advance.

    An error in making an item is raised where the consumer asks for that item. Items that are made
    but not consumed are lost, so a checkpoint stores the cursors of the last batch that was
    consumed. Close it, or use it as a context, to end its thread.

    Args:
        items: what is made in advance.
        depth: how many of them.
        stop_requested: whether to wait no longer; called while nothing is ready.
    """

    def __init__(
        self, items: Iterable[T], depth: int, stop_requested: Callable[[], bool] = never
    ) -> None:
        assert depth >= 1
        self._stop_requested = stop_requested
        # The semaphore bounds the queue: one permit for each item that may lie in it.
        self._room = Semaphore(depth)
        self._made: SimpleQueue[tuple[T] | BaseException] = SimpleQueue()
        self._closed = Event()
        self._thread = Thread(target=self._make, args=(items,), name="prefetch", daemon=True)
        self._thread.start()

    def _make(self, items: Iterable[T]) -> None:
        try:
            iterator = iter(items)
            while True:
                self._room.acquire()
                if self._closed.is_set():
                    return
                self._made.put((next(iterator),))
        except BaseException as error:  # StopIteration included
            self._made.put(error)

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        assert not self._closed.is_set(), "closed"
        made = self._take()
        if isinstance(made, BaseException):
            self._made.put(made)  # the next call raises it again
            raise made
        self._room.release()
        return made[0]

    def _take(self) -> tuple[T] | BaseException:
        while True:
            try:
                # With a timeout, because a server that stalls must not keep a stop waiting.
                return self._made.get(timeout=POLL_S)
            except Empty:
                if self._stop_requested():
                    raise WaitEndedError from None

    def close(self) -> None:
        """End the thread after its present item; if that takes long, it ends by itself later."""
        self._closed.set()
        self._room.release()
        self._thread.join(CLOSE_TIMEOUT_S)

    def __enter__(self) -> "Prefetch[T]":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
