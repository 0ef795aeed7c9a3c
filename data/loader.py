"""Batches of a token stream, made ready by threads, in the stream's own order."""

from collections.abc import Callable, Collection, Generator, Iterator
from contextlib import ExitStack
from time import perf_counter

from data.mixture import LaneCursor
from data.packing import Row
from data.prefetch import Prefetch, WaitEndedError, never
from data.stream import Batch, TokenStream


class Loader:
    """The batches of a stream; each worker reads and tokenises for some of its lanes.

        lanes 0 1 2 3 4 5, two workers     worker 0: rows of lanes 0 2 4 0 2 4 ...
                                           worker 1: rows of lanes 1 3 5 1 3 5 ...
                                           batch:    one of each in turn

    Lanes know nothing of each other, so the batches are the same whatever the number of workers.
    SentencePiece, decompression and Arrow work outside Python's lock, so threads are enough. Close
    the loader, or use it as a context, to end them.

    Args:
        workers: threads; with 0, the consumer makes each batch when it asks for it.
        depth: batches that are made in advance.
        give_up: whether to wait no longer for a batch, asked while workers have none.
        given: batches that the stream's beginning has given already.
        skip_batches: numbers of batches, counted from 1, that are not given.

    Attributes:
        number: of the batch that was given last.
        wait_s: seconds that the consumer has waited so far.
        failure: why there is no batch after the last one that was given; None while there is.
    """

    def __init__(
        self,
        stream: TokenStream,
        *,
        workers: int,
        depth: int,
        give_up: Callable[[], bool] = never,
        given: int = 0,
        skip_batches: Collection[int] = (),
    ) -> None:
        self.stream = stream
        self.number = given
        self._made_number = given
        self._skip_batches = skip_batches
        self.wait_s = 0.0
        self.failure: Exception | None = None
        self._next: Batch | None = None
        self._threads = ExitStack()
        order = stream.lanes
        lanes = list(dict.fromkeys(order))
        workers = min(workers, len(lanes))
        if not workers:
            self._rows = stream.rows(order)
            return
        worker_of = {lane: i % workers for i, lane in enumerate(lanes)}
        feeds = []
        for worker in range(workers):
            own = [lane for lane in order if worker_of[lane] == worker]
            feed = Prefetch(stream.rows(own), depth * len(own), give_up)
            feeds.append(self._threads.enter_context(feed))
        self._rows = _merged([feeds[worker_of[lane]] for lane in order])

    def __iter__(self) -> Iterator[Batch]:
        return self

    def peek(self) -> Batch | None:
        """The next batch, without taking it; None: there is none, or the wait was given up."""
        if self._next is None:
            start = perf_counter()
            self._next = self._made()
            self.wait_s += perf_counter() - start
        return self._next

    def __next__(self) -> Batch:
        batch = self.peek()
        if batch is None:
            raise self.failure or WaitEndedError
        self._next, self.number = None, self._made_number
        self.peek()  # so that whoever takes the last one is told so
        return batch

    def _made(self) -> Batch | None:
        if self.failure is None:
            try:
                while True:
                    batch = self.stream.batch(self._rows)
                    self._made_number += 1
                    if self._made_number not in self._skip_batches:
                        return batch
            except WaitEndedError:
                pass
            except Exception as error:
                self.failure = error
        return None

    def close(self) -> None:
        """Ends the threads, each after the row that it is making, and closes what is open."""
        self._threads.close()
        self._rows.close()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _merged(order: list[Prefetch[tuple[Row, LaneCursor]]]) -> Generator[tuple[Row, LaneCursor]]:
    while True:
        for feed in order:
            yield next(feed)
