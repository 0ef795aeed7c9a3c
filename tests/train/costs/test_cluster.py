"""The model of costs for a cluster: small cases by hand, published runs, and what it recommends."""

import json
from dataclasses import replace
from math import inf, sqrt
from pathlib import Path

import pytest

from conf.errors import ConfigError
from conf.validation import build
from phd.config import ModelConfig
from phd.flops import forward_flops
from phd.model import count_parameters
from phd.pattern import patterns_of
from train.arguments import PlanArguments
from train.compose import load
from train.conf_files import CLUSTERS, choices
from train.costs.cluster import ClusterConfig, LinkConfig, load_cluster
from train.costs.cluster_plan import ClusterPlan, find_layouts, plan_cluster
from train.costs.failures import Saving, best_interval_s, daly_s, failures_of, saving_of, young_s
from train.costs.kernels import (
    MicroBatch,
    attention_flops,
    block_products,
    block_stages,
    copies_of,
    head_stage,
)
from train.costs.links import Group, bandwidth, gather_s, group_of, groups_of, reduce_s
from train.costs.step import (
    KeySeconds,
    Place,
    Step,
    StepTime,
    Timed,
    Weights,
    flops_before,
    key_pieces,
    key_traffic,
    pipelined_s,
    step_time,
    tensor_traffic,
)
from train.engines.context_parallel import ContextRank
from train.engines.mesh import ParallelDims

H100 = load_cluster("h100_64")
ROUND = replace(  # figures that can be worked out by hand
    H100,
    within=LinkConfig(gb_per_s=100, latency_us=1),
    between=LinkConfig(gb_per_s=10, latency_us=5),
    start_us=20,
)


# The files


@pytest.mark.parametrize("name", choices(CLUSTERS))
def test_a_shipped_cluster_can_be_read_and_says_where_each_figure_is_from(name: str) -> None:
    cluster = load_cluster(name)
    assert cluster.ranks == cluster.nodes * cluster.devices
    assert cluster.memory > 0
    text = (Path(__file__).parents[3] / "conf" / CLUSTERS / f"{name}.yaml").read_text()
    sourced, found = False, []
    for line in text[text.index("rates:") :].splitlines():
        if line.endswith(":"):
            sourced = False  # a new section
        elif "#" in line:
            sourced = True  # also of the figures that follow
        if line[-1].isdigit() and not sourced:
            found.append(line)
    assert found == []


def test_clusters_are_of_the_sizes_in_their_names() -> None:
    sizes = {name: load_cluster(name).ranks for name in choices(CLUSTERS)}
    assert sizes == {
        "a100_8": 8, "h100_8": 8, "h100_64": 64, "h100_1024": 1024, "h200": 1, "laptop": 1
    }  # fmt: skip


def wrong(tmp_path: Path, text: str) -> str:
    """What is said of a file of the user's own."""
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        build(PlanArguments, {"cluster": str(path)})
    return str(caught.value).replace(str(path), "mine.yaml")


def test_what_is_wrong_with_a_cluster_is_told_at_once_by_file_and_key(tmp_path: Path) -> None:
    shipped = (Path(__file__).parents[3] / "conf/cluster/h100_64.yaml").read_text()
    text = shipped.replace("nodes: 8", "nodes: 0").replace("device: H100", "device: H10")
    text = text.replace("  gb_per_s: 45", "  gb_per_s: -1").replace("attention_", "atention_")
    said = wrong(tmp_path, text)
    for told in (
        "cluster=mine.yaml: nodes=0: expected an integer of at least 1",
        "cluster=mine.yaml: device='H10': expected cpu or one of",
        "Did you mean H100?",
        "cluster=mine.yaml: rates.atention_tflops: unknown key. Did you mean rates.attention_",
        "cluster=mine.yaml: between.gb_per_s=-1.0: expected a number of at least 0",
    ):
        assert told in said, said


