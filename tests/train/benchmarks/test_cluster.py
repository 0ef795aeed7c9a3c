"""How the model of costs is calibrated on a machine."""

from dataclasses import replace

import pytest

from train.benchmarks.cluster import cases_of, predicted, with_fsdp_of
from train.compose import load
from train.costs.cluster import ClusterConfig, LinkConfig, RatesConfig, StorageConfig

CLUSTER = ClusterConfig(
    nodes=1,
    devices=4,
    device="cpu",
    memory_gib=1.0,
    cores=2,
    rates=RatesConfig(product_tflops=0.1, attention_tflops=0.05, memory_gb_per_s=10),
    within=LinkConfig(gb_per_s=0.5),
    storage=StorageConfig(
        host_gb_per_s=1, node_write_gb_per_s=1, write_gb_per_s=1, node_read_gb_per_s=1,
        read_gb_per_s=1,
    ),
)  # fmt: skip


@pytest.mark.parametrize("factor", [1.0, 3.5])
def test_a_machine_is_found_again_from_what_its_step_takes(factor: float) -> None:
    there = replace(CLUSTER, fsdp_factor=factor)
    fsdp, phd, ddp = cases_of(load(["engine.device=cpu", "train.global_batch=8"]), 2)
    found = with_fsdp_of(fsdp, predicted(fsdp, there).total, CLUSTER)
    assert found.fsdp_factor == pytest.approx(factor)
    for case in (fsdp, phd):
        assert predicted(case, found).total == pytest.approx(predicted(case, there).total)
    # DDP's all-reduces are collectives alone.
    assert predicted(ddp, found) == predicted(ddp, CLUSTER)


def test_a_step_as_fast_as_its_collectives_has_no_more_than_them() -> None:
    fsdp, _, _ = cases_of(load(["engine.device=cpu", "train.global_batch=8"]), 2)
    assert with_fsdp_of(fsdp, 1e-9, CLUSTER).fsdp_factor == 1.0
