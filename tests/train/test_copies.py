"""K by schedule: everything that depends on it follows, and a run goes on bitwise at a switch."""

import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from conf.arguments import parse
from conf.errors import ConfigError
from phd.flops import training_flops
from tests.train.conftest import LoadedRun
from train.anomalies.detection import SpikeDetector
from train.arguments import EvaluateArguments
from train.checkpoint.load_run import load_run
from train.checkpoint.reader import flatten
from train.compose import load, other_runs
from train.config import Config
from train.evaluate import measure_texts
from train.evaluation.subject import of_run
from train.metrics.record import Metrics
from train.plan import make_plan
from train.run_dir.name import holds
from train.settings.faults import FaultsConfig

MakeConfig = Callable[..., Config]

SWITCHED = ("model=phd_cswa", "model.K=3", "schedule.copies={0:1,0.5:3}", "train.max_steps=8")
CLOSE = ("0.3333333", "0.33333333")  # equal in six digits
SWITCH = 4  # steps with one copy

WITH_COPIES = ("train/", "kv/", "eval/", "optim/grad_norm")


@pytest.fixture(scope="module")
def switched(
    small_at: Callable[..., list[str]],
    trained: Callable[..., LoadedRun],
    tmp_path_factory: pytest.TempPathFactory,
) -> LoadedRun:
    """A run whose copies are switched on after half of its steps."""
    directory = tmp_path_factory.mktemp("runs") / "switched"
    measured = ("checkpoint.every=1", "checkpoint.keep=8", "eval.every=1")
    return trained(load(small_at(directory, *SWITCHED, *measured)))


def everything(run: LoadedRun) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in flatten(run.run.engine.state()).items()}


def of_copies(lines: list[Metrics]) -> list[Metrics]:
    """What depends on K in the lines of a log."""
    return [{k: v for k, v in line.items() if k.startswith(WITH_COPIES)} for line in lines]


def test_until_the_switch_it_is_a_vanilla_run(
    switched: LoadedRun, config: MakeConfig, trained: Callable[..., LoadedRun], logged: Callable
) -> None:
    vanilla = trained(config("model=vanilla", "train.max_steps=8", "eval.every=1"))
    theirs, ours = (logged(run.run.directory) for run in (vanilla, switched))
    assert of_copies(ours[:SWITCH]) == of_copies(theirs[:SWITCH])
    for name in ("train/loss", "kv/bytes_per_sequence", "eval/heldout/loss"):
        assert ours[SWITCH][name] != theirs[SWITCH][name], name
    assert [line["progress/copies"] for line in ours] == [1] * SWITCH + [3] * SWITCH


def test_flops_and_slots_are_those_of_the_copies_of_the_moment(
    switched: LoadedRun, logged: Callable
) -> None:
    lines, config = logged(switched.run.directory, measured=True), switched.run.config
    flops = [0, *(line["progress/train_flops"] for line in lines)]
    steps = [now - before for before, now in pairwise(flops)]
    rows, T = config.train.global_batch, config.train.seq_len
    vanilla, phd = (rows * training_flops(m, T) for m in (config.model.vanilla_twin, config.model))
    assert steps == [vanilla] * SWITCH + [phd] * SWITCH
    assert config.flops_between(0, 8) == flops[-1] == switched.record.flops
    copies = [line["throughput/slots_per_s"] / line["throughput/tokens_per_s"] for line in lines]
    assert copies == pytest.approx([1] * SWITCH + [3] * SWITCH)


def test_the_loss_at_the_end_is_that_of_the_model_that_is_saved(
    switched: LoadedRun, opened: Callable
) -> None:
    assert load_run(switched.run.directory, torch.device("cpu")).model.config.K == 3
    again = opened(switched.run.config)
    assert again.finished
    measured = again.measure()
    assert measured == {key: switched.metrics[key] for key in measured}


