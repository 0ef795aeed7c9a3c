"""Metrics reach the file, the console and W&B; a sink that fails costs its own output only."""

import io
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import wandb
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from train.sinks import ConsoleLine, MetricsFile, Wandb, console_lines, cut_back, run_id

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=300)


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# metrics.jsonl


def test_a_line_is_written_at_once_with_its_step_and_time(console: Console, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0, console)
    for step in (1, 2):
        file.write(step, {"train/loss": 1 / 3, "sample/text": "é\u2028\n"})
        *_, line = lines_of(path)
        assert line.pop("time") > 1.7e9
        assert line == {"step": step, "train/loss": 1 / 3, "sample/text": "é\u2028\n"}
    assert printed(console) == ""


def test_a_resumed_run_drops_the_lines_of_steps_that_it_takes_again(
    console: Console, tmp_path: Path
) -> None:
    path = tmp_path / "metrics.jsonl"
    for resumed, steps in ((0, (1, 2, 3, 4)), (2, (3,)), (3, (4, 5))):
        file = MetricsFile(path, resumed, console)
        for step in steps:
            file.write(step, {"resumed": resumed})
        file.close()
    assert [(line["step"], line["resumed"]) for line in lines_of(path)] == [
        (1, 0),
        (2, 0),
        (3, 2),
        (4, 3),
        (5, 3),
    ]


@given(length=st.integers(0, 100), step=st.integers(0, 5))
def test_of_a_file_that_a_crash_cut_the_whole_lines_stay(
    tmp_path_factory: pytest.TempPathFactory, length: int, step: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "cut.jsonl"
    whole = [json.dumps({"step": n, "loss": 0.5}) + "\n" for n in range(1, 5)]
    path.write_text("".join(whole)[:length])
    left = min(length // len(whole[0]), step, 4)
    cut_back(path, step)
    assert path.read_text() == "".join(whole[:left])


def test_before_the_first_line_there_is_nothing_to_cut(tmp_path: Path) -> None:
    cut_back(tmp_path / "metrics.jsonl", 3)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def disk_of() -> Iterator[Callable[[int], None]]:
    """Lets the kernel refuse what goes beyond some size in any file of this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_costs_lines_is_told_once_and_leaves_no_half_line(
    disk_of: Callable[[int], None], console: Console, tmp_path: Path
) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0, console)
    file.write(1, {})
    disk_of(path.stat().st_size + 20)
    for step in (2, 3, 4):
        file.write(step, {"train/loss": 1.5})
    assert printed(console).count("is not written") == 1
    assert f"{path} is not written: [Errno 27] File too large" in printed(console)
    disk_of(10_000)
    file.write(5, {})
    disk_of(path.stat().st_size)
    file.write(6, {})
    assert printed(console).count("is not written") == 2
    file.close()
    assert [line["step"] for line in lines_of(path)] == [1, 5]


# The console


def test_a_console_line_has_the_step_and_what_a_person_follows(console: Console) -> None:
    sink = ConsoleLine(console, 300)
    sink.write(
        20,
        {
            "train/loss": 3.21,
            "eval/heldout/loss": 3.5,
            "eval/heldout/bits_per_byte": 1.9,
            "eval/books/loss": 4.0,
            "eval/books/bits_per_byte": 2.0,
            "kv/ratio_to_vanilla": 1.0,
            "checkpoint/error": "the disk [/is] full",
        },
    )
    assert printed(console).splitlines() == [
        "step 20/300  loss 3.210",
        "step 20/300  heldout loss 3.500  1.900 bits/byte",
        "step 20/300  books loss 4.000  2.000 bits/byte",
        "step 20/300  checkpoint/error: the disk [/is] full",
    ]


def test_a_run_without_a_length_shows_the_step_alone(console: Console) -> None:
    ConsoleLine(console, None).write(20, {"train/loss": 3.21})
    assert printed(console) == "step 20  loss 3.210\n"


def test_a_step_with_nothing_to_follow_prints_nothing() -> None:
    assert console_lines({"kv/ratio_to_vanilla": 1.0, "progress/epoch": 0}) == []


# Weights & Biases


class Service:
    """W&B as it behaves when a connection or a disk is lost: a call raises."""

    def __init__(self, failing: str) -> None:
        self.failing = failing
        self.calls: list[str] = []

    def call(self, name: str) -> None:
        self.calls.append(name)
        if name == self.failing:
            raise OSError("[/gone] lost")

    def init(self, **_: object) -> "Service":
        self.call("init")
        return self

    def log(self, _: object, **__: object) -> None:
        self.call("log")

    def finish(self) -> None:
        self.call("finish")


@pytest.mark.parametrize(
    ("failing", "calls"),
    [
        ("init", ["init"]),
        ("log", ["init", "log"]),
        ("finish", ["init", "log", "log", "finish"]),
        ("", ["init", "log", "log", "finish"]),
    ],
)
def test_whatever_fails_at_wandb_is_told_once_and_left_out_from_there(
    failing: str,
    calls: list[str],
    config,
    console: Console,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    service = Service(failing)
    monkeypatch.setattr(wandb, "init", service.init)
    sink = Wandb(config("hooks.wandb.mode=offline"), tmp_path, console)
    sink.write(1, {"train/loss": 1.0})
    sink.write(2, {"train/loss": 1.0})
    sink.close()
    assert service.calls == calls
    told = "Weights & Biases failed and is left out from here on: [/gone] lost\n"
    assert printed(console) == (told if failing else "")


def test_training_goes_on_when_wandb_fails(
    config, trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wandb, "init", Service("log").init)
    done = trained(config("hooks.wandb.mode=offline"))
    assert done.record.ending == "finished"
    assert done.output.count("Weights & Biases failed") == 1


def test_a_directory_that_cannot_be_written_costs_wandb_alone(
    config, console: Console, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    sink = Wandb(config("hooks.wandb.mode=offline"), tmp_path / "file", console)
    sink.write(1, {})
    sink.close()
    assert printed(console).count("Weights & Biases failed") == 1
    assert "Not a directory" in printed(console)


def test_a_run_has_one_id_for_ever(tmp_path: Path) -> None:
    first = run_id(tmp_path)
    assert run_id(tmp_path) == first
    assert (tmp_path / "wandb_id.txt").read_text() == first
    (tmp_path / "other").mkdir()
    assert run_id(tmp_path / "other") != first


OFFLINE = """
import sys
from rich.console import Console
from rich.progress import Progress
from train.command_line import load
from train.loop import train
from train.run import open_run

for steps in (2, 4):
    config = load([*sys.argv[1:], f"train.max_steps={steps}"])
    with open_run(config, Console(width=300)) as run:
        train(run, Progress(disable=True))
"""


def test_a_resumed_run_is_one_offline_run_on_wandb(small, tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    environment |= {"HOME": str(tmp_path / "home"), "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, *small("hooks.wandb.mode=auto", "hooks.wandb.project=p")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "failed" not in done.stdout
    name = (tmp_path / "run/wandb_id.txt").read_text()
    files = sorted((tmp_path / "run/wandb").glob("offline-run-*/run-*.wandb"))
    assert [file.name for file in files] == [f"run-{name}.wandb"] * 2
    assert all(b"train/loss" in file.read_bytes() for file in files)
