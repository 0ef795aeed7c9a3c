import threading
import time
from collections.abc import Callable, Iterator
from itertools import islice

import numpy as np
import pytest

from data.loader import Loader
from data.sources.documents import Documents
from data.stream import Batch, BatchShape, OutOfTextError, TokenStream
from data.tokenizer import Tokenizer

DocumentsOf = Callable[..., Documents]
Made = Callable[..., Loader]


@pytest.fixture
def loader(documents_of: DocumentsOf, tokenizer: Tokenizer) -> Iterator[Made]:
    made = []

    def build(
        *, workers: int, depth: int = 2, rank: int = 0, world_size: int = 1, **settings: object
    ) -> Loader:
        shape = BatchShape(global_batch=8, seq_len=11, rank=rank, world_size=world_size)
        documents = documents_of(**settings)
        made.append(
            Loader(TokenStream(documents, tokenizer, shape, seed=0), workers=workers, depth=depth)
        )
        return made[-1]

    yield build
    for one in made:
        one.close()


def threads() -> int:
    return sum(thread.name == "prefetch" for thread in threading.enumerate())


@pytest.mark.parametrize("workers", [0, 1, 2, 4, 7])
def test_there_are_as_many_threads_as_workers_but_no_more_than_lanes(
    loader: Made, workers: int
) -> None:
    before = threads()
    made = loader(workers=workers)
    next(made)
    assert threads() == before + min(workers, 4)
    made.close()
    made.close()
    assert threads() == before


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_ranks_with_workers_share_one_stream(loader: Made, workers: int) -> None:
    whole = list(islice(loader(workers=0), 8))
    ranks = [list(islice(loader(workers=workers, rank=r, world_size=2), 8)) for r in range(2)]
    for step, batch in enumerate(whole):
        for rank in range(2):
            assert np.array_equal(ranks[rank][step].rows, batch.rows[rank::2])


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_the_end_of_the_text_is_known_with_the_last_batch(loader: Made, workers: int) -> None:
    made = loader(workers=workers, epochs=2)
    batches: list[Batch] = []
    while made.failure is None:
        batches.append(next(made))
    assert isinstance(made.failure, OutOfTextError)
    with pytest.raises(OutOfTextError, match=r"data\.sources\.\*\.epochs=\{'text': 2\}"):
        next(made)
    endless = list(islice(loader(workers=0), len(batches)))
    assert np.array_equal(batches[5].rows, endless[5].rows)
    assert batches[-1].stats.epoch("text") == 2


@pytest.mark.parametrize("packing", ["sequential", "best_fit"])
@pytest.mark.parametrize("block_documents", [3, 256])
def test_to_the_end_of_the_text_every_token_is_a_target_once(
    loader: Made, packing: str, block_documents: int
) -> None:
    made = loader(workers=2, epochs=2, packing=packing, block_documents=block_documents)
    stream = made.stream
    targets = 0
    while made.failure is None:
        targets += next(made).stats.targets
    documents, encode = stream.documents, stream.tokenizer.document_tokens
    lanes = [[encode(d) for d, _ in documents.training("text", lane)] for lane in range(4)]
    total = 2 * sum(len(tokens) for lane in lanes for tokens in lane)
    # The first token of a lane has nothing before it, but for the separator that best-fit adds.
    assert targets == total - (4 if packing == "sequential" else 0)


def test_no_more_than_depth_batches_are_made_ahead(
    loader: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    encode = Tokenizer.document_tokens
    monkeypatch.setattr(
        Tokenizer, "document_tokens", lambda self, d: (made.append(1), encode(self, d))[1]
    )
    ahead = loader(workers=2, depth=2)
    next(ahead)
    before = -1
    while before != len(made) < 200:  # until nothing more is made
        before = len(made)
        time.sleep(0.5)
    assert len(made) < 200


def test_waiting_is_measured_and_workers_end_it(loader: Made) -> None:
    inline = loader(workers=0)
    list(islice(inline, 20))
    assert inline.wait_s > 0
    ahead = loader(workers=2, depth=30)
    next(ahead)
    time.sleep(1.0)
    before = ahead.wait_s
    list(islice(ahead, 10))
    assert ahead.wait_s - before < inline.wait_s
