"""AdamW (arXiv 1711.05101) with fused clipping and skipping of bad steps."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from train.settings.optim import OptimConfig
from train.torch_private import fuse_clip_and_skip

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state of a parameter besides its step: running means of the gradient and its square."""


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over all parameters of a model, with its moments allocated."""
    optimizer = adamw(dict(model.named_parameters()), config)
    add_moments(optimizer)
    return optimizer


def adamw(parameters: Mapping[str, Tensor], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on everything except embeddings.

    OLMo 2 leaves them out (arXiv 2501.00656), because decay shrinks their norms, and small
    embeddings give the first layers large gradients.

    Args:
        parameters: by canonical name. They may be shards, because AdamW treats each element alone.
        config: learning rate, betas, eps and weight decay.
    """
    decayed = [p for name, p in parameters.items() if not is_embedding(name)]
    embeddings = [p for name, p in parameters.items() if is_embedding(name)]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": embeddings, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def add_moments(optimizer: torch.optim.Optimizer) -> None:
    """Allocate AdamW's state before its first step, so that a checkpoint can be loaded into it."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                **{name: torch.zeros_like(parameter) for name in MOMENTS},
            }


def set_clip_and_skip(
    optimizer: torch.optim.Optimizer, grad_norm: Tensor, grad_clip: float | None, applied: Tensor
) -> None:
    """Have the next step of a fused optimizer clip the gradient, and skip the update if it is bad.

    The AdamW kernel does both, as it does for `torch.amp.GradScaler`. So clipping needs no pass of
    its own over the gradients, and the host need not wait for the device to know the norm.

    Args:
        optimizer: with `fused=True`.
        grad_norm: L2 norm of the whole gradient, a scalar on the device.
        grad_clip: the largest norm; None: no clipping.
        applied: bool scalar on the device; the update is skipped if it is false.
    """
    # With offloaded weights the device differs. AdamW would copy the two scalars there itself, but
    # without waiting for the copy.
    parts = (part for group in optimizer.param_groups for part in group["params"])
    device = next(parts, grad_norm).device
    # The kernel divides the gradient by this; 1e-6 is that of `clip_grad_norm_`.
    scale = ((grad_norm + 1e-6) / (grad_clip or torch.inf)).clamp(min=1)
    fuse_clip_and_skip(optimizer, scale.to(device), applied.logical_not().float().to(device))


def is_embedding(name: str) -> bool:
    """Whether a parameter is an embedding. A tied LM head is one, too: it has the same name."""
    return name.startswith(("embed.", "copy_embed."))
