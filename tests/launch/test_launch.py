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
from launch.__main__ import describe, main, read_command
from launch.config import Check, Kubernetes, Nodes, Slurm, passed_on
from tests.launch.machines import WORKER, free_port
from tests.patience import PATIENCE_S
from train.compose import check

ROOT = Path(__file__).parents[2]
NODES = ["nodes", "address=node1:29500"]
PODS = ["kubernetes", "image=phd:1", "volume=runs"]


def problems(*texts: str) -> str:
    with pytest.raises(ConfigError) as refusal:
        read_command(texts)
    return "\n".join(map(str, refusal.value.problems))


def test_settings_of_launcher_and_training_are_told_apart() -> None:
    command = read_command([*NODES, "nodes=1:2", "model=phd", "processes=4", "+optim.lr=1e-3"])
    assert command.config == Nodes(address="node1:29500", nodes="1:2", processes=4)
    assert command.arguments == ["model=phd", "+optim.lr=1e-3"]
    assert command.run_dirs == [Path("runs/phd-2-tiny-lr_0.001")]


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
        ([], "'': expected one of local, nodes, slurm, kubernetes, check"),
        (["slrum"], "'slrum': expected one of .* Did you mean slurm?"),
        (["local", "procceses=2"], "procceses: unknown group or key. Did you mean processes?"),
        (["local", "--processes", "4"], "^--processes 4: .* Did you mean processes=4?$"),
        (["local", "processes", "4"], "^processes 4: .* Did you mean processes=4?$"),
        (["local", "--model", "phd"], "^--model phd: .* Did you mean model=phd?$"),
        (["local", "modle=phd"], "modle: unknown group or key. Did you mean model?"),
        (["local", "--mutlirun"], "--mutlirun: unknown option. Did you mean --multirun?"),
        (["local", "model.K=2,3"], "several values make a sweep, which needs -m"),
        (["nodes"], "address: has to be given"),
        (
            ["nodes", "address=a:1", "last_call_s=1"],
            "last_call_s=1: expected an integer of at least 2",
        ),
        (["nodes", "address=node1"], "address='node1': expected HOST:PORT"),
        ([*NODES, "nodes=4:1"], "nodes='4:1': expected a number, or LEAST:MOST"),
        ([*NODES, "rendezvous=static"], "node_rank: has to be given"),
        ([*NODES, "rendezvous=static", "nodes=1:2"], "elastic, which needs rendezvous=c10d"),
        ([*NODES, "rendezvous=static", "nodes=2", "node_rank=2"], "expected less than nodes=2"),
        ([*NODES, "node_rank=0"], "rendezvous=c10d assigns the ranks of machines"),
        (["local", "env.A-B=1"], "env.A-B: a variable's name has letters, digits and _ only"),
        (["local", "env.A"], "env={'A': None}: expected text for each name"),
        (["local", "env=5", "env.A=1"], "env=5: expected text for each name"),
        (["slurm", "optin.lr=1"], "optin.lr: unknown key. Did you mean optim.lr?"),
        (["local", "envs.A=1"], "envs.A: unknown key. Did you mean env.A?"),
        ([*PODS, "nodeSelector.a/b=c"], "nodeSelector.a/b: unknown key. Did you mean node_selec"),
        (["local", "rank_log=a.log"], "rank_log='a.log': expected a file with %t"),
        (["local", "rank_log=%x/%t"], "rank_log='%x/%t': there is only %t"),
        (["slurm", "rank_log=%x/%t%q"], "there is only %t, %x, %j"),
        (["slurm", "mem=much"], "mem='much': expected a size such as 500G, or 0 for all"),
        (["slurm", "chdir=work"], "chdir='work': expected an absolute path"),
        (["slurm", "partition=a b"], "partition='a b': expected no spaces, quotes or #"),
        (["slurm", "venv=/v", "conda=c"], "conda='c': venv is given, too"),
        (["slurm", "runtime=apptainer"], "there is no container for it to run; set container="),
        (["slurm", "container=i.sif"], "Pyxis cannot read images of Apptainer; set runtime=app"),
        (["slurm", "container=i.sqsh", "runtime=apptainer"], "Apptainer cannot read images of"),
        (["slurm", "mounts=/a:/b"], "mounts='/a:/b': there is no container to mount it in"),
        (
            ["slurm", "max_clock_skew_s=-1"],
            "max_clock_skew_s=-1.0: expected a number of at least 0",
        ),
        (["check", "nodes=2"], "address='localhost:29500': other machines cannot reach it"),
        (["check", "nodes=1:2"], "nodes='1:2': expected the number of machines that are checked"),
        (["check", "message_mib=0"], "message_mib=0: expected an integer of at least 1"),
        (["slurm", "time=soon"], "time='soon': expected 90m, 12h, 2d"),
        (["slurm", "signal_s=60"], "signal_s=60: expected more than grace_s=120"),
        (["slurm", "processes=null"], "processes: has to be given"),
        ([*PODS, "name=My_Job"], "name='My_Job': expected at most 50 of a-z"),
        ([*PODS, "secrets.A=s3cr3t"], "secrets.A: expected NAME/KEY of a Secret in the cluster"),
        ([*PODS, "secrets.A-B=a/b"], "secrets.A-B: a variable's name has letters, digits and _"),
        ([*PODS, "secrets.A=a/b", "env.A=1"], "secrets.A: env.A is given, too"),
        ([*PODS, "tolerations=a:Never"], "tolerations='a:Never': expected KEY=VALUE:EFFECT"),
        ([*PODS, "resources.a/b=lots"], "resources.a/b='lots': expected an amount such as 2"),
        ([*PODS, "resources.nvidia.com/gpu=4"], "resources.nvidia.com/gpu='4': is what processes"),
        ([*PODS, "resources.memory=4Gi"], "resources.memory='4Gi': is what memory sets"),
        ([*PODS, "node_selector.a=b c"], "node_selector.a='b c': expected at most 63 letters"),
        ([*PODS, "rdma=a:0"], "rdma='a:0': expected NAME or NAME:COUNT"),
        ([*PODS, "mount=runs"], "mount='runs': expected an absolute path"),
        (["slurm", "site=nowhere.yaml"], "site='nowhere.yaml': cannot be read"),
    ],
)
def test_a_mistake_is_named(texts: list[str], said: str) -> None:
    assert re.search(said.replace("?", r"\?"), problems(*texts))


