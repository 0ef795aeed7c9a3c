"""How the processes of a run start: one small frozen value per way of starting them.

`local` is this machine; `nodes` is one of several machines, each of which is given the same
command; `slurm` and `kubernetes` are schedulers, on whose machines that command runs.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any, Literal

KUBERNETES_NAME = r"[a-z]([-a-z0-9]{0,48}[a-z0-9])?"  # of a pod, with room for what is appended
SHARED = {"passed_on": True}  # a scheduler's setting that its machines' `nodes` is told


@dataclass(frozen=True, kw_only=True)
class Local:
    """Processes on this machine; python -m launch local processes=4 model=phd_cswa ...

    Attributes:
        processes: null: one for each CUDA device, or one where there is none.
        script: what each process runs; null: train/main.py. Only its arguments are checked.
        max_restarts: how often all processes are started again after one has crashed.
        grace_s: seconds that processes have to save and end after a signal, before they are killed.
    """

    processes: int | None = field(default=None, metadata=SHARED)
    script: str | None = field(default=None, metadata=SHARED)
    max_restarts: int = field(default=3, metadata=SHARED)
    grace_s: int = field(default=120, metadata=SHARED)

    def problems(self) -> list[str]:
        return [
            *_least(self, 1, "processes", "grace_s"),
            *_least(self, 0, "max_restarts"),
        ]


@dataclass(frozen=True, kw_only=True)
class Group(Local):
    """What several machines have to agree on.

    Attributes:
        nodes: how many machines, each with as many `processes`; 1:4 is elastic: the run starts with
            at least 1, goes on without those that die, and takes in those that come.
        join_s: seconds that machines wait for each other at every (re)start.
        last_call_s: seconds that an elastic run, once it has enough machines, waits for more.
        heartbeat_s: seconds between two signs of life of a machine; it is dead after three missed.
    """

    nodes: int | str = field(default=1, metadata=SHARED)
    join_s: int = field(default=600, metadata=SHARED)
    last_call_s: int = field(default=30, metadata=SHARED)
    heartbeat_s: int = field(default=5, metadata=SHARED)

    @property
    def least_nodes(self) -> int:
        """Machines without which nothing starts."""
        return int(str(self.nodes).partition(":")[0])

    @property
    def most_nodes(self) -> int:
        """Machines beyond which no more are taken in."""
        return int(str(self.nodes).rpartition(":")[2])

    def problems(self) -> list[str]:
        found = super().problems() + _least(self, 1, "join_s", "last_call_s", "heartbeat_s")
        form = re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", str(self.nodes))
        if not form or self.least_nodes > self.most_nodes:
            found.append(f"nodes={self.nodes}: expected a number, or LEAST:MOST such as 1:4")
        return found


@dataclass(frozen=True, kw_only=True)
class Nodes(Group):
    """One of several machines; run on each: python -m launch nodes nodes=2 address=HOST:29500 ...

    Attributes:
        address: HOST:PORT of one of the machines, which all can reach; it keeps the list of them.
        rendezvous: c10d: machines come in any order and may be replaced; static: each has its
            `node_rank`, and a lost one ends the run.
        node_rank: this machine's number from 0, for rendezvous=static; 0 is that of `address`.
        id: a name that no other run at this address has.
        local_address: this machine's name or IP as the others reach it; null: its host name.
        saved_code: the exit code when the run was saved and ended early.
    """

    address: str
    rendezvous: Literal["c10d", "static"] = "c10d"
    node_rank: int | None = None
    id: str = "phd"
    local_address: str | None = None
    saved_code: int = 75

    def problems(self) -> list[str]:
        found = super().problems() + _least(self, 0, "node_rank") + _least(self, 1, "saved_code")
        port = re.fullmatch(r"\S+:(\d{1,5})", self.address)
        if not port or not 0 < int(port[1]) < 2**16:
            found.append(f"address={self.address}: expected HOST:PORT, such as node1:29500")
        static = self.rendezvous == "static"
        if static and ":" in str(self.nodes):
            found.append(f"rendezvous=static: nodes={self.nodes} is elastic, which needs c10d")
        elif static and self.node_rank is None:
            found.append("node_rank: has to be given with rendezvous=static, from 0 on")
        elif static and not found and (self.node_rank or 0) >= self.most_nodes:
            found.append(f"node_rank={self.node_rank}: expected less than nodes={self.nodes}")
        if not static and self.node_rank is not None:
            found.append(
                f"node_rank={self.node_rank}: rendezvous=c10d numbers the machines; leave it out"
            )
        return found


@dataclass(frozen=True, kw_only=True)
class Slurm(Group):
    """A batch job; python -m launch slurm nodes=2 processes=8 partition=gpu time=12h ...

    It is put back into the queue when it was saved and ended early, and goes on from there.

    Attributes:
        name: the job's.
        time: its limit, as 90m, 12h, 2d, or in SLURM's own form; null: the partition's.
        partition: null, as the next two: SLURM's default.
        account: who pays.
        qos: quality of service.
        gres: the devices' kind, as in gpu or gpu:a100, one for each process; null: none.
        cpus: CPU cores of each process.
        options: further options of sbatch, one a line.
        setup: shell lines that each start begins with, such as: module load cuda
        python: null: this one, or python in a container.
        container: an image for the Pyxis plugin; null: none.
        mounts: the container's, as FROM:TO,FROM:TO; the current directory is always mounted.
        signal_s: seconds before the limit at which the run is told to save and end.
        logs: directory of the job's output.
        checkpoints: directories, one a line, in which progress shows; null: those of the run.
        stalls: starts in a row that end early without progress after which the job stays ended.
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

    def problems(self) -> list[str]:
        found = super().problems() + _least(self, 1, "cpus", "stalls", "signal_s")
        if self.processes is None:
            found.append("processes: has to be given, for each machine")
        if self.mounts is not None and not re.fullmatch(r"[\w./:,@+-]+", self.mounts):
            found.append(f"mounts={self.mounts}: expected FROM:TO,FROM:TO")
        if not re.fullmatch(r"[\w.+-]+", self.name):
            found.append(f"name={self.name}: expected letters, digits and _ . + - only")
        if self.time is not None and not re.fullmatch(r"[\d:-]+|\d+[smhd]", self.time):
            found.append(f"time={self.time}: expected 90m, 12h, 2d or [DAYS-]HOURS:MINUTES:SECONDS")
        if self.signal_s <= self.grace_s:
            found.append(
                f"signal_s={self.signal_s}: expected more than grace_s={self.grace_s}, so that the "
                "run is saved before the job is over"
            )
        return found


