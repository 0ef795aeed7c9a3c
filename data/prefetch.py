"""Batches made ready in the background while the model computes."""

from collections.abc import Iterable, Iterator
from queue import SimpleQueue
from threading import Event, Semaphore, Thread
from time import perf_counter
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetch(Generic[T]):
    """The items of another iterable in their order, up to `depth` of them made in advance.

    An error in the making comes to the consumer in its place. What is made but not consumed is
    lost, so a checkpoint stores the cursors of the last batch that was consumed. Close it, or use
    it as a context, to end its thread.

    Attributes:
        wait_s: seconds that the consumer has waited so far.
    """

    def __init__(self, items: Iterable[T], depth: int) -> None:
        assert depth >= 1
        self.wait_s = 0.0
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
        start = perf_counter()
        made = self._made.get()
        self.wait_s += perf_counter() - start
        if isinstance(made, BaseException):
            self._made.put(made)  # for whoever asks again
            raise made
        self._room.release()
        return made[0]

    def close(self) -> None:
        """Ends the thread, after the item that it is making."""
        self._closed.set()
        self._room.release()
        self._thread.join()

    def __enter__(self) -> "Prefetch[T]":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
