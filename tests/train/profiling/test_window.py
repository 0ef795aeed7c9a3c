"""A profile is of the steps that are asked for, however the run goes, and changes nothing in it."""

import gzip
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.errors import ConfigError
from tests.train.distributed.test_run import train_on
from tests.train.many_ranks import run_ranks
from train.config import Config
from train.metrics.record import Metrics, StepRecord
from train.profiling.window import MEMORY, TABLE, TRACE
from train.run_dir.name import identity

PROFILE = ("train.profile=true", "train.profile_start=3", "train.profile_steps=2")


def steps_in(folder: Path) -> int:
    """How many optimizer steps the trace shows."""
    with gzip.open(folder / TRACE) as file:
        events = json.load(file)["traceEvents"]
    return sum(event["name"] == "Optimizer.step#AdamW.step" for event in events)


def test_the_window_is_written_and_printed_and_changes_nothing(
    config: Callable[..., Config], trained: Callable[..., Any], tmp_path: Path
) -> None:
    plain = trained(config(f"run.dir={tmp_path / 'plain'}"))
    found = trained(config(*PROFILE))
    assert found.metrics["train/loss"] == plain.metrics["train/loss"]
    folder = tmp_path / "run" / "profile"
    assert sorted(path.name for path in folder.iterdir()) == [TABLE, TRACE]
    assert steps_in(folder) == 2
    text = (folder / TABLE).read_text(encoding="utf-8")
    assert text.startswith("Where the time of a step goes: steps 3 to 4, CPU, torch ")
    assert "| matrix products |" in text
    assert text.strip() in found.output
    assert not (tmp_path / "plain" / "profile").exists()


def test_a_signal_within_the_window_leaves_the_steps_that_were_taken(
    config: Callable[..., Config], trained: Callable[..., Any], tmp_path: Path
) -> None:
    class Signalling:
        every = 1

        def __call__(self, record: StepRecord) -> Metrics:
            if record.step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return {}

    long = ("train.max_steps=100", "schedule=constant", "train.profile_steps=50")
    done = trained(config(*PROFILE[:2], *long), hooks=(Signalling(),))
    folder = tmp_path / "run" / "profile"
    assert done.record.step == 4
    assert steps_in(folder) == 2
    assert "steps 3 to 4" in (folder / TABLE).read_text(encoding="utf-8")


def test_a_resumed_run_counts_from_its_beginning(
    config: Callable[..., Config], trained: Callable[..., Any], tmp_path: Path
) -> None:
    folder = tmp_path / "run" / "profile"
    trained(config("train.max_steps=2", "schedule=constant"))
    found = trained(config("train.max_steps=6", "schedule=constant", *PROFILE))
    assert "steps 3 to 4" in (folder / TABLE).read_text(encoding="utf-8")
    assert "changed since then: train.profile" not in found.output
    (folder / TABLE).unlink()
    found = trained(config("train.max_steps=8", "schedule=constant", *PROFILE))
    assert "train.profile: the run goes on after steps 3 to 4" in found.output
    assert not (folder / TABLE).exists()


def test_a_folder_that_cannot_be_written_costs_the_profile_alone(
    config: Callable[..., Config], trained: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "profile").touch()
    found = trained(config(*PROFILE))
    assert found.record.step == 6
    assert f"no profile in {tmp_path / 'run' / 'profile'}: " in found.output


@pytest.mark.process
def test_of_several_ranks_the_first_is_profiled(
    small_at: Callable[..., list[str]], tmp_path: Path
) -> None:
    run_ranks(2, train_on, small_at(tmp_path / "run", *PROFILE))
    folder = tmp_path / "run" / "profile"
    assert steps_in(folder) == 2
    assert "| communication |" in (folder / TABLE).read_text(encoding="utf-8")


def test_impossible_and_useless_windows_are_refused(config: Callable[..., Config]) -> None:
    with pytest.raises(ConfigError, match=r"train\.profile_start=7: the run ends after step 6"):
        config("train.profile=true", "train.profile_start=7")
    with pytest.raises(ConfigError, match=r"train\.profile_steps=5: no step is profiled"):
        config("train.profile_steps=5")
    with pytest.raises(ConfigError, match=r"train\.profile_steps=0: expected"):
        config(*PROFILE, "train.profile_steps=0")


def test_a_profile_does_not_make_another_run(config: Callable[..., Config]) -> None:
    assert identity(config(*PROFILE)) == identity(config())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_cuda_kernels_are_told_and_memory_is_written(
    config: Callable[..., Config], trained: Callable[..., Any], tmp_path: Path
) -> None:
    trained(config(*PROFILE, "engine.device=cuda"))
    folder = tmp_path / "run" / "profile"
    assert sorted(path.name for path in folder.iterdir()) == [MEMORY, TABLE, TRACE]
    assert (folder / MEMORY).stat().st_size > 0
    text = (folder / TABLE).read_text(encoding="utf-8")
    assert "| clipping and optimizer |" in text
    assert "| matrix products |" in text
