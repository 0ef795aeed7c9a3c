"""PyTorch's parallelism, applied to a model from outside, in the one order that works."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from phd.model import ModelWithLoss
from train.distributed.process_groups import ProcessGroups
from train.engines.activation_checkpointing import MATRIX_PRODUCTS, checkpoint_activations
from train.engines.compilation import compile_blocks
from train.engines.float8 import check_float8, use_float8
from train.engines.mesh import ParallelDims
from train.engines.tensor_parallel import PRODUCT_SUM, TensorRanks, parallelize_tensor
from train.settings.engine import FsdpConfig
from train.torch_private import drop_accumulated_gradients, ignore_in_ddp, init_fsdp_root

PRODUCTS = (*MATRIX_PRODUCTS, PRODUCT_SUM)
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def parallelize(
    model_with_loss: ModelWithLoss,
    config: FsdpConfig,
    *,
    groups: ProcessGroups,
    device: torch.device,
    dtype: torch.dtype,
) -> nn.Module:
    """Parallelize a model on the meta device, and allocate its weights without values.

        float8           first, because it replaces the projections within the blocks
        tensor           before all that calls a block, whose parts get weights of other shapes
        checkpointing    before compiling, so that it is compiled with its block, and the
                         recomputation does not all-gather the weights again
        compiling        block by block: all blocks share one compiled graph
        sharding         around compiled blocks, whose weights are gathered before they are called
        allocation       after sharding, so that no rank ever holds the whole model
        replication      last, because DDP makes its gradient buckets from the weights

    Args:
        model_with_loss: on the meta device; it is changed in place.
        config: of the engine.
        groups: the ranks. A lone process keeps a plain model. A single rank that has joined a
            group is sharded or replicated as many are, which tries the collectives on one device.
        device: of this rank.
        dtype: of the matrix products.

    Returns:
        The model and its loss, wrapped by DDP where weights are replicated.
    """
    check_float8(config, device)
    sharded = config.shard and groups.control is not None
    if config.precision == "fp8":
        use_float8(model_with_loss.model, config.fp8_scaling)
    mesh = ParallelDims.of(config, groups.world_size).weight_mesh(device) if sharded else None
    if config.tensor > 1:
        assert mesh is not None
        parallelize_tensor(model_with_loss, TensorRanks.of(mesh["tensor"]))
    compiled = config.compiles_on(device.type)
    checkpoint_activations(model_with_loss.model, replace(config, compile=compiled), PRODUCTS)
    if compiled:
        compile_blocks(model_with_loss.model)
    if groups.control is None:
        return model_with_loss.to_empty(device=device)
    if mesh is None:
        return replicate(model_with_loss.to_empty(device=device), config)
    shard(model_with_loss, config, mesh, dtype)
    model_with_loss.to_empty(device=device)
    make_root(model_with_loss)
    return model_with_loss


def shard(
    model_with_loss: ModelWithLoss, config: FsdpConfig, mesh: DeviceMesh, dtype: torch.dtype
) -> None:
    """Apply FSDP2, or HSDP on a mesh of two axes.

    Each block is one unit of all-gathers and reduce-scatters; all other parameters (embeddings,
    final norm, LM head) are another unit. Gradients are summed over ranks, not averaged.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype,
        reduce_dtype=PRECISIONS[config.reduce],
        cast_forward_inputs=False,  # the residual stream stays float32
    )
    assert mesh.mesh_dim_names is not None
    axes = tuple(name for name in mesh.mesh_dim_names if name != "tensor")
    settings: dict[str, Any] = {"mesh": mesh[axes], "mp_policy": policy}
    always = config.reshard_after_forward == "always"
    blocks = model_with_loss.model.blocks
    for block in blocks:
        # The last block's backward pass directly follows its forward pass, so `auto` does not free
        # its weights between them.
        reshard = always or (config.reshard_after_forward == "auto" and block is not blocks[-1])
        fully_shard(block, reshard_after_forward=reshard, **settings)
    fully_shard(model_with_loss, reshard_after_forward=always, **settings)
    for module in sharded_modules(model_with_loss):
        # FSDP2 averages by default. The loss is divided by the targets of all ranks already.
        module.set_gradient_divide_factor(1.0)
        # Otherwise FSDP2 asks for a reduction with a factor, which only NCCL has, and not gloo.
        module.set_force_sum_reduction_for_comms(True)


def make_root(model_with_loss: nn.Module) -> None:
    """Make the whole model FSDP2's root, also if a block is called before it, as in sampling."""
    assert isinstance(model_with_loss, FSDPModule)
    init_fsdp_root(model_with_loss)


def drop_unreduced_gradients(model_with_loss: nn.Module) -> None:
    """Drop the accumulated gradients of micro-batches that FSDP2 has not reduced yet."""
    drop_accumulated_gradients(sharded_modules(model_with_loss))


def sharded_modules(model_with_loss: nn.Module) -> list[FSDPModule]:
    """The units of FSDP2's all-gathers; none where weights are not sharded."""
    return [module for module in model_with_loss.modules() if isinstance(module, FSDPModule)]


def replicate(model_with_loss: ModelWithLoss, config: FsdpConfig) -> DistributedDataParallel:
    """Apply DDP, with gradients summed over ranks. Every rank must fill in the same weights.

    `init_sync=False` saves DDP's broadcast of rank 0's weights: all ranks draw them by one seed.
    """
    # The buffers are RoPE's tables, which are constant. DDP would broadcast them before every
    # forward pass.
    tables = [name for name, _ in model_with_loss.named_buffers()]
    ignore_in_ddp(model_with_loss, tables)
    replicated = DistributedDataParallel(
        model_with_loss, gradient_as_bucket_view=True, init_sync=False
    )
    replicated.register_comm_hook(PRECISIONS[config.reduce], _sum)
    return replicated


def _sum(dtype: torch.dtype, bucket: dist.GradBucket) -> Future[Tensor]:
    """All-reduce a bucket of gradients in `dtype`, as a sum. DDP itself would average."""
    gradients = bucket.buffer()
    work = dist.all_reduce(gradients.to(dtype), async_op=True)
    assert work is not None
    return work.get_future().then(partial(_copy_back, gradients))


def _copy_back(gradients: Tensor, summed: Future[list[Tensor]]) -> Tensor:
    """Write the sums into the bucket, whose memory the parameters' `.grad` share."""
    return gradients.copy_(summed.value()[0])
