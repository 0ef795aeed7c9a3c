"""The time of a training step on a cluster, by part, without running it.

Sizes are those of whole results. In an all-gather or reduce-scatter of n ranks, each of them
receives (n-1)/n of that.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

from phd.attention.parts import remembered_copies
from phd.pattern import Pattern, patterns_of
from train.costs.cluster import ClusterConfig
from train.costs.kernels import (
    RESIDUAL,
    Copies,
    MicroBatch,
    Recompute,
    Seconds,
    Stage,
    block_stages,
    copies_of,
    head_stage,
    optimizer_s,
    recompute_of,
)
from train.costs.links import Groups, bandwidth, gather_s, groups_of, reduce_s
from train.engines.context_parallel import heads_sent, pieces_of
from train.engines.mesh import ParallelDims

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


def key_pieces(batch: MicroBatch, pattern: Pattern) -> int:
    """In how many pieces a layer's keys and values are sent, as `pieces_of` says."""
    heads = heads_sent(pattern, batch.model.kv_heads) // batch.tensor
    return pieces_of(key_traffic(batch, pattern).gathered, heads)


def flops_before(batch: MicroBatch, pattern: Pattern, queries: int) -> int:
    """The part of `attention_flops` over keys that lie before a rank's own parts.

    A rank has parts i and 2c-1-i of T / 2c tokens: before them lie 2c-1 parts, whoever it is.
    """
    model, c = batch.model, batch.context
    part, copies = batch.seq_len / (2 * c), remembered_copies(pattern)
    pairs = batch.rows * queries * copies * part * part * (2 * c - 1)
    return int(4 * model.head_dim * model.heads * pairs) // batch.tensor


class KeySeconds(NamedTuple):
    """Seconds that a layer's keys and values are under way in context parallelism.

    Attributes:
        gather: those that everybody sees, in the forward pass, and again in the backward.
        scatter: the sums of their gradients.
        halo, halo_back: hidden copies of neighbours, and their gradients.
    """

    gather: float
    scatter: float
    halo: float
    halo_back: float

    @property
    def moved(self) -> tuple[float, float]:
        """Forward, and backward."""
        return self.gather + self.halo, self.gather + self.scatter + self.halo_back

    def waited(self, attention: float, others: float, pieces: int) -> tuple[float, float]:
        """How much of it a layer waits for, forward and backward.

            forward                               backward
            compute | own | others 1 | others 2 | compute | 1/2 own | others 1, 2 | 1/2 own |
            link    | gather 1 | gather 2 |       link    | gather 1, 2 | scatter 1, 2 |

        Args:
            attention: seconds of the layer's attention in the forward pass; twice that backward.
            others: of these, for keys of tokens before the rank's own.
            pieces: in which keys are sent.
        """
        own = attention - others
        device = max(self.halo, own)
        for piece in range(1, pieces + 1):
            device = max(device, self.halo + piece * self.gather / pieces) + others / pieces
        forward = device - attention
        device, link = own, self.gather
        for piece in range(1, pieces + 1):
            device = max(device, piece * self.gather / pieces) + 2 * others / pieces
            link = max(link, device) + self.scatter / pieces
        device = max(device + own, link + self.halo_back)
        return forward, device - 2 * attention


class TensorTraffic(NamedTuple):
    """Bytes of a layer's tensor parallelism with sequence parallelism, in one direction.

    Attributes:
        gathered: the inputs of the columnwise products, of attention and of the feed-forward.
        scattered: the results of the rowwise ones.
        summed: sums of squares of whole q and k, float32.
    """

    gathered: tuple[int, ...]
    scattered: tuple[int, ...]
    summed: int

    def again(self, recompute: Recompute) -> "TensorTraffic":
        """What is sent once more for what the backward pass computes again."""
        match recompute:
            case "none":
                return TensorTraffic((), (), 0)
            case "selective":
                return self._replace(scattered=())  # it keeps these sums
            case "full":
                return self


def tensor_traffic(batch: MicroBatch, copies: Copies) -> TensorTraffic:
    """Of a block's forward pass; the backward gathers where this scatters, and has as much."""
    if batch.tensor == 1:
        return TensorTraffic((), (), 0)
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

    def keys_s(self, batch: MicroBatch, pattern: Pattern) -> KeySeconds:
        """Seconds of context parallelism in a layer."""
        group, keys = self.groups.context, key_traffic(batch, pattern)
        pieces = key_pieces(batch, pattern)
        halo = keys.halo / bandwidth(group, self.cluster) if keys.halo else 0.0
        return KeySeconds(
            # Each piece has a start and a latency of its own.
            gather=pieces * gather_s(keys.gathered / pieces, group, self.cluster),
            scatter=pieces * gather_s(keys.scattered / pieces, group, self.cluster),
            halo=halo,
            halo_back=halo * GRADIENT / batch.itemsize,
        )

    def tensor_s(self, traffic: TensorTraffic) -> float:
        """Seconds of so much tensor parallelism."""
        group, sizes = self.groups.tensor, (*traffic.gathered, *traffic.scattered)
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
        return self.cluster.fsdp_factor * gather_s(size, self.groups.shard, self.cluster)

    def reduce_gradients_s(self, size: float) -> tuple[float, float]:
        """Seconds of (the reduce-scatter over shards, the all-reduce of a shard over replicas)."""
        shard = size / self.groups.shard.ranks
        scatter = self.gather_weights_s(size)  # it takes as long
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


