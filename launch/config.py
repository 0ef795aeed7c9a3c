"""The settings of the launchers: one small frozen dataclass for each.

`local` starts processes on this machine. `nodes` starts those of one of several machines, each of
which gets the same command. `slurm` and `kubernetes` are schedulers, on whose machines that command
runs.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from conf.errors import Problem
from conf.exit_codes import ExitCode
from conf.redaction import is_secret, redacted
from conf.settings import Settings, at_least

# A pod's name has at most 63 characters; the operators append up to 13.
KUBERNETES_NAME = r"[a-z]([-a-z0-9]{0,48}[a-z0-9])?"
QUANTITY = r"(\d+(\.\d*)?|\.\d+)([KMGTPE]i|[numkMGTPE]|[eE][+-]?\d+)?"
LABEL = r"([A-Za-z0-9]([-\w.]{0,61}[A-Za-z0-9])?)?"
TOLERATION = r"([\w./-]+)(?:=([\w.-]*))?(?::(NoSchedule|PreferNoSchedule|NoExecute))?"
VARIABLE = r"[A-Za-z_]\w*"
NO_VARIABLE = "a variable's name has letters, digits and _ only"
SHARED = {"passed_on": True}  # marks a setting that a scheduler passes on to `nodes`
CHECKED = {"checked": True}  # marks one that it passes on to `check`


@dataclass(frozen=True, kw_only=True)
class Local(Settings):
    """Processes on this machine: python -m launch local processes=4 model=phd_cswa ...

    Attributes:
        processes: how many processes are started; null: one for each CUDA device, or one where
            there is none.
        script: the script that each process runs; null: train/main.py. The arguments of another
            script are not checked.
        max_restarts: how often all processes are started again after one of them has crashed.
        grace_s: seconds that processes have to save and end after a signal, before they are killed.
        env: variables of every process, as env.NAME=value.
        rank_log: a file for all that a rank prints, with %t where the number of the rank goes, such
            as logs/rank_%t.log; then only rank 0's output is also shown here. null: the output of
            all ranks is shown here, and what they write to stderr is kept if one of them crashes.
    """

    processes: int | None = field(default=None, metadata=SHARED)
    script: str | None = field(default=None, metadata=SHARED)
    max_restarts: int = field(default=3, metadata=SHARED)
    grace_s: int = field(default=120, metadata=SHARED)
    env: dict[str, str] = field(default_factory=dict)
    rank_log: str | None = field(default=None, metadata=SHARED)

    def problems(self) -> list[Problem]:
        return [
            *at_least(self, "", 1, "processes", "grace_s"),
            *at_least(self, "", 0, "max_restarts"),
            *_env_problems(self.env, self.secret_hint),
            *self._rank_log_problems(),
        ]

    @property
    def secret_hint(self) -> str:
        """Where a secret belongs instead of `env`, which others can read."""
        return "export it in the shell in which you type this command: all processes inherit it"

    @property
    def placeholders(self) -> str:
        """The letters that may follow a % in `rank_log`."""
        return "t"

    def _rank_log_problems(self) -> list[Problem]:
        if self.rank_log is None:
            return []
        if "%t" not in self.rank_log:
            expected = "expected a file with %t, where the number of the rank goes"
            return [Problem("rank_log", self.rank_log, expected, "for example logs/rank_%t.log")]
        if re.search(f"%[^{self.placeholders}]|%$", self.rank_log):
            known = ", ".join(f"%{letter}" for letter in self.placeholders)
            return [Problem("rank_log", self.rank_log, f"there is only {known}")]
        return []


@dataclass(frozen=True, kw_only=True)
class MultiNode(Local):
    """The settings that must be the same on all machines of a run.

    Attributes:
        nodes: the number of machines, each with as many `processes`. A range such as 1:4 is
            elastic: the run starts when at least 1 machine is there, continues when others die, and
            takes in up to 4.
        join_s: seconds that machines wait for each other at every start and restart.
        last_call_s: seconds that an elastic run waits for more machines when there are enough; at
            least 2, because machines that wait look once a second.
        heartbeat_s: seconds between two heartbeats of a machine, which counts as dead when three
            are missing.
    """

    nodes: int | str = field(default=1, metadata=SHARED)
    join_s: int = field(default=600, metadata=SHARED)
    last_call_s: int = field(default=30, metadata=SHARED)
    heartbeat_s: int = field(default=5, metadata=SHARED)

    @property
    def least_nodes(self) -> int:
        """The least number of machines that a run needs."""
        return int(str(self.nodes).partition(":")[0])

    @property
    def most_nodes(self) -> int:
        """The greatest number of machines that a run takes in."""
        return int(str(self.nodes).rpartition(":")[2])

    @property
    def is_elastic(self) -> bool:
        """Whether machines may join while the run is at work."""
        return self.least_nodes < self.most_nodes

    def problems(self) -> list[Problem]:
        found = super().problems()
        found += at_least(self, "", 1, "join_s", "heartbeat_s")
        found += at_least(self, "", 2, "last_call_s")
        form = re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", str(self.nodes))
        if not form or self.least_nodes > self.most_nodes:
            expected = "expected a number, or LEAST:MOST such as 1:4"
            found.append(Problem("nodes", self.nodes, expected))
        return found


@dataclass(frozen=True, kw_only=True)
class Nodes(MultiNode):
    """One of several machines; on each: python -m launch nodes nodes=2 address=HOST:29500 ...

    Attributes:
        address: HOST:PORT of the machine that serves the rendezvous; all machines must reach it.
        rendezvous: `c10d`: machines come in any order and may be replaced. `static`: each machine
            has its `node_rank`, and the run ends when one is lost.
        node_rank: the rank of this machine, from 0, for `rendezvous=static`; null: the rendezvous
            assigns it. Rank 0 is the machine of `address`.
        id: a name for the run that no other run at this address has.
        local_address: the name or IP address by which the other machines reach this one; null: its
            host name.
        saved_code: the exit code that stands for 75: the run was saved and ended early, or a
            server, disk or network failed for now, and the same command continues it.
    """

    address: str
    rendezvous: Literal["c10d", "static"] = "c10d"
    node_rank: int | None = None
    id: str = "phd"
    local_address: str | None = None
    saved_code: int = int(ExitCode.REQUEUE)

    def problems(self) -> list[Problem]:
        found = super().problems()
        found += at_least(self, "", 0, "node_rank") + at_least(self, "", 1, "saved_code")
        port = re.fullmatch(r"\S+:(\d{1,5})", self.address)
        if not port or not 0 < int(port[1]) < 2**16:
            expected = "expected HOST:PORT, such as node1:29500"
            found.append(Problem("address", self.address, expected))
        if self.rendezvous == "static":
            return found + self._static_problems()
        if self.node_rank is not None:
            reason = "rendezvous=c10d assigns the ranks of machines"
            found.append(Problem("node_rank", self.node_rank, reason, "leave it out"))
        return found

    def _static_problems(self) -> list[Problem]:
        if ":" in str(self.nodes):
            reason = f"nodes={self.nodes} is elastic, which needs rendezvous=c10d"
            return [Problem("rendezvous", self.rendezvous, reason, others=("nodes",))]
        if self.node_rank is None:
            return [Problem("node_rank", expected="has to be given with rendezvous=static, from 0")]
        if str(self.nodes).isdigit() and self.node_rank >= self.most_nodes:
            expected = f"expected less than nodes={self.nodes}"
            return [Problem("node_rank", self.node_rank, expected, others=("nodes",))]
        return []


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """What the check of machines asks for.

    Attributes:
        min_bandwidth_gb_s: the least bus bandwidth of an all-reduce in gigabytes (10^9 bytes) per
            second, within a machine and between machines; null: a machine is only compared with
            the others.
        max_clock_skew_s: the greatest difference in seconds between the clocks of two machines.
        min_relative_speed: the least speed of a device or connection, as a part of the median of
            the others; 0: they are not compared.
        min_free_disk_gib: the least free space in GiB where runs, caches and temporary files are.
        check_s: seconds after which a check that has not ended names the ranks that it waits for.
    """

    min_bandwidth_gb_s: float | None = field(default=None, metadata=CHECKED)
    max_clock_skew_s: float = field(default=1.0, metadata=CHECKED)
    min_relative_speed: float = field(default=0.5, metadata=CHECKED)
    min_free_disk_gib: float = field(default=10.0, metadata=CHECKED)
    check_s: int = field(default=60, metadata=CHECKED)

    def threshold_problems(self) -> list[Problem]:
        """Every impossible threshold."""
        return [
            *at_least(self, "", 0.0, "min_bandwidth_gb_s", "max_clock_skew_s"),
            *at_least(self, "", 0.0, "min_relative_speed", "min_free_disk_gib"),
            *at_least(self, "", 1, "check_s"),
        ]


@dataclass(frozen=True, kw_only=True)
class Check(Nodes, Thresholds):
    """Checks machines in about a minute: python -m launch check nodes=2 address=HOST:29500 ...

    Each machine gets the same command, with the settings of the run that is to be started there.
    On each, as many `processes` as the run has look at their device, the free disk, the clock, the
    versions of libraries and the code, and send data to each other. A machine that differs or is
    slow is named, and the exit code is 1.

    Attributes:
        address: HOST:PORT of the machine that serves the rendezvous; all machines must reach it.
            It has to be given for more than one machine.
        device: `auto`: CUDA devices where all is installed for them, else the CPU; or one of both.
        message_mib: the size of the all-reduce in MiB; null: 256 on CUDA devices, 8 on the CPU.
        max_restarts: what has crashed is not started again.
    """

    address: str = "localhost:29500"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    message_mib: int | None = None
    max_restarts: int = 0
    grace_s: int = 10

    def problems(self) -> list[Problem]:
        problems = [*super().problems(), *self.threshold_problems()]
        problems += at_least(self, "", 1, "message_mib")
        if ":" in str(self.nodes):
            expected = "expected the number of machines that are checked"
            problems.append(Problem("nodes", self.nodes, expected))
        elif self.address.startswith("localhost:") and self.most_nodes > 1:
            expected = f"other machines cannot reach it, and nodes={self.nodes}"
            hint = "for example address=node1:29500"
            problems.append(Problem("address", self.address, expected, hint, others=("nodes",)))
        return problems


@dataclass(frozen=True, kw_only=True)
class Slurm(MultiNode, Thresholds):
    """A batch job: python -m launch slurm nodes=2 processes=8 partition=gpu time=12h ...

    When the run was saved and ended early, or a server, disk or network failed for now (exit code
    75), the job goes back into the queue and continues later.

    Attributes:
        processes: how many processes are started on each machine.
        name: the name of the job.
        time: the time limit of the job, as 90m, 12h or 2d, or in SLURM's own form; null: that of
            the partition.
        partition: the partition; null: SLURM's default.
        account: the account that pays; null: SLURM's default.
        qos: the quality of service; null: SLURM's default.
        gres: the kind of the devices, such as gpu or gpu:a100, one for each process; null: none.
        cpus: the number of CPU cores of each process; null: SLURM's default.
        mem: the memory of each machine, such as 500G; 0: all of it. null: SLURM's default.
        exclusive: no other job runs on the machines of this one.
        chdir: the directory in which the job runs, an absolute path; null: the current one.
        options: further options of sbatch, one on each line.
        setup: shell lines that run before each start, on the first machine only, such as
            `module load cuda`. All machines get the variables that they export.
        node_setup: shell lines that run before each start on every machine, in the container if
            there is one.
        venv: a virtual environment that every machine activates; null: none.
        conda: the name or path of a conda environment that every machine activates; null: none.
        python: the Python interpreter; null: `python` in a container, `venv` or `conda`, else the
            one that runs this command.
        container: an image; null: none.
        runtime: what runs the container: `pyxis`, SLURM's plugin for enroot; or `apptainer`.
        mounts: what is mounted in the container, as FROM:TO,FROM:TO; the current directory always
            is. null: nothing else.
        signal_s: seconds before the time limit at which the run is told to save and end.
        logs: the directory of the job's output.
        rank_log: a file for all that a rank prints, with %t where the number of the rank goes, %x
            for the name of the job and %j for its number; null: %x-%j/rank_%t.log in `logs`. Rank
            0's output is in the job's output, too.
        checkpoints: directories, one on each line, in which a new checkpoint is progress; null:
            those of the run.
        stalls: after this many starts in a row that end early without progress, the job is not
            queued again.
        preflight: before each start, check the machines as `python -m launch check` does; a bad one
            is named, and ends the job.
    """

    processes: int | None = field(default=8, metadata=SHARED)
    name: str = "phd"
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    gres: str | None = "gpu"
    cpus: int | None = None
    mem: str | None = None
    exclusive: bool = False
    chdir: str | None = None
    options: str = ""
    setup: str = ""
    node_setup: str = ""
    venv: str | None = None
    conda: str | None = None
    python: str | None = None
    container: str | None = None
    runtime: Literal["pyxis", "apptainer"] = "pyxis"
    mounts: str | None = None
    signal_s: int = 300
    logs: str = "logs"
    checkpoints: str | None = None
    stalls: int = 3
    preflight: bool = False

    @property
    def secret_hint(self) -> str:
        return (
            "export it in the shell from which you submit: SLURM hands it on, and the script does "
            "not hold it"
        )

    @property
    def placeholders(self) -> str:
        return "txj"

    @property
    def log_dir(self) -> Path:
        """The directory of the job's output, as it is found from anywhere."""
        return Path(self.chdir or "", self.logs)

    def problems(self) -> list[Problem]:
        found = super().problems() + at_least(self, "", 1, "cpus", "stalls", "signal_s")
        if self.processes is None:
            found.append(Problem("processes", expected="has to be given, for each machine"))
        if self.mounts is not None and not re.fullmatch(r"[\w./:,@+-]+", self.mounts):
            found.append(Problem("mounts", self.mounts, "expected FROM:TO,FROM:TO"))
        if not re.fullmatch(r"[\w.+-]+", self.name):
            found.append(Problem("name", self.name, "expected letters, digits and _ . + - only"))
        if self.time is not None and not re.fullmatch(r"[\d:-]+|\d+[smhd]", self.time):
            expected = "expected 90m, 12h, 2d or [DAYS-]HOURS:MINUTES:SECONDS"
            found.append(Problem("time", self.time, expected))
        if self.mem is not None and not re.fullmatch(r"\d+[KMGT]?", self.mem):
            found.append(Problem("mem", self.mem, "expected a size such as 500G, or 0 for all"))
        if self.chdir is not None and not self.chdir.startswith("/"):
            found.append(Problem("chdir", self.chdir, "expected an absolute path"))
        if self.signal_s <= self.grace_s:
            expected = f"expected more than grace_s={self.grace_s}"
            hint = "the run has to be saved before the time limit"
            found.append(Problem("signal_s", self.signal_s, expected, hint, others=("grace_s",)))
        found += self.threshold_problems()
        return [
            *found,
            *self._header_problems(),
            *self._environment_problems(),
            *self._setup_problems(),
        ]

    def _header_problems(self) -> list[Problem]:
        """What is written behind #SBATCH has to stay one word there."""
        names = ("partition", "account", "qos", "gres", "chdir", "logs")
        return [
            Problem(name, value, "expected no spaces, quotes or #")
            for name in names
            if re.search(r"[\s'\"#\\]", value := getattr(self, name) or "")
        ]

    def _setup_problems(self) -> list[Problem]:
        """Secrets in shell lines; one that the shell reads from somewhere is none."""
        found = []
        for setting in ("setup", "node_setup"):
            text = getattr(self, setting)
            assigned = re.findall(r"\b([A-Za-z_]\w*)=[\"']?[^\s$\"']", text)
            name = next(filter(is_secret, assigned), None)
            if name or redacted(text) != text:
                what = f"sets {name}" if name else "has a link with a password or a signature"
                expected = f"{what}, and scripts must not hold secrets"
                found.append(Problem(setting, expected=expected, hint=self.secret_hint))
        return found

    def _environment_problems(self) -> list[Problem]:
        """A container, and an environment of Python."""
        found = []
        if self.venv and self.conda:
            expected = "venv is given, too, and only one of them can be active"
            found.append(Problem("conda", self.conda, expected, others=("venv",)))
        if self.container is None and self.mounts is not None:
            found.append(Problem("mounts", self.mounts, "there is no container to mount it in"))
        if self.container is None and self.runtime != "pyxis":
            expected = "there is no container for it to run"
            found.append(Problem("runtime", self.runtime, expected, "set container=IMAGE"))
        if self.container and self.container.endswith(".sif") and self.runtime == "pyxis":
            expected = "Pyxis cannot read images of Apptainer"
            hint = "set runtime=apptainer"
            found.append(Problem("container", self.container, expected, hint, ("runtime",)))
        if self.container and self.container.endswith(".sqsh") and self.runtime == "apptainer":
            expected = "Apptainer cannot read images of enroot"
            hint = "set runtime=pyxis"
            found.append(Problem("container", self.container, expected, hint, ("runtime",)))
        return found


