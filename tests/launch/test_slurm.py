"""The batch script is sound, asks for what was configured, and puts the right jobs back in line.

It is run for real, with stand-ins for `srun` and `scontrol` that do what SLURM's do.
"""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launch.config import Slurm
from launch.slurm import render
from tests.launch.workshop import WORKER, wait_for

HOSTILE = [
    "optim.lr=1e-3,3e-3",
    "data.sources.files.paths=[a b/*.txt]",
    "run.name='x; $(date) `id`'",
    "~model.K",
]
EVERYTHING = Slurm(
    nodes="1:4",
    name="big",
    time="2d",
    partition="gpu",
    account="lab",
    qos="high",
    gres="gpu:a100",
    cpus=12,
    options="--exclusive\n--mail-type=END",
    setup="module load cuda\nexport NCCL_DEBUG=WARN",
    container="image.sqsh",
    mounts="/data:/data",
)

# srun runs its command as a machine would, passes signals on, and ends with its code.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
"$@" &
task=$!
for signal in TERM USR1 USR2; do trap "kill -s $signal $task" $signal; done
wait $task; code=$?
while ((code > 128)) && kill -0 $task 2>/dev/null; do wait $task; code=$?; done
exit $code
"""
SCONTROL = """#!/bin/bash
echo "$*" >>"$CALLS"
case "$1 $2" in
  "show hostnames") echo 127.0.0.1 ;;
  "show job") echo "JobId=7 JobState=$JOB_STATE Requeue=1" ;;
