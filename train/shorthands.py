"""What may stand for settings of the model in a file or on a command line.

model.flops_of=phd_cswa-2   as many layers as cost at least what this variant does
model.chunk=null            no chunk, which is model=phd_swa
"""

from dataclasses import replace
from typing import Any

from conf.errors import ConfigError, Problem
from phd.config import ModelConfig
from train.config import Config
from train.overrides import DEEPENED
from train.settings.train import TrainConfig


def config_of(values: dict[str, Any]) -> Config:
    """The config that plain values describe, among which are shorthands.

    Raises:
        ConfigError: as `Config.from_dict`; or `model.flops_of` names no variant.
    """
    model = _without_chunk(values["model"])
    cost = model.pop(DEEPENED, None) if isinstance(model, dict) else None
    config = Config.from_dict({**values, "model": model})
    return config if cost is None else _deepened(config, cost)


def _deepened(config: Config, cost: Any) -> Config:
    """The config with as many layers as cost at least what the variant of this name does."""
    from phd.flops import layers_at_flops, training_flops  # needs torch

    try:
        other = config.model.as_variant(str(cost))
    except ValueError as error:
        raise ConfigError([Problem(f"model.{DEEPENED}", cost, str(error))]) from error
    row = config.train.seq_len
    layers = layers_at_flops(config.model, training_flops(other, row), row)
    train = _length_of_parameters(config)
    return replace(config, train=train, model=replace(config.model, layers=layers))


def _length_of_parameters(config: Config) -> TrainConfig:
    """The settings with a length for each parameter in tokens, which more layers leave as it is."""
    train, ratio = config.train, config.train.max_tokens_per_parameter
    if ratio is None:
        return train
    limits = [int(ratio * config.parameters), *([train.max_tokens] if train.max_tokens else [])]
    return replace(train, max_tokens=min(limits), max_tokens_per_parameter=None)


def _without_chunk(model: Any) -> Any:
    """The model's settings; with a chunk of null, which is no chunk, those of `phd_swa`."""
    if not isinstance(model, dict) or model.get("chunk", "") is not None:
        return model
    variant = "phd_swa" if model.get("variant") == "phd_cswa" else model.get("variant")
    return {**model, "variant": variant, "chunk": ModelConfig.chunk}
