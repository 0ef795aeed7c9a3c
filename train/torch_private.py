"""Every private name of torch that `train` uses, each with what is assumed of it.

pyproject.toml allows the versions of torch that these were tested with; tests/train/
test_torch_private.py tests the assumptions, so that an upgrade fails in one place.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.filesystem import _StorageInfo as StorageInfo
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

__all__ = ["FakeTensorMode", "StorageInfo", "TorchDispatchMode", "tree_map_only"]


def init_fsdp_root(module: FSDPModule) -> None:
    """Tell FSDP2 now that `module` is the root, which it else finds out at its first call.

    Else a block that is called before the root would become a root of its own, and would not be
    gathered as part of the whole.
    """
    module._get_fsdp_state()._lazy_init()


def drop_accumulated_gradients(modules: Sequence[FSDPModule]) -> None:
    """Drop the gradients that FSDP2 keeps, unsharded, of micro-batches it has not reduced yet.

    Its parameter group holds them in `unsharded_accumulated_grad` (in the precision of the sum)
    or as `.grad` of the unsharded parameter.
    """
    for module in modules:
        group = module._get_fsdp_state()._fsdp_param_group
        for parameter in group.fsdp_params if group else ():
            parameter.unsharded_accumulated_grad = None
            parameter._unsharded_param.grad = None


def ignore_in_ddp(module: nn.Module, names: Sequence[str]) -> None:
    """Have DDP neither broadcast nor reduce the buffers and parameters of these names."""
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, list(names))


def storage_key(tensor: Tensor) -> int:
    """A number that two tensors share exactly if they share their storage, also fake ones.

    `data_ptr()` of a fake tensor says nothing; `_cdata` is the address of the storage's C object.
    """
    return tensor.untyped_storage()._cdata


def fuse_clip_and_skip(optimizer: torch.optim.Optimizer, scale: Tensor, skip: Tensor) -> None:
    """Have the next step of a fused optimizer divide gradients by `scale`, or skip the update.

    The fused AdamW kernel reads `grad_scale` and `found_inf` of its optimizer, as
    `torch.amp.GradScaler` sets them, on the device of the parameters.
    """
    optimizer.grad_scale = scale  # type: ignore[attr-defined]
    optimizer.found_inf = skip  # type: ignore[attr-defined]
