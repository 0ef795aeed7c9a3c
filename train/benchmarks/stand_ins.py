"""A process group of thousands of ranks, of which a few are real and the others stand-ins.

    ranks      0      1      2   3   ...  1023
               real   real   stand-ins

Real ranks are processes. They run the project's own code, and gloo connects them with each other.
A stand-in says what the last real rank has said, as it would be of its own number (`as_rank`): the
cursors of its own lanes, its own pieces of tensors, a file of its own. So rank 0 gets as many
values as there are ranks. What stand-ins take is not counted.
"""

import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from time import thread_time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from data.batch import BatchStats
from train.torch_private import StorageInfo, completed_work

BACKEND = "stand-ins"

SLACK = 64
"""Bytes that a stand-in's message may be longer than the one that it is made from: its numbers are
larger. An eighth of the message is added to it."""

LIKE = Callable[[Any, int, Any], Any]
"""What a rank says where the last real rank says the first of these; the last of them is what rank
0 has dealt to it before."""


@dataclass
class Traffic:
    """What a rank has sent and received.

    Attributes:
        messages: that it has sent or received, as gloo does it: an all-reduce is a ring, a
            broadcast a tree, gather and scatter are stars.
        received, sent: bytes of tensors.
        outside_s: CPU time of this thread in collectives, with that of stand-ins.
    """

    messages: int = 0
    received: int = 0
    sent: int = 0
    outside_s: float = 0.0