def test_nodes_need_links_and_a_file_has_to_be_one(tmp_path: Path) -> None:
    lines = (Path(__file__).parents[3] / "conf/cluster/h100_8.yaml").read_text()
    said = wrong(tmp_path, lines.replace("nodes: 1", "nodes: 2"))
    assert "between.gb_per_s: has to be given: there are 2 nodes" in said
    assert "has no settings such as nodes: 8" in wrong(tmp_path, "- 1\n")
    assert "cannot be read" in wrong(tmp_path, "nodes: [1\n")
    with pytest.raises(ConfigError, match=r"cannot be read .*No such file"):
        load_cluster("nowhere/mine.yaml")


def test_an_unknown_cluster_and_arguments_that_it_replaces_are_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        build(PlanArguments, {"cluster": "h100_46", "device": "A100", "processes": 3})
    said = str(caught.value)
    assert "cluster='h100_46': expected one of a100_8, h100_1024" in said
    assert "Did you mean h100_64?" in said
    for key in ("device='A100'", "processes=3"):
        assert f"{key}: cluster=h100_46 says it; leave it out" in said


# Links


def test_groups_are_neighbours_where_they_talk_most() -> None:
    groups = groups_of(ParallelDims(replicate=2, shard=4, context=2, tensor=4), devices=8)
    assert groups.tensor == Group(4, 4)
    assert groups.context == Group(2, 2)
    assert groups.shard == Group(8, 2)  # 4 shards of 2 context ranks, one in 4 ranks
    assert groups.replicate == Group(2, 1)
    assert groups.all == Group(64, 8)


def test_a_ring_over_nodes_has_the_links_of_all_its_ranks_of_a_node() -> None:
    assert bandwidth(Group(8, 8), ROUND) == 100e9
    assert bandwidth(Group(64, 8), ROUND) == 8 * 10e9
    assert bandwidth(Group(4, 1), ROUND) == 10e9


def test_collectives_by_hand() -> None:
    assert gather_s(8e9, Group(1, 1), ROUND) == 0
    # 7/8 of 8 GB at 100 GB/s; 20 us and 7 steps of 1 us.
    assert gather_s(8e9, Group(8, 8), ROUND) == pytest.approx(0.07 + 27e-6)
    # 15/16 of 8 GB at 80 GB/s; 14 steps within nodes and 1 between.
    assert gather_s(8e9, Group(16, 8), ROUND) == pytest.approx(0.09375 + (20 + 14 + 5) * 1e-6)
    # A large all-reduce is a ring: twice that. A small one is a tree: of 16 nodes, 4 deep.
    assert reduce_s(8e9, Group(16, 8), ROUND) == pytest.approx(2 * (0.09375 + 39e-6))
    assert reduce_s(4, group_of(128, 1, 8), ROUND) == pytest.approx(
        (20 + 2 * (7 + 4 * 5)) * 1e-6, 1e-3
    )


def test_what_overlaps_by_hand() -> None:
    stages = [Timed(2, 4, 0), Timed(3, 1, 5), Timed(1, 6, 0)]
    # The link: 0-2; 3 during the first stage, 2-5; 1 during the second, 6-7; then 5, 7-12, beside
    # the third, 7-13.
    assert pipelined_s(stages) == 2 + 4 + 1 + 6
    assert pipelined_s(stages, overlaps=False) == 22
    assert pipelined_s([Timed(0, 1, 9), Timed(0, 2, 0)]) == 10  # the last sums are waited for
    assert pipelined_s([Timed(0, 1, 0), Timed(7, 1, 0)]) == 8  # and weights that come late


# Computation


@pytest.mark.parametrize("variant", ["vanilla", "phd", "phd_swa", "phd_cswa", "naive_repeat"])
def test_flops_are_those_of_the_model(variant: str) -> None:
    model = load([f"model={variant}", "size=1b2"]).model
    batch = MicroBatch(model, rows=3, seq_len=256)
    linear = attention = 0
    for layer, pattern in enumerate(patterns_of(model)):
        copies = copies_of(model, layer, pattern)
        linear += sum(product.flops for product in block_products(batch, copies))
        attention += attention_flops(batch, pattern, copies.queries)
    counted = forward_flops(model, 256)
    head = 2 * model.dim * model.vocab_size * 256
    assert linear == 3 * (counted.linear - head)
    assert attention == 3 * counted.attention


