"""Metrics reach the file, the console and W&B; a sink that fails costs its own output only."""

import io
import json
import os
import resource
import signal
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from time import sleep
from typing import Any

import pytest
import torch
import wandb
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from tests.fork_server import Command
from tests.patience import PATIENCE_S
from train.metrics.record import Metrics
from train.metrics.sinks import (
    ConsoleLine,
    FailingSink,
    MetricsFile,
    Wandb,
    append_metrics,
    console_lines,
    cut_back,
    keep_run_id,
)

REPOSITORY = Path(__file__).parents[3]


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


def test_a_disk_that_refuses_the_cut_at_a_resume_costs_no_run(
    disk_of: Callable[[int], None], console: Console, tmp_path: Path
) -> None:
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2, 3):
        MetricsFile(path, step, console).write(step, {"train/loss": 1.5})
    content = path.read_bytes()
    disk_of(20)
    MetricsFile(path, 2, console)
    disk_of(10_000)
    assert path.read_bytes() == content
    assert f"{path} cannot be cut back ([Errno 27] File too large); " in printed(console)


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
            "eval/mine/loss": 1.0,
            "sample/text": "def f():\n    [red]",
            "kv/ratio_to_vanilla": 1.0,
            "checkpoint/error": "the disk [/is] full",
        },
    )
    assert printed(console).splitlines() == [
        "step 20/300  loss 3.210",
        "step 20/300  heldout loss 3.500  1.900 bits/byte",
        "step 20/300  books loss 4.000  2.000 bits/byte",
        "step 20/300  mine loss 1.000",
        "step 20/300  a sample:",
        "def f():",
        "    [red]",
        "step 20/300  checkpoint/error: the disk [/is] full",
    ]


def test_a_run_without_a_length_shows_the_step_alone(console: Console) -> None:
    ConsoleLine(console, None).write(20, {"train/loss": 3.21})
    assert printed(console) == "step 20  loss 3.210\n"


def test_a_step_with_nothing_to_follow_prints_nothing() -> None:
    assert console_lines({"kv/ratio_to_vanilla": 1.0, "progress/epoch": 0}) == []


# Any sink


class Broken:
    def write(self, step: int, metrics: Metrics) -> None:  # noqa: ARG002
        raise OSError(28, "No space left on device")

    def close(self) -> None:
        raise ConnectionError("gone")


def test_whatever_a_sink_raises_costs_its_own_output_and_is_told_once(console: Console) -> None:
    sink = FailingSink(Broken(), console)
    for step in (1, 2, 3):
        sink.write(step, {"train/loss": 1.0})
    sink.close()
    assert printed(console) == (
        "Broken does not take the metrics of step 1: OSError: [Errno 28] No space left on device; "
        "the run goes on\n"
    )


@pytest.mark.parametrize("value", [torch.zeros(2), object(), {1, 2}])
def test_what_a_sink_cannot_write_costs_that_line_alone(
    value: Any, console: Console, tmp_path: Path
) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = FailingSink(MetricsFile(path, 0, console), console)
    sink.write(1, {"mine/value": value})
    sink.write(2, {"mine/value": 1.0})
    assert [line["step"] for line in lines_of(path)] == [2]
    assert "MetricsFile does not take the metrics of step 1: TypeError" in printed(console)


def test_every_sink_of_a_run_is_such_a_one(config, opened) -> None:
    run = opened(config("hooks.console=true"))
    assert {type(sink) for sink in run.sinks} == {FailingSink}
    assert len(run.sinks) == 2


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
    told = (
        "Weights & Biases failed and is left out from here on, but `wandb sync` can upload what is "
        f"in {tmp_path}/wandb: [/gone] lost\n"
    )
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


ONLINE = """
import os, signal, sys, threading
from pathlib import Path
from time import sleep
from rich.console import Console
from train.metrics import sinks
from train.compose import load

sinks.START_S = sinks.FINISH_S = 2.0
# Who relies on this limit, where another one should end the waiting, is told of as a failure.
sinks.CLOSE_S = 3.0 if sys.argv[1] == "stopped" else float(sys.argv.pop())
config = load([*sys.argv[2:], "hooks.wandb.mode=online"])
console = Console(width=1000)
config.run_dir.mkdir()
file = sinks.MetricsFile(config.run_dir / "metrics.jsonl", 0, console)
service = sinks.Wandb(config, config.run_dir, console)

def write(step):
    for sink in (file, service):
        sink.write(step, {"train/loss": step / 8})
    # It waits in a thread of its own, whatever it waits for.
    assert "wandb" in [thread.name for thread in threading.enumerate()]

write(1)
while not Path("go").exists():
    sleep(0.02)
if sys.argv[1] == "stopped":
    children = [p.read_text() for p in Path("/proc/self/task").glob("*/children")]
    child = int(" ".join(children))
    os.kill(child, signal.SIGSTOP)
    print("stopped", child, flush=True)
write(2)
service.close()
print("closed")
"""


