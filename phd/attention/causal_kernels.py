"""Which kernel computes causal attention: one table, by device, dtype and head size.

Rule 1 of every pattern is causal attention, and so are all of vanilla and naive repetition. Of
`CAUSAL_KERNELS` the first row that can do the work does it. The choice is a function of values, so
that it can be made, told and tested on a machine without a GPU.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import torch

from phd.torch_private import (
    HAS_TRITON,
    cpu_flash_backward,
    cpu_flash_forward,
    cuda_cudnn_backward,
    cuda_cudnn_forward,
    cuda_efficient_backward,
    cuda_efficient_forward,
    cuda_flash_backward,
    cuda_flash_forward,
    cuda_varlen_backward,
    cuda_varlen_forward,
)

Capability = tuple[int, int]
# cuDNN 9.15.1: older versions err where T is no multiple of 128 (pytorch/pytorch issue 169849).
FIRST_CUDNN = 91501


@dataclass(frozen=True)
class Platform:
    """What the choice depends on besides the tensors.

    Attributes:
        type: `cpu` or `cuda`.
        capability: CUDA's compute capability.
        cudnn: the version of cuDNN as a number, 91900 for 9.19; 0: there is none, or
            `torch.backends.cuda.enable_cudnn_sdp(False)` keeps attention from it. A run sets that
            by `engine.flash_attention`.
        flash_attention: the version of FlashAttention that PyTorch's operators call, 2, 3 or 4.
        deterministic: `torch.use_deterministic_algorithms(True)` is set.
        triton: Triton is installed.
    """

    type: str
    capability: Capability = (0, 0)
    cudnn: int = 0
    flash_attention: int = 2
    deterministic: bool = False
    triton: bool = True

    @classmethod
    def of(cls, device: torch.device) -> "Platform":
        """This process on a device."""
        if device.type != "cuda":
            return cls(device.type, triton=HAS_TRITON)
        enabled = torch.backends.cuda.cudnn_sdp_enabled()
        return cls(
            "cuda",
            torch.cuda.get_device_capability(device),
            (torch.backends.cudnn.version() or 0) if enabled else 0,
            active_flash_attention(),
            torch.are_deterministic_algorithms_enabled(),
            HAS_TRITON,
        )

    def __str__(self) -> str:
        if self.type != "cuda":
            return f"the device {self.type}"
        return f"a GPU of compute capability {'.'.join(map(str, self.capability))}"


def active_flash_attention() -> int:
    """The version of FlashAttention that PyTorch's operators call in this process."""
    active = torch.nn.attention.current_flash_attention_impl()
    return 2 if active is None else int(active.removeprefix("FA"))


@dataclass(frozen=True, kw_only=True)
class CausalKernel:
    """A kernel, with what it can do. All take an external (out, lse) in their backward.

    Attributes:
        name: as it is told to users.
        forward, backward: as `phd.torch_private.cuda_flash_forward` and `cuda_flash_backward`.
        varlen_forward, varlen_backward: as `cuda_varlen_forward` and `cuda_varlen_backward`, for
            documents; None: the kernel runs on one document after another.
        since, until: the compute capabilities that it runs on.
        dtypes: of q, k and v.
        head_dim: the largest one.
        alignment: what the head dimension must be a multiple of; others are padded.
        cudnn: the oldest version of cuDNN that it needs.
        flash_attention: the version that PyTorch's operators have to call.
        tokens: the fewest that a row may have.
        plans: it plans every shape anew, which takes milliseconds on the host, so it is of no use
            where the length changes from call to call.
        deterministic: its backward can be.
    """

    name: str
    forward: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    backward: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    varlen_forward: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = None
    varlen_backward: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]] | None = None
    type: str = "cuda"
    since: Capability = (0, 0)
    until: Capability = (99, 9)
    dtypes: tuple[torch.dtype, ...]
    head_dim: int
    alignment: int = 8
    cudnn: int = 0
    flash_attention: int | None = None
    tokens: int = 1
    plans: bool = False
    deterministic: bool = True

    def runs_on(self, platform: Platform, dtype: torch.dtype, head_dim: int) -> bool:
        """Whether it can do attention with this dtype and head dimension on a platform."""
        return (
            self.type == platform.type
            and self.since <= platform.capability <= self.until
            and dtype in self.dtypes
            and head_dim <= self.head_dim
            and self.cudnn <= platform.cudnn
            and self.flash_attention in (None, platform.flash_attention)
            and (self.deterministic or not platform.deterministic)
        )


HALF = (torch.float16, torch.bfloat16)
ANY_HEAD_DIM = 1 << 16


def _flash_attention(
    version: int, head_dim: int, since: Capability, until: Capability
) -> CausalKernel:
    """A row of FlashAttention: once activated, 3 and 4 stand behind the operators of 2."""
    return CausalKernel(
        name=f"FlashAttention-{version}",
        forward=cuda_flash_forward,
        backward=cuda_flash_backward,
        varlen_forward=cuda_varlen_forward,
        varlen_backward=cuda_varlen_backward,
        since=since,
        until=until,
        dtypes=HALF,
        head_dim=head_dim,
        flash_attention=version,
    )


