"""Activation checkpointing: what a block's forward pass does not keep, its backward makes again.

none          keeps everything
selective     keeps its input and the results of matrix products and of causal attention; makes
              again norms, RoPE, SiLU, and the little of attention that only hidden copies see
full          keeps its input
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from phd.model import Transformer
from train.engine_config import EngineConfig
from train.torch_private import TorchDispatchMode, tree_map_only

aten = torch.ops.aten

MATRIX_PRODUCTS = [aten.mm.default, aten.addmm.default]
ATTENTION = [
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.phd.isolated_forward.default,
    torch.ops.higher_order.flex_attention,
]


def checkpoint_activations(model: Transformer, config: EngineConfig) -> None:
    """Have every `checkpoint_every_block`th block recompute as configured; to be called once.

    Gradients stay the same to the last bit. A block's parameters keep their names, because only
    its `forward` is replaced; so hooks on it, as those that gather its weights, are not run twice.
    """
    if config.activation_checkpointing == "none":
        return
    # Nothing in a block is random, so there is no generator to put back.
    settings: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if config.activation_checkpointing == "selective":
        settings["context_fn"] = _selective if config.compile else _selective_in_place
    for block in model.blocks[:: config.checkpoint_every_block]:
        block.forward = _checkpointed(block.forward, settings)


def _checkpointed(
    forward: Callable[..., Tensor], settings: dict[str, Any]
) -> Callable[..., Tensor]:
    # A function, no `partial`: torch.compile finds `checkpoint` only where it is called in one.
    def checkpointed(*args: Any) -> Tensor:
        return checkpoint(forward, *args, **settings)

    return checkpointed


def _selective() -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """The contexts of a block's forward pass and of its recomputation."""
    return create_selective_checkpoint_contexts([*MATRIX_PRODUCTS, *ATTENTION])


def _selective_in_place() -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """The same where tensors are really changed in place: torch.compile does away with that."""
    keeping, recomputing = _selective()
    return _CopiedAttention(keeping), _CopiedAttention(recomputing)


class _CopiedAttention(TorchDispatchMode):
    """Gives the block copies of attention that is kept, since it merges other results into it."""

    supports_higher_order_operators = True

    def __init__(self, inner: TorchDispatchMode) -> None:
        super().__init__()
        self.inner = inner

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = self.inner.__torch_dispatch__(func, types, args, kwargs)
        return tree_map_only(Tensor, torch.clone, out) if func in ATTENTION else out