@dataclass(frozen=True, kw_only=True)
class Kubernetes(Group):
    """A job of the Kubeflow operator; python -m launch kubernetes nodes=2 image=... volume=...

    Attributes:
        image: has this framework installed.
        volume: the claim (PVC) that all pods share and that runs are written to.
        kind: PyTorchJob of Kubeflow's training operator v1, TrainJob of its Trainer v2.
        name: the job's.
        namespace: null: that of kubectl's context.
        mount: where the volume is; processes start in this directory.
        device: the name of what each process gets one of; null: none.
        cpu: CPU cores of each pod, as Kubernetes writes them.
        memory: of each pod.
        shared_memory: the size of /dev/shm, part of `memory`.
        port: of the first pod, where the pods find each other.
        retries: pods that a TrainJob replaces because they saved or were killed; a PyTorchJob does
            not count them.
        python: in the image.
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

    def problems(self) -> list[str]:
        found = super().problems() + _least(self, 0, "retries") + _least(self, 1, "port")
        if self.processes is None:
            found.append("processes: has to be given, for each pod")
        if not re.fullmatch(KUBERNETES_NAME, self.name):
            found.append(f"name={self.name}: expected at most 50 of a-z, 0-9 and -, a letter first")
        if not self.mount.startswith("/"):
            found.append(f"mount={self.mount}: expected an absolute path")
        return found


LAUNCHERS: dict[str, type[Local]] = {
    "local": Local,
    "nodes": Nodes,
    "slurm": Slurm,
    "kubernetes": Kubernetes,
}


def passed_on(config: Group) -> Iterator[str]:
    """A scheduler's settings as arguments of `nodes`, without those that have its defaults."""
    of_nodes = {setting.name: setting.default for setting in fields(Nodes)}
    for setting in fields(config):
        value: Any = getattr(config, setting.name)
        if setting.metadata == SHARED and value != of_nodes[setting.name]:
            yield f"{setting.name}={value}"


def _least(config: Any, least: int, *names: str) -> list[str]:
    """One sentence for each named setting below `least`; null always passes."""
    return [
        f"{name}={value}: expected an integer of at least {least}"
        for name in names
        if (value := getattr(config, name)) is not None and value < least
    ]
