"""How long a save stops the training, and how long the whole save takes."""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter

from train.benchmarks.subject import subject_of
from train.benchmarks.timing import Result, Work, interleaved, within_turns
from train.checkpoint.reader import TensorTree, flatten
from train.checkpoint.store import CheckpointStore
from train.config import Config
from train.distributed.process_groups import ProcessGroups
from train.engines.fsdp import FsdpEngine


def bench_saving(config: Config, repeat: int, folder: Path, device: torch.device) -> Result:
    """Time saves of a model and its AdamW moments into `folder`; they are deleted at the end.

        stall        training stops while its tensors are copied to the host
        behind it    a thread writes, flushes, reads back and hashes; training goes on
        synchronous  the sum of both: what training would wait for without the thread
        DCP's save   torch.distributed.checkpoint alone, flushed, neither hashed nor read back

    On two CPU cores 1.8 GB stall for 0.16 s: 0.02 of a synchronous save, 0.04 of DCP's.

    Args:
        config: of the model.
        repeat: turns; each is one save of either kind.
        folder: a directory on the disk that is measured.
        device: of the model.
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
    # Turn by turn, so that the ratios are those within a turn.
    seconds["synchronous"] = [
        sum(parts) for parts in zip(seconds["stall"], seconds["behind it"], strict=True)
    ]
    times = within_turns("synchronous", seconds)
    size = sum(tensor.nbytes for tensor in flatten(tensors).values())
    rows = [
        {"work": work}
        | times.columns(work)
        | {"gigabytes_per_s": size / 1e9 / times.typical_s(work)}
        for work in seconds
    ]
    stall, dcp = times.ratio("stall").median, times.ratio("DCP's save").median
    ratios = {
        "stall_over_synchronous": stall,
        "stall_over_dcp_save": stall / dcp,
        "synchronous_over_dcp_save": 1 / dcp,
        "gigabytes": size / 1e9,
    }
    return Result(rows, ratios, subject_of(config.model, device))


def _tensors(config: Config) -> TensorTree:
    """The tensors that a run of one process saves: 12 bytes for each parameter."""
    tensors = FsdpEngine(config, ProcessGroups()).state()
    for name, tensor in flatten(tensors).items():
        if name.startswith("optimizer."):
            nn.init.normal_(tensor)  # disks that compress are faster with zeros
    return tensors


def _saving(store: CheckpointStore, tensors: TensorTree) -> Work:
    """Begin the save of the next step; a name is used once, because a whole checkpoint is kept."""
    steps = iter(range(1, 1_000_000))
    return lambda: store.save(next(steps), tensors, {})


def _saving_with_dcp(path: Path, tensors: TensorTree) -> Work:
    """Write over one directory, with the calls that `dcp.save` makes in one process.

    `dcp.save` itself warns where there is no process group, and warnings are errors in the tests.
    """

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
