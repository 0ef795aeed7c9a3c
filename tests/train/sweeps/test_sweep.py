"""Claims about sweeps as a user meets them: kills, failures, runs side by side, signals."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import monotonic, sleep

import pytest

from conf.exit_codes import ExitCode
from tests.fork_server import Command
from tests.forked_python import forked_python
from tests.patience import PATIENCE_S
from train.sweeps.outcome import Outcome, write_outcome
from train.sweeps.sweep import Launcher, Sweep

pytestmark = pytest.mark.process

REPOSITORY = Path(__file__).parents[3]

# Runs that need no model: by its seed, each fails, ends, or waits for a signal as a training does.
SCRIPT = """
import os, signal, sys, time
from pathlib import Path
from conf.errors import ConfigError, Problem
from train.compose import own_overrides, run
from train.distributed.signals import StopSignal

def main(config):
    print("begun", config.name, own_overrides())
    match config.seed:
        case 3:
            raise KeyError("a fault of the program")
        case 4:
            raise ConfigError([Problem("seed", 4, "refused")])
        case 5:
            os.kill(os.getpid(), signal.SIGKILL)
        case 6:  # is at work when the other one dies
            Path("times").open("a").write("6")
            time.sleep(1)
        case 7 | 8:
            with StopSignal() as stop:
                Path(f"begun-{config.seed}").touch()
                while not stop.is_set():
                    time.sleep(0.01)
                time.sleep(0.1)  # it saves
                Path(f"saved-{config.seed}").touch()
                return 130 if stop.received.name == "SIGINT" else 75
    return 0

if __name__ == "__main__":
    run(main)
