"""Models of one size that share their weights, so that a benchmark has room for many of them."""

from dataclasses import replace

import torch
from torch import Tensor

from phd.config import ModelConfig, SpanUnit, Variant
from phd.linear import Linear
from phd.model import Transformer

STD = 0.02
"""Of the weights. What a token costs does not depend on their values."""


class Models:
    """Models of one size that share their weights: float32 on the CPU, bfloat16 on CUDA."""

    # Sharing saves memory: the grid of `inference` on CUDA has some 40 models.
    def __init__(self, size: ModelConfig, device: torch.device) -> None:
        self.size, self.device = size, device
        with torch.device("meta"):
            vanilla = Transformer(size.vanilla_twin)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        vanilla.to(dtype).to_empty(device=device)
        # Drawn on the device: 1b2's would take the CPU half a minute.
        generator = torch.Generator(device).manual_seed(0)
        for name, weight in vanilla.named_parameters():
            if "norm" in name:
                torch.nn.init.ones_(weight)
            else:
                torch.nn.init.normal_(weight, std=STD, generator=generator)
        self.weights = vanilla.fuse_projections().state_dict()

    def of(
        self, variant: Variant, K: int, span_unit: SpanUnit | None = None, *, passes: int = 1
    ) -> Transformer:
        """Return the model of a variant. It holds the shared weights, not a copy of them."""
        unit = span_unit or self.size.span_unit
        config = replace(self.size, variant=variant, K=K, span_unit=unit, passes=passes)
        with torch.device("meta"):
            model = Transformer(config)
        model.load_state_dict(self.weights | self._hidden_input(config), assign=True)
        model.rope.build(self.device)
        for layer in model.modules():
            if isinstance(layer, Linear):
                layer.fused = True  # the shared weights lie one after another already
        return model.eval()

    def _hidden_input(self, config: ModelConfig) -> dict[str, Tensor]:
        """What hidden copies are fed: rows of the embedding, and for a further table all again."""
        embed = self.weights["embed.weight"]
        match config.hidden_input:
            case "token":
                return {}
            case "learned":
                return {"copy_input.weight": embed[:1]}
            case "table":
                tables = embed if config.K == 2 else embed.repeat(config.K - 1, 1)
                return {"copy_input.weight": tables}


def random_tokens(vocab_size: int, *shape: int) -> Tensor:
    """int64 of this shape; the same tokens for every model of a size."""
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(0))
