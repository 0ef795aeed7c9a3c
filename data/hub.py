"""A corpus that `datasets` streams: from the Hub, from URLs, in any format that it reads."""

from collections.abc import Iterator
from itertools import count
from math import gcd
from typing import TYPE_CHECKING, Any

from data.config import DatasetsSource
from data.source import Document, Position, text_of

if TYPE_CHECKING:
    from datasets import IterableDataset

EVEN_ENOUGH = 16
"""Shards per lane from which on one shard more or less makes no difference."""


class HubCorpus:
    """The documents of a streamed dataset, in its own order.

    `datasets`' `shuffle` and `split_dataset_by_node` lose and repeat rows when a run resumes; its
    plain streams resume exactly, and only those are used.
    """

    def __init__(self, source: DatasetsSource) -> None:
        self.source = source
        self.stream = _load(source)

    @property
    def identity(self) -> dict[str, Any]:
        """The settings; a dataset that changes without its `revision` is not noticed."""
        names = ("path", "name", "split", "revision", "data_files", "text_field")
        values = {f"data.source.{name}": getattr(self.source, name) for name in names}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    def documents(
        self, lane: int, lanes: int, position: Position = None
    ) -> Iterator[tuple[Document, Position]]:
        """One pass over a lane's documents; see `Corpus`."""
        groups = _groups(self.stream.num_shards, lanes)
        shards = self.stream.shard(groups, lane % groups)
        first, state = position or (0, None)
        if state is not None:
            shards.load_state_dict(state)
        for index, record in zip(count(first), shards, strict=False):
            if index % (lanes // groups) == lane // groups:
                origin = f"{self.source.path}[{lane % groups}/{groups}]:{index + 1}"
                text = text_of(record, self.source.text_field, origin)
                if text is not None:
                    yield Document(text, origin), [index + 1, shards.state_dict()]


def _groups(shards: int, lanes: int) -> int:
    """How many groups both shards and lanes are dealt into; each lane reads its group's shards.

    The lanes of a group take turns with the documents, so all of them download the same shards.
    Groups have equally many shards, or nearly if there are many: lanes that had fewer would
    repeat their documents more often.

    >>> _groups(shards=14, lanes=8), _groups(shards=3, lanes=8), _groups(shards=1001, lanes=8)
    (2, 1, 8)
    """
    return lanes if shards >= EVEN_ENOUGH * lanes else gcd(shards, lanes)


def _load(source: DatasetsSource) -> "IterableDataset":
    # Imported here because it takes seconds and only this source needs it.
    from datasets import load_dataset

    files = source.data_files
    try:
        return load_dataset(
            source.path,
            name=source.name,
            split=source.split,
            revision=source.revision,
            data_files=list(files) if isinstance(files, tuple) else files,
            streaming=True,
        )
    except (OSError, ValueError) as error:  # not found, no network; no such split or name
        chosen = {
            f"data.source.{key}": value
            for key in ("path", "name", "split", "revision", "data_files")
            if (value := getattr(source, key)) is not None
        }
        raise ValueError(
            f"{', '.join(f'{key}={value!r}' for key, value in chosen.items())}: `datasets` cannot "
            f"open it ({error}); correct the setting, or check the network"
        ) from error