def test_a_site_is_written_down_once_and_yields_to_the_command_line(tmp_path: Path) -> None:
    site = tmp_path / "cluster.yaml"
    site.write_text("partition: gpu\naccount: lab\nprocesses: 4\nsetup: |\n  module load cuda\n")
    config = read_command(["slurm", "account=other", f"site={site}"]).config
    assert config == Slurm(
        partition="gpu", account="other", processes=4, setup="module load cuda\n"
    )
    site.write_text("partiton: gpu\n")
    assert "partiton: unknown key. Did you mean partition?" in problems("slurm", f"site={site}")
    site.write_text("partition: gpu\n", encoding="utf-8-sig")
    assert read_command(["slurm", f"site={site}"]).config.partition == "gpu"  # type: ignore[union-attr]
    site.write_text("partition: gpu\n", encoding="utf-16")
    assert "cannot be read (UTF-16, not UTF-8: convert" in problems("slurm", f"site={site}")
    site.write_text("- gpu\n")
    assert "expected settings, one on each line" in problems("slurm", f"site={site}")


@pytest.mark.parametrize("launcher", [["local"], NODES, ["slurm"], PODS, ["check"]])
@pytest.mark.parametrize(
    "name", ["WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD", "my_secret"]
)
def test_a_secret_is_refused_and_not_repeated(launcher: list[str], name: str) -> None:
    found = problems(*launcher, f"env.{name}=abc123")
    assert f"env.{name}: looks like a secret" in found
    assert "abc123" not in found