@pytest.mark.parametrize(("step", "K"), [(SWITCH, 1), (SWITCH + 1, 3)])
def test_a_checkpoint_is_evaluated_with_the_copies_that_it_was_trained_with(
    step: int, K: int, switched: LoadedRun, logged: Callable, tmp_path: Path
) -> None:
    directory = tmp_path / "copy"
    shutil.copytree(switched.run.directory, directory)
    for later in range(step + 1, 9):
        shutil.rmtree(directory / "checkpoints" / f"step_{later:08d}")
    subject = of_run(directory, torch.device("cpu"))
    assert (subject.step, load_run(directory, subject.device).model.config.K) == (step, K)
    args = parse(EvaluateArguments, ["device=cpu", f"run={directory}"])
    found = measure_texts(args, subject)["heldout"].loss
    line = logged(directory)[step - 1]
    assert line["step"] == step
    assert found == pytest.approx(line["eval/heldout/loss"], rel=1e-5)


def test_vectors_of_copies_that_wait_are_no_part_of_a_checkpoints_model(
    config: MakeConfig, trained: Callable[..., LoadedRun]
) -> None:
    settings = config(*SWITCHED, "model.copy_embedding=true", "checkpoint.every=4")
    trained(settings)
    for step, K in ((8, 3), (SWITCH, 1)):
        model = load_run(settings.run_dir, torch.device("cpu")).model
        assert (model.config.K, len(model.copy_embed.weight)) == (K, K)
        shutil.rmtree(settings.run_dir / "checkpoints" / f"step_{step:08d}")


@pytest.mark.parametrize("step", [SWITCH - 1, SWITCH, SWITCH + 1])
def test_a_run_goes_on_bitwise_around_the_switch(
    step: int,
    switched: LoadedRun,
    trained: Callable[..., LoadedRun],
    small_at: Callable[..., list[str]],
    logged: Callable,
    tmp_path: Path,
) -> None:
    directory = tmp_path / "copy"
    shutil.copytree(switched.run.directory, directory)
    for later in range(step + 1, 9):
        shutil.rmtree(directory / "checkpoints" / f"step_{later:08d}")
    measured = ("checkpoint.every=1", "checkpoint.keep=8", "eval.every=1")
    resumed = trained(load(small_at(directory, *SWITCHED, *measured)))
    assert f"going on from {directory}/checkpoints/step_{step:08d}" in resumed.output
    assert "K is" not in resumed.output
    ours, theirs = everything(resumed), everything(switched)
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    assert logged(directory) == logged(switched.run.directory)


def test_another_schedule_of_copies_is_told_when_a_run_goes_on(
    switched: LoadedRun, trained: Callable[..., LoadedRun], small_at: Callable, tmp_path: Path
) -> None:
    directory = tmp_path / "copy"
    shutil.copytree(switched.run.directory, directory)
    longer = (*SWITCHED[:3], "train.max_steps=20")
    resumed = trained(load(small_at(directory, *longer)))
    told = "K is 1 from step 9 on; with the settings before, it would have been 3"
    assert told in resumed.output
    assert resumed.record.step == 20


def test_it_is_another_run_than_one_without_a_schedule() -> None:
    late, always = (load([*settings]) for settings in (SWITCHED[:3], SWITCHED[:2]))
    assert late.name == "phd_cswa-3-16-32-tiny-copies_0_1_0.5_3"
    assert always.name == "phd_cswa-3-16-32-tiny"
    assert not holds(Path("nowhere"), late)
    third, close = (load([*SWITCHED[:2], f"schedule.copies={{0:1,{at}:3}}"]) for at in CLOSE)
    assert third.name != close.name
    assert Config.from_dict(late.to_dict()) == late


