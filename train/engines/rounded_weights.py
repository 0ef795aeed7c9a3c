"""Copies of weights in the precision of matrix products, made once a step.

    weights, float32  --round-->  copies, bf16  -->  forward, backward of each micro-batch
         ^                                                |
         +------- AdamW <------- gradients, float32 <-----+

Autocast would round each weight again for each micro-batch: of 6 bytes per weight that are moved,
at two micro-batches a step half are saved. FSDP2 has such copies already: it rounds the shards that
it gathers.
"""

import torch
from torch import Tensor

from phd.linear import Linear
from phd.model import Transformer


class RoundedWeights:
    """The copies of the projections' weights of all blocks; 2 bytes per weight.

    The head and the embedding have none, because the loss and the residual stream take them as they
    are; nor have norms, which compute in float32.
    """

    def __init__(self, model: Transformer, dtype: torch.dtype) -> None:
        self.pairs: list[tuple[Tensor, Tensor]] = []
        if dtype == torch.float32:
            return
        for layer in model.blocks.modules():
            if isinstance(layer, Linear):
                layer.rounded = torch.empty_like(layer.weight, dtype=dtype, requires_grad=False)
                self.pairs.append((layer.rounded, layer.weight.detach()))

    @torch.no_grad()
    def refresh(self) -> None:
        """Round the weights again; after each change of them."""
        for rounded, weight in self.pairs:
            rounded.copy_(weight)
