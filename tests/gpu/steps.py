"""Twenty steps of every engine, and of float8, on one rank: they must all train the same.

The rank of an engine joins a process group, NCCL's on CUDA, so that FSDP2 cuts weights into one
shard, and DDP reduces gradients over one rank: collectives and hooks run, as on many.
"""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import NamedTuple, get_args

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
from train.engines.float8 import use_float8
from train.loop import train_step
from train.run import open_engine
from train.settings.engine import Float8Scaling

STEPS, FIRST_TIMED = 20, 5


class Case(NamedTuple):
    """What is trained.

    Attributes:
        settings: of the run.
        alone: a lone process, without a process group.
        emulated: how float8 is scaled where the device, a CPU, has none.
        tolerance: by which the loss of a step may differ from the first case's, as a part of it.
    """

    settings: tuple[str, ...] = ()
    alone: bool = False
    emulated: Float8Scaling | None = None
    tolerance: float = 1e-2  # bf16's rounding


def float8(device: str, scaling: Float8Scaling) -> Case:
    """Float8's rounding is coarser than bf16's."""
    if device == "cpu":
        return Case(alone=True, emulated=scaling, tolerance=3e-2)
    settings = ("engine.precision=fp8", f"engine.fp8_scaling={scaling}", "engine.compile=true")
    return Case(settings, alone=True, tolerance=3e-2)


# Eager, so that ZeRO 3, which cannot be compiled, is compared with its like.
ENGINES = {
    "a lone process": Case(("engine.compile=false",), alone=True),
    "FSDP2, one shard": Case(("engine.compile=false",)),
    "DDP, one replica": Case(("engine=ddp", "engine.compile=false")),
    "DeepSpeed ZeRO 2": Case(("engine=deepspeed", "engine.stage=2", "engine.compile=false")),
    "DeepSpeed ZeRO 3": Case(("engine=deepspeed", "engine.stage=3")),
}


def cases(device: str) -> dict[str, dict[str, Case]]:
    """The cases of each part of `make gpu`, of which the first is the others' measure."""
    plain = Case(alone=True) if device == "cpu" else Case(("engine.compile=true",), alone=True)
    scaled = {f"float8, {name}": float8(device, name) for name in get_args(Float8Scaling)}
    return {"engines": ENGINES, "float8": {"without float8": plain, **scaled}}


NO_TEXT = ("data=files", "data.sources.files.paths=unread.jsonl", "data.lanes=1", "hooks=quiet")
LENGTH = (
    *(f"train.max_steps={STEPS}", "train.max_tokens=null", "schedule.warmup_tokens=null"),
    *("train.global_batch=8", "train.micro_batch=4"),
)
SIZES = {
    "cuda": ("size=151m", "train.seq_len=1024"),
    # Float8 pays for wide products.
    "wide": ("size=1b2", "model.layers=4", "train.seq_len=2048"),
    "cpu": (
        *("model.layers=2", "model.dim=32", "model.ffn_dim=48", "model.heads=2"),
        *("model.kv_heads=1", "model.head_dim=16", "model.vocab_size=64", "train.seq_len=32"),
    ),
}


def config_of(device: str, part: str, *settings: str) -> Config:
    """A run of PHD-CSWA that reads no text."""
    size = SIZES["wide" if device == "cuda" and part == "float8" else device]
    return load([*NO_TEXT, *size, *LENGTH, f"engine.device={device}", *settings])


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


def measured(case: Case, config: Config, groups: ProcessGroups) -> tuple[list[float], Row]:
    """The losses of a case, and its row."""
    engine = open_engine(config, ProcessGroups() if case.alone else groups)
    if case.emulated:
        use_float8(engine.model, case.emulated, emulate=True)
    if engine.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    try:
        losses, speed = losses_of(engine, config)
    finally:
        engine.close()
    shown = {"first loss": losses[0], "last loss": losses[-1]}
    return losses, {**shown, "tokens/s": speed, "peak GiB": peak_memory_gib(engine.device)}


def result_of(
    case: Case, config: Config, groups: ProcessGroups, expected: list[float]
) -> tuple[list[float], Row]:
    """The losses of a case, and what its row says beside its name.

    Args:
        expected: the losses that they must be close to; empty for the first case.
    """
    try:
        losses, row = measured(case, config, groups)
    except ConfigError as error:
        missing = "not installed" in str(error)
        return [], {"result": f"{NOT_INSTALLED if missing else FAIL}: {error}"}
    except Exception as error:
        return [], {"result": f"{FAIL}: {type(error).__name__}: {error}"}
    apart = max(abs(a - b) / b for a, b in zip(losses, expected or losses, strict=True))
    fine = apart <= case.tolerance and losses[-1] < losses[0]
    return losses, {**row, "apart": apart, "result": PASS if fine else FAIL}


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


def rows(device: str, part: str) -> Iterator[Row]:
    """A row for each case of a part."""
    config = config_of(device, part)
    chosen = choose_device(config.engine)
    configure_process(config.engine, chosen)
    expected: list[float] = []
    with one_rank(chosen) as groups:
        for name, case in cases(device)[part].items():
            config = config_of(device, part, *case.settings)
            losses, row = result_of(case, config, groups, expected)
            yield {"what": name, **row}
            expected = expected or losses
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    for row in rows(*sys.argv[1:]):
        tell(row)