def _efficient(since: Capability, *dtypes: torch.dtype) -> CausalKernel:
    return CausalKernel(
        name="PyTorch's memory-efficient kernel",
        forward=cuda_efficient_forward,
        backward=cuda_efficient_backward,
        since=since,
        dtypes=dtypes,
        head_dim=ANY_HEAD_DIM,
    )


CAUSAL_KERNELS = (
    # On an H200 1.6 times as fast as FlashAttention-2, forward and backward, at H = 64. Heads of
    # more than 128 need a cuDNN that PyTorch 2.11 does not come with.
    # Documents go to the next rows. Up to torch 2.13 the backward of cuDNN's variable-length path
    # takes H for the longest document and writes past its buffer (pytorch/pytorch pull request
    # 186142), and plans anew at every call.
    CausalKernel(
        name="cuDNN",
        forward=cuda_cudnn_forward,
        backward=cuda_cudnn_backward,
        since=(9, 0),
        until=(10, 3),
        dtypes=HALF,
        head_dim=128,
        cudnn=FIRST_CUDNN,
        tokens=2,
        plans=True,
        deterministic=False,
    ),
    # Written for Hopper, and of these two the one that is no beta version there.
    _flash_attention(3, 256, (9, 0), (9, 0)),
    _flash_attention(4, 128, (9, 0), (10, 3)),
    # Its backward refuses heads of 193 to 224 on GPUs other than an A100 and those of data centres.
    _flash_attention(2, 256, (8, 0), (8, 0)),
    _flash_attention(2, 256, (9, 0), (11, 9)),
    _flash_attention(2, 192, (8, 1), (99, 9)),
    _efficient((8, 0), torch.float32, *HALF),
    _efficient((5, 0), torch.float32, torch.float16),
    CausalKernel(
        name="PyTorch's CPU flash kernel",
        forward=cpu_flash_forward,
        backward=cpu_flash_backward,
        type="cpu",
        dtypes=(torch.float32, torch.float64, *HALF),
        head_dim=ANY_HEAD_DIM,
        alignment=1,
    ),
)
"""The kernels, from the fastest to the one that can do most."""


@lru_cache
def causal_kernel(
    platform: Platform,
    dtype: torch.dtype,
    head_dim: int,
    *,
    tokens: int = 1 << 30,
    varying_length: bool = False,
    documents: bool = False,
) -> CausalKernel:
    """The first kernel of the table that can do the work.

    Args:
        tokens: T.
        varying_length: T changes from call to call, as in inference.
        documents: attention within documents. A kernel with a variable-length path is preferred;
            without any, the first one runs on one document after another.

    Raises:
        ValueError: there is none.

    >>> hopper = Platform("cuda", (9, 0), cudnn=91900)
    >>> causal_kernel(hopper, torch.bfloat16, 64).name
    'cuDNN'
    >>> causal_kernel(hopper, torch.bfloat16, 64, documents=True).name
    'FlashAttention-2'
    """
    able = [kernel for kernel in CAUSAL_KERNELS if kernel.runs_on(platform, dtype, head_dim)]
    if documents:
        able = [kernel for kernel in able if kernel.varlen_forward] or able
    varying_length = varying_length or documents
    for kernel in able:
        if kernel.tokens <= tokens and not (kernel.plans and varying_length):
            return kernel
    raise ValueError(
        f"no kernel computes attention in {str(dtype).removeprefix('torch.')} with "
        f"model.head_dim={head_dim} on {platform}: choose engine.precision=fp32, a smaller "
        "model.head_dim or model.attention=reference"
    )


def can_flash_attention(version: int, platform: Platform, head_dim: int) -> bool:
    """Whether a version of FlashAttention, once active, can do heads of this size on a platform."""
    active = replace(platform, flash_attention=version)
    return any(
        kernel.flash_attention == version and kernel.runs_on(active, torch.bfloat16, head_dim)
        for kernel in CAUSAL_KERNELS
    )


def best_flash_attention(platform: Platform, head_dim: int, installed: Collection[int]) -> int:
    """The version of FlashAttention to activate: the first of the table that is installed.

    2, which is part of PyTorch, where no other one can do heads of this size on the platform.

    >>> best_flash_attention(Platform("cuda", (9, 0)), 64, {2, 4})
    4
    """
    versions = [k.flash_attention for k in CAUSAL_KERNELS if k.flash_attention in installed]
    return next((v for v in versions if v and can_flash_attention(v, platform, head_dim)), 2)


def installed_flash_attentions() -> frozenset[int]:
    """The versions of FlashAttention that this Python has, without importing any."""
    versions = {2}
    if find_spec("flash_attn_interface"):
        versions.add(3)
    # The package `flash_attn` may be FlashAttention-2's, which takes long to import.
    package = find_spec("flash_attn")
    folders = package.submodule_search_locations if package else None
    if any((Path(folder) / "cute" / "interface.py").exists() for folder in folders or ()):
        versions.add(4)
    return frozenset(versions)


def activate_flash_attention(version: int) -> None:
    """Have PyTorch's FlashAttention operators call this version, for the whole process.

    Raises:
        ImportError, RuntimeError: its package cannot be imported or is of another version.
    """
    if version == active_flash_attention():
        return
    if version == 2:
        torch.nn.attention.restore_flash_attention_impl()
    else:
        torch.nn.attention.activate_flash_attention_impl(f"FA{version}")
