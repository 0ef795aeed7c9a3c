"""A run goes on bitwise where it ended, refuses what it is not, and says what it does."""

import io
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from rich.console import Console
from torch import Tensor

from conf.errors import ConfigError, DataError
from data.tokenizer import Tokenizer
from train.checkpoint.load_run import load_run
from train.checkpoint.reader import flatten
from train.checkpoint.store import CheckpointStore
from train.config import Config
from train.engines.fsdp import FsdpEngine
from train.hf.pretrained import save_pretrained
from train.metrics.record import Metrics, StepRecord
from train.metrics.sinks import MetricsFile
from train.run import Run, open_run
from train.run_dir.name import holds
from train.run_dir.prepare import archive_run_dir

MODELS = {
    "vanilla": ["model=vanilla"],
    "phd_cswa, accumulating": ["model=phd_cswa", "model.K=3", "train.micro_batch=1"],
    "phd, in the data's order": ["model=phd", "data.shuffle=false", "data.prefetch=7"],
}


class InterruptAfter:
    """A hook that sends this process a signal; the step after that is the last."""

    every = 1

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self, record: StepRecord) -> Metrics:
        if record.step == self.step:
            os.kill(os.getpid(), signal.SIGINT)
        return {}


def everything(trained) -> dict[str, Tensor]:
    """Weights, moments and random numbers of a run, by name."""
    return {name: t.clone() for name, t in flatten(trained.run.engine.state()).items()}


