"""Parallelism, applied to a model from outside: one function, in the order that matters."""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from phd.model import ModelWithLoss
from train.engine_config import FsdpConfig
from train.engines.activation_checkpointing import checkpoint_activations
from train.torch_private import drop_accumulated_gradients, ignore_in_ddp, init_fsdp_root

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def parallelize(
    model_with_loss: ModelWithLoss,
    config: FsdpConfig,
    *,
    world_size: int,
    device: torch.device,
    dtype: torch.dtype,
) -> nn.Module:
    """Make of an objective on the meta device one of many ranks, with memory but without values.

        checkpointing    inside, so that it is compiled with its block, and does not gather again
        compiling        block by block: all of them share what is compiled
        sharding         around compiled blocks, whose weights are gathered before they are called
        memory           after sharding, so that no rank ever holds the whole model
        replication      last, because it makes its buffers from the weights

    Args:
        world_size: ranks.
        device: of this rank.
        dtype: of the matrix products.
    """
    checkpoint_activations(model_with_loss.model, config)
    if config.compile:
        for block in model_with_loss.model.blocks:
            block.compile()
    if world_size == 1:
        return model_with_loss.to_empty(device=device)
    if not config.shard:
        return replicate(model_with_loss.to_empty(device=device), config)
    shard(model_with_loss, config, mesh_of(config, world_size, device), dtype)
    model_with_loss.to_empty(device=device)
    make_root(model_with_loss)
    return model_with_loss


def mesh_of(config: FsdpConfig, world_size: int, device: torch.device) -> DeviceMesh:
    """All ranks in a row, or for HSDP in `replicate` rows, each of which holds the whole model.

    Neighbours, which share a machine, share a row: gathering weights is most of the traffic.
    """
    if config.replicate == 1:
        return init_device_mesh(device.type, (world_size,), mesh_dim_names=("shard",))
    shape = (config.replicate, world_size // config.replicate)
    return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))


def shard(
    model_with_loss: ModelWithLoss, config: FsdpConfig, mesh: DeviceMesh, dtype: torch.dtype
) -> None:
    """FSDP2, or HSDP on a mesh of two axes: each block, and what is left, is gathered as one.

    Gradients are summed over ranks.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype,
        reduce_dtype=PRECISIONS[config.reduce],
        cast_forward_inputs=False,  # the residual stream stays float32
    )
    settings: dict[str, Any] = {"mesh": mesh, "mp_policy": policy}
    always = config.reshard_after_forward == "always"
    blocks = model_with_loss.model.blocks
    for block in blocks:
        # The last block's backward comes right after its forward.
        freed = always or (config.reshard_after_forward == "auto" and block is not blocks[-1])
        fully_shard(block, reshard_after_forward=freed, **settings)
    fully_shard(model_with_loss, reshard_after_forward=always, **settings)
    for module in sharded_modules(model_with_loss):
        module.set_gradient_divide_factor(1.0)
        # Else a factor becomes an operation that only NCCL has.
        module.set_force_sum_reduction_for_comms(True)


def make_root(model_with_loss: nn.Module) -> None:
    """Make the whole the root of its blocks, or a block that is called first becomes its own."""
    assert isinstance(model_with_loss, FSDPModule)
    init_fsdp_root(model_with_loss)


def drop_unreduced_gradients(model_with_loss: nn.Module) -> None:
    """Drop the gradients that FSDP keeps of micro-batches that it has not reduced."""
    drop_accumulated_gradients(sharded_modules(model_with_loss))


def sharded_modules(model_with_loss: nn.Module) -> list[FSDPModule]:
    """The modules that are gathered as one; none where weights are not cut."""
    return [module for module in model_with_loss.modules() if isinstance(module, FSDPModule)]


def replicate(model_with_loss: ModelWithLoss, config: FsdpConfig) -> DistributedDataParallel:
    """DDP, with gradients summed over ranks; every rank has to fill in the same weights."""
    # RoPE's tables are the same everywhere, and not to be sent with every forward pass.
    tables = [name for name, _ in model_with_loss.named_buffers()]
    ignore_in_ddp(model_with_loss, tables)
    replicated = DistributedDataParallel(
        model_with_loss, gradient_as_bucket_view=True, init_sync=False
    )
    replicated.register_comm_hook(PRECISIONS[config.reduce], _sum)
    return replicated


def _sum(dtype: torch.dtype, bucket: dist.GradBucket) -> Future[Tensor]:
    """The sum over ranks of a bucket of gradients, in a precision; DDP itself averages."""
    gradients = bucket.buffer()
    work = dist.all_reduce(gradients.to(dtype), async_op=True)
    assert work is not None
    return work.get_future().then(partial(_back, gradients))


def _back(gradients: Tensor, summed: Future[list[Tensor]]) -> Tensor:
    return gradients.copy_(summed.value()[0])
