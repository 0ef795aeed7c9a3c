"""The batch script is sound, asks for what was configured, and puts the right jobs back in line.

It is run for real, with stand-ins for `srun` and `scontrol` that do what SLURM's do.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch.config import Slurm
from launch.slurm import render
from tests.launch.machines import WORKER, wait_for
from tests.patience import PATIENCE_S

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
    mem="500G",
    exclusive=True,
    chdir="/shared/lab",
    options="--mail-type=END\n--reservation=x",
    setup="module load cuda\nexport NCCL_DEBUG=WARN",
    node_setup="ulimit -l unlimited\nmkdir -p '/local/my cache'",
    venv="/shared/my venv",
    container="image.sqsh",
    mounts="/data:/data",
    env={"NCCL_IB_HCA": "mlx5_0,mlx5_1", "NOTE": "it's $HOME; $(date)"},
    preflight=True,
    min_bandwidth_gb_s=100.0,
)
APPTAINER = Slurm(container="image.sif", runtime="apptainer", conda="phd", mounts="/data:/data")

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

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        (directory / "bin").mkdir()
        self.tool("srun", SRUN)
        self.tool("scontrol", SCONTROL)

    def tool(self, name: str, text: str) -> Path:
        tool = self.directory / "bin" / name
        tool.write_text(text)
        tool.chmod(0o755)
        return tool

    def job(
        self, script: str, state: str = "RUNNING", stderr: int | None = None
    ) -> "subprocess.Popen[str]":
        """Starts the job; signals go to all of its processes, as they do under SLURM."""
        environment = {
            "PATH": f"{self.directory / 'bin'}:{os.environ['PATH']}",
            "PYTHONPATH": str(WORKER.parents[2]),
            "OMP_NUM_THREADS": "1",
            "CALLS": str(self.directory / "calls"),
            "JOB_STATE": state,
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NAME": "phd",
            "SLURM_JOB_NODELIST": "node[0-1]",
        }
        return subprocess.Popen(
            ["bash", "-c", script],
            cwd=self.directory,
            env=environment,
            text=True,
            stderr=stderr,
        )

    def run(self, command: str, state: str = "RUNNING", **settings: Any) -> int:
        """Runs a job to its end, with a shell command in place of the agent."""
        python = self.tool("python", f"#!/bin/bash\n{command}\n")
        script = render(Slurm(python=str(python), **settings), [], [Path("run")])
        return self.job(script, state).wait(PATIENCE_S)

    @property
    def requeued(self) -> int:
        calls = self.directory / "calls"
        return calls.read_text().count("requeue 7") if calls.exists() else 0


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


SCRIPTS = {
    "least": render(Slurm(), [], []),
    "everything": render(EVERYTHING, HOSTILE, [Path("runs/a b"), Path("runs/c")]),
    "apptainer": render(APPTAINER, HOSTILE, [Path("runs/c")]),
    "preflight": render(Slurm(preflight=True, chdir="/a/b", rank_log="/c/%t"), [], []),
}


@pytest.mark.process
@pytest.mark.parametrize("name", SCRIPTS)
def test_bash_can_read_the_script(name: str) -> None:
    subprocess.run(["bash", "-n"], input=SCRIPTS[name], text=True, check=True)


@pytest.mark.process
@pytest.mark.skipif(not shutil.which("shellcheck"), reason="needs shellcheck (in the dev extra)")
@pytest.mark.parametrize("name", SCRIPTS)
def test_shellcheck_has_no_objection(name: str) -> None:
    check = ["shellcheck", "--severity=style", "-"]
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
        "--mem=500G",
        "--exclusive",
        "--chdir=/shared/lab",
        "--mail-type=END",
        "--reservation=x",
    }
    assert lines.index("module load cuda") + 1 == lines.index("export NCCL_DEBUG=WARN")


@pytest.mark.process
def test_arguments_arrive_as_they_were_given(cluster: Cluster) -> None:
    tell = 'printf "%s\\n" "$@" >told'
    python = cluster.tool("python", f"#!/bin/bash\n{tell}\n")
    settings = Slurm(python=str(python), nodes=2, max_restarts=5, processes=4)
    assert cluster.job(render(settings, HOSTILE, [])).wait(PATIENCE_S) == 0
    assert (cluster.directory / "told").read_text().splitlines() == [
        *("-m", "launch", "nodes", "address=127.0.0.1:20007", "id=7"),
        "rank_log=logs/phd-7/rank_%t.log",
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
    job = cluster.job(render(config, [str(cluster.directory)], []))
    log = cluster.directory / "log"
    wait_for(lambda: log.exists() and "0/1 started" in log.read_text(), "the start of the worker")
    (cluster.directory / "saves" / "step_1").mkdir(parents=True)
    job.send_signal(signal.Signals[sent])
    assert job.wait(PATIENCE_S) == 75
    assert f"0/1 saved {sent}" in log.read_text()
    assert cluster.requeued == 1


@pytest.mark.process
def test_the_job_makes_the_folders_of_its_logs(cluster: Cluster) -> None:
    settings = {"logs": f"{cluster.directory}/deep/logs", "rank_log": "ranks/%x/%j/%t"}
    python = cluster.tool("python", "#!/bin/bash\n")
    assert cluster.job(render(Slurm(python=str(python), **settings), [], [])).wait(PATIENCE_S) == 0
    assert (cluster.directory / "deep/logs").is_dir()
    assert (cluster.directory / "ranks/phd/7").is_dir()


@pytest.mark.process
def test_a_script_that_is_run_by_hand_makes_the_folder_and_submits_itself(
    cluster: Cluster,
) -> None:
    """SLURM loses the output of a job whose folder does not exist, and may fail the job."""
    where = cluster.directory / "shared"
    where.mkdir()
    script = cluster.directory / "job.sh"
    script.write_text(render(Slurm(chdir=str(where)), [], []))
    cluster.tool("sbatch", f'#!/bin/bash\ntest -d {where}/logs && echo "$1" >submitted\n')
    path = f"{cluster.directory / 'bin'}:{os.environ['PATH']}"
    subprocess.run(
        ["bash", str(script)],
        cwd=cluster.directory,
        env={"PATH": path},
        check=True,
        timeout=PATIENCE_S,
    )
    assert (cluster.directory / "submitted").read_text() == f"{script}\n"


@pytest.mark.process
def test_each_rank_gets_a_log_and_the_variables_that_were_given(cluster: Cluster) -> None:
    given = {"GREETING": 'it\'s $HOME, "x"', "NCCL_DEBUG": "WARN"}
    config = Slurm(python=sys.executable, script=str(WORKER), processes=2, env=given)
    (cluster.directory / "exit").write_text("0")
    arguments = [str(cluster.directory), "talk", "tell=GREETING", "tell=NCCL_DEBUG"]
    job = cluster.job(render(config, arguments, []))
    assert job.wait(PATIENCE_S) == 0
    log = (cluster.directory / "log").read_text()
    for rank in (0, 1):
        assert f"{rank}/2 GREETING={given['GREETING']}\n" in log
        assert f"{rank}/2 NCCL_DEBUG=WARN\n" in log
        text = (cluster.directory / f"logs/phd-7/rank_{rank}.log").read_text()
        assert f"rank {rank} on stdout" in text


@pytest.mark.process
def test_every_machine_activates_the_environment(cluster: Cluster) -> None:
    """Not only the first one: the stand-in for srun starts the command without the job's PATH."""
    cluster.tool("srun", SRUN.replace('"$@" &', 'PATH=/usr/bin:/bin "$@" &'))
    venv = cluster.directory / "my venv"
    (venv / "bin").mkdir(parents=True)
    python = venv / "bin/python"
    python.write_text('#!/bin/bash\necho "$NAME: $0 ${*:1:3}" >>told\n')
    python.chmod(0o755)
    (venv / "bin/activate").write_text(f'PATH="{venv}/bin:$PATH"\n')
    config = Slurm(venv=str(venv), node_setup="export NAME=node")
    assert cluster.job(render(config, [], [])).wait(PATIENCE_S) == 0
    told = (cluster.directory / "told").read_text()
    assert told == f"node: {python} -m launch nodes\n"


