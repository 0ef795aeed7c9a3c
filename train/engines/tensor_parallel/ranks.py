"""What the ranks of a tensor-parallel group send each other, with the gradients of it.

    verb             forward              backward
    gather           all-gather           reduce-scatter
    scatter_sum      reduce-scatter       all-gather

Megatron-LM's sequence parallelism (arXiv 2205.05198, figure 5) calls these g and its conjugate.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

from train.torch_private import all_gather_rows, all_reduce, reduce_scatter_rows


@dataclass(frozen=True)
class TensorRanks:
    """The ranks among which each matrix is cut.

    Attributes:
        mesh: of the one axis `tensor`.
        size: t, how many ranks there are.
        rank: this one among them.
        group: the name of their process group.
    """

    mesh: DeviceMesh
    size: int
    rank: int
    group: str

    @classmethod
    def of(cls, mesh: DeviceMesh) -> "TensorRanks":
        """The ranks of a mesh of one axis."""
        return cls(mesh, mesh.size(), mesh.get_local_rank(), mesh.get_group().group_name)

    def gather(self, x: Tensor) -> Tensor:
        """The tokens (..., T / t, D) of all ranks: (..., T, D)."""
        return _Gather.apply(x, self.size, self.group)

    def gather_for_product(self, x: Tensor) -> Tensor:
        """`gather` of what a matrix product takes: autocast's dtype is sent where it is on."""
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        return self.gather(x)

    def scatter_sum(self, x: Tensor) -> Tensor:
        """This rank's tokens (..., T / t, D) of the sum of the x (..., T, D) of all ranks."""
        return _ScatterSum.apply(x, self.size, self.group)

    def sum(self, x: Tensor) -> Tensor:
        """The sum of the x of all ranks, without a gradient."""
        return all_reduce(x, "sum", self.group)

    def max(self, x: Tensor) -> Tensor:
        """The largest of the x of all ranks, without a gradient."""
        return all_reduce(x, "max", self.group)


class _Gather(torch.autograd.Function):
    """All-gather; each rank computes with all of it, so the gradients of the ranks are summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, group: str) -> Tensor:
        ctx.size, ctx.group = size, group
        return _gathered(x, size, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _summed(grads[0], ctx.size, ctx.group), None, None


class _ScatterSum(torch.autograd.Function):
    """Reduce-scatter; each rank has added to all tokens, so it needs the gradients of all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, group: str) -> Tensor:
        ctx.size, ctx.group = size, group
        return _summed(x, size, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _gathered(grads[0], ctx.size, ctx.group), None, None


def _gathered(x: Tensor, size: int, group: str) -> Tensor:
    # The collective puts one rank's tensor after the other.
    return torch.cat(all_gather_rows(x.contiguous(), size, group).chunk(size), -2)


def _summed(x: Tensor, size: int, group: str) -> Tensor:
    return reduce_scatter_rows(torch.cat(x.chunk(size, -2)), size, group)