SCALARS = 2
"""All-reduces of a number in a step: the loss with its targets, and the norm of the gradient."""


class StepTime(NamedTuple):
    """Seconds of a step.

    Attributes:
        products: matrix products of blocks and head.
        attention: its kernels.
        other: norms, activations, RoPE, residuals and the loss's softmax.
        optimizer: AdamW, or Muon.
        host: what the host adds.
        gather: all-gathers of weights, hidden or not, as the four that follow.
        scatter: reduce-scatters of gradients.
        reduce: all-reduces of gradients over replicas, and of numbers over all ranks.
        context: keys and values, and their gradients.
        tensor: activations of tensor parallelism.
        exposed: what of these five nothing hides.
    """

    products: float
    attention: float
    other: float
    optimizer: float
    host: float
    gather: float
    scatter: float
    reduce: float
    context: float
    tensor: float
    exposed: float

    @property
    def compute(self) -> float:
        """What would be left of the step with links that take no time."""
        return self.products + self.attention + self.other + self.optimizer + self.host

    @property
    def sent(self) -> float:
        """All communication, hidden or not."""
        return self.gather + self.scatter + self.reduce + self.context + self.tensor

    @property
    def hidden(self) -> float:
        """Communication beside computation."""
        return self.sent - self.exposed

    @property
    def total(self) -> float:
        return self.compute + self.exposed


@dataclass(frozen=True)
class Weights:
    """The parameters of a model, and how they are kept.

    Attributes:
        block: numbers in a block.
        outside: numbers in all else: embeddings, final norm, head.
        layers: how many blocks there are.
        itemsize: bytes in which they are gathered.
        gradient: bytes in which their gradients are summed.
        reshard: whether a block is gathered again in the backward pass: `always`, `auto` (all but
            the last one) or `never`.
    """

    block: int
    outside: int
    layers: int
    itemsize: int
    gradient: int = 4
    reshard: str = "auto"

    @property
    def total(self) -> int:
        return self.outside + self.layers * self.block


@dataclass(frozen=True)
class Step:
    """What a step consists of on each rank.

    Attributes:
        batch: a micro-batch.
        passes: micro-batches of a step.
        weights: of the model.
        dims: the mesh.
        cluster: the machines.
        checkpoint_every: how many blocks there are to each checkpointed one.
        muon_flops: of the busiest rank's Newton-Schulz; 0: AdamW alone.
        muon_bytes: that a rank receives for it.
    """

    batch: MicroBatch
    passes: int
    weights: Weights
    dims: ParallelDims
    cluster: ClusterConfig
    checkpoint_every: int = 1
    muon_flops: float = 0.0
    muon_bytes: float = 0.0

    @property
    def place(self) -> Place:
        """This rank's groups."""
        return Place(groups_of(self.dims, self.cluster.devices), self.cluster)

    @property
    def crowding(self) -> float:
        """How many ranks share a core of their node; 1 where each computes on its own."""
        ranks = min(self.cluster.devices, self.place.groups.all.ranks)
        return 1.0 if self.cluster.cores is None else max(1.0, ranks / self.cluster.cores)


class _Waits(NamedTuple):
    """Seconds of context and tensor parallelism in a layer, forward and backward.

    Attributes:
        context: keys and values, and their gradients.
        tensor: activations, for which the layer waits.
        waited: the layer waits for this much of both.
    """

    context: tuple[float, float]
    tensor: tuple[float, float]
    waited: tuple[float, float]


