"""Float8 matrix products of the blocks' projections (arXiv 2209.05433), computed by torchao.

    forward     y  = x w^T       e4m3 x e4m3
    backward    dx = dy w        `tensorwise`: e5m2 x e4m3        `rowwise`: e4m3 x e4m3
                dw = dy^T x

Both operands of a product are scaled to float8's range just before it: by one number for the whole
tensor, or by one for each row and each column. Results are bfloat16, and weights stay float32 in
the optimizer and in checkpoints. The head, the embedding, norms and attention are as with bf16.
"""

import importlib
import logging
import warnings
from dataclasses import replace
from importlib.util import find_spec
from types import ModuleType

import torch

from conf.errors import ConfigError, Problem
from conf.extras import pip_command
from phd.model import Transformer
from train.settings.engine import LEAST_CAPABILITY, EngineConfig, Float8Scaling, no_float8


def check_float8(config: EngineConfig, device: torch.device) -> None:
    """Make sure that this machine can do what `engine.precision=fp8` asks for.

    Raises:
        ConfigError: the device has no such products, or torchao is not installed.
    """
    if config.precision != "fp8":
        return
    found = []
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    if capability < LEAST_CAPABILITY[config.fp8_scaling]:
        has = "the CPU" if device.type == "cpu" else "{}.{}".format(*capability)
        found.append(no_float8(config.fp8_scaling, has))
    if find_spec("torchao") is None:
        missing = "the package torchao is not installed"
        hint = f"{pip_command('phd-transformer[fp8]')}, or choose engine.precision=bf16"
        found.append(Problem("engine.precision", "fp8", missing, hint))
    if found:
        raise ConfigError(found)


def use_float8(model: Transformer, scaling: Float8Scaling, *, emulate: bool = False) -> None:
    """Have the projections of all blocks multiply in float8; parameters stay what they are.

    Args:
        model: with widths that are multiples of 16; it is changed in place.
        scaling: of the operands.
        emulate: round the operands to float8, and multiply them in their own precision, as a test
            does on a device without float8 products.
    """
    float8 = _import_torchao()
    recipe = float8.Float8LinearConfig.from_recipe_name(scaling)
    for block in model.blocks:
        float8.convert_to_float8_training(block, config=replace(recipe, emulate=emulate))


def _import_torchao() -> ModuleType:
    """Import torchao's float8 training, and silence it."""
    # It warns of its own compiled kernels for other versions of Python. Float8 training needs none.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings(
        "ignore", r"torch\.get_autocast_gpu_dtype\(\) is deprecated", DeprecationWarning
    )
    return importlib.import_module("torchao.float8")