@pytest.mark.parametrize("launcher", [["slurm"], PODS])
@pytest.mark.parametrize(
    "url", ["https://user:abc123@host/a.jsonl", "https://host/a.jsonl?sig=abc123"]
)
def test_a_secret_of_the_training_is_refused_where_a_script_would_show_it(
    launcher: list[str], url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = problems(*launcher, "data=files", f"data.sources.files.paths='{url}'")
    assert "data.sources.files.paths=" in found
    assert "which scripts and manifests must not hold; write '${oc.env:NAME}' in its" in found
    assert "abc123" not in found
    monkeypatch.setenv("MY_URL", url)
    command = read_command([*launcher, "data=files", "data.sources.files.paths=${oc.env:MY_URL}"])
    assert "abc123" not in describe(command)


@pytest.mark.parametrize("setting", ["setup", "node_setup", "env.PROXY"])
@pytest.mark.parametrize(
    "text", ["https://user:s3cr3t@host/a", "export WANDB_API_KEY=s3cr3t", "X=1 HF_TOKEN='s3cr3t'"]
)
def test_a_script_holds_no_secret_that_was_typed(setting: str, text: str) -> None:
    if setting.startswith("env.") and "://" not in text:
        return  # a variable's value is no shell code
    found = problems("slurm", f"{setting}={text}")
    assert found.startswith(f"{setting}: ")
    assert "s3cr3t" not in found


def test_a_secret_that_the_shell_reads_is_no_secret_in_the_script() -> None:
    lines = 'export WANDB_API_KEY="$(cat ~/.key)"\nexport HF_TOKEN=$TOKEN'
    assert read_command(["slurm", f"setup={lines}"]).config == Slurm(setup=lines)


def test_variables_that_only_sound_like_secrets_are_none() -> None:
    names = ["TOKENIZERS_PARALLELISM", "NCCL_DEBUG", "KEYBOARD", "PASSWORDLESS", "MY_TOKENS"]
    config = read_command(["local", *(f"env.{name}=1" for name in names)]).config
    assert config.env == dict.fromkeys(names, "1")
    both = read_command(["local", "env.B=2", 'env={"A": "1"}']).config
    assert both.env == {"A": "1", "B": "2"}


def test_variables_are_given_one_by_one_or_in_the_site(tmp_path: Path) -> None:
    site = tmp_path / "cluster.yaml"
    site.write_text("env:\n  NCCL_DEBUG: WARN\n  OMP_NUM_THREADS: 4\n  A: 'x=y, z'\n")
    config = read_command(["slurm", f"site={site}", "env.NCCL_DEBUG=INFO", "env.EMPTY="]).config
    given = {"NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "4", "A": "x=y, z", "EMPTY": ""}
    assert config.env == given


def test_the_check_takes_the_settings_of_a_scheduler_and_of_the_run(tmp_path: Path) -> None:
    site = tmp_path / "cluster.yaml"
    site.write_text("partition: gpu\nprocesses: 4\nmin_free_disk_gib: 500.0\n")
    command = read_command(
        ["check", f"site={site}", "nodes=2", "address=node1:1", "data.lanes=8", "run.dir=/r"]
    )
    assert command.config == Check(
        nodes="2", address="node1:1", processes=4, min_free_disk_gib=500.0
    )
    assert command.run_dirs == [Path("/r")]
    assert list(passed_on(Slurm(nodes="2:4", grace_s=99, check_s=30), to=Check)) == [
        *("check_s=30", "processes=8", "nodes=4"),
    ]


def test_names_of_kubernetes_may_have_dots_in_them() -> None:
    label = "node.kubernetes.io/instance-type"
    command = read_command(
        [*PODS, f"node_selector.{label}=p5", "resources.rdma/ib=2", "tolerations=nvidia.com/gpu"]
    )
    assert command.config == Kubernetes(
        image="phd:1",
        volume="runs",
        node_selector={label: "p5"},
        resources={"rdma/ib": "2"},
        tolerations=("nvidia.com/gpu",),
    )


def test_a_reference_that_may_be_a_secret_is_not_repeated() -> None:
    assert "s3cr3t" not in problems(*PODS, "secrets.WANDB_API_KEY=s3cr3t")


def test_every_number_of_machines_that_may_come_has_to_suit_the_batch() -> None:
    found = problems(*NODES, "nodes=2", "processes=8")
    assert found.startswith("data.lanes=8: not divisible by the 16 ranks")
    found = problems(*NODES, "nodes=1:3", "processes=4")
    assert found.startswith("data.lanes=8: with 3 machines not divisible by the 12 ranks")
    sizes = ["data.lanes=24", "train.global_batch=24", "train.micro_batch=1"]
    read_command([*NODES, "nodes=1:3", "processes=4", *sizes])


def test_a_sweep_stays_one_and_its_runs_are_known() -> None:
    command = read_command(["slurm", "-m", "model.K=2,3"])
    assert command.arguments == ["-m", "model.K=2,3"]
    assert command.run_dirs == [Path(f"runs/phd_cswa-{K}-16-32-tiny") for K in (2, 3)]


@pytest.mark.parametrize("launcher", [["local"], NODES], ids=["local", "nodes"])
@pytest.mark.parametrize("script", ["nosuch.py", "tests", "../conf/main.py"])
def test_a_script_that_is_not_there_is_told_before_anything_starts(
    launcher: list[str], script: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    told = re.escape(f"script={script!r}: no such file; correct it (relative paths start at {ROOT}")
    with pytest.raises(ConfigError, match=told):
        main([*launcher, f"script={script}"])
    # What is only shown may be meant for other machines.
    assert main([*launcher, f"script={script}", "--dry"]) == 0


def test_the_arguments_of_another_script_are_its_own() -> None:
    command = read_command(["local", "script=other.py", "--lr", "1", "envs.A=1"])
    assert (command.arguments, command.run_dirs) == (["--lr", "1", "envs.A=1"], [])


def test_dry_shows_the_command_of_every_process() -> None:
    shown = describe(read_command([*NODES, "nodes=2", "processes=4", "run.dir='a b'"]))
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
    ("launcher", "tool"),
    [(["slurm"], "sbatch"), (PODS, "kubectl apply -f -")],
    ids=["slurm", "pods"],
)
def test_a_scheduler_gets_what_dry_shows(
    launcher: list[str], tool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / tool.partition(" ")[0]
    script.write_text(
        '#!/bin/bash\necho "$(basename "$0") $*" | sed "s/ $//" >called\ncat >given\n'
    )
    script.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert main([*launcher, "model=phd"]) == 0
    assert (tmp_path / "called").read_text() == f"{tool}\n"
    assert (tmp_path / "given").read_text() == describe(read_command([*launcher, "model=phd"]))
    # SLURM does not make the directory of its logs.
    assert (tmp_path / "logs").is_dir() == (launcher == ["slurm"])


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
    assert subprocess.run(command, cwd=ROOT, check=False, timeout=PATIENCE_S).returncode == 75
    assert {line[:3] for line in (tmp_path / "log").read_text().splitlines()} <= {"0/2", "1/2"}
    wrong = [sys.executable, "-m", "launch", "local", "model=nothing"]
    assert subprocess.run(wrong, cwd=ROOT, check=False, capture_output=True).returncode == 2


def test_a_scheduler_passes_on_what_its_machines_have_to_know() -> None:
    config = Kubernetes(image="i", volume="v", nodes="1:2", heartbeat_s=9, script="a b.py")
    assert set(passed_on(config)) == {"processes=8", "script=a b.py", "nodes=1:2", "heartbeat_s=9"}
    command = read_command([*NODES, *passed_on(config)])
    assert command.config == Nodes(
        address="node1:29500", nodes="1:2", heartbeat_s=9, script="a b.py", processes=8
    )


SUBMITIT = ["hydra/launcher=submitit_slurm", "hydra.launcher.partition=gpu"]


def test_hydras_own_launcher_of_slurm_jobs_fits_the_configuration() -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    points = check([*SUBMITIT, "model.K=2,3"], multirun=True).jobs
    assert [job.model.K for job in points] == [2, 3]
