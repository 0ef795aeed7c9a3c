"""What the data does to a run: mixtures that go on, text that ends, shards that vanish."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from threading import Timer

import numpy as np
import pytest
import torch

from conf.errors import ConfigError, DataError
from data.source import Document
from data.tokenizer import Tokenizer
from tests.data.storage.fault_server import FaultServer, serving
from train import main as main_module
from train.checkpoint.reader import flatten
from train.config import Config
from train.metrics.record import Metrics, StepRecord
from train.run import Run


@pytest.fixture
def mixed(tmp_path: Path) -> Callable[..., list[str]]:
    """The overrides of a mixture of two corpora, packed best-fit and isolated, in two phases."""
    for name, words in (("a", 9), ("b", 40)):
        texts = [f"{name}{i} " + "tokens that are kept " * (i % words) for i in range(60)]
        text = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (tmp_path / f"{name}.jsonl").write_text(text)

    def overrides(*others: str) -> list[str]:
        sources = [f"data.sources.{n}={{kind:files,paths:{tmp_path}/{n}.jsonl}}" for n in "ab"]
        return [
            "~data.sources.files",
            *sources,
            "data.sources.b.weight=3",
            "data.phases.later.after_tokens=700",
            "data.phases.later.weights.a=5",
            "data.packing=best_fit",
            "data.documents=isolate",
            *others,
        ]

    return overrides


class Vanishing:
    """A hook that removes a file after some step."""

    every = 1

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        self.step = step

    def __call__(self, record: StepRecord) -> Metrics:
        if record.step == self.step:
            self.path.unlink()
        return {}


def test_a_mixture_goes_on_bitwise(config, mixed, trained, logged, tmp_path: Path) -> None:
    settings = mixed("train.max_steps=12", "data.workers=2", "schedule=constant")
    whole = trained(config(*settings, f"run.dir={tmp_path / 'whole'}"))
    trained(config(*mixed("train.max_steps=5", "data.workers=0", "schedule=constant")))
    rest = trained(config(*settings))

    def steps(run: Run) -> list[Metrics]:
        """What is logged, without what is measured at an end only."""
        ends = ("eval/", "sample/")
        lines = logged(run.directory)
        return [{k: v for k, v in line.items() if not k.startswith(ends)} for line in lines]

    assert steps(rest.run) == steps(whole.run)
    assert rest.metrics["eval/a/loss"] == whole.metrics["eval/a/loss"]
    ours, theirs = (flatten(done.run.engine.state()) for done in (rest, whole))
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    last = logged(rest.run.directory)[-1]
    assert last["progress/a/tokens"] > 0
    assert last["progress/b/tokens"] > 0
    assert 0 < last["data/padding_fraction"] < 0.5
    assert {"eval/a/loss", "eval/b/loss"} <= set(last)


def test_changed_weights_are_refused_on_resume(config, mixed, trained, opened) -> None:
    trained(config(*mixed("train.max_steps=2")))
    with pytest.raises(ConfigError, match=r"weight and data\.phases=.*: was .* when this run"):
        opened(config(*mixed("train.max_steps=4", "data.sources.b.weight=4")))


def test_a_phase_that_has_not_begun_may_change_on_resume(config, mixed, trained) -> None:
    far = "data.phases.later.after_tokens=100000"
    trained(config(*mixed("train.max_steps=2", far)))
    other = mixed("train.max_steps=4", far, "data.phases.later.weights.a=2")
    done = trained(config(*other))
    assert done.record.step == 4
    assert "changed since then: data.sources.*.weight and data.phases was" in done.output


def test_text_that_a_later_phase_lacks_is_told_before_the_run_has_a_directory(
    config, mixed, opened, tmp_path: Path
) -> None:
    (tmp_path / "few.jsonl").write_text(json.dumps({"text": "only one"}) + "\n")
    settings = mixed(
        f"data.sources.few={{kind:files,paths:{tmp_path}/few.jsonl,weight:0}}",
        "data.phases.later.weights.few=1",
    )
    with pytest.raises(DataError, match=r"data\.phases give data\.sources\.few a weight later"):
        opened(config(*settings))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("length", [100_000, 17_000_000], ids=["valid", "quarantined"])
def test_a_run_over_one_huge_record_trains_and_goes_on_bitwise(
    config, trained, logged, corpus: Path, tmp_path: Path, length: int
) -> None:
    lines = corpus.read_text().splitlines(keepends=True)
    huge = json.dumps({"text": "huge " * (length // 5)}) + "\n"
    (path := tmp_path / "huge.jsonl").write_text("".join([*lines[:9], huge, *lines[9:]]))
    paths = f"data.sources.files.paths={path}"
    settings = (paths, "data.lanes=4", "schedule=constant", "train.max_steps=8")
    whole = trained(config(*settings, f"run.dir={tmp_path / 'whole'}"))
    trained(config(*settings, "train.max_steps=3"))
    rest = trained(config(*settings))
    told = "data.sources.files: its lanes are cut by documents"
    assert told in whole.output
    assert told not in rest.output, "the checkpoint says so already"
    losses = [[line["train/loss"] for line in logged(d.run.directory)] for d in (whole, rest)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 8
    state = rest.run.store.newest().state["stream"]
    assert len(state["data.sources.files.lanes"]) == 4


def test_a_run_ends_well_with_its_text(
    config: Callable[..., Config], logged, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    settings = config("data.sources.files.epochs=2", "train.max_steps=500", "hooks.console=false")
    assert main_module.main(settings) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "ended after step" in output
    assert "data.sources.*.epochs={'files': 2}: all text has been read" in output
    assert "the same command again" not in output
    assert "heldout: " in output
    assert main_module.main(settings) == 0
    assert "nothing to train: " in capsys.readouterr().out
    more = config("data.sources.files.epochs=3", "train.max_steps=500")
    assert main_module.main(more) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "changed since then: data.sources.files.epochs was 2 and is now 3" in output
    last = logged(tmp_path / "run")[-1]
    assert last["progress/files/epoch"] == 3


def test_when_the_data_fails_the_run_is_saved_before_it_says_so(
    config, trained, corpus: Path, tmp_path: Path
) -> None:
    path = tmp_path / "text.jsonl"
    path.write_bytes(corpus.read_bytes())
    settings = config(
        f"data.sources.files.paths={path}",
        "data.remote.retry_s=0.2",
        "data.workers=1",
        "data.prefetch=1",
        "train.max_steps=500",
    )
    done = trained(settings, hooks=(Vanishing(path, 3),))
    assert done.record.ending == "data_failed"
    assert str(path) in str(done.record.failure)
    newest = done.run.store.newest()
    assert newest.step == done.record.step >= 3
    path.write_bytes(corpus.read_bytes())
    more = config(f"data.sources.files.paths={path}", f"train.max_steps={newest.step + 2}")
    assert trained(more).record.step == newest.step + 2


def test_what_is_no_document_is_found_in_the_runs_directory(
    config, trained, logged, corpus: Path, tmp_path: Path
) -> None:
    path = tmp_path / "text.jsonl"
    path.write_bytes(b"not JSON\n" + corpus.read_bytes() + b'{"text": ""}\n')
    done = trained(config(f"data.sources.files.paths={path}", "train.max_steps=30"))
    lines = (done.run.directory / "quarantine.jsonl").read_text().splitlines()
    origins = {json.loads(line)["origin"]: json.loads(line)["reason"] for line in lines}
    size = path.stat().st_size
    assert origins[f"{path}@0"].startswith("not JSON")
    assert origins[f"{path}@{size - len(b'{.text.: ..}') - 1}"] == "empty"
    assert len(origins) == 2
    assert logged(done.run.directory)[-1]["data/quarantined"] == 2


class Stalling:
    """A hook after which a server answers nothing any more, and somebody ends the run."""

    every = 1

    def __init__(self, server: FaultServer, step: int) -> None:
        self.server = server
        self.step = step

    def __call__(self, record: StepRecord) -> Metrics:
        if record.step == self.step:
            self.server.behaviour.rate = 1.0
            Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
        return {}


def test_a_signal_ends_a_run_that_waits_for_a_stalled_server(
    config, trained, corpus: Path, tmp_path: Path
) -> None:
    lines = corpus.read_bytes()
    for number in range(9):
        (tmp_path / f"{number}.jsonl").write_bytes(lines)
    with serving(tmp_path, faults=("stall",), stall_s=1e9) as server:
        settings = config(
            f"data.sources.files.paths=[{','.join(f'{server.url}/{n}.jsonl' for n in range(9))}]",
            "data.lanes=1",
            "data.workers=1",
            "data.prefetch=1",
            "data.remote.timeout_s=1",
            "train.max_steps=5000",
            "train.micro_batch=4",
        )
        done = trained(settings, hooks=(Stalling(server, 2),))  # no stall is over before this is
    assert done.record.ending == "SIGTERM"
    assert 2 < done.record.step < 5000
    newest = done.run.store.newest()
    assert newest.step == done.record.step


def test_a_resumed_run_keeps_its_own_tokenizer(
    config, trained, opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = trained(config("train.max_steps=2"))
    monkeypatch.setenv("PHD_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr("data.tokenizer_training.train", None)
    again = opened(config("train.max_steps=4"))
    assert again.tokenizer.fingerprint == done.run.tokenizer.fingerprint
    assert again.step == 2


def test_a_failure_that_is_nobodys_setting_shows_after_the_run_was_saved(
    config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    encode, calls = Tokenizer.document_tokens, []

    def failing(tokenizer: Tokenizer, document: Document) -> np.ndarray:
        calls.append(document)
        if len(calls) > 60:
            raise RuntimeError("broken")
        return encode(tokenizer, document)

    monkeypatch.setattr(Tokenizer, "document_tokens", failing)
    with pytest.raises(RuntimeError, match="broken"):
        main_module.main(config("train.max_steps=500"))
    assert len(list((tmp_path / "run/checkpoints").glob("step_*/COMPLETE"))) == 1
