"""The links that a group of ranks has, and how long its collectives take on them."""

from math import inf
from typing import NamedTuple

from train.costs.cluster import ClusterConfig
from train.engines.mesh import ParallelDims


class Group(NamedTuple):
    """Ranks that call a collective together, as their links see them.

    Attributes:
        ranks: how many.
        in_node: how many of them each node has.
    """

    ranks: int
    in_node: int

    @property
    def nodes(self) -> int:
        return self.ranks // self.in_node


def group_of(ranks: int, stride: int, devices: int) -> Group:
    """The group of an axis whose neighbours are `stride` ranks apart, on nodes of `devices` ranks.

    >>> group_of(ranks=16, stride=2, devices=8), group_of(ranks=4, stride=8, devices=8)
    (Group(ranks=16, in_node=4), Group(ranks=4, in_node=1))
    """
    return Group(ranks, min(ranks, max(1, devices // stride)))


class Groups(NamedTuple):
    """The groups of a mesh that a rank is in.

    Attributes:
        shard: the ranks that gather weights together.
        replicate: those that sum gradients of equal shards.
        context: those that share the tokens of a row.
        tensor: those that share matrices.
        all: every rank.
    """

    shard: Group
    replicate: Group
    context: Group
    tensor: Group
    all: Group


def groups_of(dims: ParallelDims, devices: int) -> Groups:
    """The groups of a mesh on nodes of so many devices; neighbouring ranks share a node."""
    inner = dims.shards * dims.tensor
    return Groups(
        shard=group_of(dims.shards, dims.tensor, devices),
        replicate=group_of(dims.replicate, inner, devices),
        context=group_of(dims.context, dims.tensor, devices),
        tensor=group_of(dims.tensor, 1, devices),
        all=group_of(dims.replicate * inner, 1, devices),
    )


def bandwidth(group: Group, cluster: ClusterConfig) -> float:
    """Bytes a second that each rank of a group sends in a ring over all of them.

    A ring leaves a node once for all of its ranks, through the links of all of them:

        within  o-o-o-o      between, one for each device: 4 at once
                | | | |
                o-o-o-o
    """
    within = cluster.within.gb_per_s if group.in_node > 1 else inf
    between = group.in_node * cluster.between.gb_per_s if group.nodes > 1 else inf
    return min(within, between) * 1e9


def gather_s(size: float, group: Group, cluster: ClusterConfig) -> float:
    """Seconds of an all-gather to `size` bytes on each rank, or of a reduce-scatter of them.

        (n-1)/n * size / bandwidth + start + (n-m) * latency within + (m-1) * latency between

    n ranks on m nodes, in a ring, as NCCL's own model of costs has it (`src/graph/tuning.cc`).
    """
    n = group.ranks
    if n == 1 or size == 0:
        return 0.0
    crossings = group.nodes - 1
    latency = (n - 1 - crossings) * cluster.within.latency_us
    latency += crossings * cluster.between.latency_us
    sent = (n - 1) / n * size / bandwidth(group, cluster)
    return _shared(n, cluster) * (sent + (cluster.start_us + latency) * 1e-6)


def reduce_s(size: float, group: Group, cluster: ClusterConfig) -> float:
    """Seconds of an all-reduce of `size` bytes: by a ring, or by a tree where that is faster.

    A ring is a reduce-scatter and an all-gather. A double tree reaches 0.9 of its bandwidth, and
    its latency grows with the logarithm of the nodes (ibid.).
    """
    n = group.ranks
    if n == 1 or size == 0:
        return 0.0
    ring = 2 * gather_s(size, group, cluster)
    depth = (group.nodes - 1).bit_length()
    latency = (group.in_node - 1) * cluster.within.latency_us + depth * cluster.between.latency_us
    sent = 2 * size / (0.9 * bandwidth(group, cluster))
    tree = sent + (cluster.start_us + 2 * latency) * 1e-6
    return ring if cluster.cores is not None else min(ring, tree)


def _shared(ranks: int, cluster: ClusterConfig) -> float:
    """How much longer ranks take that share the cores of their node."""
    if cluster.cores is None:
        return 1.0
    return max(1.0, min(ranks, cluster.devices) / cluster.cores)