def assert_equal_bits(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def refusal(config: Config) -> str:
    with (
        pytest.raises((ConfigError, DataError)) as error,
        open_run(config, Console(file=io.StringIO())),
    ):
        pass
    [problem] = getattr(error.value, "problems", [error.value])
    return str(problem)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


# Going on


@pytest.mark.parametrize("model", MODELS)
def test_a_run_interrupted_twice_ends_bitwise_as_one_that_was_not(
    model: str, config, trained, logged, tmp_path: Path
) -> None:
    whole = trained(config(*MODELS[model], f"run.dir={tmp_path / 'whole'}"))
    first = trained(config(*MODELS[model]), hooks=(InterruptAfter(1),))
    second = trained(config(*MODELS[model]), hooks=(InterruptAfter(3),))
    last = trained(config(*MODELS[model]))
    # A step of several micro-batches is given up: the signal came in the one before it.
    ends = [1, 3, 6, 6] if model.endswith("accumulating") else [2, 4, 6, 6]
    assert [t.record.step for t in (first, second, last, whole)] == ends
    assert [t.record.ending for t in (first, second, last)] == ["SIGINT", "SIGINT", "finished"]
    assert_equal_bits(everything(last), everything(whole))
    assert logged(last.run.directory) == logged(whole.run.directory)
    assert len(logged(whole.run.directory)) == 6


def test_a_run_whose_process_died_goes_on_from_its_last_checkpoint(
    config, trained, logged, tmp_path: Path
) -> None:
    class Crash:
        every = 1

        def __call__(self, record: StepRecord) -> Metrics:
            if record.step == 5:
                raise MemoryError
            return {}

    whole = trained(config("checkpoint.every=2", f"run.dir={tmp_path / 'whole'}"))
    with pytest.raises(MemoryError):
        trained(config("checkpoint.every=2"), hooks=(Crash(),))
    last = trained(config("checkpoint.every=2"))
    assert f"going on from {tmp_path}/run/checkpoints/step_00000004" in last.output
    assert_equal_bits(everything(last), everything(whole))
    assert logged(last.run.directory) == logged(whole.run.directory)


def test_a_truncated_checkpoint_is_passed_over_and_the_one_before_it_used(
    config, trained, logged, tmp_path: Path
) -> None:
    whole = trained(config("checkpoint.every=2"))
    tensors, lines = everything(whole), logged(whole.run.directory)
    damaged = tmp_path / "run/checkpoints/step_00000006"
    cut(damaged / "__0_0.distcp")
    again = trained(config("checkpoint.every=2"))
    assert f"rejected the checkpoint {damaged}: __0_0.distcp has" in again.output
    assert f"going on from {tmp_path}/run/checkpoints/step_00000004" in again.output
    assert_equal_bits(everything(again), tensors)
    assert logged(again.run.directory) == lines


def test_when_every_checkpoint_is_damaged_the_run_does_not_start_anew(config, trained) -> None:
    run = trained(config()).run
    cut(run.store.newest().path / "state.json")
    problem = refusal(config())
    assert f"every checkpoint in {run.store.root} is damaged" in problem
    assert "run.resume=never" in problem


def test_a_complete_run_has_nothing_left_to_train(config, trained, opened) -> None:
    done = trained(config())
    again = opened(config())
    assert (again.finished, again.step) == (True, 6)
    assert_equal_bits(flatten(again.engine.state()), everything(done))
    # What it says of itself is what it said when it ended.
    assert again.measure() == {key: done.metrics[key] for key in again.measure()}


def test_a_complete_run_goes_on_when_it_is_made_longer(config, trained, tmp_path: Path) -> None:
    longer = ["train.max_steps=9", "schedule=constant"]
    trained(config("schedule=constant"))
    extended = trained(config(*longer))
    whole = trained(config(*longer, f"run.dir={tmp_path / 'whole'}"))
    assert "changed since then: train.max_steps was 6 and is now 9" in extended.output
    assert "takes another course" not in extended.output
    assert extended.record.step == 9
    assert_equal_bits(everything(extended), everything(whole))


def test_a_changed_learning_rate_is_told_and_followed(config, trained) -> None:
    trained(config("schedule=constant", "optim.lr=1e-3"))
    changed = trained(config("schedule=constant", "optim.lr=5e-4", "train.max_steps=7"))
    assert "changed since then: optim.lr was 0.001 and is now 0.0005" in changed.output
    assert "the learning rate takes another course. Step 6 had 0.001. " in changed.output
    assert changed.record.lr == 5e-4


QUIET_CHANGES = ["hooks.log_every=2", "eval.every=1", "checkpoint.keep=1", "model.attention=packed"]


def test_every_file_of_a_run_has_the_permissions_of_the_umask(config, trained) -> None:
    before = os.umask(0o027)
    try:
        run = trained(config("checkpoint.every=3", "hooks.wandb.mode=offline")).run
    finally:
        os.umask(before)
    others = {
        str(path.relative_to(run.directory)): oct(path.stat().st_mode & 0o777)
        for path in run.directory.rglob("*")
        if path.is_file() and path.stat().st_mode & 0o777 not in (0o640, 0o750)
    }
    assert others == {}


def test_what_only_reports_may_change_without_a_word(config, trained) -> None:
    trained(config())
    changed = trained(config(*QUIET_CHANGES, "train.max_steps=7"))
    assert changed.output.count("changed since then") == 1  # the length


def test_a_new_run_starts_from_given_weights_and_a_resumed_one_from_its_own(
    config, trained, opened, tmp_path: Path
) -> None:
    pytest.importorskip("safetensors")
    given = opened(config("model=vanilla", "seed=7", f"run.dir={tmp_path / 'given'}")).engine.model
    save_pretrained(tmp_path / "weights", given.config, given.state_dict())
    settings = ["model=phd", f"run.start_from={tmp_path / 'weights'}"]
    fresh = opened(config(*settings)).engine.model
    assert all(
        torch.equal(p, q) for p, q in zip(fresh.parameters(), given.parameters(), strict=True)
    )
    done = trained(config(*settings))
    resumed = opened(config(*settings))
    assert_equal_bits(flatten(resumed.engine.state()), everything(done))
    problem = refusal(config(*settings, "model.dim=32", f"run.dir={tmp_path / 'other'}"))
    assert "model.dim=16 (here it is 32)" in problem


# What must not change


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("model.dim=32", "model.dim was 16 and is now 32"),
        ("model.K=3", "model.K was 2 and is now 3"),
        ("model=phd", "model.variant was 'phd_cswa' and is now 'phd'"),
        ("seed=1", "seed was 0 and is now 1"),
        ("train.seq_len=16", "train.seq_len was 32 and is now 16"),
        ("train.global_batch=8", "train.global_batch was 4 and is now 8"),
        ("data.lanes=4", "data.lanes=4: was 2 when this run began"),
        ("data.lanes=1", "data.lanes=1: was 2 when this run began"),
        ("data.shuffle=false", "data.shuffle=false: was true when this run began"),
        ("data.holdout=0.3", "data.holdout=0.3: was 0.2 when this run began"),
        ("tokenizer.vocab_size=300", "': was '"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused_and_left_alone(
    change: str, told: str, config, trained
) -> None:
    run = trained(config()).run
    before = sorted(path.stat().st_mtime_ns for path in run.directory.rglob("*"))
    problem = refusal(config(change, "train.max_steps=9"))
    assert told in problem
    assert "run.name" in problem
    assert sorted(path.stat().st_mtime_ns for path in run.directory.rglob("*")) == before


def rewritten(run: Run, weights: dict[str, int], drop: str = "") -> None:
    """Save the run's state as the checkpoint of a later step, with norms of other lengths."""
    newest = run.store.newest()
    assert newest is not None
    tensors = newest.read(newest.specs)
    for name in tensors:
        for part, length in weights.items():
            if f"attention.{part}.weight" in name:
                tensors[name] = torch.ones(length)
    state = {**newest.state, "step": newest.step + 1}
    state["config"]["model"].pop(drop, None)
    run.store.save(newest.step + 1, tensors, state)
    run.store.wait()


@pytest.mark.parametrize(("model", "norm"), [("phd_cswa", "hybrid"), ("vanilla", "hybrid_star")])
def test_a_checkpoint_of_hybrid_over_whole_projections_is_refused_by_name(
    model: str, norm: str, config, trained
) -> None:
    settings = (f"model={model}", f"model.norm={norm}", "model.heads=4", "model.kv_heads=2")
    run = trained(config(*settings)).run
    load_run(run.directory, torch.device("cpu"))
    rewritten(run, {"q_norm": 4 * 8, "k_norm": 2 * 8, "v_norm": 2 * 8})
    told = f"is of the old form of model.norm={norm}, which normalised whole projections of queries"
    problem = refusal(config(*settings, "train.max_steps=9"))
    assert told in problem
    assert "source/" in problem
    with pytest.raises(ConfigError, match=re.escape(told)):  # generate, export
        load_run(run.directory, torch.device("cpu"))


def test_a_model_setting_that_is_newer_than_a_checkpoint_had_its_default(config, trained) -> None:
    run = trained(config("schedule=constant")).run
    rewritten(run, {}, drop="head_init")
    resumed = trained(config("schedule=constant", "train.max_steps=9"))
    assert "head_init" not in resumed.output
    assert resumed.record.step == 9
    problem = refusal(config("schedule=constant", "model.head_init=fan_in", "model.tied=false"))
    assert "model.head_init was 'embedding' and is now 'fan_in'" in problem


def test_an_earlier_run_with_a_setting_that_its_variant_does_not_use_goes_on(
    config, trained
) -> None:
    """As commands of that time took them: `model=phd_swa model.chunk=16`."""
    now = config("model=phd_swa", "schedule=constant")
    then = replace(now.model, chunk=16), replace(now.schedule, final_ratio=0.3)
    run = trained(replace(now, model=then[0], schedule=then[1])).run
    assert holds(run.directory, now)
    problem = refusal(config("model=phd_cswa", "schedule=constant"))
    assert "model.variant was 'phd_swa' and is now 'phd_cswa'" in problem
    assert "model.chunk was 16 and is now 4" in problem
    resumed = trained(config("model=phd_swa", "schedule=constant", "train.max_steps=9"))
    assert resumed.record.step == 9
    assert "model.chunk" not in resumed.output
    assert "final_ratio" not in resumed.output


def test_a_corpus_that_has_grown_is_refused(config, trained, corpus: Path, tmp_path: Path) -> None:
    text = tmp_path / "mine.jsonl"
    text.write_bytes(corpus.read_bytes())
    trained(config(f"data.sources.files.paths={text}"))
    text.write_bytes(corpus.read_bytes() + b'{"text": "more"}\n')
    problem = refusal(config(f"data.sources.files.paths={text}", "train.max_steps=9"))
    assert problem.startswith("data.sources.files='1 files ")
    assert ": was '1 files " in problem


def test_a_corpus_may_move(config, trained, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    moved = tmp_path / "elsewhere" / corpus.name
    moved.write_bytes(corpus.read_bytes())
    trained(config())
    assert (
        trained(config(f"data.sources.files.paths={moved}", "train.max_steps=7")).record.step == 7
    )


# run.resume


def test_a_run_that_must_go_on_needs_a_checkpoint(config, trained, tmp_path: Path) -> None:
    problem = refusal(config("run.resume=must"))
    assert problem == (
        f"run.resume='must': there is no checkpoint in {tmp_path}/run/checkpoints; check run.dir, "
        "or choose run.resume=auto"
    )
    trained(config())
    assert trained(config("run.resume=must", "train.max_steps=7")).record.step == 7


def test_a_run_that_never_goes_on_sets_the_old_one_aside_whole(
    config, trained, tmp_path: Path
) -> None:
    first = trained(config())
    files = {p.relative_to(tmp_path / "run"): p.read_bytes() for p in sorted_files(tmp_path, "run")}
    second = trained(config("run.resume=never", "seed=1"))
    assert f"the earlier run is now in {tmp_path}/run.old-1" in second.output
    kept = sorted_files(tmp_path, "run.old-1")
    assert {p.relative_to(tmp_path / "run.old-1"): p.read_bytes() for p in kept} == files
    third = trained(config("run.resume=never"))
    assert_equal_bits(everything(third), everything(first))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "run.old-1", "run.old-2"]


def sorted_files(folder: Path, name: str) -> list[Path]:
    return sorted(path for path in (folder / name).rglob("*") if path.is_file())


def test_a_refused_run_leaves_the_old_one_where_it_is(config, trained, tmp_path: Path) -> None:
    trained(config())
    refusal(config("run.resume=never", "data.sources.files.paths=nowhere.txt"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


def test_there_is_nothing_to_set_aside_before_the_first_run(tmp_path: Path) -> None:
    assert archive_run_dir(tmp_path / "run") is None


# The directory


def test_the_directory_says_what_the_run_is_made_of(config, trained) -> None:
    run = trained(config()).run
    again = trained(config("train.max_steps=7"))
    saved = OmegaConf.to_container(OmegaConf.load(run.directory / "config.yaml"))
    assert Config.from_dict(saved) == again.run.config
    assert (
        Tokenizer.load(run.directory / "tokenizer.model").fingerprint == run.tokenizer.fingerprint
    )
    starts = json.loads((run.directory / "environment.json").read_text())
    assert [start["packages"]["torch"] for start in starts] == [torch.__version__] * 2
    assert starts[0]["python"] == ".".join(map(str, sys.version_info[:3]))


def test_git_is_not_needed(config, opened, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError):
        subprocess.run(["git"])
    directory = opened(config()).directory
    [start] = json.loads((directory / "environment.json").read_text())
    assert start["revision"] is None


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("data.sources.files.paths=nowhere.txt", "data.sources.files.paths='nowhere.txt': "),
        ("tokenizer.path=none.model", "tokenizer.path='none.model': no such file"),
        ("tokenizer.vocab_size=100", "tokenizer.vocab_size=100: SentencePiece cannot make"),
        ("data.holdout=0.001", "data.holdout=0.001: holds out none of the documents"),
    ],
)
def test_what_cannot_be_opened_is_refused_before_anything_is_written(
    override: str, told: str, config, tmp_path: Path
) -> None:
    assert refusal(config(override)).startswith(told)
    assert list(tmp_path.iterdir()) == []


def test_without_cuda_it_cannot_be_asked_for(config, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    assert refusal(config("engine.device=cuda")).startswith(
        "engine.device='cuda': this machine has"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("directory", ["/sys/run", "/proc/run", "/dev/null/run"])
def test_a_directory_that_cannot_be_written_is_refused(directory: str, config) -> None:
    told = refusal(config(f"run.dir={directory}"))
    assert told.startswith(f"run.dir='{directory}': cannot be written (")
    assert told.endswith("choose another run.dir, or make room there")


def test_with_nothing_held_out_there_is_no_evaluation(config, trained) -> None:
    metrics = trained(config("data.holdout=0")).metrics
    assert "sample/text" in metrics
    assert [key for key in metrics if key.startswith("eval/")] == []


def test_flex_attention_off_cuda_is_refused_before_anything_is_built(
    config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    settings = config("model.attention=flex", "engine.device=auto")
    assert refusal(settings).startswith("model.attention='flex': ")
    assert not settings.run_dir.exists()


class Unclosable:
    """A sink that fails at its end."""

    def write(self, step: int, metrics: Metrics) -> None:
        pass

    def close(self) -> None:
        raise ConnectionError("the server is gone")


def test_a_sink_that_fails_on_closing_keeps_nothing_else_open(
    config, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[str] = []
    for owner in (CheckpointStore, FsdpEngine, MetricsFile):
        monkeypatch.setattr(owner, "close", lambda _, name=owner.__name__: closed.append(name))
    monkeypatch.setattr("train.run.Wandb", lambda *_: Unclosable())
    settings = config("hooks.wandb.mode=offline")
    written = io.StringIO()
    with open_run(settings, Console(file=written)):
        pass
    assert "the server is gone" in written.getvalue()
    assert closed == ["CheckpointStore", "MetricsFile", "FsdpEngine"]
    assert not (settings.run_dir / "stacks").exists()  # the watchdog has been left, too


def test_what_fails_while_a_run_is_opened_closes_the_engine(
    config, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[str] = []
    monkeypatch.setattr(FsdpEngine, "close", lambda _: closed.append("engine"))
    with (
        pytest.raises(ConfigError, match=r"data\.holdout="),
        open_run(config("data.holdout=1e-9"), Console(file=io.StringIO())),
    ):
        pass
    assert closed == ["engine"]