@pytest.mark.process
def test_conda_is_activated_in_a_shell_that_does_not_know_it(cluster: Cluster) -> None:
    conda = cluster.tool(
        "my-conda",
        '#!/bin/bash\n[[ $* == "shell.bash hook" ]] && echo \'conda() { export ACTIVE="$*"; }\'\n',
    )
    cluster.tool("python", '#!/bin/bash\necho "$ACTIVE" >told\n')
    script = f"export CONDA_EXE={conda}\n" + render(Slurm(conda="my env"), [], [])
    assert cluster.job(script).wait(PATIENCE_S) == 0
    assert (cluster.directory / "told").read_text() == "activate my env\n"


@pytest.mark.process
@pytest.mark.parametrize("lines", ["false", "source /nowhere/activate", "nosuchcommand", "exit 0"])
def test_a_machine_whose_set_up_fails_is_named_and_trains_nothing(
    cluster: Cluster, lines: str
) -> None:
    python = cluster.tool("python", "#!/bin/bash\ntouch trained\n")
    script = render(Slurm(python=str(python), node_setup=f"{lines}\ntrue"), [], [])
    job = cluster.job(script, stderr=subprocess.PIPE)
    _, errors = job.communicate(timeout=PATIENCE_S)
    assert job.returncode not in (0, 75)
    assert f"failed on {socket.gethostname()}" in errors
    assert not (cluster.directory / "trained").exists()


