"""The memory that a training step will need, found without allocating it."""

from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from phd.model import Transformer
from train.config import Config
from train.engine_config import DeepSpeedConfig, FsdpConfig
from train.engines.activation_checkpointing import checkpoint_activations
from train.engines.device import autocast
from train.torch_private import FakeTensorMode, storage_key


class Memory(NamedTuple):
    """Bytes on one device."""

    weights: int
    gradients: int
    moments: int
    activations: int

    @property
    def total(self) -> int:
        return sum(self)


def predict_memory(
    config: Config, parameters: int, dtype: torch.dtype, world_size: int = 1
) -> Memory:
    """What training with these settings holds at its peak on each of `world_size` devices.

    Weights, gradients and the two moments are float32; where they are cut over ranks, this is a
    rank's part, without the blocks that are gathered at a time. The activations are what a forward
    pass over a micro-batch saves for its backward, in matrix products of `dtype`. Kernels' scratch
    space is left out.
    """
    weights, gradients, moments = cut(config, world_size)
    return Memory(
        4 * parameters // weights,
        4 * parameters // gradients,
        8 * parameters // moments,
        activation_bytes(config, dtype, world_size),
    )


def cut(config: Config, world_size: int) -> tuple[int, int, int]:
    """Into how many parts weights, gradients and moments are cut."""
    match config.engine:
        case FsdpConfig(shard=shard, replicate=replicate):
            parts = max(1, world_size // replicate) if shard else 1
            return parts, parts, parts
        case DeepSpeedConfig(stage=stage):
            weights, gradients, moments = (
                world_size if stage >= least else 1 for least in (3, 2, 1)
            )
            return weights, gradients, moments


def activation_bytes(config: Config, dtype: torch.dtype, world_size: int = 1) -> int:
    """Bytes that the backward pass of one micro-batch finds saved.

    With `full` activation checkpointing, also those of the one block that is made again. What
    `selective` keeps is not known here; what is told is what is saved without it.
    """
    everything = saved_bytes(config, dtype, world_size, "none")
    if config.engine.activation_checkpointing != "full":
        return everything
    return saved_bytes(config, dtype, world_size, "full") + everything // config.model.layers


def saved_bytes(
    config: Config, dtype: torch.dtype, world_size: int, checkpointing: Literal["none", "full"]
) -> int:
    """Bytes that the forward pass of one micro-batch saves: run on tensors without storage."""
    rows = config.train.micro_batch_on(world_size)
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        sizes[storage_key(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with FakeTensorMode(), autocast(torch.device("cpu"), dtype):
        model = Transformer(replace(config.model, attention="auto"))
        engine = replace(config.engine, compile=False, activation_checkpointing=checkpointing)
        checkpoint_activations(model, engine)
        own = {storage_key(p) for p in model.parameters()}
        tokens = torch.zeros(rows, config.train.seq_len, dtype=torch.int64)
        with saved_tensors_hooks(note, lambda tensor: tensor):
            loss = model.loss(tokens, tokens, config.optim.z_loss)
        del loss
    return sum(size for storage, size in sizes.items() if storage not in own)
