"""Files and directories are whole or absent, whatever fails and whoever else writes."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from xxhash import xxh3_128_hexdigest

from data.storage.atomic import file_xxh3_128, new_directory, open_atomic, write_atomic
from tests.patience import PATIENCE_S


@pytest.mark.parametrize("content", ["é\n", b"\xff\x00", ""])
def test_a_file_holds_what_was_written_and_nothing_lies_beside_it(
    tmp_path: Path, content: str | bytes
) -> None:
    path = tmp_path / "a.json"
    path.write_text("what was there before")
    write_atomic(path, content)
    assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("before")
    with pytest.raises(TypeError), open_atomic(path) as file:
        file.writelines([b"half", "no bytes"])  # type: ignore[list-item]
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_readers_see_one_of_two_files_and_never_a_part(tmp_path: Path) -> None:
    path = tmp_path / "a"
    contents = [letter * 1_000_000 for letter in ("x", "y")]
    path.write_text(contents[0])
    with ThreadPoolExecutor(2) as pool:
        writers = [pool.submit(rewrite, path, content) for content in contents]
        while not all(writer.done() for writer in writers):
            assert path.read_text() in contents
        for writer in writers:
            writer.result()
    assert list(tmp_path.iterdir()) == [path]


def rewrite(path: Path, content: str) -> None:
    for _ in range(50):
        write_atomic(path, content)


KILLED = """
import sys, time
from pathlib import Path
from data.storage.atomic import open_atomic
with open_atomic(Path(sys.argv[1])) as file:
    file.write(b"half")
    file.flush()
    time.sleep(3600)
"""


def test_a_killed_process_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("before")
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(path)])
    deadline = time.monotonic() + PATIENCE_S
    while len(os.listdir(tmp_path)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert path.read_text() == "before"
    write_atomic(path, "after")
    assert path.read_text() == "after"


def test_a_directory_gets_its_name_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "above" / "new"
    with new_directory(path) as partial:
        (partial / "a").write_text("x")
        assert not path.exists()
    assert (path / "a").read_text() == "x"
    assert list(path.parent.iterdir()) == [path]


def test_of_a_directory_that_fails_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError), new_directory(tmp_path / "new") as partial:
        [(partial / name).mkdir() for name in "aba"]
    (tmp_path / "there").mkdir()
    (tmp_path / "there/b").write_text("y")
    with pytest.raises(OSError, match="not empty"), new_directory(tmp_path / "there"):
        pass
    assert list(tmp_path.iterdir()) == [tmp_path / "there"]
    assert (tmp_path / "there/b").read_text() == "y"


@pytest.mark.parametrize("size", [0, 1, 3_000_000])
def test_the_hash_of_a_file_is_that_of_its_bytes(tmp_path: Path, size: int) -> None:
    content = os.urandom(size)
    (tmp_path / "a").write_bytes(content)
    assert file_xxh3_128(tmp_path / "a") == xxh3_128_hexdigest(content)


def test_text_that_cannot_be_encoded_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "environment.json"
    write_atomic(path, "before")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "after\ud800")
    assert path.read_text(encoding="utf-8") == "before"
    assert list(tmp_path.iterdir()) == [path]
