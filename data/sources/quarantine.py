"""Records that are no documents: they are written down, and stop a run only if they are many."""

import json
from collections import Counter
from contextlib import suppress
from pathlib import Path
from threading import Lock

from conf.errors import DataError, reason_of
from conf.redaction import redacted
from data.source import BadRecord
from data.storage.atomic import write_atomic

TOLERATED = 20
"""Bad records that never stop a run, unless none are allowed: a rate of so few means little."""


class Quarantine:
    """Collects bad records, each place once, however often it is read.

    Args:
        max_fraction: the fraction of bad records among all records beyond which reading stops.

    Attributes:
        bad_records: by origin; those that earlier starts of the run found are among them.
        earlier_count: how many of them were in the file when this start opened it.
        records: records that this process has read so far, bad ones included.
        write_error: why the file could not be written the last time; None if it could.
    """

    def __init__(self, max_fraction: float) -> None:
        self.max_fraction = max_fraction
        self.bad_records: dict[str, BadRecord] = {}
        self.earlier_count = 0
        self.records = 0
        self.write_error: str | None = None
        # Only what this process has found counts against `max_fraction`, as `records` do.
        self._found: set[str] = set()
        self._path: Path | None = None
        self._lock = Lock()

    @property
    def new_count(self) -> int:
        """Bad records that no earlier start had found."""
        return len(self.bad_records) - self.earlier_count

    def write_to(self, path: Path) -> None:
        """Write all bad records, from before and from now on, to a file of JSON lines.

        Those that the file holds already are taken over from it.
        """
        with self._lock:
            earlier = _read(path)
            self.earlier_count = len(earlier)
            self._path = path
            new = [
                bad_record
                for origin, bad_record in self.bad_records.items()
                if origin not in earlier
            ]
            self.bad_records = earlier | self.bad_records
            self._append(new)

    def count_valid(self, records: int) -> None:
        """Count records that are documents."""
        with self._lock:
            self.records += records

    def add(self, bad_record: BadRecord) -> None:
        """Count and write down a bad record.

        Raises:
            DataError: there are too many of them.
        """
        # The origin may be a URL with a password or a signature.
        bad_record = bad_record._replace(
            origin=redacted(bad_record.origin), reason=redacted(bad_record.reason)
        )
        with self._lock:
            self.records += 1
            # Every epoch reads it again; it is written down and counted once.
            if bad_record.origin not in self.bad_records:
                self.bad_records[bad_record.origin] = bad_record
                self._append([bad_record])
            self._found.add(bad_record.origin)
            tolerated = TOLERATED if self.max_fraction else 0
            if len(self._found) > max(tolerated, self.max_fraction * self.records):
                raise self._too_many(bad_record)

    def _append(self, bad_records: list[BadRecord]) -> None:
        """Write to the file; a disk that refuses costs the lines and not the run."""
        if self._path is None or not bad_records:
            return
        lines = "".join(json.dumps(bad_record._asdict()) + "\n" for bad_record in bad_records)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab") as file:
                file.write(lines.encode())  # no flush to the disk: all readers wait for the lock
            self.write_error = None
        except OSError as error:
            self.write_error = f"{self._path} is not written: {reason_of(error)}"

    def _too_many(self, last: BadRecord) -> DataError:
        listed = f" (all in {self._path})" if self._path else ""
        return DataError(
            f"data.max_quarantined={self.max_fraction}: {len(self._found)} of {self.records} "
            f"records are no documents{listed}: {self.summary()}; the last is {last.origin}: "
            f"{last.reason}. Mend the source, or raise data.max_quarantined"
        )

    def summary(self) -> str:
        """What was wrong and how often, the most frequent first: `12 not JSON, 1 empty`."""
        kinds = Counter(
            bad_record.reason.partition(":")[0] for bad_record in self.bad_records.values()
        )
        return ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(5))


def _read(path: Path) -> dict[str, BadRecord]:
    """The bad records that an earlier start wrote; removes a last line that it did not finish."""
    if not path.is_file():
        return {}
    lines = path.read_bytes().split(b"\n")
    # What follows the last line end was cut off by a crash; appending would spoil a line.
    if lines[-1]:
        write_atomic(path, b"".join(line + b"\n" for line in lines[:-1]))
    bad_records = {}
    for line in lines[:-1]:
        with suppress(ValueError, TypeError):  # a line that was not written here
            bad_record = BadRecord(**json.loads(line))
            bad_records[bad_record.origin] = bad_record
    return bad_records
