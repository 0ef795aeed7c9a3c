"""Every private name of DeepSpeed that `train` uses, and what each use assumes.

pyproject.toml allows the versions of DeepSpeed that these were tested with. The tests in
tests/train/engines/test_deepspeed_private.py check one assumption each, so that an upgrade that
breaks one fails in one place. This module does not import DeepSpeed at its top, because that takes
seconds and only engine=deepspeed needs it.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from pydantic import ValidationError
from torch import nn

from conf.errors import ConfigError, Problem, reason_of


def global_grad_norm(optimizer: Any) -> Any:
    """The L2 norm of the whole gradient, a number or a tensor, within a ZeRO optimizer's step.

    Stages 1 to 3 set it before they call AdamW. The engine's own `get_global_grad_norm` returns
    the norm of this step only after the step, when it is too late to clip.
    """
    return optimizer._global_grad_norm


def shard_size(parameter: nn.Parameter) -> int:
    """The number of a parameter's elements on each rank at stage 3, padding included."""
    return parameter.ds_tensor.numel()  # type: ignore[attr-defined]


def fragment(parameter: nn.Parameter) -> tuple[int, int]:
    """Which part of its rank's flat partition is a parameter's at stages 1 and 2: (start, numel).

    The partitions of the ranks, one after another, are all parameters of a group, one after
    another. So a parameter's parts, in the order of the ranks, are the whole of it.
    """
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:  # it lies on other ranks
        return 0, 0
    return mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel


@contextmanager
def kept_gathered(parameters: list[nn.Parameter], owner: object) -> Iterator[None]:
    """Within this context, modules do not release these gathered parameters (stage 3).

    DeepSpeed releases a parameter when its `ds_active_sub_modules`, the ids of the modules that use
    it, is empty. This adds the id of `owner`.
    """
    for parameter in parameters:
        parameter.ds_active_sub_modules.add(id(owner))  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.ds_active_sub_modules.discard(id(owner))  # type: ignore[attr-defined]


def disable_shared_memory_comm(deepspeed: ModuleType) -> None:
    """Keep DeepSpeed from compiling its C++ all-reduce over shared memory, on the CPU.

    It would compile when the process group is made, which takes a C++ compiler and most of a
    minute. `deepspeed.comm` asks this table whether the operator can be built.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def check_json(json: Mapping[str, Any]) -> None:
    """Check DeepSpeed's own configuration, before the initialization that would refuse it.

    Raises:
        ConfigError: names everything that DeepSpeed finds wrong.
    """
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

    key = "engine.deepspeed"
    try:
        DeepSpeedConfig(json)
    except ValidationError as error:
        found = [(".".join(map(str, e["loc"])), e["msg"]) for e in error.errors()]
        raise ConfigError([Problem(f"{key}.{at}", expected=said) for at, said in found]) from None
    except (AssertionError, ValueError, TypeError, DeepSpeedConfigError) as error:
        raise ConfigError([Problem(key, expected=reason_of(error))]) from None
