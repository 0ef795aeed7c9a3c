"""What is typed is checked as a whole before anything starts, and runs as `--dry` says."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from conf.errors import ConfigError
from launch.__main__ import describe, main, read
from launch.config import Kubernetes, Nodes, Slurm, passed_on
from tests.launch.workshop import WORKER, free_port
from train.compose import check

ROOT = Path(__file__).parents[2]
NODES = ["nodes", "address=node1:29500"]
PODS = ["kubernetes", "image=phd:1", "volume=runs"]


def problems(*texts: str) -> str:
    with pytest.raises(ConfigError) as refusal:
        read(texts)
    return "\n".join(refusal.value.problems)


def test_settings_of_the_start_and_of_the_training_are_told_apart() -> None:
    request = read([*NODES, "nodes=1:2", "model=phd", "processes=4", "+optim.lr=1e-3"])
    assert request.config == Nodes(address="node1:29500", nodes="1:2", processes=4)
    assert request.arguments == ["model=phd", "+optim.lr=1e-3"]
    assert request.run_dirs == [Path("runs/phd-2-tiny")]


def test_everything_wrong_is_said_at_once() -> None:
    found = problems("local", "processes=none", "grace_s=0", "modle=phd", "model.K=0")
    assert [line.partition(":")[0] for line in found.splitlines()] == [
        "processes='none'",
        "grace_s=0",
        "modle",
        "model.K=0",
    ]


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ([], "'': expected one of local, nodes, slurm, kubernetes"),
        (["slrum"], "'slrum': expected one of .* Did you mean slurm?"),
        (["local", "procceses=2"], "procceses: unknown setting. Did you mean processes?"),
        (["local", "modle=phd"], "modle: unknown group or key. Did you mean model?"),
        (["local", "--mutlirun"], "--mutlirun: unknown option; there is --dry, -m and --help"),
        (["local", "model.K=2,3"], "several values make a sweep, which needs -m"),
        (["nodes"], "address: has to be given"),
        (["nodes", "address=node1"], "address=node1: expected HOST:PORT"),
        ([*NODES, "nodes=4:1"], "nodes=4:1: expected a number, or LEAST:MOST"),
        ([*NODES, "rendezvous=static"], "node_rank: has to be given"),
        ([*NODES, "rendezvous=static", "nodes=1:2"], "elastic, which needs c10d"),
        ([*NODES, "rendezvous=static", "nodes=2", "node_rank=2"], "expected less than nodes=2"),
        ([*NODES, "node_rank=0"], "rendezvous=c10d numbers the machines"),
        (["slurm", "time=soon"], "time=soon: expected 90m, 12h, 2d"),
        (["slurm", "signal_s=60"], "signal_s=60: expected more than grace_s=120"),
        (["slurm", "processes=null"], "processes: has to be given"),
        ([*PODS, "name=My_Job"], "name=My_Job: expected at most 50 of a-z"),
        ([*PODS, "mount=runs"], "mount=runs: expected an absolute path"),
        (["slurm", "site=nowhere.yaml"], "site=nowhere.yaml: cannot be read"),
    ],
)
def test_a_mistake_is_named(texts: list[str], said: str) -> None:
    assert re.search(said.replace("?", r"\?"), problems(*texts))


def test_a_site_is_written_down_once_and_yields_to_the_command_line(tmp_path: Path) -> None:
    site = tmp_path / "cluster.yaml"
    site.write_text("partition: gpu\naccount: lab\nprocesses: 4\nsetup: |\n  module load cuda\n")
    config = read(["slurm", "account=other", f"site={site}"]).config
    assert config == Slurm(
        partition="gpu", account="other", processes=4, setup="module load cuda\n"
    )
    site.write_text("partiton: gpu\n")
    assert "partiton: unknown key. Did you mean partition?" in problems("slurm", f"site={site}")
    site.write_text("- gpu\n")
    assert "expected settings, one a line" in problems("slurm", f"site={site}")


def test_every_number_of_machines_that_may_come_has_to_suit_the_batch() -> None:
    found = problems(*NODES, "nodes=2", "processes=8")
    assert found.startswith("data.lanes=8: not divisible by the 16 ranks")
    found = problems(*NODES, "nodes=1:3", "processes=4")
    assert found.startswith("with 3 machines, data.lanes=8: not divisible by the 12 ranks")
    sizes = ["data.lanes=24", "train.global_batch=24", "train.micro_batch=1"]
    read([*NODES, "nodes=1:3", "processes=4", *sizes])


def test_a_sweep_stays_one_and_its_runs_are_known() -> None:
    request = read(["slurm", "-m", "model.K=2,3"])
    assert request.arguments == ["-m", "model.K=2,3"]
    assert request.run_dirs == [Path(f"runs/phd_cswa-{K}-16-32-tiny") for K in (2, 3)]


def test_the_arguments_of_another_script_are_its_own() -> None:
    request = read(["local", "script=other.py", "--lr", "1"])
    assert (request.arguments, request.run_dirs) == (["--lr", "1"], [])


def test_dry_shows_the_command_of_every_process() -> None:
    shown = describe(read([*NODES, "nodes=2", "processes=4", "run.dir='a b'"]))
    assert "processes on this machine: 4" in shown
    assert "machines: 2, c10d at node1:29500" in shown
    program = [sys.executable, "-u", str(ROOT / "train/main.py")]
    assert shlex.split(shown.splitlines()[-1]) == [*program, "run.dir='a b'"]


def test_dry_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")
    assert main(["slurm", "--dry", "model=phd"]) == 0
    assert capsys.readouterr().out.startswith("#!/bin/bash\n#SBATCH --job-name=phd\n")
    assert main([*PODS, "--dry"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["kind"] == "PyTorchJob"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("way", "command"), [(["slurm"], "sbatch"), (PODS, "kubectl apply -f -")], ids=["slurm", "pods"]
)
def test_a_scheduler_gets_what_dry_shows(
    way: list[str], command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / command.partition(" ")[0]
    tool.write_text('#!/bin/bash\necho "$(basename "$0") $*" | sed "s/ $//" >called\ncat >given\n')
    tool.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert main([*way, "model=phd"]) == 0
    assert (tmp_path / "called").read_text() == f"{command}\n"
    assert (tmp_path / "given").read_text() == describe(read([*way, "model=phd"]))
    assert (tmp_path / "logs").is_dir() == (way == ["slurm"])  # SLURM makes no directories


def test_a_machine_without_the_scheduler_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match="sbatch: not found on this machine; --dry prints"):
        main(["slurm"])


def test_help_names_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "python -m launch slurm" in capsys.readouterr().out
    assert main(["nodes", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {key}=" in shown for key in ("address", "nodes", "processes", "grace_s"))


@pytest.mark.process
def test_what_only_queues_jobs_needs_no_torch() -> None:
    script = (
        "import sys; from launch.__main__ import main; "
        "main(['slurm', '--dry']); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)


@pytest.mark.process
def test_the_command_line_runs_and_ends_as_its_processes_do(tmp_path: Path) -> None:
    (tmp_path / "exit").write_text("75")
    address = f"address=127.0.0.1:{free_port()}"
    settings = ["nodes", address, "processes=2", "local_address=127.0.0.1", f"script={WORKER}"]
    command = [sys.executable, "-m", "launch", *settings, str(tmp_path)]
    assert subprocess.run(command, cwd=ROOT, check=False, timeout=60).returncode == 75
    assert {line[:3] for line in (tmp_path / "log").read_text().splitlines()} <= {"0/2", "1/2"}
    wrong = [sys.executable, "-m", "launch", "local", "model=nothing"]
    assert subprocess.run(wrong, cwd=ROOT, check=False, capture_output=True).returncode == 2


def test_a_scheduler_passes_on_what_its_machines_have_to_know() -> None:
    config = Kubernetes(image="i", volume="v", nodes="1:2", heartbeat_s=9, script="a b.py")
    assert set(passed_on(config)) == {"processes=8", "script=a b.py", "nodes=1:2", "heartbeat_s=9"}
    request = read([*NODES, *passed_on(config)])
    assert request.config == Nodes(
        address="node1:29500", nodes="1:2", heartbeat_s=9, script="a b.py", processes=8
    )


SUBMITIT = ["hydra/launcher=submitit_slurm", "hydra.launcher.partition=gpu"]


def test_hydras_own_launcher_of_slurm_jobs_fits_the_configuration() -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    points = check([*SUBMITIT, "model.K=2,3"], multirun=True).jobs
    assert [job.model.K for job in points] == [2, 3]
