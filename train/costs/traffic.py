"""Bytes that a rank's collectives have in a step, and how much of their time nothing hides.

Sizes are those of whole results. In an all-gather or reduce-scatter of n ranks, each of them
receives (n-1)/n of that.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

from phd.pattern import Pattern
from train.costs.cluster import ClusterConfig
from train.costs.kernels import RESIDUAL, Copies, MicroBatch
from train.costs.links import Groups, bandwidth, gather_s, reduce_s

GRADIENT = 4
"""Bytes of a number of dk and dv, which are summed over context ranks in float32."""


class KeyTraffic(NamedTuple):
    """Bytes of a layer's keys and values under context parallelism, on a tensor rank.

    Attributes:
        gathered: to all context ranks, in the forward pass and again in the backward.
        scattered: sums of their gradients, in the backward.
        halo: hidden keys and values that a rank has of its left neighbours, for both of its parts.
    """

    gathered: int
    scattered: int
    halo: int


def key_traffic(batch: MicroBatch, pattern: Pattern) -> KeyTraffic:
    """Of the keys that a rank needs of other context ranks.

    Everybody sees the originals: 2 B T G H numbers a layer, whatever K is; every copy's, where
    copies see all copies. A window without chunks reaches over the border of a part by

        ceil((W - 1) / (K - 1)) tokens with K - 1 hidden copies each

    and chunks end at the borders.
    """
    if batch.context == 1:
        return KeyTraffic(0, 0, 0)
    model = batch.model
    token = 2 * batch.rows * model.kv_heads * model.head_dim // batch.tensor
    copies = pattern.K if pattern.rule in ("flat", "stream") else 1
    numbers = copies * token * batch.seq_len
    halo = 0
    if pattern.rule == "hidden" and pattern.window is not None and pattern.chunk_tokens is None:
        reach = pattern.window - 1
        tokens = reach if pattern.span_unit == "token" else ceil(reach / (pattern.K - 1))
        halo = 2 * token * tokens * (pattern.K - 1) * batch.itemsize
    return KeyTraffic(numbers * batch.itemsize, numbers * GRADIENT, halo)


class TensorTraffic(NamedTuple):
    """Bytes of a layer's tensor parallelism with sequence parallelism, in one direction.

    Attributes:
        gathered: the inputs of the columnwise products, of attention and of the feed-forward.
        scattered: the results of the rowwise ones.
        summed: sums of squares of whole q and k, float32.
    """

    gathered: tuple[int, int]
    scattered: tuple[int, int]
    summed: int


def tensor_traffic(batch: MicroBatch, copies: Copies) -> TensorTraffic:
    """Of a block's forward pass; the backward gathers where this scatters, and has as much."""
    if batch.tensor == 1:
        return TensorTraffic((0, 0), (0, 0), 0)
    copy = batch.tokens * batch.model.dim * batch.itemsize
    into = max(copies.projected, copies.projected_keys) * copy
    out = copies.queries * copy
    whole_norms = batch.model.norm == "reordered"
    summed = 4 * batch.tokens * (copies.queries + copies.keys) if whole_norms else 0
    return TensorTraffic((into, out), (out, out), summed)


@dataclass(frozen=True)
class Place:
    """A rank's groups on the links of a cluster."""

    groups: Groups
    cluster: ClusterConfig

    def keys_s(self, batch: MicroBatch, pattern: Pattern) -> tuple[float, float]:
        """Seconds of context parallelism in a layer's forward and backward pass."""
        group, keys = self.groups.context, key_traffic(batch, pattern)
        gather = gather_s(keys.gathered, group, self.cluster)
        scatter = gather_s(keys.scattered, group, self.cluster)
        halo = keys.halo / bandwidth(group, self.cluster) if keys.halo else 0.0
        back = halo * GRADIENT / batch.itemsize
        return gather + halo, gather + halo + scatter + back

    def tensor_s(self, batch: MicroBatch, copies: Copies) -> float:
        """Seconds of tensor parallelism in one direction through a block."""
        group, traffic = self.groups.tensor, tensor_traffic(batch, copies)
        sizes = (*traffic.gathered, *traffic.scattered)
        moved = sum(gather_s(size, group, self.cluster) for size in sizes)
        return moved + reduce_s(traffic.summed, group, self.cluster)

    def head_s(self, batch: MicroBatch) -> float:
        """Seconds of tensor parallelism in one direction through embedding, head and loss.

        The embedding's partial sums are scattered in float32, the head's input is gathered, and of
        each token the largest logit and the sum of exponentials are reduced.
        """
        if batch.tensor == 1:
            return 0.0
        group, numbers = self.groups.tensor, batch.tokens * batch.model.dim
        moved = gather_s(numbers * RESIDUAL, group, self.cluster)
        moved += gather_s(numbers * batch.itemsize, group, self.cluster)
        return moved + reduce_s(2 * 4 * batch.tokens, group, self.cluster)

    def gather_weights_s(self, size: float) -> float:
        """Seconds to gather `size` bytes of weights over the ranks that hold their shards."""
        return gather_s(size, self.groups.shard, self.cluster)

    def reduce_gradients_s(self, size: float) -> tuple[float, float]:
        """Seconds of (the reduce-scatter over shards, the all-reduce of a shard over replicas)."""
        shard = size / self.groups.shard.ranks
        scatter = gather_s(size, self.groups.shard, self.cluster)
        return scatter, reduce_s(shard, self.groups.replicate, self.cluster)


class Timed(NamedTuple):
    """What a link and the computation beside it do in one direction through the model.

    Attributes:
        before: seconds on the link that have to end before this stage is computed.
        compute: seconds of the stage.
        after: seconds on the link that begin when the stage is computed.
    """

    before: float
    compute: float
    after: float


def pipelined_s(stages: Sequence[Timed], overlaps: bool = True) -> float:
    """Seconds until stages are computed one after another, and the link has nothing left to do.

        compute     | stage 0 | stage 1     |   | stage 2 |
        link    | 0 | before 1| before 2        | after 1 | after 2 |

    What comes `before` a stage is sent while the stage before it is computed: FSDP2 gathers one
    unit ahead. The link does one thing at a time, in the order in which they are asked for.

    Args:
        overlaps: whether the link works while the device computes.
    """
    if not overlaps:
        return sum(map(sum, stages))
    device = 0.0
    ready = link = stages[0].before
    for number, stage in enumerate(stages):
        start = max(device, ready)
        if following := stages[number + 1 : number + 2]:
            ready = 0.0
            if following[0].before:
                ready = link = max(link, start) + following[0].before
        device = start + stage.compute
        if stage.after:
            link = max(link, device) + stage.after
    return max(device, link)
