"""Looks at a machine and its connections, in the process of one rank; see `launch.diagnosis`.

    python -m launch.preflight SETTINGS     as JSON, see `Probe`

All ranks do the same, one thing after the other, and say in the rendezvous' store where they are.
So if one of them hangs, rank 0 knows which: it is not where the others are.

    local      device, free disk, versions, code
    clock      the first rank of each machine asks rank 0 for the time
    within     an all-reduce among the ranks of each machine
    pairs      one between each machine and its neighbours, two at a time
    all        one among all ranks
"""

import hashlib
import json
import os
import platform
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist

from launch.config import Check
from launch.diagnosis import Finding, Report, diagnose, table
from launch.traces import lost_another

BAD_MACHINE = 3  # the exit code that means: a finding was printed
ROOT = Path(__file__).parents[1]
CODE = ("phd", "data", "train", "launch", "conf")
LIBRARIES = ("torch", "numpy", "transformers", "deepspeed", "sentencepiece", "datasets")
WAITS = "waits for the others"
LEAVE_S = 3.0  # in which ranks notice that the check has ended
PINGS = 8
REPEATS = {"cuda": 10, "cpu": 3}
MESSAGE_MIB = {"cuda": 256, "cpu": 8}
MATRIX = {"cuda": 8192, "cpu": 512}


@dataclass(frozen=True)
class Probe:
    """What a rank is told.

    Attributes:
        host: the name of its machine.
        directories: whose free space counts.
        check: the settings of the command.
    """

    host: str
    directories: tuple[str, ...]
    check: Check

    @classmethod
    def read(cls, text: str) -> "Probe":
        """The inverse of `text`."""
        values = json.loads(text)
        return cls(values["host"], tuple(values["directories"]), Check(**values["check"]))

    @property
    def text(self) -> str:
        """As an argument of a process."""
        return json.dumps(asdict(self))


class Ranks:
    """This rank among those that are checked, and the store by which they tell each other things.

    Attributes:
        rank, size, local_rank, local_size: as torchrun's variables say.
        machine, machines: the number of this machine, and how many there are.
    """

    def __init__(self, limit_s: float) -> None:
        def number(name: str) -> int:
            return int(os.environ[name])

        self.rank, self.size = number("RANK"), number("WORLD_SIZE")
        self.local_rank, self.local_size = number("LOCAL_RANK"), number("LOCAL_WORLD_SIZE")
        self.machine, self.machines = number("GROUP_RANK"), number("GROUP_WORLD_SIZE")
        self.step, self.stage = 0, ""
        self._groups: dict[tuple[int, ...], dist.ProcessGroup] = {}
        self._deadline = time.monotonic() + limit_s
        self.store = self._connect(is_server=self.rank == 0)

    def _connect(self, *, is_server: bool) -> dist.TCPStore:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return dist.TCPStore(host, port, self.size, is_server, self.left, wait_for_workers=False)

    @property
    def left_s(self) -> float:
        """Seconds until the check has to have ended."""
        return max(0.0, self._deadline - time.monotonic())

    @property
    def left(self) -> timedelta:
        """How long a rank waits for others: until somebody has said which of them hang."""
        return timedelta(seconds=self.left_s + 2 * LEAVE_S)

    def second_store(self) -> dist.TCPStore:
        """Another connection: a store answers one thread at a time."""
        return self._connect(is_server=False)

    def enter(self, step: int, stage: str) -> None:
        """Says what this rank does now; `step` is larger the later that is."""
        self.step, self.stage = step, stage
        self.store.set(f"stage/{self.rank}", f"{step}:{stage}")

    def tell(self, key: str, value: str) -> None:
        """Tells all ranks something."""
        self.store.set(key, value)

    def hear(self, key: str) -> str:
        """What a rank has told, or will tell before the check has to have ended."""
        self.store.wait([key], self.left)
        return str(self.store.get(key).decode())

    def reports(self, key: str) -> list[Report]:
        """What all ranks have told of themselves under a key."""
        return [Report(**json.loads(self.hear(f"{key}/{rank}"))) for rank in range(self.size)]

    def group(self, machines: tuple[int, ...]) -> tuple[dist.ProcessGroup, list[int]]:
        """The ranks of some machines as a group, and their numbers.

        Of two groups with equal members, torch would take the keys of the first for the second.
        """
        local = range(self.local_size)
        members = [machine * self.local_size + rank for machine in machines for rank in local]
        if machines not in self._groups:
            self._groups[machines] = dist.new_group(
                members, timeout=self.left, use_local_synchronization=True
            )
        return self._groups[machines], members

    def leave(self) -> None:
        """Waits on rank 0, which serves the store, until the others do not need it any more."""
        self.tell(f"left/{self.rank}", "")
        if self.rank == 0:
            with suppress(dist.DistError):
                keys = [f"left/{rank}" for rank in range(self.size)]
                self.store.wait(keys, timedelta(seconds=LEAVE_S))


