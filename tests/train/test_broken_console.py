import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from conf import arguments
from conf.standard_streams import LossyStream, guard_standard_streams
from launch import __main__ as launch
from tests.conf.test_standard_streams import pipe_without_reader
from train import bench, compose, generate, main, tokenizer
from train.arguments import BenchArguments, GenerateArguments, TokenizerArguments
from train.checkpoint.store import CheckpointStore

pytestmark = pytest.mark.usefixtures("streams_as_they_were")
ROOT = Path(__file__).parents[2]


def full_disk() -> int:
    return os.open("/dev/full", os.O_WRONLY)


@pytest.mark.parametrize(
    ("opened", "encoding"), [(pipe_without_reader, "utf-8"), (full_disk, "ascii")]
)
def test_a_training_ends_as_ever_and_is_saved(
    opened: Callable[[], int],
    encoding: str,
    small: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    report = ("hooks.console=true", "hooks.sample.every=1", "hooks.sample.prompt='é 😀'")
    monkeypatch.setattr("sys.argv", ["main.py", *small(*report)])
    redirect(opened(), encoding)
    with pytest.raises(SystemExit) as ended:
        compose.run(main.main)
    assert ended.value.code == 0
    newest = CheckpointStore(tmp_path / "run/checkpoints", keep=1).newest()
    assert newest is not None
    assert newest.step == 6


ENTRY_POINTS: dict[str, Callable[[], object]] = {
    "compose.run(": lambda: compose.run(main.main),
    "compose.run_with(": lambda: compose.run_with(TokenizerArguments, tokenizer.main),
    "arguments.run(": lambda: arguments.run(BenchArguments, bench.main),
    "_run()": launch._run,
}


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_every_entry_point_prints_where_it_can_and_ends_with_its_own_code(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    redirect(pipe_without_reader(), "utf-8")
    monkeypatch.setattr("sys.argv", ["command", "--help"])
    with pytest.raises(SystemExit) as ended:
        ENTRY_POINTS[name]()
    assert ended.value.code in (0, None)
    assert isinstance(sys.stdout, LossyStream)


def test_every_command_has_such_an_entry_point() -> None:
    scripts = [*ROOT.glob("train/*.py"), *ROOT.glob("launch/*.py")]
    block = re.compile(r'if __name__ == "__main__":(.*?)(?=\n\S|\Z)', re.DOTALL)
    blocks = ["".join(block.findall(path.read_text())) for path in scripts]
    # One prints nothing, and becomes the program that it starts.
    commands = [block for block in blocks if block and "sys.argv" not in block]
    assert len(commands) >= 10
    assert [block for block in commands if not any(name in block for name in ENTRY_POINTS)] == []


def redirect(descriptor: int, encoding: str) -> None:
    """Makes it the standard output, as Python opens it."""
    raw = io.FileIO(descriptor, "w", closefd=False)
    sys.stdout = io.TextIOWrapper(io.BufferedWriter(raw), encoding=encoding)


def test_a_text_that_nobody_reads_is_not_written_to_its_end() -> None:
    made: list[str] = []

    class Endless(generate.Writer):
        def __init__(self) -> None:
            self.args = GenerateArguments(run="none")

        def stream(self, prompt: str) -> Iterator[str]:
            while True:
                made.append(prompt)
                yield prompt

    redirect(pipe_without_reader(), "utf-8")
    guard_standard_streams()
    generate.show(Endless(), "a")
    assert len(made) == 1


def test_texts_in_json_are_whole_in_every_encoding(
    trained, config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    prompts, out = tmp_path / "prompts", tmp_path / "out"
    prompts.write_text("é 😀 def\n", encoding="utf-8")
    settings = [f"run={trained(config()).run.directory}", f"file={prompts}", "max_tokens=2"]
    monkeypatch.setattr("sys.argv", ["generate.py", *settings])
    redirect(os.open(out, os.O_WRONLY | os.O_CREAT), "latin-1")
    with pytest.raises(SystemExit):
        arguments.run(GenerateArguments, generate.main)
    assert json.loads(out.read_text(encoding="latin-1"))["prompt"] == "é 😀 def"
