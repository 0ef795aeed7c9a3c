"""The optimizer of a run, AdamW (arXiv 1711.05101) or Muon with it, which clips and skips."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from train.distributed.process_groups import ProcessGroups
from train.engines.muon import MuonAdamW, Place
from train.engines.state_rules import ADAMW, MUON, STEP, is_embedding, is_matrix, rule_of
from train.settings.optim import OptimConfig
from train.torch_private import fuse_clip_and_skip


def build_optimizer(
    model: nn.Module,
    config: OptimConfig,
    dtype: torch.dtype = torch.float32,
    width_ratio: float = 1.0,
) -> torch.optim.Optimizer:
    """The optimizer of all parameters of a model in a lone process, with its state allocated."""
    parameters = dict(model.named_parameters())
    optimizer = optimizer_of(parameters, config, dtype, width_ratio)
    matrices = {n: p.shape for n, p in parameters.items() if rule_of(n, config) is MUON}
    places = [Place(i, 0, shape.numel()) for i, shape in enumerate(matrices.values())]
    share_matrices(optimizer, matrices, places, ProcessGroups(), shards=1)
    add_state(optimizer)
    return optimizer


def optimizer_of(
    parameters: Mapping[str, Tensor],
    config: OptimConfig,
    dtype: torch.dtype,
    width_ratio: float = 1.0,
) -> torch.optim.Optimizer:
    """The optimizer, with weight decay on everything except embeddings.

        group               learning rate                 weight decay
        norms, head         lr                            weight_decay
        embeddings          lr                            0
        blocks' matrices    lr (or muon_lr) * s           weight_decay / s     s: `matrix_lr_scale`

    OLMo 2 leaves embeddings out (arXiv 2501.00656), because decay shrinks their norms, and small
    embeddings give the first layers large gradients. muP divides the decay by what it multiplies
    the learning rate by, so that weights of all widths shrink by lr * weight_decay in a step
    (arXiv 2405.13698).

    Args:
        parameters: by canonical name. They may be shards, because AdamW treats each element alone;
            for Muon see `MuonAdamW.share`.
        config: of the optimizer.
        dtype: of the matrix products, which Muon makes its own in.
        width_ratio: of the model, `ModelConfig.width_ratio`.
    """
    muon = config.kind == "muon"
    rule, lr = (MUON, config.muon_lr or config.lr) if muon else (ADAMW, config.lr)
    scale = matrix_lr_scale(config, width_ratio)
    apart = muon or scale != 1  # else the matrices are as all others

    def group(names: Iterable[str], decay: float, **others: Any) -> dict[str, Any]:
        ratio = others["lr"] / config.lr
        params = [parameters[name] for name in names]
        return {"params": params, "weight_decay": decay, "lr_ratio": ratio, **others}

    embeddings = [name for name in parameters if is_embedding(name)]
    matrices = [name for name in parameters if apart and is_matrix(name)]
    known = {*embeddings, *matrices}
    rest = [name for name in parameters if name not in known]
    groups = [
        group(rest, config.weight_decay, rule=ADAMW, lr=config.lr),
        group(embeddings, 0.0, rule=ADAMW, lr=config.lr),
    ]
    if apart:
        groups.append(group(matrices, config.weight_decay / scale, rule=rule, lr=lr * scale))
    if muon:
        return MuonAdamW(groups, config, dtype)
    return torch.optim.AdamW(groups, betas=config.betas, eps=config.eps, fused=True)


def matrix_lr_scale(config: OptimConfig, width_ratio: float) -> float:
    """What muP multiplies the learning rate of the blocks' matrices by.

        AdamW                       1 / m          arXiv 2203.03466, table 8
        Muon, match_rms_adamw       1 / sqrt(m)
        Muon, original              1

    An update should change what a matrix makes of its input equally much at all widths, so its
    largest singular value has to stay (arXiv 2310.17813). AdamW's updates have few large singular
    values, which grow as m. Those of a Muon update are all equal: `match_rms_adamw` makes them
    0.2 sqrt(max(rows, columns)), and `original` leaves them the same for all widths.

    Args:
        width_ratio: m.
    """
    if config.kind == "adamw":
        return 1 / width_ratio
    return 1.0 if config.adjust_lr == "original" else width_ratio**-0.5


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
