"""Ranks that share rows or matrices train compiled blocks as they train eager ones."""

from functools import partialmethod
from typing import Any

import numpy as np
import pytest
from torch import nn
from torch._dynamo.utils import counters

from phd.block import Block
from tests.train.engines.test_parity import ROWS, Training, batch, closed, united
from tests.train.many_ranks import run_ranks
from tests.train.uneven import COPIES, UNEVEN
from train.compose import load
from train.config import Config
from train.distributed.process_groups import ProcessGroups
from train.loop import train_step
from train.run import open_engine

WORLD = 2
# Two graphs: of the first two layers, which share one, and of the last, with one copy of queries.
SMALL = (*UNEVEN, *COPIES, "model.layers=3", "model.heads=2", "model.kv_heads=2")
SMALL += ("model.vocab_size=62", f"train.global_batch={ROWS}", "data.holdout=0")
MESHES = {
    "context": ("engine.context=2",),
    "context, recomputed": ("engine.context=2", "engine.activation_checkpointing=selective"),
    "tensor": ("engine.tensor=2",),
    "tensor, recomputed": ("engine.tensor=2", "engine.activation_checkpointing=selective"),
}


def trained(groups: ProcessGroups, config: Config) -> tuple[Training, dict[str, Any]]:
    """One step, and what torch.compile did for it."""
    # It traces and differentiates as the default backend does, and builds no C++.
    Block.compile = partialmethod(nn.Module.compile, backend="aot_eager")
    engine = open_engine(config, groups)
    counters.clear()
    reader, readers = engine.dims.data_rank(groups.rank), engine.dims.data_ranks
    engine.micro_batch = ROWS // readers
    results = [train_step(engine, batch(0).shard(reader, readers), lr=0.01)]
    return closed(engine, results), {name: dict(count) for name, count in counters.items()}


def all_meshes(groups: ProcessGroups, configs: list[Config]) -> list[Any]:
    return [trained(groups, config) for config in configs]


@pytest.mark.process
@pytest.mark.compile
def test_compiled_blocks_of_a_mesh_share_whole_graphs_and_equal_eager_ones() -> None:
    eager = [load([*SMALL, *settings]) for settings in MESHES.values()]
    compiled = [load([*SMALL, *settings, "engine.compile=true"]) for settings in MESHES.values()]
    ranks = run_ranks(WORLD, all_meshes, [*eager, *compiled])
    for number, mesh in enumerate(MESHES):
        expected = united(mesh, [rank[number][0] for rank in ranks])
        found = united(mesh, [rank[len(MESHES) + number][0] for rank in ranks])
        np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-6, err_msg=mesh)
        np.testing.assert_allclose(found.norms, expected.norms, rtol=1e-5, err_msg=mesh)
        for name, value in expected.weights.items():
            np.testing.assert_allclose(found.weights[name], value, rtol=0, atol=1e-5, err_msg=name)
        for rank in ranks:
            assert "graph_break" not in rank[len(MESHES) + number][1], mesh
            assert rank[len(MESHES) + number][1]["stats"]["unique_graphs"] == 2, mesh
            assert rank[number][1].get("stats", {}) == {}, mesh
