"""How the ranks are laid out: which rows a rank reads, and with whom it shares the model."""

from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from train.settings.engine import EngineConfig, FsdpConfig


@dataclass(frozen=True)
class ParallelDims:
    """The sizes of the axes over which the ranks are laid out, the slowest one first.

    8 ranks with context = tensor = 2, and so shard = 2:

        rank             0   1   2   3   4   5   6   7
        rows of          0   0   0   0   1   1   1   1     data_rank
        tokens           0   0   1   1   0   0   1   1     context_rank
        part of heads    0   1   0   1   0   1   0   1     tensor_rank

    Neighbouring ranks share a machine: tensor parallelism sends the most, in each layer.

    Attributes:
        replicate: copies of the whole model.
        shard: shards of each copy that read rows of their own.
        context: ranks over which the tokens of a row are dealt.
        tensor: ranks over which matrices are cut.
    """

    replicate: int = 1
    shard: int = 1
    context: int = 1
    tensor: int = 1

    @classmethod
    def of(cls, config: EngineConfig, world_size: int) -> "ParallelDims":
        """The layout of an engine's ranks, whose number `config.problems_on` has accepted."""
        if not isinstance(config, FsdpConfig):
            return cls(shard=world_size)
        if not config.shard:
            return cls(replicate=world_size)
        shard = world_size // (config.replicate * config.ranks_per_row)
        return cls(config.replicate, shard, config.context, config.tensor)

    @property
    def data_ranks(self) -> int:
        """How many ranks read rows of their own."""
        return self.replicate * self.shard

    @property
    def ranks_per_row(self) -> int:
        """How many ranks work on the same rows."""
        return self.context * self.tensor

    @property
    def shards(self) -> int:
        """Over how many ranks FSDP2 cuts the weights (with `tensor`, their parts)."""
        return self.shard * self.context

    def data_rank(self, rank: int) -> int:
        """Which of the ranks that read rows of their own has the same rows as this one."""
        return rank // self.ranks_per_row

    def context_rank(self, rank: int) -> int:
        """Which part of the rows' tokens a rank has."""
        return rank // self.tensor % self.context

    def tensor_rank(self, rank: int) -> int:
        """Which part of the matrices a rank has."""
        return rank % self.tensor

    def is_reader(self, rank: int) -> bool:
        """Whether a rank is the first of those that work on the same rows."""
        return rank % self.ranks_per_row == 0

    def weight_mesh(self, device: torch.device) -> DeviceMesh:
        """The mesh over which weights are cut: `fsdp`, before it `replicate`, after it `tensor`.

        An axis of one rank is left out, but for `fsdp`. HSDP of 8 ranks with replicate = 2:

                          fsdp
            replicate   0  1  2  3
                        4  5  6  7

        Each row has the whole model. Neighbouring ranks share a machine, and so they share a row:
        the all-gathers and reduce-scatters of a row are most of the traffic. A column only
        all-reduces gradients, once per step.
        """
        sizes = {"replicate": self.replicate, "fsdp": self.shards, "tensor": self.tensor}
        kept = {name: size for name, size in sizes.items() if size > 1 or name == "fsdp"}
        return init_device_mesh(device.type, tuple(kept.values()), mesh_dim_names=tuple(kept))

    def row_mesh(self, device: torch.device) -> DeviceMesh:
        """The mesh of three axes over which rows are dealt: `data`, `context`, `tensor`."""
        return init_device_mesh(
            device.type,
            (self.data_ranks, self.context, self.tensor),
            mesh_dim_names=("data", "context", "tensor"),
        )
