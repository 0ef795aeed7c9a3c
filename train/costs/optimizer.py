"""What an optimizer computes and sends in a step; AdamW does so little that it is not counted."""

from typing import NamedTuple

import torch

from train.config import Config
from train.engines.matrix_exchange import deal
from train.engines.newton_schulz import newton_schulz_flops
from train.engines.state_rules import matrix_shapes


class OptimizerCost(NamedTuple):
    """Of Newton-Schulz in one step.

    Attributes:
        parameters: numbers in the matrices.
        flops: of all ranks.
        busiest: of the rank that has the most of them; the others wait for it.
        received: bytes that each rank receives, as a mean; 0 in a lone process.
    """

    parameters: int
    flops: int
    busiest: int
    received: int


def optimizer_cost(
    config: Config, dtype: torch.dtype, world_size: int, shards: int
) -> OptimizerCost | None:
    """The cost of a step of Muon on `world_size` ranks; None: the optimizer is AdamW alone.

    Args:
        dtype: of the matrix products.
        shards: into how many the moments are divided.
    """
    shapes = list(matrix_shapes(config.model, config.optim).values())
    if not shapes:
        return None
    costs = [newton_schulz_flops(shape, config.optim.ns_steps) for shape in shapes]
    loads = [0] * world_size
    for cost, owner in zip(costs, deal(costs, world_size), strict=True):
        loads[owner] += cost
    parameters = sum(shape.numel() for shape in shapes)
    # Of each matrix that a rank owns or has a part of, it has some numbers already.
    there = parameters / world_size * (1 - 1 / shards)
    back = parameters / shards * (1 - 1 / world_size)
    received = int(dtype.itemsize * (there + back))
    return OptimizerCost(parameters, sum(costs), max(loads), received)
