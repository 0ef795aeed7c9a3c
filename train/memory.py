"""The memory that a training step will need, found without allocating it."""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from phd.model import Transformer
from train.config import Config
from train.device import autocast


class Memory(NamedTuple):
    """Bytes on one device."""

    weights: int
    gradients: int
    moments: int
    activations: int

    @property
    def total(self) -> int:
        return sum(self)


def predict_memory(config: Config, parameters: int, dtype: torch.dtype) -> Memory:
    """What training with these settings holds at its peak, kernels' scratch space left out.

    Weights, gradients and the two moments are float32. The activations are what a forward pass
    over a micro-batch saves for its backward, in matrix products of `dtype`.
    """
    return Memory(4 * parameters, 4 * parameters, 8 * parameters, saved_bytes(config, dtype))


def saved_bytes(config: Config, dtype: torch.dtype) -> int:
    """Bytes that the forward pass of one micro-batch saves: run on tensors without storage."""
    rows = config.train.micro_batch or config.train.global_batch
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage._cdata] = storage.nbytes()
        return tensor

    with FakeTensorMode(), autocast(torch.device("cpu"), dtype):
        model = Transformer(replace(config.model, attention="auto"))
        own = {p.untyped_storage()._cdata for p in model.parameters()}
        tokens = torch.zeros(rows, config.train.seq_len, dtype=torch.int64)
        with saved_tensors_hooks(note, lambda tensor: tensor):
            loss = model.loss(tokens, tokens, config.optim.z_loss)
        del loss
    return sum(size for storage, size in sizes.items() if storage not in own)