class Server:
    """A W&B server for as long as a test wants one, as far as a run needs it.

    Attributes:
        known: set as soon as it has been told of a run.
        silent: while it is set, nothing is answered.
    """

    def __init__(self) -> None:
        self.known, self.silent = Event(), Event()
        server = self

        class Answers(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                while server.silent.is_set():
                    sleep(0.1)
                self.send_response(200)
                self.send_header("content-type", "application/json")
                self.end_headers()
                self.wfile.write(json.dumps({"data": ANSWER}).encode())
                if b"mutation UpsertBucket" in body:
                    server.known.set()

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
        self.thread = Thread(target=self.http.serve_forever, args=(0.05,))
        self.thread.start()

    def stop(self) -> None:
        self.silent.clear()
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()


PROJECT = {"id": "p", "name": "p", "entity": {"id": "e", "name": "e"}}
BUCKET = {"id": "b", "name": "b", "displayName": "b", "config": "{}", "project": PROJECT}
ANSWER = {
    "model": {"bucket": None},
    "upsertBucket": {"bucket": BUCKET, "inserted": True},
    "viewer": {"id": "v", "username": "u", "entity": "e", "flags": "{}"},
    "createRunFiles": {"runID": "b", "uploadHeaders": [], "files": []},
}


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.stop()


@pytest.mark.process
@pytest.mark.parametrize(
    ("trouble", "told"),
    [
        ("gone at the start", "Weights & Biases is not reached"),
        ("silent at the start", "Weights & Biases is not reached"),
        ("silent later", "Weights & Biases failed"),
        ("stopped", "its service has not answered for 3 s"),
        ("none", ""),
    ],
    ids=["gone_at_start", "silent_at_start", "silent_later", "stopped", "none"],
)
def test_a_wandb_that_is_gone_costs_little_time_and_no_metrics(
    trouble: str, told: str, server: Server, small: Callable[..., list[str]], tmp_path: Path
) -> None:
    if trouble == "gone at the start":
        server.stop()
    elif trouble == "silent at the start":
        server.silent.set()
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    environment = kept | {
        "HOME": str(tmp_path / "home"),
        "PYTHONPATH": str(REPOSITORY),
        "WANDB_API_KEY": "0123456789" * 4,
        "WANDB_BASE_URL": f"http://127.0.0.1:{server.http.server_port}",
        "WANDB_ERROR_REPORTING": "false",
    }
    patience = [] if trouble == "stopped" else [str(PATIENCE_S / 2)]
    (tmp_path / "online.py").write_text(ONLINE)
    script = tmp_path / "online.py", trouble, *small(), *patience
    process = Command(*script, cwd=tmp_path, env=environment, strict=False)
    if "start" not in trouble:
        assert server.known.wait(PATIENCE_S)
    if trouble == "silent later":
        server.silent.set()
    (tmp_path / "go").touch()
    text = "".join(process.communicate(PATIENCE_S))
    assert process.returncode == 0, text
    if trouble == "stopped":
        os.kill(int(text.partition("stopped ")[2].split()[0]), signal.SIGKILL)
    assert text.count("Weights & Biases") == bool(told)
    assert told in text
    assert text.count("closed") == 1
    assert [line["step"] for line in lines_of(tmp_path / "run/metrics.jsonl")] == [1, 2]
    if trouble != "stopped":
        mode = "offline-run" if "start" in trouble else "run"
        ((kept_there),) = (tmp_path / "run/wandb").glob(f"{mode}-*/run-*.wandb")
        assert kept_there.read_bytes().count(b"train/loss") >= 2


def test_a_run_has_one_id_for_ever(console: Console, tmp_path: Path) -> None:
    first = keep_run_id(tmp_path, None, console)
    assert keep_run_id(tmp_path, None, console) == first
    assert (tmp_path / "wandb_id.txt").read_text() == first
    (tmp_path / "other").mkdir()
    assert keep_run_id(tmp_path / "other", None, console) != first
    assert printed(console) == ""


@pytest.mark.parametrize("content", [b"", b"\0" * 16, b"\xff\xfe", b"two words\n", None])
def test_a_damaged_id_comes_from_the_checkpoint_or_is_told(
    content: bytes | None, console: Console, tmp_path: Path
) -> None:
    path = tmp_path / "wandb_id.txt"
    if content is not None:
        path.write_bytes(content)
    assert keep_run_id(tmp_path, "abc123", console) == "abc123"
    assert path.read_text() == "abc123"
    assert printed(console) == ""
    if content is not None:
        path.write_bytes(content)
        new = keep_run_id(tmp_path, None, console)
        assert path.read_text() == new
        assert f"{path} is damaged; the curves of Weights & Biases begin a new run" in printed(
            console
        )


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ([1, 2, 3, 4], ""),
        ([1, 2, 3, 4, "{"], ""),  # a process that was killed leaves it
        ([1, 2, 3, 4, "{\n"], "damaged lines are left out: 1"),
        ([1, "\0\0\0\n", '{"step": "3"}\n', 4], "damaged lines are left out: 2"),
        ([1, 2], "lines are lost; the last one is of step 2"),
        ([], "lines are lost; the last one is of step 0"),
        (["\0" * 80], "lines are lost; the last one is of step 0"),
    ],
)
def test_lost_lines_are_told(
    lines: list[int | str], told: str, console: Console, tmp_path: Path
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(x if isinstance(x, str) else f'{{"step": {x}}}\n' for x in lines))
    MetricsFile(path, 4, console, log_every=2)
    assert printed(console) == (f"{path}: {told}\n" if told else "")
    assert [line["step"] for line in lines_of(path)] == [x for x in lines if isinstance(x, int)]


