"""The optimizer of a run, AdamW (arXiv 1711.05101) or Muon with it, which clips and skips."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from train.distributed.process_groups import ProcessGroups
from train.engines.muon import MuonAdamW, Place
from train.engines.state_rules import ADAMW, MUON, STEP, Rule, is_embedding, rule_of, rules_of
from train.settings.optim import OptimConfig
from train.torch_private import fuse_clip_and_skip


def build_optimizer(
    model: nn.Module, config: OptimConfig, dtype: torch.dtype = torch.float32
) -> torch.optim.Optimizer:
    """The optimizer of all parameters of a model in a lone process, with its state allocated."""
    parameters = dict(model.named_parameters())
    optimizer = optimizer_of(parameters, config, dtype)
    matrices = {n: p.shape for n, p in parameters.items() if rule_of(n, p, config) is MUON}
    places = [Place(i, 0, shape.numel()) for i, shape in enumerate(matrices.values())]
    share_matrices(optimizer, matrices, places, ProcessGroups(), shards=1)
    add_state(optimizer)
    return optimizer


def optimizer_of(
    parameters: Mapping[str, Tensor], config: OptimConfig, dtype: torch.dtype
) -> torch.optim.Optimizer:
    """The optimizer, with weight decay on everything except embeddings.

    OLMo 2 leaves them out (arXiv 2501.00656), because decay shrinks their norms, and small
    embeddings give the first layers large gradients.

    Args:
        parameters: by canonical name. They may be shards, because AdamW treats each element alone;
            for Muon see `MuonAdamW.share`.
        config: of the optimizer.
        dtype: of the matrix products, which Muon makes its own in.
    """
    rules = rules_of(parameters, config)

    def group(rule: Rule, embedding: bool, lr: float) -> dict[str, object]:
        return {
            "params": [
                parameter
                for name, parameter in parameters.items()
                if rules[name] == rule and is_embedding(name) == embedding
            ],
            "weight_decay": 0.0 if embedding else config.weight_decay,
            "rule": rule,
            "lr": lr,
            "lr_ratio": lr / config.lr,
        }

    groups = [group(ADAMW, False, config.lr), group(ADAMW, True, config.lr)]
    if config.kind == "muon":
        return MuonAdamW([*groups, group(MUON, False, config.muon_lr or config.lr)], config, dtype)
    return torch.optim.AdamW(groups, betas=config.betas, eps=config.eps, fused=True)


def share_matrices(
    optimizer: torch.optim.Optimizer,
    shapes: Mapping[str, torch.Size],
    places: Sequence[Place],
    groups: ProcessGroups,
    shards: int,
) -> None:
    """Have the ranks share Muon's work on matrices; AdamW has none. Every rank calls this.

    Args:
        shapes: of the whole matrices, in the order of the parameters.
        places: where this rank's piece of each is among Muon's parameters.
        groups: the ranks.
        shards: how many neighbouring ranks hold a whole model together.
    """
    if isinstance(optimizer, MuonAdamW):
        sizes = groups.gather([place.numel for place in places])
        optimizer.share(list(shapes.values()), places, sizes, groups.rank, shards)


def add_state(optimizer: torch.optim.Optimizer) -> None:
    """Allocate the state before the first step, so that a checkpoint can be loaded into it."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = {name: torch.zeros_like(parameter) for name in group["rule"].moments}
            if group["rule"].counts:
                state[STEP] = torch.zeros((), device=parameter.device)
            optimizer.state[parameter] = state


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of the next step, of which each group has its own multiple."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_ratio"]


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
