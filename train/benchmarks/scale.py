"""What a rank does besides computing, measured for up to thousands of ranks on one machine.

A few ranks are real processes; the others are stand-ins (see `stand_ins.py`). For each number of
ranks the real ones open a text with as many lanes, shard a model over all ranks, log, agree, save a
checkpoint with a file of each rank, and resume from it, by the functions that a run calls. What is
counted are CPU seconds and memory of each real rank, and its messages and bytes as gloo sends them.
The rendezvous is real on all ranks, which are threads of one process there.
"""

import copy
import gc
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from math import log
from pathlib import Path
from signal import Signals
from tempfile import TemporaryDirectory
from time import process_time
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from conf.errors import ConfigError, Problem
from data.batch import Batch
from data.loader import Loader
from data.sources.documents import Documents
from data.stream import BatchShape, TokenStream
from data.tokenizer import Tokenizer
from data.tokenizer_training import prepare_tokenizer
from train.benchmarks.gloo_ranks import on_processes
from train.benchmarks.stand_ins import BACKEND, StandIns, Traffic, as_rank
from train.benchmarks.subject import subject_of
from train.benchmarks.timing import Result
from train.checkpoint.reader import Checkpoint
from train.checkpoint.store import CheckpointStore
from train.config import Config
from train.distributed.dist_env import DistEnv
from train.distributed.process_groups import ProcessGroups, raise_on_all_ranks
from train.distributed.signals import StopSignal
from train.distributed.stop_sync import RankFlags, StopSync
from train.distributed.watchdog import Watchdog
from train.engines.fsdp import FsdpEngine
from train.metrics.hooks import DataProgress, Throughput, TrainingMetrics
from train.metrics.record import StepRecord
from train.torch_private import use_fake_backend

T = TypeVar("T")

TIMEOUT = timedelta(minutes=30)
MOST_CONNECTED = 256
"""Ranks that are really connected by gloo. Each takes two threads; all of them share one core."""

SETTINGS = (
    *(
        "data=files",
        "data.sources.files.paths=text",
        "engine=fsdp",
        "engine.device=cpu",
        "engine.compile=false",
        "engine.threads=1",
    ),
    *("train.micro_batch=1", "train.seq_len=64", "train.max_steps=2", "data.block_documents=4"),
    *("model.layers=1", "data.holdout=0", "hooks.wandb.mode=disabled", "model.vocab_size=4096"),
)
"""Of the run that is measured, beside the size of its model."""

WORDS = ("def", "keep", "only", "its", "original", "token", "hidden", "copy", "lane", "cursor")
LINES_OF_A_LANE = 6


@dataclass(frozen=True)
class Job:
    """What the real ranks measure.

    Attributes:
        ranks: the numbers of ranks, ascending.
        local: how many of them are real.
        settings: of a run with one source, `files`.
        port: of the store by which the real ranks find each other.
        folder: for texts and checkpoints.
        tokenizer: a SentencePiece model.
    """

    ranks: tuple[int, ...]
    local: int
    settings: Mapping[str, Any]
    port: int
    folder: Path
    tokenizer: bytes

    def config(self, ranks: int) -> Config:
        """The run of so many ranks: a row and a lane for each."""
        tree = copy.deepcopy(dict(self.settings))
        tree["data"]["lanes"] = tree["train"]["global_batch"] = ranks
        tree["data"]["sources"]["files"]["paths"] = str(self.folder / f"text_{ranks}.jsonl")
        tree["run"]["dir"] = str(self.folder / f"run_{ranks}")
        return Config.from_dict(tree)


def bench_scale(config: Config, ranks: Sequence[int], local: int) -> Result:
    """Measure what grows with the number of ranks, for several of them.

    Args:
        config: with `SETTINGS`; its model is sharded and saved.
        ranks: the numbers of ranks, each at least `local`.
        local: how many ranks are real processes.
    """
    numbers = tuple(sorted(set(ranks)))
    with TemporaryDirectory() as name:
        folder = Path(name)
        for number in numbers:
            _write_text(folder / f"text_{number}.jsonl", number)
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        job = Job(numbers, local, config.to_dict(), store.port, folder, b"")
        job = replace(job, tokenizer=_tokenizer(job))
        found = on_processes(local, measure_rank, job, start="spawn")
        rows = [row for of_rank in found for row in of_rank]
    rows += [row for number in numbers for row in rendezvous(number)]
    rows.sort(key=lambda row: (row["rank"] != "0", row["rank"], row["work"]))
    device = torch.device("cpu")
    return Result(rows, growths(rows), subject_of(config.model, device), method=METHOD)


