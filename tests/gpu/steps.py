"""Twenty steps of every engine on one rank, which must all train the same.

The rank joins a process group, NCCL's on CUDA, so that FSDP2 cuts weights into one shard, and DDP
reduces gradients over one rank: the collectives and their hooks run, as on many.
"""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

import torch
import torch.distributed as dist

from conf.errors import ConfigError
from data.batch import Batch
from tests.gpu.lines import FAIL, NOT_INSTALLED, PASS, Row, tell
from tests.train.batches import batch_of
from train.compose import load
from train.config import Config
from train.distributed.process_groups import ProcessGroups
from train.engines.device import choose_device, configure_process, peak_memory_gib
from train.engines.engine import Engine
from train.loop import train_step
from train.run import open_engine

STEPS, FIRST_TIMED = 20, 5
LONE = "a lone process"
ENGINES = {
    LONE: ("engine=fsdp",),
    "FSDP2, one shard": ("engine=fsdp",),
    "DDP, one replica": ("engine=ddp",),
    "DeepSpeed ZeRO 2": ("engine=deepspeed", "engine.stage=2"),
    "DeepSpeed ZeRO 3": ("engine=deepspeed", "engine.stage=3"),
}
TOLERANCE = 1e-2
"""By which a step's loss may differ from the lone process's, as a part of it: bf16's rounding."""

NO_TEXT = ("data=files", "data.sources.files.paths=unread.jsonl", "data.lanes=1", "hooks=quiet")
LENGTH = (
    *(f"train.max_steps={STEPS}", "train.max_tokens=null", "schedule.warmup_tokens=null"),
    *("train.global_batch=8", "train.micro_batch=4"),
)
SIZES = {
    "cuda": ("size=151m", "train.seq_len=1024"),
    "cpu": (
        *("model.layers=2", "model.dim=32", "model.ffn_dim=48", "model.heads=2"),
        *("model.kv_heads=1", "model.head_dim=16", "model.vocab_size=64", "train.seq_len=32"),
    ),
}


def config_of(device: str, *others: str) -> Config:
    """A run of PHD-CSWA that reads no text."""
    # Eager, so that ZeRO 3, which cannot be compiled, is compared with its like.
    engine = (f"engine.device={device}", "engine.compile=false")
    return load([*NO_TEXT, *SIZES[device], *LENGTH, *others, *engine])


def batches(config: Config) -> list[Batch]:
    """The batches of all steps: four, again and again, so that the loss falls."""
    generator = torch.Generator().manual_seed(0)
    shape = (4, config.train.global_batch, config.train.seq_len + 1)
    drawn = torch.randint(0, config.model.vocab_size, shape, generator=generator)
    return [batch_of(drawn[step % 4]) for step in range(STEPS)]


def losses_of(engine: Engine, config: Config) -> tuple[list[float], float]:
    """(the loss of each step, tokens per second of the steps after the first few)."""
    losses = []
    start = 0.0
    for step, batch in enumerate(batches(config)):
        if step == FIRST_TIMED:
            engine.synchronize()
            start = perf_counter()
        losses.append(train_step(engine, batch, lr=1e-3).loss)
    engine.synchronize()
    tokens = (STEPS - FIRST_TIMED) * config.train.tokens_per_step
    return torch.stack(losses).tolist(), tokens / (perf_counter() - start)


def measured(config: Config, groups: ProcessGroups) -> tuple[list[float], Row]:
    """The losses of an engine, and its row."""
    engine = open_engine(config, groups)
    if engine.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    try:
        losses, speed = losses_of(engine, config)
    finally:
        engine.close()
    shown = {"first loss": losses[0], "last loss": losses[-1]}
    return losses, {**shown, "tokens/s": speed, "peak GiB": peak_memory_gib(engine.device)}


def row_of(name: str, config: Config, groups: ProcessGroups, expected: list[float]) -> Row:
    """The row of an engine, whose losses must be the expected ones; the first engine's are these.

    `expected` is empty for the first engine, which fills it.
    """
    try:
        losses, row = measured(config, groups)
    except ConfigError as error:
        missing = "not installed" in str(error)
        return {"what": name, "result": f"{NOT_INSTALLED if missing else FAIL}: {error}"}
    except Exception as error:
        return {"what": name, "result": f"{FAIL}: {type(error).__name__}: {error}"}
    expected += [] if expected else losses
    apart = max(abs(a - b) / b for a, b in zip(losses, expected, strict=True))
    fine = apart <= TOLERANCE and losses[-1] < losses[0]
    return {"what": name, **row, "apart": apart, "result": PASS if fine else FAIL}


@contextmanager
def one_rank(device: torch.device) -> Iterator[ProcessGroups]:
    """A process group of this process alone."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        group = dist.new_group(backend="gloo")
        yield ProcessGroups(control=group, saving=group)
    finally:
        dist.destroy_process_group()


def rows(device: str) -> Iterator[Row]:
    """A row for each engine."""
    config = config_of(device)
    chosen = choose_device(config.engine)
    configure_process(config.engine, chosen)
    expected: list[float] = []
    with one_rank(chosen) as groups:
        for name, settings in ENGINES.items():
            ranks = ProcessGroups() if name == LONE else groups
            yield row_of(name, config_of(device, *settings), ranks, expected)
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    for row in rows(sys.argv[1]):
        tell(row)
