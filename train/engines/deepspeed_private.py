"""Every private name of DeepSpeed that `train` uses, each with what is assumed of it.

pyproject.toml allows the versions of DeepSpeed that these were tested with;
tests/train/engines/test_deepspeed_private.py tests the assumptions, so that an upgrade fails in
one place. Nothing here imports DeepSpeed by itself: that takes seconds.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from pydantic import ValidationError
from torch import nn

from conf.errors import ConfigError, Problem


def global_grad_norm(optimizer: Any) -> Any:
    """The L2 norm of the whole gradient, a number or a tensor, within the step of a ZeRO optimizer.

    For stages 1 to 3; the engine's `get_global_grad_norm` tells it only after the step.
    """
    return optimizer._global_grad_norm


def shard_size(parameter: nn.Parameter) -> int:
    """How many elements of a parameter each rank holds at stage 3, padding included."""
    return parameter.ds_tensor.numel()  # type: ignore[attr-defined]


@contextmanager
def kept_gathered(parameters: list[nn.Parameter], owner: object) -> Iterator[None]:
    """Within this context, gathered parameters (stage 3) are not released by their modules.

    A parameter is released when the set of modules that use it is empty; `owner` joins that set.
    """
    for parameter in parameters:
        parameter.ds_active_sub_modules.add(id(owner))  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.ds_active_sub_modules.discard(id(owner))  # type: ignore[attr-defined]


def disable_shared_memory_comm(deepspeed: ModuleType) -> None:
    """Keep DeepSpeed from compiling C++ on the CPU, for sums over ranks of one machine."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def check_json(json: Mapping[str, Any]) -> None:
    """Check DeepSpeed's own configuration, which it would else refuse amid initialization.

    Raises:
        ConfigError: with everything that DeepSpeed finds wrong.
    """
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

    key = "engine.deepspeed"
    try:
        DeepSpeedConfig(json)
    except ValidationError as error:
        found = [(".".join(map(str, e["loc"])), e["msg"]) for e in error.errors()]
        raise ConfigError([Problem(f"{key}.{at}", expected=said) for at, said in found]) from None
    except (AssertionError, ValueError, TypeError, DeepSpeedConfigError) as error:
        raise ConfigError([Problem(key, expected=str(error))]) from None