class StandIns(dist.ProcessGroup):
    """The group as one of its real ranks sees it.

    Args:
        size: how many ranks it has, real ones and stand-ins.
        real: the gloo group of the real ranks, which are the first ones.
        like: what stand-ins say.
        traffic: is added to.
    """

    def __init__(self, size: int, real: Any, like: LIKE, traffic: Traffic) -> None:
        super().__init__(real.rank(), size)  # type: ignore[call-arg]
        self.real, self.like, self.traffic = real, like, traffic
        self.dealt: list[Tensor] = []

    def getBackendName(self) -> str:  # noqa: N802  # torch's name
        """As torch asks for it."""
        return BACKEND

    def allreduce(self, tensors: list[Tensor], options: Any = None) -> dist.Work:  # type: ignore[override]
        """Among the real ranks; stand-ins have no flags, and smaller numbers."""
        with _Outside(self.traffic):
            self.real.allreduce(tensors, options).wait()
        self._count(2 * (self.size() - 1), _size(tensors), _size(tensors))
        return completed_work(tensors)

    def broadcast(self, tensors: list[Tensor], options: Any = None) -> dist.Work:  # type: ignore[override]
        """From rank 0, which is real."""
        with _Outside(self.traffic):
            self.real.broadcast(tensors, options).wait()
        depth = (self.size() - 1).bit_length()
        is_root = self.rank() == 0
        received = 0 if is_root else _size(tensors)
        self._count(depth if is_root else 1, received, depth * _size(tensors) * is_root)
        return completed_work(tensors)

    def gather(  # type: ignore[override]
        self, outputs: list[list[Tensor]], inputs: list[Tensor], options: Any = None
    ) -> dist.Work:
        """To rank 0, from the real ranks and from the stand-ins."""
        with _Outside(self.traffic):
            real = [[*outputs[0][: self.real.size()]]] if outputs else []
            self.real.gather(real, inputs, options).wait()
            if outputs:
                self._fill(outputs[0])
        if outputs:
            self._count(self.size() - 1, _size(outputs[0]) - _size(inputs), 0)
        else:
            self._count(1, 0, _size(inputs))
        return completed_work(outputs)

    def scatter(  # type: ignore[override]
        self, outputs: list[Tensor], inputs: list[list[Tensor]], options: Any = None
    ) -> dist.Work:
        """From rank 0 to the real ranks."""
        with _Outside(self.traffic):
            real = [[*inputs[0][: self.real.size()]]] if inputs else []
            self.real.scatter(outputs, real, options).wait()
        if inputs:
            if inputs[0][0].dtype == torch.uint8:  # and not the sizes that torch sends as well
                self.dealt = inputs[0]
            self._count(self.size() - 1, 0, _size(inputs[0]) - _size(outputs))
        else:
            self._count(1, _size(outputs), 0)
        return completed_work(outputs)

    def barrier(self, options: Any = None) -> dist.Work:
        """Among the real ranks."""
        with _Outside(self.traffic):
            self.real.barrier(options).wait()
        self._count(2 * (self.size() - 1).bit_length(), 0, 0)
        return completed_work(None)

    def _fill(self, outputs: list[Tensor]) -> None:
        """What stand-ins send: sizes of pickles, or pickles, as `process_groups` gathers them."""
        last = outputs[self.real.size() - 1]
        if last.dtype != torch.uint8:
            for output in outputs[self.real.size() :]:
                output.copy_(last + last // 8 + SLACK)
            return
        value = pickle.loads(last.numpy().data)
        for rank, output in enumerate(outputs[self.real.size() :], self.real.size()):
            dealt = pickle.loads(self.dealt[rank].numpy().data) if self.dealt else None
            said = pickle.dumps(self.like(value, rank, dealt))
            assert len(said) <= len(output), (rank, len(said), len(output))
            output[: len(said)] = torch.frombuffer(bytearray(said), dtype=torch.uint8)

    def _count(self, messages: int, received: int, sent: int) -> None:
        self.traffic.messages += messages
        self.traffic.received += received
        self.traffic.sent += sent


class _Outside:
    """Counts this thread's CPU time as that of others."""

    def __init__(self, traffic: Traffic) -> None:
        self.traffic = traffic

    def __enter__(self) -> None:
        self.start = thread_time()

    def __exit__(self, *error: object) -> None:
        self.traffic.outside_s += thread_time() - self.start


def _size(tensors: list[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def as_rank(value: Any, rank: int, dealt: Any, *, model: int, ranks: int, root: Path) -> Any:
    """What `rank` says of itself where rank `model` says `value`.

    Args:
        dealt: what rank 0 has dealt to it before.
        ranks: how many there are; each reads one lane, and weights are cut over all of them.
        root: where checkpoints are written. The files of stand-ins are links to that of `model`.
    """
    match value:
        case (BatchStats() as stats, waits, flops, rows):
            lanes, progress = (
                {lane - model + rank: cursor for lane, cursor in cursors.items()}
                for cursors in (stats.lanes, stats.progress)
            )
            return stats._replace(lanes=lanes, progress=progress), waits, flops, rows
        case SavePlan():
            return SavePlan([*_pieces(rank, ranks, value), *_counters(rank, ranks, value)])
        case (list(), dict() as entries) if isinstance(dealt, SavePlan):
            [(name, entry)] = entries.items()
            own = name.replace(f"__{model}_", f"__{rank}_")
            for partial in root.glob(".*.partial"):
                (partial / own).hardlink_to(partial / name)
            return _written(dealt, own, value[0]), {own: entry}
    return value


def _is_whole(item: WriteItem) -> bool:
    """Whether a tensor is not cut, and so dealt to one of the ranks."""
    return item.index.fqn.endswith(".step") or item.index.fqn.startswith("random.")


def _counters(rank: int, ranks: int, plan: SavePlan) -> Iterator[WriteItem]:
    """The step counters that a rank writes, which `FsdpEngine.state` deals to the ranks."""
    [counter, *_] = [item for item in plan.items if item.index.fqn.endswith(".step")]
    weights = [item.index.fqn for item in plan.items if item.index.fqn.startswith("model.")]
    for number, name in enumerate(weights):
        if number % ranks == rank:
            own = f"optimizer.{name.removeprefix('model.')}.step"
            yield replace(counter, index=replace(counter.index, fqn=own))


def _pieces(rank: int, ranks: int, plan: SavePlan) -> Iterator[WriteItem]:
    """A rank's pieces of tensors of which another rank's are known, as `Shard(0)` cuts them."""
    return (_piece(rank, ranks, item) for item in plan.items if not _is_whole(item))


def _piece(rank: int, ranks: int, item: WriteItem) -> WriteItem:
    data = item.tensor_data
    assert data is not None
    rows = -(-data.size[0] // ranks)
    first, end = (min(number * rows, data.size[0]) for number in (rank, rank + 1))
    start = torch.Size([first, *data.chunk.offsets[1:]])
    chunk = ChunkStorageMetadata(start, torch.Size([end - first, *data.chunk.sizes[1:]]))
    index = MetadataIndex(item.index.fqn, start)
    return replace(item, index=index, tensor_data=replace(data, chunk=chunk))


def _written(plan: SavePlan, file: str, model: list[WriteResult]) -> list[WriteResult]:
    """Where a rank has written what it was told to, in a file as that of the model.

    All ranks read the counters. Nobody who is real reads a stand-in's pieces.
    """
    counter = next(result for result in model if result.index.fqn.endswith(".step"))
    results, offset = [], 0
    for item in plan.items:
        size = item.tensor_storage_size() or 0
        place = StorageInfo(file, offset, size)
        if _is_whole(item):
            place = replace(counter.storage_data, relative_path=file)
        results.append(WriteResult(item.index, size, place))
        offset += size
    return results