METHOD = "CPU time and memory of one rank; messages and bytes as gloo sends them"


def growths(rows: list[dict[str, Any]]) -> dict[str, float]:
    """How each work's largest measure grows: the exponent p of ranks^p, from the last two numbers.

    1 is linear, 0 is constant.
    """
    found = {}
    for work, rank in dict.fromkeys((row["work"], row["rank"]) for row in rows):
        own = [row for row in rows if (row["work"], row["rank"]) == (work, rank)]
        for key in ("cpu_ms", "mib", "received_kib", "messages"):
            known = [(row["ranks"], row[key]) for row in own if row[key]]
            if len(known) > 1:
                (few, less), (many, more) = known[-2:]
                name = f"{work}, rank {rank}: {key}"
                found[name] = log(more / less) / log(many / few)
    return found


# The real ranks


def measure_rank(rank: int, job: Job) -> list[dict[str, Any]]:
    """All rows of one real rank, which runs in a process of its own."""
    torch.set_num_threads(1)
    use_fake_backend()
    store = dist.TCPStore("127.0.0.1", job.port, wait_for_workers=False)
    real: Any = dist.ProcessGroupGloo(dist.PrefixStore("real", store), rank, job.local, TIMEOUT)
    rows = []
    for ranks in job.ranks:
        traffic = Traffic()
        with simulated(rank, ranks, real, job.folder, traffic) as groups:
            measure = Measure(groups, traffic)
            _measure_run(job, groups, measure)
            rows += measure.rows
    real.barrier().wait()
    return rows


@contextmanager
def simulated(
    rank: int, ranks: int, real: Any, folder: Path, traffic: Traffic
) -> Iterator[ProcessGroups]:
    """The groups of a rank among so many; collectives of weights go nowhere."""
    model = real.size() - 1
    root = folder / f"checkpoints_{ranks}"
    like = partial(as_rank, model=model, ranks=ranks, root=root)

    def make(store: Any, rank: int, size: int, timeout: Any) -> StandIns:  # noqa: ARG001
        return StandIns(size, real, like, traffic)

    if BACKEND.upper() in dist.Backend._plugins:
        del dist.Backend._plugins[BACKEND.upper()]
    dist.Backend.register_backend(BACKEND, make, devices=["cpu"])
    dist.init_process_group("fake", rank=rank, world_size=ranks, store=dist.HashStore())
    try:
        control, saving = (dist.new_group(backend=BACKEND) for _ in range(2))
        yield ProcessGroups(DistEnv(rank, ranks, 0, 8), control, saving)
    finally:
        dist.destroy_process_group()


class Measure:
    """Measures pieces of work of a rank.

    Attributes:
        rows: one for each piece of work.
    """

    def __init__(self, groups: ProcessGroups, traffic: Traffic) -> None:
        self.groups, self.traffic = groups, traffic
        self.rows: list[dict[str, Any]] = []

    def __call__(self, name: str, work: Callable[[], T]) -> T:
        """Do the work; returns what it returns."""
        traffic = self.traffic
        traffic.messages = traffic.received = traffic.sent = 0
        before = _reset_peak_kib()
        outside, start = traffic.outside_s, process_time()
        result = work()
        cpu_s = process_time() - start - (traffic.outside_s - outside)
        self.rows.append(
            {
                "work": name,
                "rank": str(self.groups.rank),
                "ranks": self.groups.world_size,
                "cpu_ms": max(cpu_s, 0.0) * 1e3,
                "mib": max(0, _memory_kib("VmHWM") - before) / 1024,
                "messages": traffic.messages,
                "received_kib": traffic.received / 1024,
                "sent_kib": traffic.sent / 1024,
                "sockets": 0.0,  # counted in the rendezvous, where all ranks are real
            }
        )
        return result


