"""AdamW over a model's parameters, and its state under their names."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from train.config import OptimConfig


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW as OLMo 2 uses it over all parameters of a model; see `adamw`."""
    return adamw(dict(model.named_parameters()), config)


def adamw(parameters: Mapping[str, Tensor], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW as OLMo 2 uses it: weight decay on everything but embeddings, which names tell.

    Its moments exist from the start, so that a checkpoint can be loaded into them. It works on each
    element alone, so it may be given the shards of parameters that are cut over ranks.
    """
    decayed = [p for name, p in parameters.items() if not is_embedding(name)]
    kept = [p for name, p in parameters.items() if is_embedding(name)]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True
    )
    for parameter in parameters.values():
        optimizer.state[parameter] = {
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        }
    return optimizer


def take_step(optimizer: torch.optim.Optimizer, lr: float, applied: Tensor) -> None:
    """One step of a fused optimizer; where `applied`, a bool on its device, is false, of none.

    The device decides, and nobody waits for it: this is how `torch.amp.GradScaler` skips steps.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.found_inf = applied.logical_not().float()  # type: ignore[attr-defined]
    optimizer.step()


def is_embedding(name: str) -> bool:
    """Whether a parameter is an embedding: a tied head is one, under its name."""
    return name.startswith(("embed.", "copy_embed."))


def optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, dict[str, Tensor]]:
    """The optimizer's own tensors, by parameter name: exp_avg, exp_avg_sq and step."""
    return {name: optimizer.state[parameter] for name, parameter in model.named_parameters()}
