"""The settings of the launchers: one small frozen dataclass for each.

`local` starts processes on this machine. `nodes` starts those of one of several machines, each of
which gets the same command. `slurm` and `kubernetes` are schedulers, on whose machines that command
runs.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from conf.errors import Problem
from conf.exit_codes import ExitCode
from conf.settings import Settings, at_least

# A pod's name has at most 63 characters; the operators append up to 13.
KUBERNETES_NAME = r"[a-z]([-a-z0-9]{0,48}[a-z0-9])?"
SHARED = {"passed_on": True}  # marks a setting that a scheduler passes on to `nodes`


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
    """

    processes: int | None = field(default=None, metadata=SHARED)
    script: str | None = field(default=None, metadata=SHARED)
    max_restarts: int = field(default=3, metadata=SHARED)
    grace_s: int = field(default=120, metadata=SHARED)

    def problems(self) -> list[Problem]:
        return [
            *at_least(self, "", 1, "processes", "grace_s"),
            *at_least(self, "", 0, "max_restarts"),
        ]


@dataclass(frozen=True, kw_only=True)
class MultiNode(Local):
    """The settings that must be the same on all machines of a run.

    Attributes:
        nodes: the number of machines, each with as many `processes`. A range such as 1:4 is
            elastic: the run starts when at least 1 machine is there, continues when others die, and
            takes in up to 4.
        join_s: seconds that machines wait for each other at every start and restart.
        last_call_s: seconds that an elastic run waits for more machines when there are enough.
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

    def problems(self) -> list[Problem]:
        found = super().problems()
        found += at_least(self, "", 1, "join_s", "last_call_s", "heartbeat_s")
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
class Slurm(MultiNode):
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
        options: further options of sbatch, one on each line.
        setup: shell lines that run before each start, such as `module load cuda`.
        python: the Python interpreter; null: the one that runs this command, or `python` in a
            container.
        container: an image for the Pyxis plugin; null: none.
        mounts: what is mounted in the container, as FROM:TO,FROM:TO; the current directory always
            is. null: nothing else.
        signal_s: seconds before the time limit at which the run is told to save and end.
        logs: the directory of the job's output.
        checkpoints: directories, one on each line, in which a new checkpoint is progress; null:
            those of the run.
        stalls: after this many starts in a row that end early without progress, the job is not
            queued again.
    """

    processes: int | None = field(default=8, metadata=SHARED)
    name: str = "phd"
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    gres: str | None = "gpu"
    cpus: int | None = None
    options: str = ""
    setup: str = ""
    python: str | None = None
    container: str | None = None
    mounts: str | None = None
    signal_s: int = 300
    logs: str = "logs"
    checkpoints: str | None = None
    stalls: int = 3

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
        if self.signal_s <= self.grace_s:
            expected = f"expected more than grace_s={self.grace_s}"
            hint = "the run has to be saved before the time limit"
            found.append(Problem("signal_s", self.signal_s, expected, hint, others=("grace_s",)))
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
    retries: int = 100
    python: str = "python"

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
        return found


LAUNCHERS: dict[str, type[Local]] = {
    "local": Local,
    "nodes": Nodes,
    "slurm": Slurm,
    "kubernetes": Kubernetes,
}


def passed_on(config: MultiNode) -> Iterator[str]:
    """The settings of a scheduler as arguments of `nodes`, without those that are its defaults."""
    defaults = {setting.name: setting.default for setting in fields(Nodes)}
    for setting in fields(config):
        value: Any = getattr(config, setting.name)
        if setting.metadata == SHARED and value != defaults[setting.name]:
            yield f"{setting.name}={value}"