"""

Process = subprocess.Popen[str] | Command


def begin(folder: Path, *command: str) -> Process:
    """Starts a script of the folder in a Python of its own, or main.py without its imports."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "COLUMNS": "300"}
    if command[0] == "main.py":
        script = REPOSITORY / "train/main.py"
        return Command(script, *command[1:], cwd=folder, env=environment)
    with forked_python():
        return subprocess.Popen(
            [sys.executable, "-W", "error", *command],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


def wait_for(condition: Callable[[], bool], process: Process) -> None:
    deadline = monotonic() + PATIENCE_S
    while not condition():
        assert process.poll() is None, process.communicate()
        assert monotonic() < deadline
        sleep(0.01)


def steps(directory: Path) -> int:
    """The lines of a run's metrics."""
    path = directory / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_a_sweep_that_is_killed_twice_ends_with_the_runs_that_it_should_have(
    small: Callable[..., list[str]], tmp_path: Path
) -> None:
    settings = ["train.max_steps=40", "checkpoint.every=5", "model.size=nano", "run.dir=null"]
    command = ["main.py", *small(*settings), "-m", "seed=0,1"]

    def directories() -> list[Path]:
        return sorted((tmp_path / "runs").glob("phd_cswa-*"))

    first = begin(tmp_path, *command)
    wait_for(lambda: any(steps(path) >= 12 for path in directories()), first)
    first.kill()
    first.communicate()
    assert len(directories()) == 1

    second = begin(tmp_path, *command)
    wait_for(lambda: len(directories()) == 2 and steps(directories()[1]) >= 8, second)
    second.send_signal(signal.SIGTERM)
    _, errors = second.communicate()
    assert (second.returncode, errors) == (ExitCode.REQUEUE, "")

    third = begin(tmp_path, *command)
    output, errors = third.communicate()
    assert (third.returncode, errors) == (0, "")
    runs = directories()
    assert len(runs) == 2
    for run in runs:
        assert (run / "checkpoints/step_00000040/COMPLETE").exists()
        lines = (run / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(1, 41))
    starts = [len(json.loads((run / "environment.json").read_bytes())) for run in runs]
    assert starts == [2, 2]  # the first one had finished, and the third start has not opened it
    assert f"{runs[0].name}: finished already, 40 steps\n" in output
    assert "report.py 'runs=runs/*' out=report" in output
    assert not list((tmp_path / "runs").glob(".sweep-*"))


def test_failures_of_runs_side_by_side_are_told_and_the_others_finish(tmp_path: Path) -> None:
    (tmp_path / "demo.py").write_text(SCRIPT)
    log = "runs/phd_cswa-2-16-32-tiny-seed_2/console.log"
    (tmp_path / log).mkdir(parents=True)  # a log that cannot be written
    pool = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    done = begin(tmp_path, "demo.py", "-m", "seed=2,3,4,0,1", *pool)
    output, errors = done.communicate()
    names = [f"phd_cswa-2-16-32-tiny{seed}" for seed in ("-seed_3", "-seed_4", "", "-seed_1")]
    assert errors.splitlines() == [
        "3 of 5 runs of this sweep failed:",
        f"  phd_cswa-2-16-32-tiny-seed_2: no log: [Errno 21] Is a directory: '{log}' (exit code 1)",
        f"  {names[0]}: KeyError: 'a fault of the program' (exit code 1)",
        f"  {names[1]}: seed=4: refused (exit code 2)",
    ]
    assert done.returncode == ExitCode.CRASHED
    for name, end in zip(names, ["failed: ", "failed: ", "finished ", "finished "], strict=True):
        assert f"{name}: begins; its output is in runs/{name}/console.log\n" in output
        assert f"{name}: {end}" in output
        assert f"begun {name} " in (tmp_path / f"runs/{name}/console.log").read_text()
    crash = (tmp_path / f"runs/{names[0]}/console.log").read_text()
    assert f"{names[0]} crashed:\nTraceback (most recent call last):\n" in crash
    own = (tmp_path / f"runs/{names[3]}/console.log").read_text()
    assert f"{['seed=1']}\n" in own.replace("'hydra/launcher=joblib', ", "")


def test_a_killed_process_of_the_pool_costs_its_own_run_alone(tmp_path: Path) -> None:
    (tmp_path / "demo.py").write_text(SCRIPT)
    pool = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    done = begin(tmp_path, "demo.py", "-m", "seed=6,5,0,1", *pool)
    output, errors = done.communicate()
    assert done.returncode == ExitCode.CRASHED
    killed = "phd_cswa-2-16-32-tiny-seed_5"
    assert "Traceback" not in errors
    assert errors.splitlines()[-2:] == [
        "1 of 4 runs of this sweep failed:",
        f"  {killed}: its process was killed, as happens when the memory is full (exit code 1)",
    ]
    for seed in ("-seed_6", "", "-seed_1"):
        assert output.count(f"phd_cswa-2-16-32-tiny{seed}: finished after ") == 1


def test_a_job_that_leaves_no_outcome_has_failed(tmp_path: Path) -> None:
    sweep = Sweep(["died", "done", "earlier"], Launcher.JOBS, tmp_path)
    with sweep.launching():
        [folder] = tmp_path.glob(".sweep-*")
        write_outcome(folder, Outcome("done", ExitCode.FINISHED, "it ended"))
        write_outcome(folder, Outcome("earlier", ExitCode.FINISHED, "finished"))
    assert [failure.name for failure in sweep.failures] == ["died"]
    assert sweep.code == ExitCode.CRASHED


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_ends_runs_side_by_side_after_they_have_saved(
    number: int, code: int, tmp_path: Path
) -> None:
    (tmp_path / "demo.py").write_text(SCRIPT)
    pool = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    sweep = begin(tmp_path, "demo.py", "-m", "seed=7,8,1", *pool)
    wait_for(lambda: len(list(tmp_path.glob("begun-*"))) == 2, sweep)
    sweep.send_signal(number)
    output, errors = sweep.communicate()
    assert (sweep.returncode, errors) == (code, "")
    assert len(list(tmp_path.glob("saved-*"))) == 2
    assert output.count(": ended before its end\n") == 2
    assert "seed_1" not in output