@pytest.mark.parametrize(
    ("copies", "others", "told"),
    [
        ("{0.5:1,0.75:2}", [], "the first fraction must be 0"),
        ("{0:1,0.7:3,0.3:2}", [], "the fractions must increase"),
        ("{0:1,1:2}", [], "fractions are from 0 to below 1"),
        ("{0:0,0.5:2}", [], "K is at least 1"),
        ("{0:2}", [], "a fraction that does not change K says nothing"),
        ("{0:1,0.5:3}", [], "its last K is not model.K=2"),
        ("{0:1,0.5:2}", ["model=vanilla"], "vanilla feeds each token once"),
        ("{0:1,0.5:2}", ["model=vanilla", "train.max_flops=1e13"], "vanilla feeds each token once"),
        ("{0:1,0.5:2}", ["model=vanilla", "train.flops_of=phd-2"], "vanilla feeds each token once"),
        ("{0:1,0.999:2}", [], "the run has 320 steps, too few for a step with each K"),
        ("{0:1,0.5:2}", ["train.max_time=1h", "schedule=constant"], "whose length in steps is"),
        ("{0:3,0.5:2}", ["model.copy_embedding=true"], "let the last K be the largest"),
        (
            "{0:1,0.5:2}",
            ["model=sps"],
            "=learned is not trained while there are no",
        ),
        ("{0:3,0.5:2}", ["model.copy_input=table"], "has tables for the last model.K=2 copies"),
        ("{a:1}", [], "expected the K from each fraction of the run on"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(copies: str, others: list[str], told: str) -> None:
    with pytest.raises(ConfigError) as error:
        load([f"schedule.copies={copies}", *others])
    [problem] = error.value.problems
    assert str(problem).startswith("schedule.copies=")
    assert told in str(problem)


@pytest.mark.parametrize("copies", ["{0:1,0.75:2}", "{0:1,0.5:4,0.9:2}", "{0:8,0.1:2}"])
def test_a_limit_of_flops_is_filled_with_whole_steps(copies: str) -> None:
    for flops in (2e12, 2.1e13):
        config = load([f"schedule.copies={copies}", f"train.max_flops={flops}"])
        steps = config.total_steps
        assert steps is not None
        assert config.flops_between(0, steps) <= flops
        longer = load([f"schedule.copies={copies}", f"train.max_steps={steps + 1}"])
        assert longer.flops_between(0, steps + 1) > flops


def test_a_late_switch_may_take_the_flops_of_copies_all_the_time() -> None:
    """The reference has its K from the first step on, whatever the schedule of the run is."""
    late = ("model=phd", "schedule.copies={0:1,0.75:2}")
    for limit in ("train.max_steps=40", "train.max_flops=3e13"):
        always = load(["model=phd", limit])
        alone, own = (load([*late, limit, *more]) for more in ((), ("train.flops_of=phd-2",)))
        assert always.total_steps is not None
        assert own.total_steps is not None
        spent = own.flops_between(0, own.total_steps)
        allowed = always.total_steps * always.flops_per_step
        assert allowed - always.flops_per_step < spent <= allowed, limit
        assert own.total_steps > always.total_steps
        assert "train.flops_of" not in {problem.key for problem in own.unused()}
        assert own.name != alone.name


def test_the_plan_is_that_of_all_stages() -> None:
    late = load(["schedule.copies={0:1,0.75:2}"])
    plan, phd, vanilla = (make_plan(c) for c in (late, load([]), load(["model=vanilla"])))
    assert phd.flops is not None
    assert vanilla.flops is not None
    assert plan.flops == pytest.approx(0.75 * vanilla.flops + 0.25 * phd.flops)
    assert plan.memory == phd.memory
    tokens_per_step = late.train.tokens_per_step
    assert late.mean_step_flops / tokens_per_step == pytest.approx(plan.compute.flops)
    told = plan.to_json()
    assert told["copies"] == [
        {"first": 0, "end": 240, "K": 1},
        {"first": 240, "end": None, "K": 2},
    ]
    less = load(["schedule.copies={0:2,0.75:1}", "model.K=1"])
    assert make_plan(less).memory == phd.memory


def test_the_runs_to_compare_it_with_have_no_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    typed = ["model=phd", "schedule.copies={0:1,0.75:2}", "seed=3"]
    monkeypatch.setattr("sys.argv", ["main.py", *typed])
    proposed = [" ".join(arguments) for arguments in other_runs(load(typed))]
    assert proposed == ["model=vanilla seed=3", "-m +sweep=k seed=3"]


def test_a_loss_that_jumps_at_the_switch_is_no_spike() -> None:
    detector = SpikeDetector(FaultsConfig(spike=6.0, window=8))
    for step in range(1, 21):
        detector.observe(step, 2.0, 1.0, applied=True)
    assert detector.limits(22).loss < 3
    assert detector.limits(22, since=21).loss == torch.inf