esac
"""


class Cluster:
    """A machine with one job, whose command is a stand-in unless `agent` is called."""

    def __init__(self, place: Path) -> None:
        self.place = place
        (place / "bin").mkdir()
        (place / "logs").mkdir()
        self.tool("srun", SRUN)
        self.tool("scontrol", SCONTROL)

    def tool(self, name: str, text: str) -> Path:
        tool = self.place / "bin" / name
        tool.write_text(text)
        tool.chmod(0o755)
        return tool

    def job(self, script: str, state: str = "RUNNING") -> "subprocess.Popen[str]":
        """Starts the job; signals go to all of its processes, as they do under SLURM."""
        environment = {
            "PATH": f"{self.place / 'bin'}:{os.environ['PATH']}",
            "PYTHONPATH": str(WORKER.parents[2]),
            "OMP_NUM_THREADS": "1",
            "CALLS": str(self.place / "calls"),
            "JOB_STATE": state,
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "node[0-1]",
        }
        return subprocess.Popen(["bash", "-c", script], cwd=self.place, env=environment, text=True)

    def run(self, command: str, state: str = "RUNNING", **settings: int) -> int:
        """Runs a job to its end, with a shell command in place of the agent."""
        python = self.tool("python", f"#!/bin/bash\n{command}\n")
        script = render(Slurm(python=str(python), **settings), [], [Path("run")])
        return self.job(script, state).wait(30)

    @property
    def requeued(self) -> int:
        calls = self.place / "calls"
        return calls.read_text().count("requeue 7") if calls.exists() else 0


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


SCRIPTS = {
    "least": render(Slurm(), [], []),
    "everything": render(EVERYTHING, HOSTILE, [Path("runs/a b"), Path("runs/c")]),
}


@pytest.mark.process
@pytest.mark.parametrize("name", SCRIPTS)
def test_bash_can_read_the_script(name: str) -> None:
    subprocess.run(["bash", "-n"], input=SCRIPTS[name], text=True, check=True)


@pytest.mark.process
@pytest.mark.skipif(not shutil.which("shellcheck"), reason="needs shellcheck (in the dev extra)")
@pytest.mark.parametrize("name", SCRIPTS)
def test_shellcheck_has_no_objection(name: str) -> None:
    # SC2016: users' arguments are quoted so that the shell expands nothing in them.
    check = ["shellcheck", "--severity=style", "--exclude=SC2016", "-"]
    done = subprocess.run(check, input=SCRIPTS[name], text=True, capture_output=True, check=False)
    assert done.stdout == ""


def test_sbatch_is_told_what_was_configured() -> None:
    lines = SCRIPTS["everything"].splitlines()
    told = {line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")}
    assert told == {
        "--job-name=big",
        "--nodes=4",
        "--ntasks-per-node=1",
        "--gres=gpu:a100:8",
        "--cpus-per-task=96",
        "--partition=gpu",
        "--account=lab",
        "--qos=high",
        "--time=2-00",
        "--signal=USR1@300",
        "--requeue",
        "--open-mode=append",
        "--output=logs/%x-%j.log",
        "--no-kill",
        "--exclusive",
        "--mail-type=END",
    }
    assert lines.index("module load cuda") + 1 == lines.index("export NCCL_DEBUG=WARN")


@pytest.mark.process
def test_arguments_arrive_as_they_were_given(cluster: Cluster) -> None:
    tell = 'printf "%s\\n" "$@" >told'
    python = cluster.tool("python", f"#!/bin/bash\n{tell}\n")
    settings = Slurm(python=str(python), nodes=2, max_restarts=5, processes=4)
    assert cluster.job(render(settings, HOSTILE, [])).wait(30) == 0
    assert (cluster.place / "told").read_text().splitlines() == [
        *("-m", "launch", "nodes", "address=127.0.0.1:20007", "id=7"),
        *("processes=4", "max_restarts=5", "nodes=2"),
        *HOSTILE,
    ]


@pytest.mark.process
@pytest.mark.parametrize("code", [0, 1, 2, 130])
def test_a_job_that_is_over_is_not_queued_again(cluster: Cluster, code: int) -> None:
    assert cluster.run(f"mkdir -p run/checkpoints/step_1; exit {code}") == code
    assert cluster.requeued == 0


@pytest.mark.process
def test_a_job_that_saved_is_queued_again_as_long_as_it_gets_on(cluster: Cluster) -> None:
    for step in range(5):
        assert cluster.run(f"mkdir -p run/checkpoints/step_{step}; exit 75", stalls=2) == 75
    assert cluster.requeued == 5


@pytest.mark.process
def test_a_job_that_gets_nowhere_is_queued_again_a_few_times_only(cluster: Cluster) -> None:
    codes = [cluster.run("mkdir -p run/checkpoints/.step_9; exit 75", stalls=3) for _ in range(4)]
    assert codes == [75] * 4
    assert cluster.requeued == 2


@pytest.mark.process
def test_progress_makes_up_for_starts_without(cluster: Cluster) -> None:
    for command in ("true", "mkdir -p run/checkpoints/step_1", "true", "true"):
        cluster.run(f"{command}; exit 75", stalls=2)
    assert cluster.requeued == 3


@pytest.mark.process
@pytest.mark.parametrize("state", ["CANCELLED", "COMPLETING", "PREEMPTED"])
def test_a_job_that_somebody_else_ended_is_left_alone(cluster: Cluster, state: str) -> None:
    assert cluster.run("mkdir -p run/checkpoints/step_1; exit 75", state) == 75
    assert cluster.requeued == 0


@pytest.mark.process
@pytest.mark.parametrize("sent", ["SIGUSR1", "SIGTERM"])
def test_a_signal_reaches_the_processes_which_save_and_the_job_goes_on(
    cluster: Cluster, sent: str
) -> None:
    config = Slurm(python=sys.executable, script=str(WORKER), processes=1, checkpoints="saves")
    job = cluster.job(render(config, [str(cluster.place)], []))
    log = cluster.place / "log"
    wait_for(lambda: log.exists() and "0/1 started" in log.read_text(), "the start of the worker")
    (cluster.place / "saves" / "step_1").mkdir(parents=True)
    job.send_signal(signal.Signals[sent])
    assert job.wait(60) == 75
    assert f"0/1 saved {sent}" in log.read_text()
    assert cluster.requeued == 1
