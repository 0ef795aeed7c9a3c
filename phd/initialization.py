"""Initial weights, a pure function of the seed and each parameter's name."""

import hashlib
from collections.abc import Iterator
from math import sqrt

import torch
from torch import Tensor, nn

from phd.config import ModelConfig


def initial_weights(model: nn.Module, seed: int) -> Iterator[tuple[str, Tensor]]:
    """The name of each parameter of a `Transformer` on any device, and its value on the CPU.

        parameter                 standard deviation
        embed, copy_input, q k v  1 / sqrt(2.5 D)                    truncated at 3 sigma
        head                      1 / sqrt(2.5 D)                    truncated at 3 sigma
          with head_init fan_in   1 / sqrt(D)                        truncated at 3 sigma
        gate, up                  1 / sqrt(2.5 D)                    truncated at 3 sigma
        o, down                   1 / sqrt(2.5 D) / sqrt(2 layers)   truncated at 3 sigma
        norms                     1
        copy_embed                0: the model starts as the one without it

    With muP, D is `mup_base_dim` for embed, copy_input and head. All others are as above: their
    variance goes as 1 / fan-in already, because `ffn_dim` and heads grow as D does.

    Each parameter has a generator of its own, keyed by (seed, name). So all variants of one size
    and seed start from the same weights, and a sharded model starts from those of a whole one.
    Values come one by one, so that no process has to hold all of them.
    """
    config: ModelConfig = model.config  # type: ignore[assignment]
    std = 1 / sqrt(2.5 * config.dim)
    base_dim = config.mup_base_dim or config.dim
    for name, parameter in model.named_parameters():
        if "norm" in name:
            yield name, torch.ones(parameter.shape, device="cpu")
        elif name.startswith("copy_embed"):
            yield name, torch.zeros(parameter.shape, device="cpu")
        else:
            sigma = std
            if name.endswith(("attention.o.weight", "ffn.down.weight")):
                sigma = std / sqrt(2 * config.layers)
            elif name == "head.weight" and config.head_init == "fan_in":
                sigma = 1 / sqrt(base_dim)
            elif not name.startswith("blocks."):
                sigma = 1 / sqrt(2.5 * base_dim)
            yield name, _truncated_normal(parameter.shape, sigma, f"{seed}/{name}")


def _truncated_normal(shape: torch.Size, std: float, key: str) -> Tensor:
    """Normal values within 3 sigma.

    The device is named because a CPU generator cannot draw for the tensors of another default
    device (`torch.set_default_device`). The CPU gives the same values to models on any device.
    """
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest, "big") >> 1)
    values = torch.empty(shape, device="cpu")
    return nn.init.trunc_normal_(values, std=std, a=-3 * std, b=3 * std, generator=generator)
