"""How long a save stops the training, beside how long the whole of it takes."""

from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from torch import nn
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter

from train.benchmarks.timing import Result, Work, interleaved, ratio
from train.checkpoint.reader import TensorTree, flatten
from train.checkpoint.store import CheckpointStore
from train.config import Config
from train.distributed.process_groups import ProcessGroups
from train.engines.fsdp import FsdpEngine


def bench_saving(config: Config, repeat: int, folder: Path, device: torch.device) -> Result:
    """Saves of a model and its moments into a folder of that disk, which are deleted at the end.

    A turn is a save: the part for which training stops, and the part behind it, which a synchronous
    save would wait for as well. DCP's own save, flushed but neither hashed nor read back, follows.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder) as name:
        tensors = _tensors(config)
        store = CheckpointStore(Path(name, "ours"), keep=1)
        works: dict[str, Work] = {
            "stall": _saving(store, tensors),
            "behind it": store.wait,
            "DCP's save": _saving_with_dcp(Path(name, "dcp"), tensors),
        }
        seconds = interleaved(works, repeat, device)
    seconds["synchronous"] = [
        sum(parts) for parts in zip(seconds["stall"], seconds["behind it"], strict=True)
    ]
    size = sum(tensor.nbytes for tensor in flatten(tensors).values())
    rows = [
        {
            "work": work,
            "median_s": median(spent),
            "gigabytes_per_s": size / 1e9 / median(spent),
            "seconds": spent,
        }
        for work, spent in seconds.items()
    ]
    ratios = {
        "stall_over_synchronous": ratio(seconds, "stall", "synchronous"),
        "stall_over_dcp_save": ratio(seconds, "stall", "DCP's save"),
        "synchronous_over_dcp_save": ratio(seconds, "synchronous", "DCP's save"),
        "gigabytes": size / 1e9,
    }
    return Result(rows, ratios)


def _tensors(config: Config) -> TensorTree:
    """What a run of one process saves."""
    tensors = FsdpEngine(config, ProcessGroups()).state()
    for name, tensor in flatten(tensors).items():
        if name.startswith("optimizer."):
            nn.init.normal_(tensor)  # a disk may be quicker with zeros
    return tensors


def _saving(store: CheckpointStore, tensors: TensorTree) -> Work:
    """Begins the save of the next step."""
    steps = iter(range(1, 1_000_000))
    return lambda: store.save(next(steps), tensors, {})


def _saving_with_dcp(path: Path, tensors: TensorTree) -> Work:
    """Writes over the same directory, as `dcp.save` does in one process, without its warnings."""

    def work() -> None:
        planner, writer = DefaultSavePlanner(), FileSystemWriter(path, sync_files=True)
        (path / ".metadata").unlink(missing_ok=True)
        planner.set_up_planner(dict(flatten(tensors)), is_coordinator=True)
        plan = writer.prepare_local_plan(planner.create_local_plan())
        [plan], metadata = planner.create_global_plan([plan])
        [plan] = writer.prepare_global_plan([plan])
        results = writer.write_data(planner.finish_plan(plan), planner).value()
        writer.finish(metadata, [results])

    return work
