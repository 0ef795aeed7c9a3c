"""A prediction of the memory that a training step needs, without allocating it."""

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
    """Predict the peak memory of training on each of `world_size` devices.

    Weights, gradients and AdamW's two moments are float32, 16 bytes per parameter in total. Where
    they are sharded, this counts a rank's shards, without the blocks that are gathered at the same
    time. Activations are what the forward pass of one micro-batch saves for its backward pass.
    The scratch memory of kernels is not counted.

    Args:
        config: of the run.
        parameters: number of the model's parameters.
        dtype: of the matrix products.
        world_size: ranks, one device each.
    """
    weights, gradients, moments = shard_counts(config, world_size)
    return Memory(
        4 * parameters // weights,
        4 * parameters // gradients,
        8 * parameters // moments,
        activation_bytes(config, dtype, world_size),
    )


def shard_counts(config: Config, world_size: int) -> tuple[int, int, int]:
    """The numbers of shards that weights, gradients and moments are divided into."""
    match config.engine:
        case FsdpConfig(shard=shard, replicate=replicate):
            shards = max(1, world_size // replicate) if shard else 1
            return shards, shards, shards
        case DeepSpeedConfig(stage=stage):
            # ZeRO-1 shards moments, ZeRO-2 gradients as well, ZeRO-3 weights as well.
            weights, gradients, moments = (
                world_size if stage >= first else 1 for first in (3, 2, 1)
            )
            return weights, gradients, moments


def activation_bytes(config: Config, dtype: torch.dtype, world_size: int = 1) -> int:
    """Bytes of the activations of one micro-batch, at the peak.

    With `full` activation checkpointing this is every block's input and all activations of the one
    block that is being recomputed. `selective` is counted like `none`, which is an upper bound.
    """
    everything = saved_bytes(config, dtype, world_size, "none")
    if config.engine.activation_checkpointing != "full":
        return everything
    return saved_bytes(config, dtype, world_size, "full") + everything // config.model.layers


def saved_bytes(
    config: Config, dtype: torch.dtype, world_size: int, checkpointing: Literal["none", "full"]
) -> int:
    """Bytes that the forward pass of one micro-batch saves for its backward pass.

    The pass runs on fake tensors, which have shapes but no memory.
    """
    rows = config.train.micro_batch_on(world_size)
    sizes: dict[int, int] = {}  # by storage: a tensor and its views are counted once

    def note(tensor: Tensor) -> Tensor:
        sizes[storage_key(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with FakeTensorMode(), autocast(torch.device("cpu"), dtype):
        model = Transformer(replace(config.model, attention="auto"))
        engine = replace(config.engine, compile=False, activation_checkpointing=checkpointing)
        checkpoint_activations(model, engine)
        weights = {storage_key(parameter) for parameter in model.parameters()}
        tokens = torch.zeros(rows, config.train.seq_len, dtype=torch.int64)
        with saved_tensors_hooks(note, lambda tensor: tensor):
            loss = model.loss(tokens, tokens, config.optim.z_loss)
        del loss
    return sum(size for storage, size in sizes.items() if storage not in weights)