# What a rank sees alone


def look_around(probe: Probe, ranks: Ranks) -> Report:
    """Device, disks, versions and code of this rank."""
    report = Report(ranks.rank, ranks.machine, probe.host, versions=_versions())
    free, failures = {}, []
    for directory in probe.directories:
        try:
            free[directory] = _free_gib(Path(directory))
        except OSError as error:
            failures.append(f"{directory} cannot be written ({error.strerror or error})")
    report = replace(report, free_gib=free)
    try:
        device = _device(probe.check.device, ranks.local_rank)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        report = replace(report, device=name, busy=_busy(device))
        report = replace(report, tflops=_tflops(device))
    except Exception as error:  # a broken device fails in many ways, all of which are its finding
        first = str(error).partition("\n")[0]
        failures.append(f"its device does not work ({type(error).__name__}: {first})")
    return replace(report, failures=tuple(failures))


def _device(wanted: str, local_rank: int) -> torch.device:
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise RuntimeError("no CUDA device is available")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise RuntimeError(f"there are {count} CUDA devices, and this is process {local_rank + 1}")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _busy(device: torch.device) -> float:
    """The part of a device's memory that is taken, before this process takes any."""
    if device.type == "cpu":
        return 0.0
    free, total = torch.cuda.mem_get_info(device)
    return 1 - free / total


def _tflops(device: torch.device) -> float:
    """The speed of a matrix multiplication, whose result is also looked at."""
    size = MATRIX[device.type]
    kind = torch.bfloat16 if device.type == "cuda" else torch.float32
    a = torch.ones(size, size, dtype=kind, device=device)
    seconds = []
    for _ in range(4):  # the first one loads the kernel
        start = _now(device)
        product = a @ a
        seconds.append(_now(device) - start)
    if not (product == size).all():
        raise RuntimeError("it computes wrong numbers")
    return 2 * size**3 / min(seconds) / 1e12


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _free_gib(directory: Path) -> float:
    """The free space where a directory is or will be, if this process can write there."""
    there = next(path for path in (directory, *directory.parents) if path.exists())
    with tempfile.TemporaryFile(dir=there):
        pass
    return shutil.disk_usage(there).free / 2**30


def _versions() -> dict[str, str]:
    """The versions that have to be the same on all machines."""
    found = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            found[library] = "not installed"
    found["CUDA"] = str(torch.version.cuda)
    if torch.cuda.is_available() and dist.is_nccl_available():
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
        driver = Path("/proc/driver/nvidia/version")
        found["driver"] = driver.read_text().partition("\n")[0] if driver.exists() else "unknown"
    return found | {"the project's code": code_hash()}


def code_hash(root: Path = ROOT) -> str:
    """A short hash of this project's files."""
    total = hashlib.sha256()
    files = (path for package in CODE for path in (root / package).rglob("*"))
    for path in sorted(path for path in files if path.suffix in (".py", ".yaml")):
        content = path.read_bytes()
        total.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    return total.hexdigest()[:12]


# What ranks find out together


