"""AdamW over a model's parameters, and its state under their names."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from train.config import OptimConfig
from train.torch_private import fuse_clip_and_skip

MOMENTS = ("exp_avg", "exp_avg_sq")


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over all parameters of a model, moments included."""
    optimizer = adamw(dict(model.named_parameters()), config)
    add_moments(optimizer)
    return optimizer


def adamw(parameters: Mapping[str, Tensor], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW as OLMo 2 uses it: weight decay on everything but embeddings, which names tell.

    It works on each element alone, so it may be given the shards of parameters that are cut over
    ranks.
    """
    decayed = [p for name, p in parameters.items() if not is_embedding(name)]
    kept = [p for name, p in parameters.items() if is_embedding(name)]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def add_moments(optimizer: torch.optim.Optimizer) -> None:
    """Make AdamW's state before its first step, so that a checkpoint can be loaded into it."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                **{name: torch.zeros_like(parameter) for name in MOMENTS},
            }


def set_clip_and_skip(
    optimizer: torch.optim.Optimizer, grad_norm: Tensor, grad_clip: float | None, applied: Tensor
) -> None:
    """Have a fused optimizer clip the gradient in its next step, and skip it unless `applied`.

    Its kernel does both, as for `torch.amp.GradScaler`: no pass over the gradients, and nobody
    waits for the device, which alone knows the norm and whether the step is applied.

    Args:
        grad_norm: of the whole gradient, a scalar.
        grad_clip: what its norm is to be at most; None: it is not clipped.
        applied: a bool.
    """
    # Where weights are offloaded, AdamW would send these there itself, but not wait for them.
    parts = (part for group in optimizer.param_groups for part in group["params"])
    device = next(parts, grad_norm).device
    scale = ((grad_norm + 1e-6) / (grad_clip or torch.inf)).clamp(min=1)  # divides the gradient
    fuse_clip_and_skip(optimizer, scale.to(device), applied.logical_not().float().to(device))


def is_embedding(name: str) -> bool:
    """Whether a parameter is an embedding: a tied head is one, under its name."""
    return name.startswith(("embed.", "copy_embed."))
