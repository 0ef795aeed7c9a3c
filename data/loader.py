"""Batches of a token stream, made ready by threads, in the stream's own order."""

from collections.abc import Callable, Collection, Generator, Iterator
from contextlib import ExitStack
from itertools import islice
from time import perf_counter

import numpy as np

from data.batch import Batch, make_batch
from data.prefetch import Prefetch, WaitEndedError, never
from data.stream import LaneRow, TokenStream


class Loader:
    """The batches of a stream; each worker reads and tokenises for some of its lanes.

        lanes 0 1 2 3 4 5, two workers     worker 0: rows of lanes 0 2 4 0 2 4 ...
                                           worker 1: rows of lanes 1 3 5 1 3 5 ...
                                           batch:    one of each in turn

    Lanes are independent of each other, so the batches are the same whatever the number of workers.
    Workers are threads, because SentencePiece, decompression and Arrow release Python's lock. Close
    the loader, or use it as a context, to end them.

    Args:
        workers: threads; with 0, each batch is made when it is asked for.
        depth: batches that are made in advance.
        stop_requested: whether to wait no longer for a batch; called while none is ready.
        batches_done: batches that this stream gave before its cursors were saved.
        skip_batches: numbers of batches, counted from 1, that are left out.

    Attributes:
        number: of the last batch that was given.
        wait_s: seconds that the consumer has waited so far.
        failure: why there is no batch after the last one that was given; None while there is. It is
            an `OutOfTextError` at the end of all text.
    """

    def __init__(
        self,
        stream: TokenStream,
        *,
        workers: int = 0,
        depth: int = 1,
        stop_requested: Callable[[], bool] = never,
        batches_done: int = 0,
        skip_batches: Collection[int] = (),
    ) -> None:
        # `number` follows what was given, `_made_number` what was made, one batch ahead of it.
        self.stream = stream
        self.number = batches_done
        self._made_number = batches_done
        self._skip_batches = skip_batches
        self.wait_s = 0.0
        self.failure: Exception | None = None
        self._next: Batch | None = None
        self._stopped = False
        self._threads = ExitStack()
        self._rows = self._open_rows(workers, depth, stop_requested)

    def _open_rows(
        self, workers: int, depth: int, stop_requested: Callable[[], bool]
    ) -> Generator[LaneRow]:
        """The stream's rows, in its own order; starts the threads."""
        order = self.stream.lanes
        lanes = list(dict.fromkeys(order))
        workers = min(workers, len(lanes))
        if not workers:
            return self.stream.rows(order)
        worker_of = {lane: i % workers for i, lane in enumerate(lanes)}
        feeds = []
        for worker in range(workers):
            own = [lane for lane in order if worker_of[lane] == worker]
            # Each feed is a queue of rows: as many as its lanes have in `depth` batches.
            feed = Prefetch(self.stream.rows(own), depth * len(own), stop_requested)
            feeds.append(self._threads.enter_context(feed))
        return _merged([feeds[worker_of[lane]] for lane in order])

    def __iter__(self) -> Iterator[Batch]:
        return self

    def peek(self) -> Batch | None:
        """The next batch, without taking it; None if there is none, or a stop was requested."""
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
        self.peek()  # so that `failure` says with the last batch that it is the last one
        return batch

    def _made(self) -> Batch | None:
        if self.failure is None and not self._stopped:
            try:
                while True:
                    batch = collate(self._rows, self.stream)
                    self._made_number += 1
                    # A batch that is left out has been read, too, so the cursors are past it.
                    if self._made_number not in self._skip_batches:
                        return batch
            except WaitEndedError:
                self._stopped = True  # the rows of this batch that were ready are lost
            except Exception as error:
                self.failure = error
        return None

    def close(self) -> None:
        """End the threads, each after the row that it is making, and close what is open."""
        self._threads.close()
        self._rows.close()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def collate(rows: Iterator[LaneRow], stream: TokenStream) -> Batch:
    """The next batch of a stream, from rows that come in the order of its lanes.

    Lanes whose text has ended give padding, until all have. Of several ranks none knows of the
    others' lanes: from there on their batches have no targets.

    Raises:
        OutOfTextError: nothing is left, and there is only one rank.
    """
    # One rank's rows of a global batch, in the order of the rows.
    taken = list(islice(rows, len(stream.lanes)))
    counted = np.array([row.targets for _, row, _ in taken])
    if not counted.any() and stream.shape.world_size == 1:
        raise stream.out_of_text()
    return make_batch(
        np.stack([row.tokens for _, row, _ in taken]),
        counted,
        stream.tokenizer,
        isolate=stream.documents.config.documents == "isolate",
        # Of a lane with several rows in the batch, the last one stays.
        lanes={lane: after for lane, _, after in taken},
        progress={lane: row.progress for lane, row, _ in taken},
    )


def _merged(order: list[Prefetch[LaneRow]]) -> Generator[LaneRow]:
    while True:
        for feed in order:
            yield next(feed)
