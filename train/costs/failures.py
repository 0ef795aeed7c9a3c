"""What failures and checkpoints cost a run, and how often it should save."""

from math import inf, sqrt
from typing import NamedTuple

from train.costs.cluster import ClusterConfig

DAY_S = 86400.0


class Saving(NamedTuple):
    """A checkpoint.

    Attributes:
        size: bytes.
        stall_s: for which training stands still, while tensors are copied to the host's memory.
        write_s: until it is complete: written, read back and hashed, beside the training.
        read_s: in which a start reads it.
    """

    size: int
    stall_s: float
    write_s: float
    read_s: float


def saving_of(size: int, shards: int, cluster: ClusterConfig) -> Saving:
    """The checkpoint of a model whose weights and moments are cut into so many shards."""
    storage, nodes = cluster.storage, cluster.nodes
    write = min(nodes * storage.node_write_gb_per_s, storage.write_gb_per_s) * 1e9
    read = min(nodes * storage.node_read_gb_per_s, storage.read_gb_per_s) * 1e9
    stall = size / shards / (storage.host_gb_per_s * 1e9)
    return Saving(size, stall, size / write + size / read, size / read)


def young_s(stall_s: float, between_failures_s: float) -> float:
    """Young's interval between checkpoints (CACM 17(9), 1974): sqrt(2 d M).

    >>> young_s(2.0, 10_000.0)
    200.0
    """
    return sqrt(2 * stall_s * between_failures_s)


def daly_s(stall_s: float, between_failures_s: float) -> float:
    """Daly's interval, of a higher order (FGCS 22(3), 2006): with x = sqrt(d / 2M)

    sqrt(2 d M) (1 + x/3 + x^2/9) - d,  and M where d is 2M and more
    """
    if stall_s >= 2 * between_failures_s:
        return between_failures_s
    if between_failures_s == inf:
        return inf
    x = sqrt(stall_s / (2 * between_failures_s))
    return young_s(stall_s, between_failures_s) * (1 + x / 3 + x * x / 9) - stall_s


class Failures(NamedTuple):
    """What a run loses at an interval between checkpoints.

    Attributes:
        per_day: how many are expected.
        interval_s: seconds of training between two checkpoints; inf: there are none.
        lost_s: seconds that each costs: the steps since the last complete checkpoint, the start and
            reading it.
        cost: seconds lost to failures and to saving for each second of training.
    """

    per_day: float
    interval_s: float
    lost_s: float
    cost: float


def failures_of(saving: Saving, cluster: ClusterConfig, interval_s: float) -> Failures:
    """The expected failures of a cluster, to the first order in their rate.

    One comes, on average, half an interval after the last save has begun that will be complete, and
    the save before it counts until the new one is written:

        lost = interval/2 + write + restart + read
    """
    per_day = cluster.failures_per_device_hour * cluster.ranks * 24
    lost = interval_s / 2 + saving.write_s + cluster.restart_s + saving.read_s
    failing = per_day / DAY_S * lost if per_day else 0.0
    return Failures(per_day, interval_s, lost, failing + saving.stall_s / interval_s)


def best_interval_s(saving: Saving, cluster: ClusterConfig) -> tuple[float, float]:
    """(Young's, Daly's) interval for a cluster, none shorter than a checkpoint takes to write."""
    per_day = cluster.failures_per_device_hour * cluster.ranks * 24
    between = DAY_S / per_day if per_day else inf
    found = young_s(saving.stall_s, between), daly_s(saving.stall_s, between)
    return max(found[0], saving.write_s), max(found[1], saving.write_s)
