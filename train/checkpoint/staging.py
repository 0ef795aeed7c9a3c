"""Staging: copies of a rank's tensors on the host, which are written while training goes on."""

from collections.abc import Iterator, Sequence
from math import prod
from typing import cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.tensor import DTensor

from train.torch_private import dedup_save_plans


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

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """What each rank writes, and the index of all pieces; on rank 0.

        DCP's own method checks pieces against each other along a tensor's longest dim. Where ranks
        have cut another one, as FSDP2 does, that compares every piece with every other one.

        Raises:
            RuntimeError: the pieces do not make up the tensors.
        """
        plans, metadata = create_default_global_save_plan(dedup_save_plans(all_plans))
        tensors = cast(dict[str, TensorStorageMetadata], metadata.state_dict_metadata)
        flaws = ((name, flaw_of_pieces(x.size, x.chunks)) for name, x in tensors.items())
        if wrong := [f"{name}: {flaw}" for name, flaw in flaws if flaw]:
            raise RuntimeError("; ".join(wrong))
        self.global_plan, self.metadata = plans, metadata
        return plans, metadata

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """The host copy. DCP calls this to get what it writes."""
        return self._copies[index]


def flaw_of_pieces(size: torch.Size, pieces: Sequence[ChunkStorageMetadata]) -> str | None:
    """Why some boxes do not cover a tensor exactly once; None if they do.

    It takes n log n steps for n boxes that are cut along one dim; along two, n times the number of
    cuts of the one that has fewer.
    """
    dims = range(len(size))
    for piece in pieces:
        if any(piece.offsets[d] + piece.sizes[d] > size[d] for d in dims):
            return f"a piece at {list(piece.offsets)} reaches out of {list(size)}"
    filled = sum(prod(piece.sizes) for piece in pieces)
    if filled != prod(size):
        return f"its pieces have {filled:,} numbers, and it has {prod(size):,}"
    if len(pieces) == 1:
        return None
    # Along the dim that is cut the most, few pieces lie beside each other.
    cut = max(dims, key=lambda d: len({piece.offsets[d] for piece in pieces}))
    beside: list[ChunkStorageMetadata] = []
    for piece in sorted(filter(_is_filled, pieces), key=lambda piece: piece.offsets[cut]):
        beside = [other for other in beside if _end(other, cut) > piece.offsets[cut]]
        if other := next((other for other in beside if _overlap(other, piece)), None):
            return f"its pieces at {list(other.offsets)} and {list(piece.offsets)} overlap"
        beside.append(piece)
    return None


def _is_filled(piece: ChunkStorageMetadata) -> bool:
    """Whether a piece has any numbers: of 1,024 ranks some get none of a short tensor."""
    return prod(piece.sizes) > 0


def _overlap(a: ChunkStorageMetadata, b: ChunkStorageMetadata) -> bool:
    dims = range(len(a.offsets))
    return all(a.offsets[d] < _end(b, d) and b.offsets[d] < _end(a, d) for d in dims)


def _end(piece: ChunkStorageMetadata, dim: int) -> int:
    return piece.offsets[dim] + piece.sizes[dim]


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
