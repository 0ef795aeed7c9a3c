"""`python train/main.py` as a user meets it: signals, exit codes, and what is on the screen."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from string import ascii_letters
from time import monotonic, sleep

import pytest
import torch

from conf.arguments import refuse
from conf.errors import USER_ERRORS
from conf.exit_codes import ExitCode
from data.tokenizer_training import LOSSLESS, train
from tests.fork_server import Command
from tests.patience import PATIENCE_S
from train.checkpoint.reader import flatten
from train.compose import load
from train.experiments.result import Estimate, read_result
from train.main import main

pytestmark = pytest.mark.process

REPOSITORY = Path(__file__).parents[2]

Process = subprocess.Popen[str] | Command


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., Process]:
    """Starts a script of train/ from a folder far from it; forked, or in a Python of its own."""
    (tmp_path / "elsewhere").mkdir()

    def begin(script: str, *arguments: str, forked: bool = True) -> Process:
        path, folder = REPOSITORY / "train" / script, tmp_path / "elsewhere"
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "COLUMNS": "200"}
        if forked:
            return Command(path, *arguments, cwd=folder, env=environment)
        return subprocess.Popen(
            [sys.executable, "-W", "error", str(path), *arguments],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return begin


def wait_for_lines(path: Path, number: int, process: Process) -> None:
    """Returns when a run has logged so many steps."""
    deadline = monotonic() + PATIENCE_S
    while not path.exists() or path.read_bytes().count(b"\n") < number:
        assert process.poll() is None, process.communicate()
        assert monotonic() < deadline, "nothing is logged"
        sleep(0.005)


def test_a_terminated_run_continues_bitwise_with_the_same_command(
    config, small, start, trained, opened, logged, tmp_path: Path
) -> None:
    settings = ["train.max_steps=60", "model.K=3", "train.micro_batch=2", "data.prefetch=5"]
    command = ["main.py", *small(*settings, "hooks.console=true", "hooks.log_every=5")]

    first = start(*command, forked=False)
    wait_for_lines(tmp_path / "run/metrics.jsonl", 4, first)  # steps 1, 2, 5, 10
    first.send_signal(signal.SIGTERM)
    output, errors = first.communicate()
    assert (first.returncode, errors) == (ExitCode.REQUEUE, "")
    *_, last = logged(tmp_path / "run")
    assert 10 <= last["step"] < 60
    assert output.splitlines()[-1] == f"SIGTERM: saved after step {last['step']}"
    stopped = read_result(tmp_path / "run/result.json")
    assert (stopped.status, stopped.steps) == ("unfinished", last["step"])
    assert stopped.reason == output.splitlines()[-1]

    second = start(*command)
    output, errors = second.communicate()
    assert (second.returncode, errors) == (0, "")
    assert f"going on from {tmp_path}/run/checkpoints/step_{last['step']:08d}\n" in output
    assert "step 60/60  loss " in output
    for part in ("the plan: ", "heldout: ", "a sample", "KV cache of one sequence", "next"):
        assert output.count(part) == 1, part
    assert f"result:     {tmp_path}/run/result.json\n" in output
    result = read_result(tmp_path / "run/result.json")
    assert (result.status, result.steps) == ("finished", 60)
    assert len(set(result.curve.step)) == len(result.curve.step)
    assert result.heldout["heldout"].bits_per_byte.standard_error

    whole = trained(config(*settings, "hooks.log_every=5", f"run.dir={tmp_path / 'whole'}"))
    uncut = logged(whole.run.directory)
    steps = {line["step"] for line in uncut}  # the end of the first start has a line, too
    assert [line for line in logged(tmp_path / "run") if line["step"] in steps] == uncut
    ours, theirs = (flatten(r.engine.state()) for r in (opened(config(*settings)), whole.run))
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_the_same_command_after_the_end_reports_and_the_model_writes(
    small, start, trained, config, tmp_path: Path
) -> None:
    done = trained(config())
    lines = (tmp_path / "run/metrics.jsonl").read_bytes()
    again = start("main.py", *small())
    output, errors = again.communicate()
    assert (again.returncode, errors) == (0, "")
    assert "nothing to train: 6 steps are done" in output
    bits, error = (done.metrics[f"eval/heldout/bits_per_byte{x}"] for x in ("", "_stderr"))
    assert f"heldout: {bits:.3f} ± {error:.3f} bits per byte" in output
    heldout = read_result(tmp_path / "run/result.json").heldout["heldout"]
    assert heldout.bits_per_byte == Estimate(value=bits, standard_error=error)
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == lines

    writing = start("generate.py", f"run={tmp_path / 'run'}", "prompt=def é", "max_tokens=5")
    output, errors = writing.communicate()
    assert (writing.returncode, errors) == (0, "")
    assert output.startswith("def é")


def test_a_run_lives_under_the_folder_it_is_started_from(small, start, tmp_path: Path) -> None:
    run = start("main.py", *small("run.dir=null", "model.size=nano", "train.max_steps=1"))
    _, errors = run.communicate()
    assert (run.returncode, errors) == (0, "")
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["runs"]
    # The name goes on with what differs from the defaults.
    [directory] = (tmp_path / "elsewhere/runs").glob("phd_cswa-2-3-4-nano-*")
    assert (directory / "checkpoints/step_00000001/COMPLETE").exists()


@pytest.fixture
def large_tokenizer(tmp_path: Path) -> Path:
    path = tmp_path / "large.model"
    rng = Random(0)
    texts = ("".join(rng.choices(ascii_letters, k=9)) for _ in range(999))
    train(texts, {**LOSSLESS, "model_type": "bpe", "vocab_size": 350}).save(path)
    return path


def test_wrong_settings_are_refused_on_one_screen(small, start, tmp_path: Path) -> None:
    wrong = ["model.K=0", "model.window=-1", "model.chunk=0", "model.windw=3", "train.steps=5"]
    run = start("main.py", *small(*wrong), forked=False)
    output, errors = run.communicate()
    assert (run.returncode, output) == (2, "")
    assert errors == (
        "5 problems in the configuration:\n"
        "  model.windw: unknown key. Did you mean model.window?\n"
        "  model.K=0: expected an integer of at least 1\n"
        "  model.window=-1: expected an integer of at least 1\n"
        "  model.chunk=0: expected an integer of at least 1\n"
        "  train.steps: unknown key. Did you mean train.max_steps?\n"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("case", ["missing path", "empty corpus", "large tokenizer"])
def test_what_a_run_cannot_be_made_of_is_refused_on_one_screen(
    case: str, small, start, large_tokenizer: Path, capsys, tmp_path: Path
) -> None:
    (tmp_path / "empty.jsonl").write_text('{"text": " "}\n')
    setting, told, remedy = {
        "missing path": (
            f"data.sources.files.paths={tmp_path}/nowhere/*.txt",
            f"data.sources.files.paths='{tmp_path}/nowhere/*.txt': there is no {tmp_path}/nowhere",
            "correct it",
        ),
        "empty corpus": (
            f"data.sources.files.paths={tmp_path}/empty.jsonl",
            f"data.sources.files: no text in it ({tmp_path}/empty.jsonl; not documents: 1 empty",
            "Choose a source with documents",
        ),
        "large tokenizer": (
            f"tokenizer.path={large_tokenizer}",
            f"tokenizer.path='{large_tokenizer}': has 350 pieces, more than model.vocab_size=320",
            "set model.vocab_size to that or more",
        ),
    }[case]
    if case == "missing path":
        run = start("main.py", *small(setting), forked=False)
        output, errors = run.communicate()
        code: object = run.returncode
    else:  # only what is said differs: no process of its own for each
        with pytest.raises(USER_ERRORS) as problems:
            main(load(small(setting)))
        with pytest.raises(SystemExit) as end:
            refuse(problems.value)
        code, (output, errors) = end.value.code, capsys.readouterr()
    assert code == 2, errors
    assert "Traceback" not in output + errors
    title, problem = errors.splitlines()
    kind = "data" if case == "empty corpus" else "configuration"
    assert title == f"1 problem in the {kind}:"
    assert problem.startswith(f"  {told}")
    assert remedy in problem
    assert not (tmp_path / "run").exists()
