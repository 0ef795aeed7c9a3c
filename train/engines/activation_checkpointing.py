"""Activation checkpointing: recompute parts of a block's forward pass in its backward pass.

none          keeps every activation
selective     keeps a block's input and the results of matrix products and of causal attention;
              recomputes norms, RoPE, SiLU, and the small attention among hidden copies
full          keeps a block's input and recomputes everything
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import train.engines.context_parallel  # noqa: F401  # its operators
from phd.model import Transformer
from train.settings.engine import EngineConfig
from train.torch_private import (
    SDPA_KERNELS,
    KernelDispatchMode,
    TorchDispatchMode,
    tree_map_only,
)

MATRIX_PRODUCTS = (
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_mm.default,  # float8's
)
# Of packed attention only rule 1 is in this list: its FLOPs grow with T^2, those of rules 2 and 3
# with T * W.
ATTENTION = (
    *SDPA_KERNELS,
    torch.ops.phd.causal_forward.default,
    torch.ops.phd.isolated_forward.default,
    torch.ops.train.context_forward.default,
    torch.ops.higher_order.flex_attention,
)


def checkpoint_activations(
    model: Transformer, config: EngineConfig, products: Sequence[Any] = MATRIX_PRODUCTS
) -> None:
    """Checkpoint every `checkpoint_every_block`th block as configured; call it once per model.

    Gradients stay the same to the last bit. Only a block's `forward` is replaced, so its parameters
    keep their names. Hooks on the block, such as FSDP2's all-gather, are outside of `forward` and
    do not run again in the recomputation.

    Args:
        products: the operators that multiply with weights.
    """
    mode = config.activation_checkpointing
    if mode == "none" or mode == "auto":  # `auto` where `train.engines.memory.fit` was not asked
        return
    for block in model.blocks[:: config.checkpoint_every_block]:
        compiled = config.compile is True
        block.forward = checkpointed(block.forward, mode, compiled=compiled, products=products)


def checkpointed(
    forward: Callable[..., Tensor],
    mode: Literal["selective", "full"],
    *,
    compiled: bool,
    products: Sequence[Any] = MATRIX_PRODUCTS,
    attention: Sequence[Any] = ATTENTION,
) -> Callable[..., Tensor]:
    """A block's `forward` that computes parts of itself again in the backward pass.

    Args:
        products, attention: the operators of which `selective` keeps the results.
    """
    # A block has no dropout or other randomness, so the generators' states need not be saved.
    settings: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if mode == "selective":
        contexts = _selective if compiled else _selective_in_place
        settings["context_fn"] = partial(contexts, products, attention)

    # This is a function and not a `partial`, because torch.compile recognizes `checkpoint` only
    # where a traced function calls it.
    def checkpointed_forward(*args: Any) -> Tensor:
        return checkpoint(forward, *args, **settings)

    return checkpointed_forward


def _selective(
    products: Sequence[Any], attention: Sequence[Any]
) -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """The contexts of a block's forward pass and of its recomputation."""
    return create_selective_checkpoint_contexts([*products, *attention])


def _selective_in_place(
    products: Sequence[Any], attention: Sequence[Any]
) -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """The same contexts for eager execution, where attention's results are changed in place.

    Packed attention merges rules 2 and 3 into the result of rule 1. The kept tensor must not
    change with it. torch.compile makes every operation functional, so it needs no copy.
    """
    keeping, recomputing = _selective(products, attention)
    return _CopiedAttention(keeping, attention), _CopiedAttention(recomputing, attention)


class _CopiedAttention(KernelDispatchMode):
    """Passes each operator to another mode, and copies the results of attention."""

    def __init__(self, inner: TorchDispatchMode, attention: Sequence[Any]) -> None:
        super().__init__()
        self.inner, self.attention = inner, attention

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = self.inner.__torch_dispatch__(func, types, args, kwargs)
        return tree_map_only(Tensor, torch.clone, out) if func in self.attention else out