@pytest.mark.process
def test_apptainer_runs_the_agent_in_the_image(cluster: Cluster) -> None:
    cluster.tool("apptainer", '#!/bin/bash\nprintf "%s\\n" "${@:1:7}" >options\n"${@:8}"\n')
    cluster.tool("python", '#!/bin/bash\nprintf "%s\\n" "$@" >told\n')
    config = Slurm(container="i.sif", runtime="apptainer", mounts="/data:/data")
    assert cluster.job(render(config, HOSTILE, [])).wait(PATIENCE_S) == 0
    here = cluster.directory
    assert (here / "options").read_text().splitlines() == [
        *("exec", "--nv", "--pwd", str(here), "--bind", f"{here}:{here},/data:/data", "i.sif"),
    ]
    assert (here / "told").read_text().splitlines()[-len(HOSTILE) :] == HOSTILE


def test_pyxis_gets_the_image_and_keeps_the_variables_that_were_given() -> None:
    lines = [line.strip() for line in SCRIPTS["everything"].splitlines()]
    step = lines[lines.index("step=(") + 1 :]
    step = step[: step.index(")")]
    assert "--container-image=image.sqsh" in step
    assert '"--container-mounts=$PWD:$PWD,/data:/data"' in step
    assert "'--container-env=NCCL_IB_HCA,NOTE'" in step


@pytest.mark.process
@pytest.mark.parametrize(
    ("code", "ends", "trained"), [(0, 0, True), (1, 1, False), (75, 75, False)]
)
def test_a_bad_machine_ends_the_job_before_the_training(
    cluster: Cluster, code: int, ends: int, trained: bool
) -> None:
    command = f'[[ $3 == nodes ]] && exec touch trained; echo "$*" >checked; exit {code}'
    settings = {"preflight": True, "nodes": "1:3", "max_clock_skew_s": 0.5, "processes": 4}
    assert cluster.run(command, **settings) == ends
    assert (cluster.directory / "trained").exists() == trained
    checked = (cluster.directory / "checked").read_text().split()
    assert checked[:3] == ["-m", "launch", "check"]
    assert {"nodes=3", "processes=4", "max_clock_skew_s=0.5", "address=127.0.0.1:10007"} < set(
        checked
    )
    assert cluster.requeued == (code == 75)
