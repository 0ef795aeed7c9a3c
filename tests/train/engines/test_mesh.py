"""How ranks are laid out over the axes of the mesh."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conf.errors import ConfigError
from train.engines.mesh import ParallelDims
from train.settings.engine import DeepSpeedConfig, EngineConfig, FsdpConfig

SIZES = st.integers(1, 4)


@given(replicate=SIZES, shard=SIZES, context=SIZES, tensor=SIZES)
def test_each_rank_has_a_place_of_its_own(
    replicate: int, shard: int, context: int, tensor: int
) -> None:
    config = FsdpConfig(replicate=replicate, context=context, tensor=tensor)
    world_size = replicate * shard * context * tensor
    assert config.problems_on(world_size) == []
    dims = ParallelDims.of(config, world_size)
    assert dims == ParallelDims(replicate, shard, context, tensor)
    assert dims.data_ranks == config.data_ranks(world_size) == replicate * shard
    places = [
        (dims.data_rank(rank), dims.context_rank(rank), dims.tensor_rank(rank))
        for rank in range(world_size)
    ]
    assert places == sorted(set(places))  # neighbours differ in the fastest axis first
    assert len(places) == world_size
    readers = [rank for rank in range(world_size) if dims.is_reader(rank)]
    assert [dims.data_rank(rank) for rank in readers] == list(range(dims.data_ranks))
    assert all(places[rank][1:] == (0, 0) for rank in readers)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (FsdpConfig(), ParallelDims(shard=6)),
        (FsdpConfig(shard=False), ParallelDims(replicate=6)),
        (DeepSpeedConfig(), ParallelDims(shard=6)),
    ],
    ids=["fsdp", "ddp", "deepspeed"],
)
def test_without_further_axes_each_rank_reads_rows_of_its_own(
    config: EngineConfig, expected: ParallelDims
) -> None:
    dims = ParallelDims.of(config, 6)
    assert dims == expected
    assert [dims.data_rank(rank) for rank in range(6)] == list(range(6))
    assert all(map(dims.is_reader, range(6)))


def test_axes_that_do_not_divide_the_ranks_are_refused_together() -> None:
    config = FsdpConfig(replicate=2, context=3)
    (problem,) = config.problems_on(8)
    assert str(problem).startswith(
        "engine.replicate=2: times engine.context=3 must divide the number of ranks, 8"
    )
    assert config.problems_on(12) == []
    (problem,) = FsdpConfig(tensor=4).problems_on(6)
    assert problem.key == "engine.tensor"


@pytest.mark.parametrize("axis", ["context", "tensor"])
def test_ddp_has_no_further_axes(axis: str) -> None:
    with pytest.raises(ConfigError, match=f"engine.{axis}=2: .*engine.shard=false is DDP"):
        replace(FsdpConfig(shard=False), **{axis: 2})
    with pytest.raises(ConfigError, match=f"engine.{axis}=0: expected an integer of at least 1"):
        replace(FsdpConfig(), **{axis: 0})
