"""A corpus that `datasets` streams: from the Hub, from URLs, in any format that it reads.

Of `datasets` (5.2) only plain streams are used, one for each shard. A position is the number of a
shard and of a record in it. Its own means for this have faults, which were measured:

- `shuffle` does not save its buffer: of 4000 rows, one resume lost 300 and repeated 50. Closing its
  iterator may sleep. Blocks are shuffled later instead (see data/shuffle.py).
- `split_dataset_by_node` drops rows when the number of ranks changes: 600 of 4000 from 2 to 4.
- `load_state_dict` does nothing, without a warning, unless the epoch is that of the state, and
  `set_epoch` reorders the shards. Here the epoch of `datasets` is always 0.
- `state_dict` depends on how a position was reached. After a resume the same position has another
  state, so that equal runs would have unequal cursors.

One limit remains. `datasets` goes to a record by reading its shard from the beginning: of a Parquet
file at best a row group, of a JSON file all of it (half a second for 200 MB here). The sources of
`kind: files` seek.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from math import gcd
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakSet

from conf.errors import ConfigError, DataError, Problem, TransientError, reason_of
from conf.extras import pip_command
from conf.redaction import redacted_tree
from conf.text import BOM
from data.config import DatasetsSource
from data.source import MISSING, BadRecord, Document, Position, field_of, no_such_field
from data.storage.retry import http_status, is_temporary

if TYPE_CHECKING:
    from datasets import IterableDataset

UNSHARED_SHARDS = 16
"""Shards per lane from which on no shard is shared: a lane with one more then reads 6 % more."""

HELD_CHARACTERS = 64 << 20
"""Characters of records that are held for the lanes that share a shard. A lane that falls behind by
more reads the shard for itself."""

RECORD_CHARACTERS = 500
"""Characters that a record counts beside its text, about the memory of its objects."""

EXCERPT_CHARACTERS = 200
"""Characters that are shown of a record without text."""

NETWORK_LIBRARIES = {"aiohttp", "fsspec", "httpcore", "httpx", "requests", "urllib3"}
"""The libraries below `datasets` whose errors are about the way to a server."""


class ShardPosition(NamedTuple):
    """Where reading goes on: the number of a shard, and of a record in it."""

    shard: int
    record: int = 0


class Item(NamedTuple):
    """A record, the number that decides which lane gets it, and the position after it."""

    record: Document | BadRecord
    number: int
    after: ShardPosition


ReadFrom = Callable[[ShardPosition], Iterator[Item]]
"""Reads certain shards from a position on."""


class Part(NamedTuple):
    """Shards that `readers` lanes read together; a lane gets every `readers`-th record, the ones
    whose number leaves the rest `remainder`."""

    shards: range
    readers: int = 1
    remainder: int = 0


class HubCorpus:
    """The documents of a streamed dataset, in its own order.

    Args:
        name: of the source.

    Attributes:
        stream: the dataset, whose shards are its files.

    Raises:
        ConfigError: `datasets` finds no such dataset, split or file.
        TransientError: the Hub or another server cannot be reached.
        DataError: the dataset is known to lack the text field.
    """

    def __init__(self, name: str, source: DatasetsSource) -> None:
        self.name = name
        self.source = source
        self.stream = self._load()
        columns = self.stream.column_names
        # The name of a column, or one that leads into a column.
        wanted = {source.text_field, source.text_field.partition(".")[0]}
        if columns is not None and not wanted & {*columns}:
            raise no_such_field(name, source.text_field, source.path, columns)
        self._lock = Lock()
        self._shared: dict[tuple[int, range], SharedReading] = {}

    @property
    def fingerprint(self) -> dict[str, Any]:
        """The settings and the number of shards; a URL without its secrets, which change.

        A dataset that changes without its `revision` is not noticed.
        """
        names = ("path", "name", "split", "revision", "data_files", "text_field")
        values = {key: getattr(self.source, key) for key in names}
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
        values = redacted_tree(values)
        values["shards"] = self.stream.num_shards
        return {f"data.sources.{self.name}.{key}": value for key, value in values.items()}

    @property
    def is_seekable(self) -> bool:
        """False: most formats are read from their beginning."""
        return False

    def documents(
        self, lane: int, lanes: int, position: Position = None
    ) -> Iterator[tuple[Document | BadRecord, Position]]:
        """One pass over a lane's records; see `Corpus`.

        Raises:
            DataError: `datasets` cannot decode a file.
            TransientError: a server cannot be reached.
        """
        # Row groups become shards only where files are too few, since it opens every file.
        stream = self.stream if self.stream.num_shards >= lanes else self._finer
        start = None if position is None else ShardPosition(*position)
        for part in _parts(stream.num_shards, lanes, lane):
            if start is None or start.shard in part.shards:
                read: ReadFrom = partial(self._items, stream, part.shards)
                if part.readers > 1:
                    shared = SharedReading(read)
                    # Lanes of one process meet here; those of other ranks read for themselves.
                    read = self._shared.setdefault((lanes, part.shards), shared).follow
                for record, number, after in read(start or ShardPosition(part.shards.start)):
                    if number % part.readers == part.remainder:
                        yield record, list(after)
                start = None

    @property
    def _finer(self) -> "IterableDataset":
        with self._lock:
            return self._resharded

    @cached_property
    def _resharded(self) -> "IterableDataset":
        """The dataset in as many shards as possible, in the same order; opens all files."""
        with self._naming_settings(ConfigError):
            return self.stream.reshard()

    def _items(
        self, stream: "IterableDataset", shards: range, start: ShardPosition
    ) -> Iterator[Item]:
        """The records of some shards from a position on."""
        count = stream.num_shards
        for shard in range(start.shard, shards.stop):
            first = start.record if shard == start.shard else 0
            # `skip` reads what it skips; see the limit at the top of this file.
            rows = iter(stream.shard(count, shard).skip(first))
            for number in itertools.count(first):
                with self._naming_settings(DataError):
                    row = next(rows, None)
                if row is None:
                    break
                record = self._record(row, f"{self.source.path}[{shard}/{count}]#{number}")
                # Each shard begins with another lane, so that shards of one record are dealt
                # equally, too.
                yield Item(record, shard + number, ShardPosition(shard, number + 1))

    def _record(self, row: dict[str, Any], origin: str) -> Document | BadRecord:
        field = self.source.text_field
        text = field_of(row, field)
        if text is MISSING:
            return BadRecord(f"no field {field!r}; it has {', '.join(row)}", origin)
        if isinstance(text, str):
            return Document(text.removeprefix(BOM), origin)
        kind = "null" if text is None else f"a value of type {type(text).__name__}"
        return BadRecord(
            f"field {field!r} holds {kind}, not text", origin, repr(text)[:EXCERPT_CHARACTERS]
        )

    def _load(self) -> "IterableDataset":
        # Imported here because it takes seconds and only this source needs it.
        try:
            from datasets import load_dataset
        except ModuleNotFoundError as error:
            if error.name != "datasets":
                raise
            key = f"data.sources.{self.name}.kind"
            reason = "needs the package datasets, which is not installed"
            add = pip_command("phd-transformer[hub]")
            raise ConfigError([Problem(key, "datasets", reason, add)]) from None

        source = self.source
        files = source.data_files
        with self._naming_settings(ConfigError):
            return load_dataset(
                source.path,
                name=source.name,
                split=source.split,
                revision=source.revision,
                data_files=list(files) if isinstance(files, tuple) else files,
                streaming=True,
            )

    @contextmanager
    def _naming_settings(self, kind: type[ConfigError] | type[DataError]) -> Iterator[None]:
        """Turns whatever `datasets` raises into an error that names the settings.

        A server that cannot be reached raises a TransientError. Everything else is of this `kind`:
        no such split or name, a damaged file. Each library below `datasets` has its own errors.
        """
        try:
            yield
        except Exception as error:
            settings = ", ".join(
                f"data.sources.{self.name}.{key}={value!r}"
                for key in ("path", "name", "split", "revision", "data_files")
                if (value := getattr(self.source, key)) is not None
            )
            found = f"{settings}: `datasets` cannot read it ({reason_of(error)})"
            if _may_pass(error, opening=kind is ConfigError):
                advice = "check the network, and start the run again"
                raise TransientError(f"{found}; {advice}") from error
            advice = (
                "correct the setting, or read its files with kind: files, which leaves out single "
                "bad records"
            )
            if kind is ConfigError:
                raise ConfigError([f"{found}; {advice}"]) from error
            raise DataError(f"{found}; {advice}") from error


def _may_pass(error: BaseException, *, opening: bool) -> bool:
    """Whether an error of `datasets`, or one that caused it, is about a server or a disk.

    An OSError without a number is one of Arrow's, which says that a file is damaged.
    """
    if opening and isinstance(error, FileNotFoundError | PermissionError):
        return False
    if (status := http_status(error)) is not None:
        return is_temporary(status)
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return True
    if type(error).__module__.partition(".")[0] in NETWORK_LIBRARIES:
        return True
    cause = error.__cause__ or error.__context__
    return cause is not None and _may_pass(cause, opening=opening)


class SharedReading:
    """Shards that several lanes of this process read, mostly once for all of them.

    The lanes advance at nearly the same speed. So the records that one of them reads are held for
    a while, and the others take them from there:

        records read   0 1 2 3 4 5 6 7 8 9
        held                   4 5 6 7 8 9        a lane at 6 takes 6, a lane at 10 reads on,
                                                  a lane at 3 begins a pass of its own
                                                  and leaves it when it comes to 4

    Only the lanes' generators hold a pass, which is closed when the last of them is. What a lane
    gets never depends on the others. Lanes may be in different threads.
    """

    def __init__(self, read: ReadFrom) -> None:
        self._read = read
        self._passes: WeakSet[_Pass] = WeakSet()
        self._lock = Lock()

    def follow(self, start: ShardPosition) -> Iterator[Item]:
        """The records from a position on."""
        position, followed = start, None
        while True:
            with self._lock:
                followed = self._pass_at(position, followed)
                item = followed.held[position]
            if item is None:
                return
            yield item
            position = item.after

    def _pass_at(self, position: ShardPosition, followed: "_Pass | None") -> "_Pass":
        """A pass that holds the record at a position, which is read if none does."""
        if followed is not None and position in followed.held:
            return followed
        # A list, since the weak set may lose members while it is walked.
        passes = list(self._passes)
        for other in passes:
            if position in other.held:
                return other
        # Another pass that is about to read this record is joined instead of a new one.
        behind = [other for other in passes if other.end == position]
        chosen = behind[0] if behind else _Pass(self._read(position), position)
        self._passes.add(chosen)
        chosen.read_on()
        return chosen


class _Pass:
    """One reading of some shards.

    Attributes:
        held: the newest records by their positions; None: the end.
        end: the position of the record that is read next; None: there is none.
    """

    def __init__(self, items: Iterator[Item], start: ShardPosition) -> None:
        self.held: dict[ShardPosition, Item | None] = {}
        self.end: ShardPosition | None = start
        self._items = items
        self._characters = 0

    def read_on(self) -> None:
        """Read one record, and forget the oldest ones if too much is held now."""
        position, self.end = self.end, None  # and stays None if reading fails
        assert position is not None
        self.held[position] = item = next(self._items, None)
        if item is not None:
            self.end = item.after
            self._characters += _characters(item)
            while self._characters > HELD_CHARACTERS and len(self.held) > 1:
                oldest = self.held.pop(next(iter(self.held)))
                assert oldest is not None
                self._characters -= _characters(oldest)


def _characters(item: Item) -> int:
    text = item.record.text if isinstance(item.record, Document) else ""
    return len(text) + RECORD_CHARACTERS


def _parts(shards: int, lanes: int, lane: int) -> list[Part]:
    """What a lane reads: shards that it shares with others, then as many of its own as all have.

    The shards that are left over are shared, because lanes with fewer records would repeat them
    more often. They come first, because all lanes begin together and can then read them together.

        5 shards, 2 lanes    lane 0:  4 (every other record)  0 1
                             lane 1:  4 (every other record)  2 3

    >>> for part in _parts(5, 2, lane=1): print(part)
    Part(shards=range(4, 5), readers=2, remainder=1)
    Part(shards=range(2, 4), readers=1, remainder=0)
    >>> _parts(2, 8, lane=3)
    [Part(shards=range(1, 2), readers=4, remainder=1)]
    """
    each, rest = divmod(shards, lanes)
    if each >= UNSHARED_SHARDS:
        return [Part(range(lane * shards // lanes, (lane + 1) * shards // lanes))]
    # The shards that are left over go to groups of lanes: as many groups as divide both.
    groups = gcd(rest, lanes)
    size = rest // groups
    first = each * lanes + lane % groups * size
    shared = Part(range(first, first + size), lanes // groups, lane // groups)
    own = Part(range(lane * each, (lane + 1) * each))
    return [part for part in (shared, own) if part.shards]