def compare_clocks(ranks: Ranks, report: Report) -> Report:
    """How far this machine's clock is from that of rank 0, as NTP finds it out.

    Rank 0 answers while this rank waits, so its time is that of the middle of the round trip, and
    the shortest round trip is the most exact.
    """
    if ranks.rank == 0:
        for machine in range(1, ranks.machines):
            for ping in range(PINGS):
                ranks.hear(f"ping/{machine}/{ping}")
                ranks.tell(f"pong/{machine}/{ping}", repr(time.time()))
        return replace(report, offset_s=0.0)
    if ranks.local_rank:
        return report
    trips = []
    for ping in range(PINGS):
        sent = time.time()
        ranks.tell(f"ping/{ranks.machine}/{ping}", "")
        answer = float(ranks.hear(f"pong/{ranks.machine}/{ping}"))
        back = time.time()
        trips.append(((back - sent) / 2, answer - (sent + back) / 2))
    error, offset = min(trips)
    return replace(report, offset_s=offset, offset_error_s=error)


def measure_bandwidths(probe: Probe, ranks: Ranks, report: Report, *, cuda: bool) -> Report:
    """The bandwidth of all-reduces within this machine, with its neighbours, and among all."""
    device = torch.device("cuda", ranks.local_rank) if cuda else torch.device("cpu")
    size = probe.check.message_mib or MESSAGE_MIB[device.type]
    message = torch.ones(size * 2**18, device=device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=dist.PrefixStore("group", ranks.store),
        rank=ranks.rank,
        world_size=ranks.size,
        timeout=ranks.left,
    )
    if ranks.local_size > 1:
        ranks.enter(2, f"all-reduce within {probe.host}")
        report = replace(report, within_gb_s=_all_reduce(message, ranks, (ranks.machine,)))
    speeds = {}
    for pair in pairs(ranks.machine, ranks.machines):
        ranks.enter(3, f"all-reduce between machines {pair[0]} and {pair[1]}")
        other = pair[1] if pair[0] == ranks.machine else pair[0]
        speeds[str(other)] = _all_reduce(message, ranks, pair)
    report = replace(report, pairs_gb_s=speeds)
    if ranks.size > 1:
        ranks.enter(4, "all-reduce among all")
        report = replace(report, all_gb_s=_all_reduce(message, ranks, tuple(range(ranks.machines))))
    return report


def pairs(machine: int, machines: int) -> Iterator[tuple[int, int]]:
    """The pairs of neighbours, in a ring, that a machine is one of; at most two.

    >>> list(pairs(0, 2)), list(pairs(0, 4)), list(pairs(1, 4)), list(pairs(2, 3))
    ([(0, 1)], [(0, 1), (0, 3)], [(0, 1), (1, 2)], [(0, 2), (1, 2)])
    """
    ring = {(a, a + 1) for a in range(machines - 1)}
    if machines > 2:
        ring.add((0, machines - 1))
    # Pairs that begin with an even machine come first: most of them can be measured at once.
    for pair in sorted(ring, key=lambda pair: (pair[0] % 2, pair)):
        if machine in pair:
            yield pair


def _all_reduce(message: torch.Tensor, ranks: Ranks, machines: tuple[int, ...]) -> float:
    """The bus bandwidth of an all-reduce in GB/s, as nccl-tests count it.

    Raises:
        RuntimeError: the sum is wrong.
    """
    group, members = ranks.group(machines)
    device = message.device
    seconds = []
    for _ in range(1 + REPEATS[device.type]):  # the first one opens the connections
        message.fill_(1)
        start = _now(device)
        dist.all_reduce(message, group=group)
        seconds.append(_now(device) - start)
    if not (message == len(members)).all():
        raise RuntimeError("an all-reduce gave a wrong sum")
    moved = message.nbytes * 2 * (len(members) - 1) / len(members)
    return moved / min(seconds[1:]) / 1e9


# The end


def conclusion(reports: list[Report], findings: list[Finding]) -> str:
    """What rank 0 prints."""
    lines = [table(reports)]
    lines += [f"check: {host}: {text}" for host, text in findings]
    if not findings:
        lines.append("check: no fault was found")
    return "\n".join(lines)


