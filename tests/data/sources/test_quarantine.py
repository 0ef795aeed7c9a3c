import json
import os
from pathlib import Path
from threading import Thread

import pytest

from conf.errors import DataError
from data.source import BadRecord
from data.sources.quarantine import TOLERATED, Quarantine


def bad_record(number: int, reason: str = "empty") -> BadRecord:
    return BadRecord(reason, f"a.jsonl@{number}", "...")


def lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_bad_record_is_written_once_with_its_origin(tmp_path: Path) -> None:
    path = tmp_path / "run" / "quarantine.jsonl"
    quarantine = Quarantine(1.0)
    quarantine.add(bad_record(1))
    quarantine.write_to(path)
    for number in (1, 2, 2, 1, 3):
        quarantine.add(bad_record(number))
    assert [line["origin"] for line in lines(path)] == ["a.jsonl@1", "a.jsonl@2", "a.jsonl@3"]
    assert lines(path)[1] == bad_record(2)._asdict()
    assert len(quarantine.bad_records) == 3


def test_without_bad_records_there_is_no_file(tmp_path: Path) -> None:
    quarantine = Quarantine(1.0)
    quarantine.write_to(tmp_path / "quarantine.jsonl")
    quarantine.count_valid(7)
    assert list(tmp_path.iterdir()) == []


def test_a_later_start_knows_what_an_earlier_one_wrote(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    first = Quarantine(1.0)
    first.write_to(path)
    first.add(bad_record(1))
    path.write_bytes(path.read_bytes() + b'{"reason": "cut off by a cra')
    second = Quarantine(1.0)
    second.add(bad_record(1))
    second.add(bad_record(2))
    second.write_to(path)
    second.add(bad_record(3))
    assert [line["origin"][-1] for line in lines(path)] == ["1", "2", "3"]
    assert len(second.bad_records) == 3


def test_a_few_never_stop_a_run_and_a_higher_rate_does() -> None:
    quarantine = Quarantine(0.1)
    for number in range(TOLERATED):
        quarantine.add(bad_record(number))
    with pytest.raises(DataError, match=r"data\.max_quarantined=0\.1: 21 of 21 records") as error:
        quarantine.add(bad_record(TOLERATED, "not JSON"))
    assert (
        "are no documents: 20 empty, 1 not JSON; the last is a.jsonl@20: not JSON. Mend the source"
        in str(error.value)
    )


def test_the_rate_is_that_of_all_records_and_a_place_counts_once() -> None:
    quarantine = Quarantine(0.1)
    quarantine.count_valid(1000)
    for number in range(100):
        quarantine.add(bad_record(number))
    for number in range(100):
        quarantine.add(bad_record(number))
    assert (len(quarantine.bad_records), quarantine.records) == (100, 1200)
    for number in range(100, 122):
        quarantine.add(bad_record(number))
    with pytest.raises(DataError, match="123 of 1223 records"):
        quarantine.add(bad_record(122))


def test_bad_records_of_an_earlier_start_stop_no_later_one(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    first = Quarantine(0.5)
    first.write_to(path)
    first.count_valid(1000)
    for number in range(300):
        first.add(bad_record(number))
    second = Quarantine(0.5)
    second.write_to(path)
    for number in range(290, 310):
        second.add(bad_record(number))
    assert len(second.bad_records) == 310
    with pytest.raises(DataError, match="21 of 21 records"):
        second.add(bad_record(310))


def test_threads_share_it(tmp_path: Path) -> None:
    quarantine = Quarantine(1.0)
    quarantine.write_to(tmp_path / "q.jsonl")

    def work(start: int) -> None:
        for number in range(start, start + 200):
            quarantine.add(bad_record(number))
            quarantine.count_valid(1)

    threads = [Thread(target=work, args=(start,)) for start in (0, 100, 200, 300)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert quarantine.records == 1600
    assert sorted(line["origin"] for line in lines(tmp_path / "q.jsonl")) == sorted(
        quarantine.bad_records
    )
    assert len(quarantine.bad_records) == 500


def test_where_none_are_allowed_the_first_one_stops_the_run() -> None:
    with pytest.raises(DataError, match=r"data\.max_quarantined=0: 1 of 1 records"):
        Quarantine(0).add(bad_record(1))


def test_a_file_that_cannot_be_written_costs_its_lines_and_not_the_run(tmp_path: Path) -> None:
    quarantine = Quarantine(1.0)
    (tmp_path / "quarantine.jsonl").mkdir()
    quarantine.write_to(tmp_path / "quarantine.jsonl")
    quarantine.add(bad_record(1))
    assert "is not written" in str(quarantine.write_error)
    (tmp_path / "quarantine.jsonl").rmdir()
    quarantine.add(bad_record(2))
    assert quarantine.write_error is None


def test_lines_that_were_not_written_here_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    path.write_text('not JSON\n{"origin": 3}\n[]\n' + json.dumps(bad_record(1)._asdict()) + "\n")
    quarantine = Quarantine(1.0)
    quarantine.write_to(path)
    assert list(quarantine.bad_records) == ["a.jsonl@1"]


def test_readers_do_not_wait_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quarantine = Quarantine(1.0)
    quarantine.write_to(tmp_path / "quarantine.jsonl")
    flushed: list[int] = []
    monkeypatch.setattr(os, "fsync", flushed.append)
    for number in range(3):
        quarantine.add(BadRecord("empty", f"a@{number}"))
    assert flushed == []
    assert len((tmp_path / "quarantine.jsonl").read_text().splitlines()) == 3
