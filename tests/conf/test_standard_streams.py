"""A standard stream that fails costs its own output: nothing raises, and the exit code stays."""

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from conf.standard_streams import LossyStream, guard_standard_streams, reader_is_gone

pytestmark = pytest.mark.usefixtures("streams_as_they_were")
REPOSITORY = Path(__file__).parents[2]


def to(descriptor: int, encoding: str = "utf-8", *, buffered: bool = True) -> None:
    """Replaces sys.stdout as Python opens it, and makes it lossy."""
    raw = io.FileIO(descriptor, "w", closefd=False)
    buffer = io.BufferedWriter(raw) if buffered else raw
    sys.stdout = io.TextIOWrapper(buffer, encoding=encoding, write_through=not buffered)  # type: ignore[arg-type, type-var]
    guard_standard_streams()


def pipe_without_reader() -> int:
    read, write = os.pipe()
    os.close(read)
    return write


def full_disk() -> int:
    return os.open("/dev/full", os.O_WRONLY)


def hung_up_terminal() -> int:
    master, terminal = os.openpty()
    os.close(master)
    return terminal


def full_pipe_that_does_not_block() -> int:
    _, write = os.pipe()
    os.set_blocking(write, False)
    try:
        while True:
            os.write(write, b"x" * 4096)
    except BlockingIOError:
        return write


BROKEN = [pipe_without_reader, full_disk, hung_up_terminal, full_pipe_that_does_not_block]


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("buffered", [True, False])
def test_printing_to_a_broken_stream_goes_on_and_is_told_once(
    broken: Callable[[], int],
    buffered: bool,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("conf.standard_streams.READ_AGAIN_S", 0.01)
    to(broken(), buffered=buffered)
    for _ in range(3):
        print("x" * 10_000, flush=True)
        sys.stdout.flush()
    assert capfd.readouterr().err.count("stdout: ") == 1


def test_a_descriptor_that_is_closed_later_becomes_the_null_device(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Otherwise the next file that is opened would get its number, and all that is printed."""
    descriptor = os.open(os.devnull, os.O_WRONLY)
    to(descriptor)
    os.close(descriptor)
    print("x", flush=True)
    assert os.fstat(descriptor).st_rdev == os.stat(os.devnull).st_rdev
    assert "Bad file descriptor" in capfd.readouterr().err


def test_a_reader_that_is_gone_is_known(capfd: pytest.CaptureFixture[str]) -> None:
    to(full_disk())
    print("x", flush=True)
    assert not reader_is_gone(sys.stdout)  # there may be room again
    to(pipe_without_reader())
    assert not reader_is_gone(sys.stdout)
    print("x", flush=True)
    assert reader_is_gone(sys.stdout)
    assert "Broken pipe" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("encoding", "text", "expected"),
    [
        ("latin-1", "café 😀 ⟨/⟩", "café ? ?/?"),
        ("ascii", "café", "caf?"),
        ("cp1252", "━━ 3/6", "?? 3/6"),
        ("utf-8", "not UTF-8: \udcff", "not UTF-8: ?"),
    ],
)
def test_characters_that_an_encoding_lacks_are_replaced(
    encoding: str, text: str, expected: str, tmp_path: Path
) -> None:
    path = tmp_path / "out"
    to(os.open(path, os.O_WRONLY | os.O_CREAT), encoding)
    print(text, flush=True)
    assert path.read_text(encoding=encoding) == f"{expected}\n"


def test_text_of_any_length_comes_whole_and_in_order(tmp_path: Path) -> None:
    path = tmp_path / "out"
    to(os.open(path, os.O_WRONLY | os.O_CREAT))
    for number in range(5000):
        print(f"line {number} é")
    sys.stdout.flush()
    sys.stdout.buffer.write(b"bytes\n")
    sys.stdout.flush()
    lines = path.read_text().splitlines()
    assert lines == [*(f"line {number} é" for number in range(5000)), "bytes"]


def test_a_closed_stream_can_be_printed_to() -> None:
    to(os.open(os.devnull, os.O_WRONLY))
    sys.stdout.close()
    print("x", flush=True)
    assert reader_is_gone(sys.stdout)


def test_streams_without_a_descriptor_and_streams_done_before_stay() -> None:
    sys.stdout = io.StringIO()
    guard_standard_streams()
    assert isinstance(sys.stdout, io.StringIO)
    to(os.open(os.devnull, os.O_WRONLY))
    done = sys.stdout
    assert isinstance(done, LossyStream)
    guard_standard_streams()
    assert sys.stdout is done


SCRIPT = """
import contextlib, os, sys
from conf.standard_streams import guard_standard_streams
guard_standard_streams()
print("to nobody")
print("to nobody", file=sys.stderr)
print(sys.stdin.read(), end="")
opened = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)
for number in (1, 2):
    with contextlib.suppress(OSError):
        os.write(number, b"native code")
assert opened > 2, opened
sys.exit(3)
"""


COMMAND = '"$0" -c "$1" "$2"'


@pytest.mark.process
@pytest.mark.parametrize(
    "redirection",
    ["<&- >&- 2>&-", ">&-", "2>&-", ">/dev/full 2>&1", "2>/dev/full", ">/dev/full", "| head -c 0"],
)
def test_the_exit_code_is_the_programs_and_its_files_are_its_own(
    redirection: str, tmp_path: Path
) -> None:
    """Python alone makes it 120 where the last flush fails, and gives a file the number 1."""
    path = tmp_path / "file"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {COMMAND} {redirection}", sys.executable, SCRIPT, path],
        cwd=REPOSITORY,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 3
    assert path.read_bytes() == b""
