"""Records that are no documents: written down, and no reason to stop while they are few."""

import json
from collections import Counter
from contextlib import suppress
from pathlib import Path
from threading import Lock

from data.source import BadRecord

FREE = 20
"""Faults that never stop a run, unless none are allowed: a rate of so few means little."""


class Quarantine:
    """Collects faults, each place once however often it is read.

    Args:
        max_fraction: the fraction of faults among all records beyond which reading stops.

    Attributes:
        bad_records: what was wrong, by origin; also what earlier starts of the run found.
        known: how many of them were in the file when this start opened it.
        records: records that were read so far in this process, faults included.
        trouble: why the file could not be written the last time; None if it could.
    """

    def __init__(self, max_fraction: float) -> None:
        self.max_fraction = max_fraction
        self.bad_records: dict[str, BadRecord] = {}
        self.known = 0
        self.records = 0
        self.trouble: str | None = None
        self._found: set[str] = set()  # in this process, as `records` are
        self._path: Path | None = None
        self._lock = Lock()

    @property
    def new(self) -> int:
        """Faults that no earlier start had found."""
        return len(self.bad_records) - self.known

    def write_to(self, path: Path) -> None:
        """Writes what was and will be found to a file of JSON lines; what it holds is known."""
        with self._lock:
            known = _read(path)
            self.known = len(known)
            self._path = path
            new = [
                bad_record for origin, bad_record in self.bad_records.items() if origin not in known
            ]
            self.bad_records = known | self.bad_records
            self._append(new)

    def passed(self, records: int) -> None:
        """Counts good records."""
        with self._lock:
            self.records += records

    def add(self, bad_record: BadRecord) -> None:
        """Takes a fault in.

        Raises:
            ValueError: there are too many of them.
        """
        with self._lock:
            self.records += 1
            if bad_record.origin not in self.bad_records:
                self.bad_records[bad_record.origin] = bad_record
                self._append([bad_record])
            self._found.add(bad_record.origin)
            free = FREE if self.max_fraction else 0
            if len(self._found) > max(free, self.max_fraction * self.records):
                raise self._too_many(bad_record)

    def _append(self, bad_records: list[BadRecord]) -> None:
        if self._path is None or not bad_records:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(
                    "".join(json.dumps(bad_record._asdict()) + "\n" for bad_record in bad_records)
                )
            self.trouble = None
        except OSError as error:
            self.trouble = f"{self._path} is not written: {error}"

    def _too_many(self, last: BadRecord) -> ValueError:
        place = f" (all in {self._path})" if self._path else ""
        return ValueError(
            f"data.max_quarantined={self.max_fraction}: {len(self._found)} of {self.records} "
            f"records are no documents{place}: {self.summary()}; the last is {last.origin}: "
            f"{last.reason}. Mend the source, or raise data.max_quarantined"
        )

    def summary(self) -> str:
        """What was wrong and how often, the most frequent first: `12 not JSON, 1 empty`."""
        kinds = Counter(
            bad_record.reason.partition(":")[0] for bad_record in self.bad_records.values()
        )
        return ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(5))


def _read(path: Path) -> dict[str, BadRecord]:
    """The faults that an earlier start wrote, but for a last line that it did not finish."""
    if not path.is_file():
        return {}
    lines = path.read_bytes().split(b"\n")
    if lines[-1]:
        path.write_bytes(b"".join(line + b"\n" for line in lines[:-1]))
    bad_records = {}
    for line in lines[:-1]:
        with suppress(ValueError, TypeError):  # of another hand
            bad_record = BadRecord(**json.loads(line))
            bad_records[bad_record.origin] = bad_record
    return bad_records