def test_a_rank_has_its_part_of_the_work() -> None:
    model = load(["model=phd_cswa", "size=1b2", "model.K=3"]).model
    whole = MicroBatch(model, rows=8, seq_len=4096)
    [first, *_] = block_stages(whole, H100.rates)
    for cut in ({"context": 4}, {"tensor": 4}, {"context": 2, "tensor": 2}):
        [part, *_] = block_stages(replace(whole, **cut), H100.rates)
        assert part.forward.attention == pytest.approx(first.forward.attention / 4, rel=1e-3)
        assert part.forward.other == pytest.approx(first.forward.other / 4, rel=1e-3)
        assert part.forward.products == pytest.approx(first.forward.products / 4, rel=0.02)


def test_computing_again_takes_what_is_computed_again() -> None:
    model = load(["model=vanilla", "size=1b2"]).model
    batch = MicroBatch(model, rows=2, seq_len=4096)
    plain, selective, full = (
        next(iter(block_stages(replace(batch, recompute=level), H100.rates)))
        for level in ("none", "selective", "full")
    )
    assert selective.backward.products == plain.backward.products
    assert selective.backward.other == plain.backward.other + plain.forward.other
    assert full.backward.total == pytest.approx(plain.backward.total + plain.forward.total)
    stages = [*block_stages(replace(batch, recompute="full"), H100.rates, checkpoint_every=2)]
    assert stages[0] == full
    assert stages[1] == plain


# What is sent


