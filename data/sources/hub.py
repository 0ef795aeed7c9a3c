"""A corpus that `datasets` streams: from the Hub, from URLs, in any format that it reads.

Of `datasets` (5.2) only plain streams are used, one for each shard, and a place is the number of a
shard and of a record in it. What looks like less work has traps:

- `shuffle` does not save its buffer: of 4000 rows, one resume lost 300 and repeated 50. Closing its
  iterator may sleep. Blocks are shuffled later instead (see data/shuffle.py).
- `split_dataset_by_node` drops rows when the number of ranks changes: 600 of 4000 from 2 to 4.
- `load_state_dict` is ignored without a word unless the epoch is that of the state, and `set_epoch`
  reorders the shards. Here the epoch of `datasets` is always 0.
- `state_dict` tells more of how a place was reached than where it is: after a resume the same place
  has another state, so that equal runs would have unequal cursors.

One limit remains. `datasets` goes to a record by reading its shard from the beginning, from a state
as from a number: of a Parquet file at best a row group, of a JSON file all of it (half a second for
200 MB here). The sources of `kind: files` seek.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from math import gcd
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakSet

from data.config import DatasetsSource
from data.source import BadRecord, Document, Position, no_such_field

if TYPE_CHECKING:
    from datasets import IterableDataset

EVEN_ENOUGH = 16
"""Shards per lane from which on one shard more or less makes no difference."""

WINDOW = 64 << 20
"""Characters that are held of what several lanes read together: the lead of the first over the last
from which on they read apart."""

RECORD = 500
"""Characters that a record counts beside its text: about the memory of what belongs to it."""

EXCERPT = 200
"""Characters of a record without text that are shown."""


class Place(NamedTuple):
    """Where reading goes on: the number of a shard, and of a record in it."""

    shard: int
    record: int = 0


class Item(NamedTuple):
    """A record, what decides whose turn it is, and the place after it."""

    record: Document | BadRecord
    number: int
    after: Place


Read = Callable[[Place], Iterator[Item]]
"""Reads certain shards from a place on."""


class Part(NamedTuple):
    """Shards that `readers` lanes read together; of the records each takes those of its turn."""

    shards: range
    readers: int = 1
    turn: int = 0


class HubCorpus:
    """The documents of a streamed dataset, in its own order.

    Args:
        name: the source's.

    Attributes:
        stream: the dataset, with the shards that its files are.

    Raises:
        ValueError: it cannot be opened, or is known to lack the text field.
    """

    def __init__(self, name: str, source: DatasetsSource) -> None:
        self.name = name
        self.source = source
        self.stream = self._load()
        known = self.stream.column_names
        if known is not None and source.text_field not in known:
            raise no_such_field(name, source.text_field, source.path, known)
        self._lock = Lock()
        self._shared: dict[tuple[int, range], SharedReading] = {}

    @property
    def identity(self) -> dict[str, Any]:
        """The settings and the number of shards; nothing else tells of a dataset that changes
        without its `revision`."""
        names = ("path", "name", "split", "revision", "data_files", "text_field")
        values = {key: getattr(self.source, key) for key in names}
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
        values["shards"] = self.stream.num_shards
        return {f"data.sources.{self.name}.{key}": value for key, value in values.items()}

    @property
    def is_seekable(self) -> bool:
        """Most formats are read from their beginning."""
        return False

    def documents(
        self, lane: int, lanes: int, position: Position = None
    ) -> Iterator[tuple[Document | BadRecord, Position]]:
        """One pass over a lane's records; see `Corpus`.

        Raises:
            ValueError: `datasets` cannot read on.
        """
        stream = self.stream if self.stream.num_shards >= lanes else self._finer
        start = None if position is None else Place(*position)
        for part in _parts(stream.num_shards, lanes, lane):
            if start is None or start.shard in part.shards:
                read: Read = partial(self._items, stream, part.shards)
                if part.readers > 1:
                    shared = SharedReading(read)
                    read = self._shared.setdefault((lanes, part.shards), shared).follow
                for record, number, after in read(start or Place(part.shards.start)):
                    if number % part.readers == part.turn:
                        yield record, list(after)
                start = None

    @property
    def _finer(self) -> "IterableDataset":
        with self._lock:
            return self._resharded

    @cached_property
    def _resharded(self) -> "IterableDataset":
        """The dataset in as many shards as possible, in the same order; opens all files."""
        with self._blaming_settings():
            return self.stream.reshard()

    def _items(self, stream: "IterableDataset", shards: range, place: Place) -> Iterator[Item]:
        """The records of some shards from a place on."""
        count = stream.num_shards
        for shard in range(place.shard, shards.stop):
            first = place.record if shard == place.shard else 0
            rows = iter(stream.shard(count, shard).skip(first))
            for number in itertools.count(first):
                with self._blaming_settings():
                    row = next(rows, None)
                if row is None:
                    break
                record = self._record(row, f"{self.source.path}[{shard}/{count}]#{number}")
                # Each shard begins one lane further: shards of one record are dealt equally, too.
                yield Item(record, shard + number, Place(shard, number + 1))

    def _record(self, row: dict[str, Any], origin: str) -> Document | BadRecord:
        field = self.source.text_field
        if field not in row:
            return BadRecord(f"no field {field!r}; it has {', '.join(row)}", origin)
        if isinstance(text := row[field], str):
            return Document(text, origin)
        kind = "null" if text is None else f"a value of type {type(text).__name__}"
        return BadRecord(f"field {field!r} holds {kind}, not text", origin, repr(text)[:EXCERPT])

    def _load(self) -> "IterableDataset":
        # Imported here because it takes seconds and only this source needs it.
        from datasets import load_dataset

        source = self.source
        files = source.data_files
        with self._blaming_settings():
            return load_dataset(
                source.path,
                name=source.name,
                split=source.split,
                revision=source.revision,
                data_files=list(files) if isinstance(files, tuple) else files,
                streaming=True,
            )

    @contextmanager
    def _blaming_settings(self) -> Iterator[None]:
        """Names the settings when `datasets` fails."""
        try:
            yield
        # Not found, no network, a damaged file; no such split or name: each library behind it has
        # errors of its own.
        except Exception as error:
            chosen = [
                f"data.sources.{self.name}.{key}={value!r}"
                for key in ("path", "name", "split", "revision", "data_files")
                if (value := getattr(self.source, key)) is not None
            ]
            raise ValueError(
                f"{', '.join(chosen)}: `datasets` cannot read it ({error}); correct the setting, "
                "check the network, or read its files with kind: files, which leaves out single "
                "bad records"
            ) from error


class SharedReading:
    """Shards that several lanes of this process read, mostly once for all of them.

    Lanes come along at nearly the same speed. So the records that one reads are held for a while,
    and another one that comes to them takes them from there:

        records read   0 1 2 3 4 5 6 7 8 9
        held                   4 5 6 7 8 9        a lane at 6 takes 6, a lane at 10 reads on,
                                                  a lane at 3 begins a pass of its own
                                                  and leaves it when it comes to 4

    A pass is followed by nothing but the lanes' generators, and gone with them. What a lane gets
    never depends on the others. Lanes may be in different threads.
    """

    def __init__(self, read: Read) -> None:
        self._read = read
        self._passes: WeakSet[_Pass] = WeakSet()
        self._lock = Lock()

    def follow(self, place: Place) -> Iterator[Item]:
        """The records from a place on."""
        followed = None
        while True:
            with self._lock:
                followed = self._at(place, followed)
                item = followed.held[place]
            if item is None:
                return
            yield item
            place = item.after

    def _at(self, place: Place, followed: "_Pass | None") -> "_Pass":
        """A pass that holds the record at a place, if need be by reading it."""
        if followed is not None and place in followed.held:
            return followed
        passes = list(self._passes)
        for other in passes:
            if place in other.held:
                return other
        behind = [other for other in passes if other.end == place]
        chosen = behind[0] if behind else _Pass(self._read(place), place)
        self._passes.add(chosen)
        chosen.read_on()
        return chosen


class _Pass:
    """One reading of some shards.

    Attributes:
        held: the newest records by their places; None: the end.
        end: the place of what is read next; None: nothing more is.
    """

    def __init__(self, items: Iterator[Item], start: Place) -> None:
        self.held: dict[Place, Item | None] = {}
        self.end: Place | None = start
        self._items = items
        self._size = 0

    def read_on(self) -> None:
        """Reads one record and, if too much is held now, forgets the oldest ones."""
        place, self.end = self.end, None  # and stays None if reading fails
        assert place is not None
        self.held[place] = item = next(self._items, None)
        if item is not None:
            self.end = item.after
            self._size += _size(item)
            while self._size > WINDOW and len(self.held) > 1:
                oldest = self.held.pop(next(iter(self.held)))
                assert oldest is not None
                self._size -= _size(oldest)


def _size(item: Item) -> int:
    text = item.record.text if isinstance(item.record, Document) else ""
    return len(text) + RECORD


def _parts(shards: int, lanes: int, lane: int) -> list[Part]:
    """What a lane reads: shards that it shares with others, then as many of its own as all have.

    Lanes with fewer records would repeat them more often, and every lane that shares a shard may
    have to read it. Shared ones come first because all lanes begin together.

        5 shards, 2 lanes    lane 0:  4 (every other record)  0 1
                             lane 1:  4 (every other record)  2 3

    >>> _parts(5, 2, lane=1)
    [Part(shards=range(4, 5), readers=2, turn=1), Part(shards=range(2, 4), readers=1, turn=0)]
    >>> _parts(2, 8, lane=3)
    [Part(shards=range(1, 2), readers=4, turn=1)]
    """
    each, rest = divmod(shards, lanes)
    if each >= EVEN_ENOUGH:
        return [Part(range(lane * shards // lanes, (lane + 1) * shards // lanes))]
    groups = gcd(rest, lanes)
    size = rest // groups
    first = each * lanes + lane % groups * size
    shared = Part(range(first, first + size), lanes // groups, lane // groups)
    own = Part(range(lane * each, (lane + 1) * each))
    return [part for part in (shared, own) if part.shards]
