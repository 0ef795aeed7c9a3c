"""What a save costs is measured on real saves, and nothing is left of them."""

from pathlib import Path

import pytest
import torch

from train.benchmarks.checkpoint import bench_saving
from train.compose import load


def test_a_synchronous_save_is_the_stall_and_what_is_behind_it(tmp_path: Path) -> None:
    config = load(["model.layers=1", "engine.device=cpu"])
    result = bench_saving(config, 3, tmp_path / "bench", torch.device("cpu"))
    rows = {row["work"]: row for row in result.rows}
    assert list(rows) == ["stall", "behind it", "DCP's save", "synchronous"]
    for stall, behind, both in zip(
        *(rows[work]["seconds"] for work in ("stall", "behind it", "synchronous")), strict=True
    ):
        assert stall + behind == both
    assert 0 < result.ratios["stall_over_synchronous"] < 1
    size = sum(parameter_bytes(config.model))
    assert result.ratios["gigabytes"] == pytest.approx(3 * size / 1e9, rel=1e-3)
    assert list((tmp_path / "bench").iterdir()) == []


def parameter_bytes(config) -> list[int]:
    from phd.model import Transformer

    with torch.device("meta"):
        return [parameter.nbytes for parameter in Transformer(config).parameters()]
