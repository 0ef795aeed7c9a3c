"""AdamW over a model's parameters, and its state under their names."""

import torch
from torch import Tensor, nn

from train.config import OptimConfig


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW as OLMo 2 uses it: weight decay on everything but embeddings.

    Its moments exist from the start, so that a checkpoint can be loaded into them.
    """
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (kept if is_embedding(name) else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True
    )
    for parameter in model.parameters():
        optimizer.state[parameter] = {
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        }
    return optimizer


def is_embedding(name: str) -> bool:
    """Whether a parameter is an embedding: a tied head is one, under its name."""
    return name.startswith(("embed.", "copy_embed."))


def optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, dict[str, Tensor]]:
    """The optimizer's own tensors, by parameter name: exp_avg, exp_avg_sq and step."""
    return {name: optimizer.state[parameter] for name, parameter in model.named_parameters()}
