"""Claims about `train.settings.train`: how a step is cut into passes."""

import pytest

from conf.errors import ConfigError
from train.settings.train import TrainConfig


def test_a_step_is_cut_into_equal_passes() -> None:
    train = TrainConfig(global_batch=24, micro_batch=4)
    assert [train.accumulation(world_size) for world_size in (1, 2, 3)] == [6, 3, 2]
    assert [TrainConfig(global_batch=24).accumulation(world_size) for world_size in (1, 8)] == [
        1,
        1,
    ]
    with pytest.raises(ConfigError, match=r"not divisible by 4 ranks times train\.micro_batch=4"):
        train.accumulation(4)
    with pytest.raises(ConfigError, match="not divisible by 5 ranks"):
        TrainConfig(global_batch=24).accumulation(5)
    with pytest.raises(ConfigError, match="not divisible by 16 ranks"):
        TrainConfig(global_batch=8).accumulation(16)
