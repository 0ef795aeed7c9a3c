"""Compiling a model's blocks with `torch.compile`."""

import torch

from phd.model import Transformer
from train.torch_private import keep_graphs_with_functions


def compile_blocks(model: Transformer) -> None:
    """Compile each block at its first call.

    All blocks run the same code, so they share its graphs:

        block                 x (B, copies, T, D)            graphs
        the first             1 copy, as all are equal       1
        those between         K copies                       1
        the last              K copies in, the last out      1

    An evaluation, without gradients, has three more.
    """
    # Graphs count against one limit for the whole process, of which those of an earlier engine, as
    # in a sweep, would use up a part. Beyond the limit blocks would silently run uncompiled.
    torch.compiler.reset()
    keep_graphs_with_functions()
    for block in model.blocks:
        block.compile()