def test_phd_sends_what_vanilla_sends_under_context_parallelism() -> None:
    vanilla = load(["model=vanilla", "size=1b2"]).model
    batch = MicroBatch(vanilla, rows=2, seq_len=4096, context=4)
    [pattern, *_] = patterns_of(vanilla)
    keys = key_traffic(batch, pattern)
    assert keys.gathered == 2 * 2 * 4096 * 8 * 64 * 2  # k and v, B, T, G, H, bytes
    assert (keys.scattered, keys.halo) == (2 * keys.gathered, 0)
    for K in (2, 3, 5):
        for variant in ("phd", "phd_cswa"):
            model = replace(vanilla, variant=variant, K=K)
            assert key_traffic(replace(batch, model=model), patterns_of(model)[0]) == keys
        model = replace(vanilla, variant="naive_repeat", K=K)
        found = key_traffic(replace(batch, model=model), patterns_of(model)[0])
        assert found.gathered == K * keys.gathered
        model = replace(vanilla, variant="phd_swa", K=K, window=16)
        found = key_traffic(replace(batch, model=model), patterns_of(model)[0])
        reach = -(-15 // (K - 1)) * (K - 1)
        assert (found.gathered, found.halo) == (keys.gathered, 2 * reach * 2 * 2 * 8 * 64 * 2)
    assert key_traffic(replace(batch, context=1), pattern).gathered == 0


@pytest.mark.parametrize("variant", ["vanilla", "phd_cswa", "naive_repeat", "hidden_decoding"])
def test_keys_before_a_ranks_own_parts_are_counted_as_they_are_dealt(variant: str) -> None:
    model, ranks, part = load([f"model={variant}", "size=tiny"]).model, 3, 8
    batch = MicroBatch(model, rows=2, seq_len=2 * ranks * part, context=ranks)
    dealt = [ContextRank("", number, ranks).parts for number in range(ranks)]
    for pattern in patterns_of(model):
        # A query of part p sees the keys of p parts; all ranks have as many.
        [each] = {sum(part * p * part for p in parts) for parts in dealt}
        seen = pattern.K * (pattern.K if pattern.rule == "flat" else 1)
        expected = 4 * model.head_dim * model.heads * 2 * seen * each
        assert flops_before(batch, pattern, pattern.K) == expected
        assert expected < attention_flops(batch, pattern, pattern.K)


def test_a_layer_waits_for_keys_where_its_own_attention_is_too_short() -> None:
    keys = KeySeconds(gather=8.0, scatter=16.0, halo=0.0, halo_back=0.0)
    # own 2, 4 in pieces |        2: waits 6, then 4
    assert keys.waited(attention=6, others=4, pieces=1)[0] == 6
    # own 2, waits 2 for a half, 2, waits 2 for the other, 2
    assert keys.waited(attention=6, others=4, pieces=2)[0] == 4
    # Quarters: at 2, 4, 6, 8; after each of them 1.
    assert keys.waited(attention=6, others=4, pieces=4)[0] == 3
    # 2 of its own, waits 6, 8 of others; then the sums, behind 2 of its own.
    assert keys.waited(attention=6, others=4, pieces=1)[1] == 6 + 16 - 2
    # 2, waits 2, 4, 4: then one half has been sent for 2 of 8.
    assert keys.waited(attention=6, others=4, pieces=2)[1] == 2 + (8 - 4 + 8) - 2
    assert keys.waited(attention=0, others=0, pieces=4) == keys.moved == (8, 24)
    assert keys.waited(attention=100, others=90, pieces=4) == (0, 0)
    halo = keys._replace(halo=1.0, halo_back=4.0)
    # The halo comes first, while the layer attends to its own tokens for 2.
    assert halo.waited(attention=6, others=4, pieces=1) == (7, 20 + 4)
    assert keys._replace(halo=3.0).waited(attention=6, others=4, pieces=1)[0] == 9
    assert halo.waited(attention=100, others=90, pieces=4)[0] == 0
    assert halo.moved == (9, 28)


def test_each_piece_of_the_keys_has_a_start_and_a_latency_of_its_own() -> None:
    model = load(["model=phd_cswa", "size=1b2"]).model
    batch = MicroBatch(model, rows=1, seq_len=65536, context=4)
    pattern, place = patterns_of(model)[0], Place(groups_of(ParallelDims(context=4), 4), ROUND)
    keys, pieces = key_traffic(batch, pattern), key_pieces(batch, pattern)
    assert pieces == 4
    found = place.keys_s(batch, pattern)
    # A start of 20 us and three steps of 1 us; 3/4 of the bytes at 100 GB/s.
    assert found.gather == pytest.approx(4 * 23e-6 + 0.75 * keys.gathered / 100e9)
    assert found.scatter == pytest.approx(4 * 23e-6 + 0.75 * keys.scattered / 100e9)
    few = replace(batch, seq_len=1024)
    assert key_pieces(few, pattern) == 1
    streams = load(
        ["model=hidden_decoding", "size=1b2", "model.kv_heads=1", "model.full_every=2"]
    ).model
    rules = {pattern.rule: pattern for pattern in patterns_of(streams)}
    assert key_pieces(replace(batch, model=streams), rules["stream"]) == streams.K == 2


def test_tensor_parallelism_gathers_and_scatters_twice_in_each_direction() -> None:
    model = load(["model=phd_cswa", "size=1b2", "model.K=3"]).model
    batch = MicroBatch(model, rows=2, seq_len=4096, context=2, tensor=4)
    pattern = patterns_of(model)[1]
    copy = 2 * 2048 * 2048 * 2  # B, T/c, D, bytes
    middle = tensor_traffic(batch, copies_of(model, 1, pattern))
    assert (middle.gathered, middle.scattered) == ((3 * copy, 3 * copy), (3 * copy, 3 * copy))
    last = tensor_traffic(batch, copies_of(model, 15, pattern))  # the last copy alone goes on
    assert (last.gathered, last.scattered) == ((3 * copy, copy), (copy, copy))


def test_recomputation_sends_what_it_computes_again_but_no_sum_that_selective_keeps() -> None:
    model = load(["model=phd", "size=1b2", "model.K=3"]).model
    dims = ParallelDims(shard=2, tensor=4)
    none, selective, full, every_other = (
        step_time(replace(step_of(model, H100, dims, 2, 4096, recompute=level), **given))
        for level, given in (
            ("none", {}),
            ("selective", {}),
            ("full", {}),
            ("full", {"checkpoint_every": 2}),
        )
    )
    # Forward and backward gather and scatter once each; only the head's part is not repeated.
    place = step_of(model, H100, dims, 2, 4096).place
    head = 2 * place.head_s(MicroBatch(model, 2, 4096, tensor=4))
    there = (none.tensor - head) / 2
    assert full.tensor == pytest.approx(none.tensor + there)
    assert every_other.tensor == pytest.approx(none.tensor + there / 2, rel=0.05)
    assert none.tensor + 0.4 * there < selective.tensor < none.tensor + 0.7 * there


# Steps


def step_of(
    model: ModelConfig, cluster: ClusterConfig, dims: ParallelDims, rows: int, T: int, **given: str
) -> Step:
    counts = count_parameters(model)
    outside = counts["embedding"] + counts["head"]
    block = (sum(counts.values()) - outside) // model.layers
    batch = MicroBatch(model, rows, T, dims.context, dims.tensor, **given)  # type: ignore[arg-type]
    return Step(batch, 1, Weights(block, outside, model.layers, 2), dims, cluster)


def tokens_per_s_per_device(step: Step) -> float:
    ranks = step.place.groups.all.ranks
    rows = step.batch.rows * step.dims.data_ranks * step.passes
    return rows * step.batch.seq_len / step_time(step).total / ranks


LLAMA_8B = ModelConfig(
    variant="vanilla", K=1, layers=32, dim=4096, ffn_dim=14336, heads=32, kv_heads=8,
    head_dim=128, vocab_size=128256, tied=False, norm="pre",
)  # fmt: skip


def grand_teton(nodes: int) -> ClusterConfig:
    """What torchtitan's tables are of: H100 with HBM2e of 2.4 TB/s, 500 W, 400 Gb/s for each GPU.

    "The actual peak TFLOPs number is between SXM and NVL", which is 989 and 835.
    """
    slower = (989 + 835) / 2 / 989
    rates = replace(
        H100.rates,
        product_tflops=H100.rates.product_tflops * slower,
        attention_tflops=H100.rates.attention_tflops * slower,
        memory_gb_per_s=0.88 * 2400,
    )
    return replace(H100, nodes=nodes, rates=rates)


A100_64 = replace(load_cluster("a100_8"), nodes=8, between=LinkConfig(gb_per_s=22.5, latency_us=4))

PUBLISHED = {
    # OLMo-core's README: a 7B model at T = 4096 on H100; `rates.sustained` is fitted to this one.
    "OLMo 2 7B": (10_000, load(["size=7b", "model=vanilla"]).model, H100, 2, 4096, "none"),
    # torchtitan's docs/performance.md, Llama 3 8B, 64 A100, local batch 1, selective.
    "torchtitan 64 A100": (2973, LLAMA_8B, A100_64, 1, 8192, "selective"),
    # benchmarks/llama3_h100_202412_torchtitan.md, tables 1 and 3, FSDP and torch.compile.
    "torchtitan 8 H100": (6667, LLAMA_8B, grand_teton(1), 2, 8192, "selective"),
    "torchtitan 128 H100": (6514, LLAMA_8B, grand_teton(16), 2, 8192, "selective"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_throughput_is_predicted_within_a_quarter(name: str) -> None:
    published, model, cluster, rows, T, recompute = PUBLISHED[name]
    step = step_of(model, cluster, ParallelDims(shard=cluster.ranks), rows, T, recompute=recompute)
    assert tokens_per_s_per_device(step) / published == pytest.approx(1, abs=0.25)


def test_the_step_that_was_measured_on_an_h200_is_predicted_within_a_tenth() -> None:
    """The attention and the loss of then, docs/speed.md, in place of those of the rates."""
    model = load(["size=1b2", "model=vanilla"]).model
    cluster = load_cluster("h200")
    step = step_of(model, cluster, ParallelDims(), 4, 4096)
    head = head_stage(step.batch, cluster.rates)
    then = 16 * 4.14e-3 + 67.9e-3  # FlashAttention-2 in 16 layers; 4096 rows of the loss at a time
    now = step_time(step).attention + head.forward.total + head.backward.total
    assert step_time(step).total - now + then == pytest.approx(0.293, rel=0.1)


def parts(time: StepTime) -> float:
    return time.products + time.attention + time.other + time.optimizer + time.host


def test_the_parts_of_a_step_add_up() -> None:
    model = load(["size=1b2", "model=phd_cswa"]).model
    for dims in (ParallelDims(8, 8), ParallelDims(2, 4, 4, 2), ParallelDims(64)):
        step = replace(step_of(model, H100, dims, 4, 4096), passes=3)
        time = step_time(step)
        assert time.compute == pytest.approx(parts(time))
        assert time.total == pytest.approx(time.compute + time.exposed)
        assert time.sent == pytest.approx(time.hidden + time.exposed)
        assert 0 <= time.exposed <= time.sent


def test_a_step_grows_with_the_work_and_with_slower_links() -> None:
    model = load(["size=1b2", "model=vanilla"]).model
    dims = ParallelDims(shard=64)
    base = step_time(step_of(model, H100, dims, 4, 4096))
    assert step_time(step_of(model, H100, dims, 8, 4096)).total > base.total
    for K in (2, 3):
        more = replace(model, variant="phd_cswa", K=K)
        assert step_time(step_of(more, H100, dims, 4, 4096)).total > base.total
    for name in ("within", "between"):
        link: LinkConfig = getattr(H100, name)
        slow = replace(H100, **{name: replace(link, gb_per_s=link.gb_per_s / 50)})
        assert step_time(step_of(model, slow, dims, 4, 4096)).exposed > base.exposed
    # A ring of more ranks has more steps.
    waits = [
        step_time(
            step_of(model, replace(H100, nodes=n), ParallelDims(shard=8 * n), 1, 4096)
        ).exposed
        for n in (1, 8, 128)
    ]
    assert waits == sorted(waits)


def test_a_lone_process_sends_nothing() -> None:
    model = load(["size=1b2", "model=vanilla"]).model
    time = step_time(step_of(model, load_cluster("h200"), ParallelDims(), 1, 4096))
    assert (time.sent, time.exposed) == (0, pytest.approx(0, abs=1e-12))


def test_ranks_that_share_cores_wait_for_each_other() -> None:
    model = load(["model=vanilla"]).model
    cores = {n: replace(H100, nodes=1, devices=4, cores=n) for n in (1, 2, 4)}
    times = {
        n: step_time(step_of(model, c, ParallelDims(shard=4), 1, 256)) for n, c in cores.items()
    }
    assert times[1].compute == pytest.approx(2 * times[2].compute) == 4 * times[4].compute
    assert times[4].exposed == pytest.approx(times[4].sent)  # nothing is hidden


# Failures


def test_youngs_and_dalys_intervals_by_hand() -> None:
    assert young_s(8, 10_000) == 400
    x = sqrt(8 / 20_000)
    assert daly_s(8, 10_000) == pytest.approx(400 * (1 + x / 3 + x * x / 9) - 8)
    assert daly_s(30, 10) == 10
    assert daly_s(1, inf) == inf


def test_dalys_interval_loses_the_least() -> None:
    cluster = replace(H100, failures_per_device_hour=1e-3, restart_s=60)
    saving = Saving(10**12, stall_s=20, write_s=1, read_s=30)
    young, daly = best_interval_s(saving, cluster)
    costs = {s: failures_of(saving, cluster, s).cost for s in (daly / 2, young, 2 * daly)}
    assert min(costs, key=lambda s: costs[s]) == young
    assert failures_of(saving, cluster, daly).cost == pytest.approx(costs[young], rel=0.01)


def test_what_a_failure_costs_by_hand() -> None:
    saving = saving_of(14 * 10**9, 2, H100)
    assert saving.stall_s == pytest.approx(7 / 30)
    assert saving.read_s == pytest.approx(14 / 15)
    assert saving.write_s == pytest.approx(14 / 7 + 14 / 15)  # and it is read back
    found = failures_of(saving, H100, 1000)
    assert found.per_day == pytest.approx(1.97e-5 * 64 * 24)
    assert found.lost_s == pytest.approx(500 + saving.write_s + 600 + saving.read_s)
    expected = found.per_day / 86400 * found.lost_s + saving.stall_s / 1000
    assert found.cost == pytest.approx(expected)
    assert failures_of(saving, replace(H100, failures_per_device_hour=0), inf).cost == 0


# The recommendation

SMALL = ["size=micro", "model=vanilla", "train.global_batch=4", "data.lanes=4", "train.seq_len=64"]

CPUS = replace(H100, nodes=1, devices=4, device="cpu", memory_gib=8)
"""Whose blocks are not compiled, and so are traced in less time."""


@pytest.fixture(scope="module")
def small() -> ClusterPlan:
    return plan_cluster("small", CPUS, load([*SMALL, "train.max_steps=100"]))


def test_the_fastest_mesh_that_fits_is_recommended(small: ClusterPlan) -> None:
    times = [layout.time.total for layout in small.layouts.fitting]
    assert times == sorted(times)
    assert small.best.time.total == min(times)
    assert {layout.name for layout in small.layouts.fitting} >= {"DDP", "FSDP2", "HSDP"}
    limit = 0.5 * small.cluster.memory
    assert all(layout.memory.total <= limit for layout in small.layouts.fitting)


def test_what_is_recommended_can_be_typed(small: ClusterPlan) -> None:
    for layout in small.of_each_kind:
        typed = load([*SMALL, *layout.settings])
        assert typed.problems_on(4) == []
        assert ParallelDims.of(typed.engine, 4) == layout.dims


def test_a_plan_in_json_has_every_mesh_by_part(small: ClusterPlan) -> None:
    told = json.loads(json.dumps(small.to_json(), allow_nan=False))
    assert len(told["meshes"]) == len(small.layouts.fitting)
    first = told["meshes"][0]
    assert first["step_s"]["total"] == pytest.approx(small.best.time.total)
    tokens = 100 * 4 * 64
    assert first["days"] == pytest.approx(tokens / first["tokens_per_s"] / 86400)
    assert first["device_hours"] == pytest.approx(first["days"] * 24 * 4)
    assert told["recommended"] == small.best.settings


def test_meshes_that_do_not_fit_are_left_out(small: ClusterPlan) -> None:
    totals = sorted(layout.memory.total for layout in small.layouts.fitting)
    gib = (totals[0] + totals[-1]) / 2 / 0.5 / 2**30
    tight = find_layouts(load(SMALL), replace(CPUS, memory_gib=gib))
    left = [layout for layout in small.layouts.fitting if layout.memory.total <= 0.5 * gib * 2**30]
    assert {layout.dims for layout in tight.fitting} == {layout.dims for layout in left}
    assert tight.too_large == len(totals) - len(left) > 0
    with pytest.raises(ConfigError, match="meshes of its 4 ranks fits"):
        plan_cluster("tight", replace(CPUS, memory_gib=0.001), load(SMALL))


def test_a_run_for_other_devices_or_engines_is_refused() -> None:
    config = load(["engine.device=cpu"])
    with pytest.raises(ConfigError, match=r"device='cpu': the devices of cluster=x are H100"):
        plan_cluster("x", H100, config)
    config = load(["engine=deepspeed"])
    with pytest.raises(ConfigError, match=r"engine.kind='deepspeed': cluster= lays out"):
        plan_cluster("x", H100, config)
