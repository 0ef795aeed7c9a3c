"""The kernels of a run's attention: told by name in the plan, and activated once at the start."""

from dataclasses import replace

import torch

from conf.errors import ConfigError, Problem, reason_of
from phd.attention.attend import describe_attention
from phd.attention.causal_kernels import (
    HALF,
    Platform,
    activate_flash_attention,
    best_flash_attention,
    can_flash_attention,
    installed_flash_attentions,
)
from phd.pattern import Pattern
from train.config import Config
from train.engines.device import precision

KEY = "engine.flash_attention"
PACKAGES = {
    3: "flash_attn_interface (the package flash-attn-3)",
    4: "flash_attn.cute (the package flash-attn-4)",
}


def configure_attention(config: Config, device: torch.device) -> str:
    """Activate the run's FlashAttention, in the whole process.

    Returns:
        What then computes the run's attention, by name.

    Raises:
        ConfigError: it is not installed, or no kernel can compute this run's attention.
    """
    wanted, dtype = config.engine.flash_attention, precision(config.engine, device)
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(wanted == "auto")
    installed = installed_flash_attentions()
    platform = attention_platform(config, Platform.of(device), dtype, installed)
    try:
        activate_flash_attention(platform.flash_attention)
    except (ImportError, RuntimeError) as error:
        name = f"FlashAttention-{platform.flash_attention}"
        reason = f"{name} is installed, but cannot be used: {reason_of(error)}"
        raise ConfigError([Problem(KEY, wanted, reason, f"choose {KEY}=2")]) from error
    return attention_kernels(config, platform, dtype)


def planned_attention(config: Config, platform: Platform, dtype: torch.dtype, is_here: bool) -> str:
    """What will compute a run's attention, by name, without activating anything.

    Args:
        platform: of the devices that the run is planned for.
        is_here: whether they are this machine's; the packages of another one are not known.
    """
    wanted = config.engine.flash_attention
    elsewhere = frozenset({2} if wanted == "auto" else {wanted})
    installed = installed_flash_attentions() if is_here else elsewhere
    return attention_kernels(config, attention_platform(config, platform, dtype, installed), dtype)


def attention_platform(
    config: Config, platform: Platform, dtype: torch.dtype, installed: frozenset[int]
) -> Platform:
    """The platform for which a run's kernels are chosen: `platform` with the run's FlashAttention.

    Raises:
        ConfigError: `engine.flash_attention` cannot be had.
    """
    wanted, head_dim = config.engine.flash_attention, config.model.head_dim
    if wanted == "auto":
        half = platform.type == "cuda" and dtype in HALF
        best = best_flash_attention(platform, head_dim, installed) if half else 2
        return replace(platform, flash_attention=best)
    reason, hint = "", f"choose {KEY}=auto"
    if platform.type != "cuda":
        reason = f"there is no FlashAttention for {platform}"
    elif dtype not in HALF:
        reason = "FlashAttention computes in half precision alone"
        hint += " or engine.precision=bf16"
    elif wanted not in installed:
        reason, hint = f"{PACKAGES[wanted]} is not installed", f"install it, or {hint}"
    elif not can_flash_attention(wanted, platform, head_dim):
        reason = f"it cannot do heads of model.head_dim={head_dim} on {platform}"
    if reason:
        raise ConfigError([Problem(KEY, wanted, reason, hint)])
    return replace(platform, flash_attention=wanted, cudnn=0)


def attention_kernels(config: Config, platform: Platform, dtype: torch.dtype) -> str:
    """What computes a run's attention, by name; see `phd.attention.attend.describe_attention`.

    Raises:
        ConfigError: no kernel can.
    """
    model = config.model
    try:
        return describe_attention(
            Pattern.of(model),
            model.attention,
            platform,
            dtype,
            model.head_dim,
            documents=config.data.documents == "isolate",
        )
    except ValueError as error:
        raise ConfigError(
            [Problem("engine.precision", config.engine.precision, str(error))]
        ) from error