def step_time(step: Step) -> StepTime:
    """The seconds of a step by part.

    The links work beside the computation, as far as there is some to hide behind. A layer waits for
    the activations of tensor parallelism, and for keys where its attention is too short for them.
    """
    rates, place = step.cluster.rates, step.place
    blocks = [*block_stages(step.batch, rates, step.checkpoint_every)]
    stages = [*blocks, head_stage(step.batch, rates)]
    waits = [*_waits(step, blocks)]
    lines = [_timeline(step, stages, waits, number) for number in range(step.passes)]
    spent = sum(pipelined_s(line, overlaps=step.cluster.cores is None) for line in lines)
    crowd = step.crowding * step.passes
    computed = Seconds(*(crowd * seconds for seconds in _sum(stages)))
    muon = step.muon_flops / rates.products
    shard = step.weights.total / (step.dims.shards * step.dims.tensor)
    scatter, reduce = _gradients(step)
    alone = SCALARS * reduce_s(4, place.groups.all, step.cluster)
    if step.muon_bytes:
        alone += step.muon_bytes / bandwidth(place.groups.all, step.cluster)
    return StepTime(
        products=computed.products,
        attention=computed.attention,
        other=computed.other,
        optimizer=step.crowding * (optimizer_s(shard, rates) + muon),
        host=step.cluster.step_s,
        gather=sum(timed.before for line in lines for timed in line),
        scatter=scatter,
        reduce=reduce + alone,
        context=step.passes * sum(sum(wait.context) for wait in waits),
        tensor=step.passes * sum(sum(wait.tensor) for wait in waits),
        exposed=max(0.0, spent - computed.total) + alone,
    )


def _sum(stages: Sequence[Stage]) -> Seconds:
    """Of all stages, both ways."""
    total = Seconds()
    for stage in stages:
        total = total.plus(stage.forward).plus(stage.backward)
    return total


def _waits(step: Step, blocks: Sequence[Stage]) -> Iterator[_Waits]:
    """Of each block, and at last of embedding, head and loss together."""
    batch, place = step.batch, step.place
    for layer, (pattern, block) in enumerate(zip(patterns_of(batch.model), blocks, strict=True)):
        copies = copies_of(batch.model, layer, pattern)
        keys, traffic = place.keys_s(batch, pattern), tensor_traffic(batch, copies)
        waited = keys.moved
        if step.cluster.cores is None:
            others = flops_before(batch, pattern, copies.queries) / step.cluster.rates.attention
            waited = keys.waited(block.forward.attention, others, key_pieces(batch, pattern))
        # What is computed again is also sent again; of attention that is all or nothing.
        recompute = recompute_of(batch, layer, step.checkpoint_every)
        again = recompute == "full"
        context, waited = ((there, back + again * there) for there, back in (keys.moved, waited))
        moved = place.tensor_s(traffic)
        tensor = moved, moved + place.tensor_s(traffic.again(recompute))
        yield _Waits(context, tensor, (waited[0] + tensor[0], waited[1] + tensor[1]))
    head = place.head_s(batch)
    yield _Waits((0.0, 0.0), (head, head), (head, head))


def _timeline(
    step: Step, stages: Sequence[Stage], waits: Sequence[_Waits], number: int
) -> list[Timed]:
    """A micro-batch: embedding, blocks and head, and back; `number` counts those of a step.

    Gradients are summed over ranks with the last one alone. `stages` and `waits` end with the head.
    """
    place, weights, depth = step.place, step.weights, len(stages) - 1
    kept = weights.reshard == "never" and number > 0
    parted = step.weights.itemsize / step.dims.tensor
    block, outside = (
        0.0 if kept else place.gather_weights_s(numbers * parted)
        for numbers in (weights.block, weights.outside)
    )
    last = number == step.passes - 1
    after = [_after(step, numbers) if last else 0.0 for numbers in (weights.block, weights.outside)]

    def timed(layer: int, way: int, before: float, after: float) -> Timed:
        waited = waits[layer].waited[way]
        return Timed(before, step.crowding * stages[layer][way].total + waited, after)

    def again(layer: int) -> float:
        """What gathers a block's weights in the backward pass."""
        freed = weights.reshard == "always" or (weights.reshard == "auto" and layer < depth - 1)
        return block if freed else 0.0

    return [
        Timed(outside, 0.0, 0.0),
        *(timed(layer, 0, block, 0.0) for layer in range(depth)),
        timed(depth, 0, 0.0, 0.0),
        timed(depth, 1, outside if weights.reshard == "always" else 0.0, 0.0),
        *(
            timed(layer, 1, again(layer), after[0] if layer < weights.layers else 0.0)
            for layer in reversed(range(depth))
        ),
        Timed(0.0, 0.0, after[1]),
    ]


def _after(step: Step, numbers: int) -> float:
    """Seconds in which the gradients of a unit are summed over ranks."""
    return sum(step.place.reduce_gradients_s(numbers * step.weights.gradient / step.dims.tensor))


def _gradients(step: Step) -> tuple[float, float]:
    """Seconds of a step's (reduce-scatters, all-reduces) of gradients."""
    weights = step.weights
    units = [weights.outside, *[weights.block] * weights.layers]
    pairs = [
        step.place.reduce_gradients_s(numbers * weights.gradient / step.dims.tensor)
        for numbers in units
    ]
    return sum(scatter for scatter, _ in pairs), sum(reduce for _, reduce in pairs)
