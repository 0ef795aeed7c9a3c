"""A spike is told from noise, a new regime from a spike, and a bad step is written down."""

import json
from collections.abc import Iterator
from math import inf, isfinite, nan
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.loader import Loader
from tests.train.batches import batch_of
from tests.train.many_ranks import run_ranks
from train.anomalies.detection import SpikeDetector
from train.anomalies.policy import layer_report
from train.anomalies.report import BadStep, write_bad_step
from train.compose import load
from train.distributed.dist_env import DistEnv
from train.distributed.process_groups import ProcessGroups
from train.engines.fsdp import FsdpEngine
from train.engines.limits import Limits
from train.engines.mesh import ParallelDims
from train.loop import train_step
from train.settings.faults import FaultsConfig

WINDOW = 8
FAULTS = FaultsConfig(spike=6.0, window=WINDOW, most_in_a_row=6)
ROWS = torch.randint(0, 320, (4, 33), generator=torch.Generator().manual_seed(1))


def fine(limits: Limits, loss: float) -> bool:
    """Whether an engine would apply a step with this loss and a gradient norm of 1."""
    return isfinite(loss) and loss <= limits.loss and limits.grad_norm >= 1.0


def fed(bad_steps: SpikeDetector, losses: list[float], first: int = 1) -> list[bool]:
    """Take steps as an engine would; which of them were applied."""
    applied = []
    for step, loss in enumerate(losses, first):
        limits = bad_steps.limits(step)
        applied.append(fine(limits, loss))
        bad_steps.observe(step, loss, 1.0, applied[-1])
    return applied


def noise(count: int, around: float = 4.0, seed: int = 0) -> list[float]:
    rng = Random(seed)
    return [around + rng.gauss(0, 0.1) for _ in range(count)]


def test_limits_are_robust_deviations_above_the_median() -> None:
    bad_steps = SpikeDetector(FAULTS)
    losses = noise(20)
    for step, loss in enumerate(losses, 1):
        bad_steps.observe(step, loss, 10 * loss, True)
    seen = losses[-1 - WINDOW : -1]  # the last step is not looked at yet
    middle = median(seen)
    most = middle + 6 * 1.4826 * median([abs(loss - middle) for loss in seen])
    assert bad_steps.limits(21) == pytest.approx((most, 10 * most))


def test_without_a_threshold_nothing_finite_is_bad() -> None:
    bad_steps = SpikeDetector(FaultsConfig(window=WINDOW))
    assert fed(bad_steps, [1.0] * 20 + [1e30, nan, inf]) == [True] * 21 + [False] * 2
    assert bad_steps.limits(30) == Limits()


def test_there_is_no_limit_before_half_a_window_is_known() -> None:
    bad_steps = SpikeDetector(FAULTS)
    for step in range(1, 5):
        bad_steps.observe(step, 4.0, 1.0, True)
        assert bad_steps.limits(step + 1) == Limits()
    assert bad_steps.limits(6).loss < inf


def test_a_constant_history_allows_noise() -> None:
    bad_steps = SpikeDetector(FAULTS)
    assert all(fed(bad_steps, [4.0] * 20 + [4.1]))
    assert fed(bad_steps, [4.5], first=22) == [False]


def test_one_spike_is_refused_and_moves_no_limit() -> None:
    with_spike, without = SpikeDetector(FAULTS), SpikeDetector(FAULTS)
    losses = noise(10)
    applied = fed(with_spike, [*losses, 50.0, *losses])
    assert applied == [True] * 10 + [False] + [True] * 10
    fed(without, [*losses, *losses])
    assert (with_spike.count, with_spike.in_a_row) == (1, 0)
    assert with_spike.limits(22) == without.limits(21)


def test_a_lasting_change_is_accepted_before_it_ends_the_run() -> None:
    bad_steps = SpikeDetector(FAULTS)
    applied = fed(bad_steps, noise(20) + noise(20, around=8.0))
    refused = [step for step, accepted in enumerate(applied, 1) if not accepted]
    # Half of 6 in a row, and what was on the way until they had been looked at.
    assert refused == [21, 22, 23, 24]
    assert not bad_steps.too_many
    assert fed(bad_steps, [50.0], first=41) == [False]


@given(
    before=st.lists(st.floats(0, 100), max_size=30),
    after=st.lists(st.floats(0, 1e6), min_size=40, max_size=40),
    most=st.integers(4, 12),
)
def test_no_finite_losses_are_refused_for_ever(
    before: list[float], after: list[float], most: int
) -> None:
    bad_steps = SpikeDetector(FaultsConfig(spike=6.0, window=WINDOW, most_in_a_row=most))
    fed(bad_steps, before)
    for step, loss in enumerate(after, len(before) + 1):
        fed(bad_steps, [loss], step)
        assert not bad_steps.too_many


