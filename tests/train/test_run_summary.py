"""What a run says when it ends is what was measured, and its commands are real."""

import io
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from conf.validation import flatten_keys
from data.prefetch import never
from train.compose import check, other_runs
from train.distributed.dist_env import DistEnv
from train.distributed.process_groups import ProcessGroups
from train.metrics.hooks import Sample
from train.metrics.record import Metrics
from train.run import Run
from train.run_summary import next_commands, print_summary

METRICS: Metrics = {
    "train/loss": 2.5,
    "eval/heldout/loss": 3.25,
    "eval/heldout/bits_per_byte": 1.7512,
    "sample/text": "def f(x): [red]\n    return x[/]",
}


def report(run: Run, step: int, metrics: Metrics) -> str:
    text = io.StringIO()
    complete = step >= 6
    print_summary(run, metrics, Console(file=text, width=300), complete=complete)
    return text.getvalue()


def test_the_report_has_the_result_a_sample_the_kv_cache_and_the_places(config, trained) -> None:
    run = trained(config("model.K=3", "hooks.kv.context=100")).run
    text = report(run, 6, METRICS)
    assert "heldout: 1.751 bits per byte, loss 3.250 nats per token" in text
    assert "def f(x): [red]\n    return x[/]" in text
    assert "KV cache of one sequence of 100 tokens" in text
    # A slot is 2 layers x (key and value) x 1 head x 8 values x 4 bytes = 128 bytes.
    rows = [line.split() for line in text.splitlines() if "│" in line]
    cells = [[cell for cell in row if cell != "│"] for row in rows]
    assert ["vanilla", "12,800", "0", "1.000"] in cells
    assert ["naive_repeat-3", "38,400", "25,600", "3.000"] in cells
    assert ["phd_cswa-3-3-4", "13,184", "384", "1.030"] in cells
    assert str(run.directory / "checkpoints" / "step_00000006") in text
    assert str(run.directory / "metrics.jsonl") in text


def test_the_report_does_without_what_was_not_measured(config, opened) -> None:
    text = report(opened(config("data.holdout=0")), 0, {})
    assert "heldout" not in text
    assert "a sample" not in text
    assert "checkpoint: none could be saved" in text


def test_a_run_that_is_not_at_its_end_is_told_how_it_goes_on(config, opened) -> None:
    run = opened(config())
    assert (
        next_commands(run, [], complete=False)[0]
        == "run the same command again to continue the training"
    )
    assert "the same command" not in " ".join(next_commands(run, [], complete=True))


@pytest.mark.parametrize("step", [5, 6])
def test_every_command_it_suggests_exists(step: int, config, opened) -> None:
    run = opened(config())
    others = other_runs(run.config)
    commands = list(map(shlex.split, next_commands(run, others, complete=step >= 6)))
    scripts = [words for words in commands if words[1].endswith(".py")]
    assert len(scripts) == (1 if step < 6 else 4)
    for interpreter, script, *arguments in scripts:
        assert shutil.which(interpreter)
        assert Path(script).is_file()
        if Path(script).name == "main.py":
            check([a for a in arguments if a != "-m"], multirun="-m" in arguments)


@pytest.mark.parametrize(("nodes", "processes"), [(1, 1), (1, 2), (2, 2)])
def test_other_runs_are_proposed_on_as_many_ranks_of_this_machine(
    nodes: int, processes: int, config, opened
) -> None:
    run = opened(config())
    place = DistEnv(world_size=nodes * processes, local_world_size=processes)
    run = replace(run, groups=ProcessGroups(dist_env=place))
    generate, other, bench = next_commands(run, [["model=vanilla"]], complete=True)
    start = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    several = (nodes, processes) == (1, 2)
    _, *words = shlex.split(other)
    assert words[: len(start)] == start if several else words[0].endswith("main.py")
    assert words[-2].endswith("main.py")
    assert words[-1] == "model=vanilla"
    assert "torch" not in generate + bench


# What was typed, and what is proposed: two runs; after a run of the sweep, not this sweep again.
PROPOSED = {
    "model.dim=32 model.head_dim=16 optim.lr=1e-3 run.name=mine model.K=3 run.resume=must": [
        "model=vanilla model.dim=32 model.head_dim=16 optim.lr=1e-3 run.name=mine-vanilla",
        "-m +sweep=k model.dim=32 model.head_dim=16 optim.lr=1e-3 run.name=mine",
    ],
    "data=files data.sources.files.paths=[a.txt,b.txt] run.dir=there": [
        "model=vanilla data=files data.sources.files.paths=[a.txt,b.txt] run.dir=there-vanilla",
        "-m +sweep=k data=files data.sources.files.paths=[a.txt,b.txt]",
    ],
    "model=vanilla size=151m +seed=3 ~eval.rows": [
        "model=phd_cswa size=151m seed=3 ~eval.rows",
        "-m +sweep=k size=151m seed=3 ~eval.rows",
    ],
    "sweep=k ++model={variant:phd_cswa,K:3,norm:pre} data=python": [
        "model=vanilla model.norm=pre data=python",
    ],
    "experiment=smoke": ["model=vanilla experiment=smoke", "-m +sweep=k experiment=smoke"],
}


@pytest.mark.parametrize("typed", PROPOSED)
def test_the_runs_it_suggests_are_its_own_with_another_model(
    typed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = typed.split()
    monkeypatch.setattr(sys, "argv", ["main.py", *overrides])
    [own] = check([text for text in overrides if text != "sweep=k"]).jobs
    runs = other_runs(own)
    assert [" ".join(arguments) for arguments in runs] == PROPOSED[typed]
    [other] = check(runs[0]).jobs
    changed = {
        key
        for key, value in flatten_keys(other.to_dict()).items()
        if value != flatten_keys(own.to_dict())[key]
    }
    assert changed <= {"model.variant", "model.K", "run.name", "run.dir", "run.resume"}
    assert other.model.variant != own.model.variant
    assert other.run_dir != own.run_dir
    for sweep in runs[1:]:
        for member in check(sweep[1:], multirun=True).jobs:
            assert member.train == own.train
            assert member.data == own.data
            assert member.model.norm == own.model.norm


@pytest.mark.parametrize("prompt", ["class A", "a 'quoted' \"$HOME\" \\", "def f():\n    "])
def test_the_prompt_it_suggests_is_the_samples(prompt: str, config, opened) -> None:
    run = opened(config())
    sample = Sample(run.config, run.engine, run.tokenizer, prompt, never)
    run = replace(run, sample=sample)
    generate = next(
        command for command in next_commands(run, [], complete=True) if "generate.py" in command
    )
    assert shlex.split(generate)[2:] == [f"run={run.directory}", f"prompt={prompt}"]