def stuck(ranks: Ranks, store: dist.TCPStore) -> str:
    """Which ranks the others wait for, as far as they have told."""
    stages: dict[tuple[int, str], list[int]] = {}
    hosts: dict[int, str] = {}
    for rank in range(ranks.size):
        step, stage = "-1", "has not come"
        if store.check([f"stage/{rank}"]):
            step, _, stage = store.get(f"stage/{rank}").decode().partition(":")
            hosts[rank // ranks.local_size] = store.get(f"host/{rank}").decode()
        # Who waits, or has lost the connection to another, is not to blame.
        if stage != WAITS and not lost_another([stage]):
            stages.setdefault((int(step), stage), []).append(rank)
    earliest = min((step for step, _ in stages), default=0)
    blamed = {stage: members for (step, stage), members in stages.items() if step == earliest}
    waiting = ranks.size - sum(map(len, blamed.values()))
    lines = []
    for stage, members in sorted(blamed.items(), key=lambda item: len(item[1])):
        machines = dict.fromkeys(rank // ranks.local_size for rank in members)
        names = " and ".join(
            hosts.get(machine, f"machine {machine + 1} of {ranks.machines}") for machine in machines
        )
        lines.append(f"check: {names}: {stage} (rank {', '.join(map(str, members))})")
    if waiting:
        lines.append(f"check: {waiting} other ranks wait for them")
    return "\n".join(lines)


def end_when_it_hangs(ranks: Ranks, store: dist.TCPStore | None, done: threading.Event) -> None:
    """Ends this process when the time is over. Rank 0, which has a store, says what hangs."""
    if done.wait(ranks.left_s + (0 if store else LEAVE_S)):
        return
    if store:
        print(f"check: it has not ended within check_s\n{stuck(ranks, store)}", flush=True)
        store.set("verdict", str(BAD_MACHINE))
        time.sleep(LEAVE_S)  # in which those that can leave do
    os._exit(BAD_MACHINE)


def check(probe: Probe, ranks: Ranks) -> int:
    """Measures; returns the exit code, which is the same on all ranks."""
    report = look_around(probe, ranks)
    ranks.tell(f"report/{ranks.rank}", json.dumps(asdict(report)))
    if ranks.rank and not ranks.local_rank:
        ranks.enter(1, "compares its clock")
    else:
        ranks.enter(1, WAITS)
    report = compare_clocks(ranks, report)
    ranks.enter(1, WAITS)
    seen = ranks.reports("report")
    if not any(other.failures for other in seen):  # with a broken device, the others would wait
        cuda = all(other.device != "cpu" for other in seen)
        report = measure_bandwidths(probe, ranks, report, cuda=cuda)
    ranks.tell(f"measured/{ranks.rank}", json.dumps(asdict(report)))
    ranks.enter(5, WAITS)
    if ranks.rank == 0:
        reports = ranks.reports("measured")
        findings = diagnose(reports, probe.check)
        print(conclusion(reports, findings), flush=True)
        ranks.tell("verdict", str(BAD_MACHINE if findings else 0))
    return int(ranks.hear("verdict"))


def main(probe: Probe) -> int:
    """Checks, and tells what went wrong on the way; returns the exit code."""
    ranks = Ranks(probe.check.check_s)
    ranks.tell(f"host/{ranks.rank}", probe.host)
    ranks.enter(0, "looks at its device and disks")
    done = threading.Event()
    store = ranks.second_store() if ranks.rank == 0 else None
    threading.Thread(target=end_when_it_hangs, args=(ranks, store, done), daemon=True).start()
    try:
        code = check(probe, ranks)
    except Exception as error:  # of a lost connection, or of a library: where it was tells most
        code = BAD_MACHINE
        first = str(error).partition("\n")[0]
        ranks.enter(ranks.step, f"{ranks.stage}: {type(error).__name__}: {first}")
        if store:
            time.sleep(LEAVE_S)  # in which the others notice it too
            print(stuck(ranks, store), flush=True)
            ranks.tell("verdict", str(code))
        else:
            ranks.hear("verdict")
    ranks.leave()
    done.set()
    return code


if __name__ == "__main__":
    ended = main(Probe.read(sys.argv[1]))
    sys.stdout.flush()
    os._exit(ended)  # the libraries of broken devices and networks may not let go