@dataclass(frozen=True, kw_only=True)
class Kubernetes(MultiNode):
    """A job of Kubeflow's operator: python -m launch kubernetes nodes=2 image=... volume=...

    When the run was saved and ended early, or a server, disk or network failed for now (exit code
    75), the operator replaces the pods, and the run continues.

    Attributes:
        processes: how many processes are started in each pod.
        image: the container image, in which this framework is installed.
        volume: the claim (PVC) of the volume that all pods share and that runs are written to.
        kind: `PyTorchJob` of Kubeflow's training operator v1, or `TrainJob` of its Trainer v2.
        name: the name of the job.
        namespace: the namespace of the job; null: that of kubectl's context.
        mount: where the volume is mounted; processes start in this directory.
        device: the resource of which each process gets one; null: none.
        cpu: the CPU cores of each pod, as Kubernetes writes them; null: no limit.
        memory: the memory of each pod, as Kubernetes writes it; null: no limit.
        shared_memory: the size of /dev/shm, which counts as part of `memory`.
        port: the port of the first pod at which the pods find each other.
        secrets: variables whose values are in a Secret of the cluster, as
            secrets.WANDB_API_KEY=NAME/KEY; the manifest holds the reference alone.
        node_selector: labels of the machines that take pods, as node_selector.LABEL=VALUE.
        tolerations: taints of machines that take pods all the same, as `kubectl taint` writes them:
            KEY=VALUE:EFFECT, KEY:EFFECT or KEY.
        resources: further resources of each pod, as resources.NAME=AMOUNT.
        rdma: the resource of the devices for RDMA, as NAME or NAME:COUNT, such as
            rdma/hca_shared or vpc.amazonaws.com/efa:32; pods with one may lock memory. null: none.
        host_network: pods use the network of their machine, as InfiniBand and RoCE need it where
            no network of theirs leads to the devices.
        annotations: of each pod, as annotations.NAME=VALUE.
        image_pull_secret: the Secret with which the image is pulled; null: none.
        retries: how many pods a TrainJob replaces because they ended with code 75 or were killed. A
            PyTorchJob has no such limit.
        python: the Python interpreter in the image.
    """

    processes: int | None = field(default=8, metadata=SHARED)
    image: str
    volume: str
    kind: Literal["PyTorchJob", "TrainJob"] = "PyTorchJob"
    name: str = "phd"
    namespace: str | None = None
    mount: str = "/runs"
    device: str | None = "nvidia.com/gpu"
    cpu: str | None = None
    memory: str | None = None
    shared_memory: str = "16Gi"
    port: int = 29500
    secrets: dict[str, str] = field(default_factory=dict)
    node_selector: dict[str, str] = field(default_factory=dict)
    tolerations: tuple[str, ...] = ()
    resources: dict[str, str] = field(default_factory=dict)
    rdma: str | None = None
    host_network: bool = False
    annotations: dict[str, str] = field(default_factory=dict)
    image_pull_secret: str | None = None
    retries: int = 100
    python: str = "python"

    @property
    def secret_hint(self) -> str:
        return "put it into a Secret of the cluster, and give secrets.VARIABLE=NAME/KEY"

    def problems(self) -> list[Problem]:
        found = super().problems()
        found += at_least(self, "", 0, "retries") + at_least(self, "", 1, "port")
        if self.processes is None:
            found.append(Problem("processes", expected="has to be given, for each pod"))
        if not re.fullmatch(KUBERNETES_NAME, self.name):
            expected = "expected at most 50 of a-z, 0-9 and -, a letter first"
            found.append(Problem("name", self.name, expected))
        if not self.mount.startswith("/"):
            found.append(Problem("mount", self.mount, "expected an absolute path"))
        return found + self._secret_problems() + self._pod_problems()

    def _secret_problems(self) -> list[Problem]:
        """References that are none; they may be secrets, so they are not repeated."""
        found = []
        for name, reference in self.secrets.items():
            if not re.fullmatch(VARIABLE, name):
                found.append(Problem(f"secrets.{name}", expected=NO_VARIABLE))
            elif not re.fullmatch(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?/[-\w.]+", reference):
                expected = "expected NAME/KEY of a Secret in the cluster, not the secret itself"
                hint = "kubectl create secret generic NAME --from-literal=KEY=... creates one"
                found.append(Problem(f"secrets.{name}", expected=expected, hint=hint))
            elif name in self.env:
                found.append(Problem(f"secrets.{name}", expected=f"env.{name} is given, too"))
        return found

    def _pod_problems(self) -> list[Problem]:
        """What the cluster would refuse, or drop in silence."""
        found = []
        for text in self.tolerations:
            if not re.fullmatch(TOLERATION, text):
                expected = "expected KEY=VALUE:EFFECT, KEY:EFFECT or KEY"
                hint = "effects are NoSchedule, PreferNoSchedule and NoExecute"
                found.append(Problem("tolerations", text, expected, hint))
        for name, amount in self.resources.items():
            if not re.fullmatch(QUANTITY, amount):
                expected = "expected an amount such as 2, 500m or 100Gi"
                found.append(Problem(f"resources.{name}", amount, expected))
            elif name in ("cpu", "memory", self.device):
                own = name if name in ("cpu", "memory") else "processes"
                expected = f"is what {own} sets"
                found.append(Problem(f"resources.{name}", amount, expected))
        for name, value in self.node_selector.items():
            if not re.fullmatch(LABEL, value):
                expected = "expected at most 63 letters, digits and - _ ."
                found.append(Problem(f"node_selector.{name}", value, expected))
        if self.rdma is not None and not re.fullmatch(r"[\w./-]+(:[1-9]\d*)?", self.rdma):
            expected = "expected NAME or NAME:COUNT, such as rdma/hca_shared:1"
            found.append(Problem("rdma", self.rdma, expected))
        return found


LAUNCHERS: dict[str, type[Local]] = {
    "local": Local,
    "nodes": Nodes,
    "slurm": Slurm,
    "kubernetes": Kubernetes,
    "check": Check,
}


def passed_on(config: MultiNode, to: type[Nodes] = Nodes) -> Iterator[str]:
    """The settings of a scheduler as arguments of `to`, without those that are its defaults."""
    marks = (CHECKED, SHARED) if to is Check else (SHARED,)
    own = ("max_restarts", "grace_s", "rank_log") if to is Check else ()
    defaults = {setting.name: setting.default for setting in fields(to)}
    for setting in fields(config):
        value: Any = getattr(config, setting.name)
        if setting.metadata not in marks or setting.name in own:
            continue
        if to is Check and setting.name == "nodes":
            value = config.most_nodes
        if value != defaults[setting.name]:
            yield f"{setting.name}={value}"


def _env_problems(env: dict[str, str], hint: str) -> list[Problem]:
    """Names that no variable can have, and secrets, which would be written down."""
    found = []
    for name in env:
        if not re.fullmatch(VARIABLE, name):
            found.append(Problem(f"env.{name}", expected=NO_VARIABLE))
        elif is_secret(name) or redacted(env[name]) != env[name]:
            expected = (
                "looks like a secret, which command lines, scripts and manifests must not hold"
            )
            found.append(Problem(f"env.{name}", expected=expected, hint=hint))
    return found