def test_what_is_not_finite_ends_the_run_when_it_does_not_stop() -> None:
    bad_steps = SpikeDetector(FAULTS)
    fed(bad_steps, noise(10))
    for number in range(1, 6):
        fed(bad_steps, [nan if number % 2 else inf], 10 + number)
        assert not bad_steps.too_many
    fed(bad_steps, [nan], 16)
    assert bad_steps.too_many
    assert (bad_steps.count, bad_steps.in_a_row) == (6, 6)
    fed(bad_steps, [4.0], 17)
    assert not bad_steps.too_many


@given(
    losses=st.lists(st.sampled_from([3.9, 4.0, 4.1, 4.2, 9.0, 50.0, nan, inf]), max_size=60),
    cut=st.integers(0, 60),
    looks=st.sets(st.integers(1, 60)),
)
def test_limits_are_the_same_after_a_resume_and_whenever_steps_are_looked_at(
    losses: list[float], cut: int, looks: set[int]
) -> None:
    at_once = SpikeDetector(FAULTS)
    expected = []
    for step, loss in enumerate(losses, 1):
        expected.append(at_once.limits(step))
        at_once.observe(step, loss, 1.0, fine(expected[-1], loss))

    late = SpikeDetector(FAULTS)
    waiting: list[tuple[int, float, float, bool]] = []
    for step, loss in enumerate(losses, 1):
        limits = late.limits(step)
        assert limits == expected[step - 1]
        for outcome in waiting:  # one step late, as while the device computes
            late.observe(*outcome)
        waiting = [(step, loss, 1.0, fine(limits, loss))]
        if step == cut or step in looks:  # a save or a log looks at the last one, too
            late.observe(*waiting.pop())
        if step == cut:
            late = SpikeDetector(FAULTS, json.loads(json.dumps(late.to_json(), allow_nan=False)))


# What is written


@pytest.fixture
def written(config: Any, opened: Any) -> tuple[Any, Any]:
    """A run of a small model, and its first batch."""
    run = opened(config())
    return run, next(Loader(run.stream))


BAD = BadStep(step=7, batch=8, loss=nan, grad_norm=2.5, limits=Limits(4.5, inf), lr=1e-3)


def test_a_bad_step_is_written_with_its_text(written: tuple[Any, Any], tmp_path: Path) -> None:
    run, batch = written
    mask = torch.ones(4, 32, dtype=torch.bool).numpy()
    mask[1, 5:] = False
    batch = batch._replace(mask=mask)
    layers = layer_report(run.engine, batch)
    path = write_bad_step(tmp_path, BAD, batch, run.tokenizer, layers, run.groups, run.engine.dims)
    assert path == tmp_path / "bad_steps/step_00000007/rank_0.json"
    record = json.loads(path.read_text())
    assert (record["step"], record["batch"], record["lr"]) == (7, 8, 1e-3)
    assert (record["loss"], record["grad_norm"]) == ("nan", 2.5)
    assert record["limits"] == {"loss": 4.5, "grad_norm": "inf"}
    assert record["layers"] == json.loads(json.dumps(layers))
    rows = record["rows"]
    assert [row["row"] for row in rows] == [0, 1, 2, 3]
    assert [row["lane"] for row in rows] == [0, 1, 0, 1]
    assert [row["targets"] for row in rows] == [32, 5, 32, 32]
    assert [row["tokens"] for row in rows] == batch.rows.tolist()
    assert rows[0]["text"] == run.tokenizer.decode(batch.rows[0])
    assert rows[1]["text"] == run.tokenizer.decode(batch.rows[1, :6])
    after = {lane: cursor["goes_on"] for lane, cursor in record["lanes"].items()}
    assert after == json.loads(json.dumps(batch.stats.cursors))


def test_rows_are_written_once_by_the_ranks_that_work_on_them(
    written: tuple[Any, Any], tmp_path: Path
) -> None:
    run, batch = written
    dims = ParallelDims(shard=2, context=2)
    records = []
    for rank in range(4):
        groups = ProcessGroups(DistEnv(rank=rank, world_size=4))
        path = write_bad_step(tmp_path, BAD, batch, run.tokenizer, {}, groups, dims)
        records.append(json.loads(path.read_text()))
    assert [record["context_rank"] for record in records] == ["0 of 2", "1 of 2"] * 2
    assert ["rows" in record for record in records] == [True, False] * 2
    assert ["lanes" in record for record in records] == [True, False] * 2
    assert [row["row"] for row in records[2]["rows"]] == [1, 3, 5, 7]


def test_a_bad_step_reads_as_a_sentence() -> None:
    assert str(BAD) == (
        "step 7 is bad: its loss is nan (at most 4.5), its gradient norm 2.5 (must be finite)"
    )


