"""Staging: copies of a rank's tensors on the host, which are written while training goes on."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.tensor import DTensor


class HostMemory:
    """Staging buffers on the host. Every save uses the same ones, as large as this rank's part.

    Allocating them anew would cost page faults (CPU) or page locking (CUDA) in every save. Buffers
    for CUDA tensors are pinned: only then is the copy asynchronous and at full PCIe speed.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[MetadataIndex, torch.Size, torch.dtype], Tensor] = {}

    def copy(self, index: MetadataIndex, tensor: Tensor) -> Tensor:
        """Begin to copy a tensor to the host. Call `synchronize` before the copy is read."""
        key = index, tensor.shape, tensor.dtype
        if key not in self._buffers:
            shape, dtype = tensor.shape, tensor.dtype
            self._buffers[key] = torch.empty(shape, dtype=dtype, pin_memory=tensor.is_cuda)
        return self._buffers[key].copy_(tensor.detach(), non_blocking=True)

    def synchronize(self) -> None:
        """Wait until all copies are complete."""
        if torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()


class StagedPlanner(DefaultSavePlanner):
    """DCP's plan of what this rank writes, and the host copies of it.

    The constructor makes the copies, so the tensors may change afterwards. If several ranks have
    the same whole tensor, DCP has one of them write it. Shards are written by ranks that hold them.
    """

    def __init__(self, tensors: dict[str, Tensor], memory: HostMemory) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.set_up_planner(dict(_this_ranks_part(tensors)))
        self.local_plan: SavePlan = self.create_local_plan()
        find_tensor = super().lookup_object  # the original tensor, or this rank's shard of it
        indices = [item.index for item in self.local_plan.items]
        self._copies = {index: memory.copy(index, find_tensor(index)) for index in indices}
        memory.synchronize()

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """The host copy. DCP calls this to get what it writes."""
        return self._copies[index]


def _this_ranks_part(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors that this rank writes.

    Under HSDP every shard has replicas, which take turns here, tensor by tensor. DCP removes
    replicas only from the global plan, when every rank would have staged all of its shards already.
    """
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
    """(index of this rank among the replicas of its shard, number of the replicas)."""
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    assert coordinate is not None, "a rank holds tensors of its own mesh only"
    replica, replicas = 0, 1
    for placement, index, size in zip(tensor.placements, coordinate, mesh.shape, strict=True):
        if placement.is_replicate():
            replica, replicas = replica * size + index, replicas * size
    return replica, replicas