def test_lines_of_an_evaluation_may_be_of_an_earlier_step(console: Console, tmp_path: Path) -> None:
    """The step of the checkpoint, while the run goes on."""
    path = tmp_path / "metrics.jsonl"
    for step in (2, 4, 3):
        append_metrics(path, step, {"eval/x/acc": 0.5})
    MetricsFile(path, 4, console)
    assert printed(console) == ""
    assert [line["step"] for line in lines_of(path)] == [2, 4, 3]


def test_the_training_does_not_wait_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl", 0, Console(file=io.StringIO()))
    flushed: list[int] = []
    monkeypatch.setattr(os, "fsync", flushed.append)
    file.write(1, {"train/loss": 1.0})
    assert flushed == []
    assert json.loads(file.path.read_text())["train/loss"] == 1.0


WANDB = ("hooks.wandb.project=p", "hooks.wandb.group=a-group", "hooks.wandb.tags=[a-tag]")

OFFLINE = """
import sys
from rich.console import Console
from rich.progress import Progress
from train.compose import load
from train.loop import train
from train.metrics.sinks import WandbSummary
from train.run import open_run

for steps in (2, 4):
    config = load([*sys.argv[1:], f"train.max_steps={steps}"])
    with open_run(config, Console(width=300)) as run:
        train(run, Progress(disable=True))
    written = config.run_dir / "wandb_id.txt"
    if steps == 2:  # a loss of power empties it
        name = written.read_text()
        written.write_text("")
assert written.read_text() == name
sink = WandbSummary(config, config.run_dir, Console(width=300))
sink.write(4, {"eval/x/acc": 0.25})
sink.close()
"""


@pytest.mark.process
def test_a_resumed_run_that_is_evaluated_is_one_offline_run_on_wandb(small, tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    environment |= {"HOME": str(tmp_path / "home"), "PYTHONPATH": str(REPOSITORY)}
    (tmp_path / "offline.py").write_text(OFFLINE)
    script = tmp_path / "offline.py", *small("hooks.wandb.mode=auto", *WANDB)
    done = Command(*script, cwd=tmp_path, env=environment, strict=False)
    output, errors = done.communicate(PATIENCE_S)
    assert done.returncode == 0, errors
    assert "failed" not in output
    name = (tmp_path / "run/wandb_id.txt").read_text()
    files = sorted((tmp_path / "run/wandb").glob("offline-run-*/run-*.wandb"))
    assert [file.name for file in files] == [f"run-{name}.wandb"] * 3
    *trained, evaluated = (file.read_bytes() for file in files)
    assert all(b"train/loss" in content for content in trained)
    assert b"eval/x/acc" in evaluated
    for text in (b"a-group", b"a-tag", b"phd_cswa-2-3-4"):
        assert all(text in content for content in trained)