def test_a_disk_that_refuses_is_an_oserror(written: tuple[Any, Any], tmp_path: Path) -> None:
    run, batch = written
    (tmp_path / "bad_steps").touch()
    with pytest.raises(OSError, match="bad_steps"):
        write_bad_step(tmp_path, BAD, batch, run.tokenizer, {}, run.groups, run.engine.dims)


# Layers


def numbers(layers: Any) -> Iterator[float]:
    for kinds in layers.values():
        for size in kinds.values():
            yield from size.values()


@pytest.mark.parametrize("others", [[], ["train.micro_batch=1"]])
def test_layers_are_measured_as_a_plain_pass_finds_them(others: list[str], config: Any) -> None:
    engine = FsdpEngine(config(*others), ProcessGroups())
    model = engine.model
    layers = layer_report(engine, batch_of(ROWS))
    assert list(layers) == ["embed", "blocks.0", "blocks.1", "norm"]

    outputs: dict[str, torch.Tensor] = {}
    for name, module in (("blocks.0", model.blocks[0]), ("norm", model.norm)):
        module.register_forward_hook(lambda *seen, name=name: outputs.update({name: seen[2]}))
    loss = engine.model_with_loss(ROWS[:, :-1], ROWS[:, 1:]).total / ROWS[:, 1:].numel()
    gradients = torch.autograd.grad(loss, list(outputs.values()))
    for (name, output), gradient in zip(outputs.items(), gradients, strict=True):
        for kind, x in (("output", output), ("gradient", gradient)):
            size = layers[name][kind]
            assert size["norm"] == pytest.approx(x.norm().item(), rel=1e-4)
            assert size["largest"] == pytest.approx(x.abs().max().item(), rel=1e-4)
            assert size["not_finite"] == 0
    for number, block in enumerate(model.blocks):
        flat = torch.cat([p.detach().flatten() for p in block.parameters()])
        size = layers[f"blocks.{number}"]["weight"]
        assert size["norm"] == pytest.approx(flat.norm().item())
        assert size["largest"] == pytest.approx(flat.abs().max().item())


def test_a_report_says_where_the_first_number_is_that_is_none(config: Any) -> None:
    engine = FsdpEngine(config(), ProcessGroups())
    with torch.no_grad():
        engine.model.blocks[1].ffn.down.weight[3, 4] = nan
    layers = layer_report(engine, batch_of(ROWS))
    assert layers["blocks.0"]["weight"]["not_finite"] == 0
    assert layers["blocks.0"]["output"]["not_finite"] == 0
    assert layers["blocks.1"]["weight"]["not_finite"] == 1
    assert layers["blocks.1"]["output"]["not_finite"] > 0
    assert all(number == number and abs(number) < inf for number in numbers(layers))


def steps(engine: FsdpEngine, reported: bool) -> list[float]:
    losses = []
    for _ in range(3):
        if reported:
            layer_report(engine, batch_of(ROWS))
        result = train_step(engine, batch_of(ROWS), 0.01)
        assert result is not None
        losses.append(result.loss.item())
    return losses


@pytest.mark.parametrize(
    "others",
    [["engine.activation_checkpointing=full"], ["train.micro_batch=2"]],
)
def test_a_report_changes_nothing_of_the_training(others: list[str], config: Any) -> None:
    plain = layer_report(FsdpEngine(config(), ProcessGroups()), batch_of(ROWS))
    engine = FsdpEngine(config(*others), ProcessGroups())
    mine = layer_report(engine, batch_of(ROWS))
    assert list(numbers(mine)) == pytest.approx(list(numbers(plain)), rel=1e-4)
    untouched = FsdpEngine(config(*others), ProcessGroups())
    assert steps(engine, reported=True) == steps(untouched, reported=False)


def on_two_ranks(groups: ProcessGroups, kinds: list[list[str]]) -> list[Any]:
    """Of each engine the report on this rank's rows, and the step after it."""
    found = []
    for overrides in kinds:
        engine = FsdpEngine(load(overrides), groups)
        rows = batch_of(ROWS[groups.rank :: groups.world_size])
        layers = layer_report(engine, rows)
        result = train_step(engine, rows, 0.01)
        assert result is not None
        found.append((layers, [result.loss.item(), result.grad_norm.item()]))
    return found


@pytest.mark.process
def test_ranks_report_on_their_own_rows_and_on_whole_weights(small: Any) -> None:
    groups = run_ranks(2, on_two_ranks, [small("engine=fsdp"), small("engine=ddp")])
    ((alone, expected),) = on_two_ranks(ProcessGroups(), [small()])
    for (first, step), (second, _) in zip(*groups, strict=True):
        assert step == pytest.approx(expected, rel=1e-4)
        for layer, kinds in alone.items():
            assert first[layer]["weight"] == pytest.approx(kinds["weight"])
            parts = (first[layer]["output"], second[layer]["output"])
            squares = sum(part["norm"] ** 2 for part in parts)
            assert squares == pytest.approx(kinds["output"]["norm"] ** 2, rel=1e-4)