def _reset_peak_kib() -> int:
    """Have the kernel forget this process's peak memory; returns what it has now."""
    gc.collect()
    with suppress(OSError):  # only Linux has it, see proc(5)
        Path("/proc/self/clear_refs").write_text("5")
    return _memory_kib("VmRSS")


def _memory_kib(name: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(next(line for line in status.splitlines() if line.startswith(name)).split()[1])


def _measure_run(job: Job, groups: ProcessGroups, measure: Measure) -> None:
    """What a run does with all ranks, in its order."""
    config = job.config(groups.world_size)
    tokenizer = Tokenizer(job.tokenizer)
    batch, documents = measure("open the text", lambda: _first_batch(config, tokenizer, groups))
    measure("agree, nothing failed", lambda: raise_on_all_ranks(groups, lambda: None))
    measure("agree, all failed", lambda: _fail_everywhere(groups))
    measure("stop flags, a step", lambda: _exchange_flags(config, groups))
    engine = measure("shard the model", lambda: FsdpEngine(config, groups))
    record = _record_of(batch)
    record = measure("log", lambda: _log(config, documents, groups, record))
    root = job.folder / f"checkpoints_{groups.world_size}"
    store = CheckpointStore(root, keep=2, groups=groups)

    def save() -> None:
        store.save(1, engine.state(), {"cursors": record.stats.cursors})
        store.wait()

    measure("save", save)
    found = measure("find the checkpoint", store.newest)
    assert found is not None
    measure("restore", lambda: engine.restore(Checkpoint(found.path, found.state)))
    if groups.is_rank_zero:
        cursors = found.state["cursors"]
        assert len(cursors) == groups.world_size, len(cursors)
    measure("resume the text", lambda: _first_batch(config, tokenizer, groups, found))


def _first_batch(
    config: Config, tokenizer: Tokenizer, groups: ProcessGroups, found: Checkpoint | None = None
) -> tuple[Batch, Documents]:
    documents = Documents(config.data)
    shape = BatchShape(
        global_batch=config.train.global_batch,
        seq_len=config.train.seq_len,
        rank=groups.rank,
        world_size=groups.world_size,
    )
    cursors = found.state["cursors"] if found else None
    stream = TokenStream(documents, tokenizer, shape, seed=config.seed, cursors=cursors)
    if found is None:
        assert stream.empty_lanes() == set()
    batch = Loader(stream).peek()
    assert batch is not None
    return batch, documents


def _fail_everywhere(groups: ProcessGroups) -> None:
    def fail() -> None:
        raise ConfigError([Problem("run.dir", "here", f"is not there, says rank {groups.rank}")])

    try:
        raise_on_all_ranks(groups, fail)
    except ConfigError:
        return
    raise AssertionError


def _exchange_flags(config: Config, groups: ProcessGroups) -> None:
    watchdog = Watchdog(config.run_dir, groups.rank, step_timeout=1e6)
    sync = StopSync(groups, StopSignal(), watchdog)
    sync.start(RankFlags(has_next=True))
    assert sync.wait().signal not in set(Signals)


def _record_of(batch: Batch) -> StepRecord:
    assert batch.stats is not None
    return StepRecord(
        step=1,
        tokens=batch.rows.size,
        flops=10**12,
        batches=1,
        lr=1e-3,
        loss=torch.tensor(2.0),
        grad_norm=torch.tensor(1.0),
        batch=batch,
        stats=batch.stats,
        train_s=1.0,
        data_wait_s=(0.01,),
        bad_steps={"count": 0},
    )


def _log(
    config: Config, documents: Documents, groups: ProcessGroups, record: StepRecord
) -> StepRecord:
    """What a step costs after which something is logged, as `train.loop.measure_and_save` does."""
    record = record.of_all(groups)
    device = torch.device("cpu")
    for hook in (
        TrainingMetrics(config),
        DataProgress(config, documents.quarantine, groups),
        Throughput(config, device, 0, 0, groups),
    ):
        hook(record)
    return record


# The text


def _write_text(path: Path, lanes: int) -> None:
    """A text that is long enough for so many lanes, each line a document."""
    with path.open("w", encoding="utf-8") as file:
        for number in range(lanes * LINES_OF_A_LANE):
            words = (WORDS[(number * 7 + place * 5) % len(WORDS)] for place in range(24))
            file.write(json.dumps({"text": f"{number} {' '.join(words)}"}) + "\n")


def _tokenizer(job: Job) -> bytes:
    config = job.config(job.ranks[0])
    return prepare_tokenizer(
        config.tokenizer, Documents(config.data), vocab_size=config.model.vocab_size
    ).model


# The rendezvous


class CountedStore(dist.Store):
    """A store that counts the calls and the bytes of one rank."""

    def __init__(self, store: Any) -> None:
        super().__init__()
        self.store, self.calls, self.received, self.sent = store, 0, 0, 0

    def set(self, key: str, value: Any) -> None:
        """Store a value."""
        self._sent(value)
        self.store.set(key, value)

    def get(self, key: str) -> bytes:
        """A value, for which this waits."""
        self.calls += 1
        value = self.store.get(key)
        self.received += len(value)
        return value

    def add(self, key: str, amount: int) -> int:
        """Add to a number."""
        self.calls += 1
        return self.store.add(key, amount)

    def wait(self, keys: list[str], *timeout: timedelta) -> None:
        """Wait for keys."""
        self.calls += 1
        self.store.wait(keys, *timeout)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        """Several values."""
        self.calls += 1
        values = self.store.multi_get(keys)
        self.received += sum(map(len, values))
        return values

    def multi_set(self, keys: list[str], values: list[Any]) -> None:
        """Store several values."""
        for value in values:
            self._sent(value)
        self.store.multi_set(keys, values)

    def has_extended_api(self) -> bool:
        """As a TCPStore."""
        return True

    def _sent(self, value: Any) -> None:
        self.calls += 1
        self.sent += len(value)


def rendezvous(ranks: int) -> list[dict[str, Any]]:
    """Rows of a gloo group whose ranks find each other in one TCPStore.

    With `lazily` each rank connects with those that it talks to; without, with all others, which is
    what torch does by default.
    """
    rows = []
    for name, lazily, most in (
        ("connect what is used", True, MOST_CONNECTED),
        ("connect all with all", False, MOST_CONNECTED // 4),
    ):
        if ranks <= most:
            rows += [{"work": name, **row} for row in connect(ranks, lazily=lazily)]
    return rows


def connect(ranks: int, *, lazily: bool) -> list[dict[str, Any]]:
    """Form a group and use it once; rows of rank 0 and of the last one."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    stores = [
        CountedStore(dist.TCPStore("127.0.0.1", server.port, wait_for_workers=False))
        for _ in range(ranks)
    ]
    groups: list[Any] = [None] * ranks
    sockets = len(os.listdir("/proc/self/fd"))

    def join(rank: int) -> None:
        group: Any = dist.ProcessGroupGloo(stores[rank], rank, ranks, TIMEOUT)
        groups[rank] = group
        flag = torch.zeros(1)
        group.allreduce([flag]).wait()
        group.barrier().wait()
        options = dist.GatherOptions()
        options.rootRank = 0
        all_flags = [[torch.zeros(1) for _ in range(ranks)]] if rank == 0 else []
        group.gather(all_flags, [flag], options).wait()

    before = os.environ.get("TORCH_GLOO_LAZY_INIT")
    os.environ["TORCH_GLOO_LAZY_INIT"] = str(int(lazily))
    start = process_time()
    try:
        threads = [threading.Thread(target=join, args=(rank,)) for rank in range(ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        if before is None:
            del os.environ["TORCH_GLOO_LAZY_INIT"]
        else:
            os.environ["TORCH_GLOO_LAZY_INIT"] = before
    cpu_s = process_time() - start
    opened = len(os.listdir("/proc/self/fd")) - sockets
    return [
        {
            "rank": "0" if rank == 0 else "1",
            "ranks": ranks,
            "cpu_ms": cpu_s / ranks * 1e3,
            "mib": 0.0,
            "messages": stores[rank].calls,
            "received_kib": stores[rank].received / 1024,
            "sent_kib": stores[rank].sent / 1024,
            "sockets": opened / ranks,
        }
        for rank in (0, ranks - 1)
    ]
