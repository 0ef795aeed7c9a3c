"""What a benchmark measured, in words: the model and the device."""

import torch

from phd.config import ModelConfig
from phd.model import count_parameters


def subject_of(model: ModelConfig, device: torch.device) -> str:
    """The model's size and shape, the precision of its weights and the device, for titles.

    The shape is that of the model at hand; its size's name alone may stand for another one.
    """
    millions = sum(count_parameters(model.vanilla_twin).values()) / 1e6
    count = f"{millions:.3g} M" if millions < 999.5 else f"{millions / 1e3:.3g} B"
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    shape = f"{model.layers} layers, D = {model.dim}, {count} parameters"
    return f"{model.size}: {shape}; {dtype}, {where}"
