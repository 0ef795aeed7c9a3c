"""Copies of a rank's tensors on the host, from which a checkpoint is written behind training."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.tensor import DTensor


class HostMemory:
    """Memory of the host that every save uses again: as much as this rank writes.

    It is pinned where the tensors are on a CUDA device, so that they are copied at the bus's speed.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[MetadataIndex, torch.Size, torch.dtype], Tensor] = {}

    def copy(self, index: MetadataIndex, tensor: Tensor) -> Tensor:
        """Begin a copy of a piece; `synchronize` before it is read."""
        key = index, tensor.shape, tensor.dtype
        if key not in self._buffers:
            shape, dtype = tensor.shape, tensor.dtype
            self._buffers[key] = torch.empty(shape, dtype=dtype, pin_memory=tensor.is_cuda)
        return self._buffers[key].copy_(tensor.detach(), non_blocking=True)

    def synchronize(self) -> None:
        """Wait until every copy that was begun is complete."""
        if torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()


class StagedPlanner(DefaultSavePlanner):
    """DCP's plan to write what this rank has of some tensors, from copies made at once.

    The tensors may change as soon as this exists. Whole tensors that several ranks give are
    written by one of them; sharded ones by the ranks that hold the shards.
    """

    def __init__(self, tensors: dict[str, Tensor], memory: HostMemory) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.set_up_planner(dict(_shared_out(tensors)))
        self.local_plan: SavePlan = self.create_local_plan()
        original = super().lookup_object
        indices = [item.index for item in self.local_plan.items]
        self._copies = {index: memory.copy(index, original(index)) for index in indices}
        memory.synchronize()

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """The copy that is written in the tensor's place."""
        return self._copies[index]


def _shared_out(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """What this rank writes: of a DTensor's replicas each takes its turn, tensor by tensor."""
    turn = 0
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            replica, replicas = _replica(tensor)
            if turn % replicas == replica:
                yield name, tensor
            turn += 1
        else:
            yield name, tensor


def _replica(tensor: DTensor) -> tuple[int, int]:
    """Which of how many replicas of its shard this rank holds."""
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    assert coordinate is not None, "a rank holds tensors of its own mesh only"
    replica, replicas = 0, 1
    for placement, place, size in zip(tensor.placements, coordinate, mesh.shape, strict=True):
        if placement.is_replicate():
            replica, replicas = replica * size + place, replicas * size
    return replica, replicas
