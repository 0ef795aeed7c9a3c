"""Several decays from one trunk: each is the run, bit by bit, that has taken all steps itself."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conf.errors import ConfigError, DataError
from tests.train.conftest import LoadedRun
from train.checkpoint.reader import Checkpoint
from train.compose import check, load
from train.config import Config
from train.engines.schedule import learning_rate
from train.experiments.experiment import experiment_of
from train.experiments.fits.choice import over_size_and_data
from train.experiments.fits.families import points_of, variants
from train.experiments.groups import groups_of, twice
from train.experiments.ledger import result_of
from train.experiments.result import Result
from train.experiments.sections.settings import settings as settings_section
from train.experiments.sections.unfinished import unfinished
from train.main import main
from train.metrics.record import Metrics
from train.plan import make_plan
from train.run import Run
from train.start.trunk import decays_of
from train.sweeps.finished import finished

Opened = Callable[[Config], Run]
Trained = Callable[..., LoadedRun]
Logged = Callable[..., list[Metrics]]

TRUNK = (
    *("schedule=wsd_s", "schedule.decays=[4,6,10]", "schedule.decay_fraction=0.5"),
    *("schedule.warmup_fraction=0.25", "checkpoint.every=1", "checkpoint.keep=1"),
    "train.max_steps=null",
)
WHOLE = ("schedule=wsd", "schedule.decay_fraction=0.5", "schedule.warmup_steps=1")


@pytest.fixture(scope="module", autouse=True)
def typed() -> Iterator[None]:
    """The command line is not pytest's: a run suggests what to type next."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train/main.py"])
        yield


@pytest.fixture(scope="module")
def law(small_at: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A trunk and its three decays, trained by one command; they begin after steps 2, 3 and 5."""
    config = load(small_at(tmp_path_factory.mktemp("runs") / "law", *TRUNK))
    assert main(config) == 0
    return config


@pytest.fixture
def whole(config: Callable[..., Config]) -> Callable[..., Config]:
    """A run with all steps of its own, or the decay of a trunk; others are settings by name."""

    def made(steps: int, **others: Any) -> Config:
        return changed(config(*WHOLE), **{"train.max_steps": steps, **others})

    return made


def changed(config: Config, **settings: Any) -> Config:
    """The config with other settings, by their full names."""
    tree = config.to_dict()
    for name, value in settings.items():
        *sections, last = name.split(".")
        part = tree
        for section in sections:
            part = part[section]
        part[last] = value
    return Config.from_dict(tree)


def decay(law: Config, length: int) -> Path:
    return law.run_dir.with_name(f"law-{length}_steps")


def saved(directory: Path) -> dict[str, Tensor]:
    """Everything in the newest checkpoint."""
    checkpoint = Checkpoint.open(max((directory / "checkpoints").glob("step_*")))
    return checkpoint.read(checkpoint.specs)


def assert_same_run(one: Path, other: Path, logged: Logged) -> None:
    """The weights, moments and random numbers at the end, and all that was logged on the way."""
    ours, theirs = saved(one), saved(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    steps = [
        [
            {k: v for k, v in line.items() if not k.startswith(("eval/", "sample/"))}
            for line in lines
        ]
        for lines in map(logged, (one, other))
    ]
    assert steps[0] == steps[1]
    evaluated = [logged(directory)[-1]["eval/heldout/loss"] for directory in (one, other)]
    assert evaluated[0] == evaluated[1]


def refusal(config: Config, opened: Opened) -> str:
    with pytest.raises((ConfigError, DataError)) as error:
        opened(config)
    return " ".join(str(error.value).split())


def test_a_trunk_keeps_the_checkpoints_where_its_decays_begin(law: Config) -> None:
    kept = sorted(path.name for path in (law.run_dir / "checkpoints").iterdir())
    assert kept == [f"step_{step:08d}" for step in (2, 3, 5)]
    assert law.branches == {4: 2, 6: 3, 10: 5}
    assert (law.total_steps, law.warmup_steps) == (5, 1)
    assert {learning_rate(law, step) for step in range(5)} == {law.optim.lr}


@pytest.mark.parametrize("steps", [4, 10])
def test_a_decay_is_the_run_that_has_taken_all_steps_itself(
    steps: int, law: Config, whole: Callable[..., Config], trained: Trained, logged: Logged
) -> None:
    alone = trained(whole(steps)).run
    assert_same_run(decay(law, steps), alone.directory, logged)
    ours, theirs = result_of(decay(law, steps)), result_of(alone.directory)
    assert ours.group == theirs.group  # two seeds of one group, and here one seed twice
    for name in ("status", "steps", "total_steps", "tokens", "train_flops", "heldout"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert (ours.curve.step, ours.curve.loss) == (theirs.curve.step, theirs.curve.loss)
    assert ours.train_s > sum(result_of(law.run_dir).curve.seconds[:1])
    assert ours.trunk is not None
    assert (ours.trunk.step, theirs.trunk) == (law.branches[steps], None)
    assert ours.began_with is None


def test_a_finished_trunk_is_passed_over_with_its_decays(
    law: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finished(law) == "5 steps, and 3 decays"
    assert main(law) == 0
    assert capsys.readouterr().out.count("finished already") == 4
    assert finished(changed(law, **{"schedule.decays": [4, 6, 20]})) is None


def test_a_longer_trunk_goes_on_and_has_one_more_decay(
    law: Config,
    whole: Callable[..., Config],
    trained: Trained,
    logged: Logged,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    directory = tmp_path / "runs"
    shutil.copytree(law.run_dir.parent, directory)
    longer = changed(law, **{"run.dir": str(directory / "law"), "schedule.decays": [4, 6, 10, 14]})
    assert main(longer) == 0
    told = capsys.readouterr().out
    assert "going on from" in told
    assert told.count("finished already") == 3
    assert_same_run(directory / "law-14_steps", trained(whole(14)).run.directory, logged)
    # Another warm-up would make other decays of it than those that it has.
    with pytest.raises(ConfigError, match="its warm-up took 1 step, and now it is"):
        main(changed(longer, **{"schedule.warmup_fraction": 0.5}))


def test_a_killed_decay_goes_on_from_its_own_checkpoint(
    law: Config, whole: Callable[..., Config], trained: Trained, logged: Logged
) -> None:
    often = {"checkpoint.every": 1, "checkpoint.keep": 9}
    config = whole(10, **{"run.decay_of": str(law.run_dir), **often})
    first = trained(config)
    assert "the trunk has 5 of the run's 10 steps" in first.output
    assert_same_run(config.run_dir, decay(law, 10), logged)
    for step in (8, 9, 10):
        shutil.rmtree(config.run_dir / "checkpoints" / f"step_{step:08d}")
    again = trained(config)
    assert "going on from" in again.output
    assert "step_00000007" in again.output
    assert_same_run(config.run_dir, decay(law, 10), logged)
    with pytest.raises(ConfigError, match="its decay ends at step 10, and now at step 12"):
        trained(changed(config, **{"train.max_steps": 12}))
    with pytest.raises(ConfigError, match=r"its decay has schedule\.decay_fraction=0\.5, and now"):
        trained(changed(config, **{"schedule.decay_fraction": 0.2}))
    with pytest.raises(ConfigError, match=r"it holds another run: optim\.lr"):
        trained(changed(config, **{"optim.lr": 0.5}))


def test_without_a_checkpoint_of_its_beginning_it_starts_from_an_earlier_one(
    law: Config, whole: Callable[..., Config], trained: Trained, logged: Logged, tmp_path: Path
) -> None:
    config = whole(8, **{"run.decay_of": str(law.run_dir)})
    ours = trained(config)
    assert "no whole checkpoint of step 4, where the decay begins: 1 step" in ours.output
    alone = trained(whole(8, **{"run.dir": str(tmp_path / "alone")}))
    assert_same_run(config.run_dir, alone.run.directory, logged)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"seed": 1, "optim.lr": 0.1}, ("optim.lr=0.1: the trunk", "seed=1: the trunk")),
        ({"model.K": 3}, ("model.K=3: the trunk", "has 2")),
        ({"data.holdout": 0.1, "train.seq_len": 16}, ("data.holdout=0.1", "train.seq_len=16")),
        ({"optim.kind": "muon"}, ("optim.kind='muon': the trunk",)),
        ({"schedule.warmup_steps": 2}, ("had a warm-up of 1 step; set schedule.warmup_steps=1",)),
    ],
)
def test_other_settings_than_the_trunks_are_named(
    settings: dict[str, Any],
    named: tuple[str, ...],
    law: Config,
    whole: Callable[..., Config],
    opened: Opened,
) -> None:
    told = refusal(whole(10, **{"run.decay_of": str(law.run_dir), **settings}), opened)
    for text in named:
        assert text in told


def test_a_trunk_that_cannot_serve_says_why(
    law: Config, whole: Callable[..., Config], opened: Opened, tmp_path: Path
) -> None:
    def told(steps: int, trunk: Path) -> str:
        return refusal(whole(steps, **{"run.decay_of": str(trunk)}), opened)

    assert "no such directory; give that of a run" in told(10, tmp_path / "nowhere")
    assert "is no directory of a run" in told(10, tmp_path)
    far = "has ended after step 5, as it was told, and a decay at the end of 40 steps begins after"
    assert far in told(40, law.run_dir)
    assert "again, with this length in schedule.decays" in told(40, law.run_dir)
    early = "its first checkpoint is of step 2, and a decay at the end of 2 steps begins after"
    assert early in told(2, law.run_dir)
    falls = "its learning rate falls from step 3 on, before the checkpoint of step 4"
    assert falls in told(8, decay(law, 4))
    shutil.copytree(law.run_dir, tmp_path / "law")
    for state in (tmp_path / "law" / "checkpoints").glob("*/state.json"):
        state.write_text(state.read_text().replace("lane", "line"))
    assert "every checkpoint in" in told(10, tmp_path / "law")
    kept = tmp_path / "law" / "checkpoints"
    shutil.copytree(kept / "step_00000002", kept / "step_mine")
    (tmp_path / "law" / "result.json").unlink()
    far = "has come to step 5, and a decay at the end of 40 steps begins after step 20; let it"
    assert far in told(40, tmp_path / "law")


def test_a_decay_after_the_end_of_its_trunks_text_is_told_so(
    law: Config, whole: Callable[..., Config], opened: Opened, tmp_path: Path
) -> None:
    settings = {"schedule.decays": [4, 400], "data.sources.files.epochs": 1.0}
    short = changed(law, **{"run.dir": str(tmp_path / "short"), **settings, "run.decays": False})
    assert main(short) == 0
    decay = {"run.decay_of": str(short.run_dir), "data.sources.files.epochs": 1.0}
    told = refusal(whole(400, **decay), opened)
    assert "its text ended after step" in told
    assert "raise data.sources.*.epochs of the trunk" in told


def test_the_report_has_the_decays_as_points_and_says_what_they_share(law: Config) -> None:
    directories = [law.run_dir, *(decay(law, steps) for steps in (4, 6, 10))]
    results = [result_of(path) for path in directories]
    experiment = experiment_of(results)
    tokens = [group.runs[0].tokens for group in experiment.groups]
    assert tokens == [steps * law.train.tokens_per_step for steps in (4, 6, 10)]
    assert "Decays, which share the steps of their trunk" in experiment.of_trunks
    left, shared = unfinished(experiment), settings_section(experiment)
    assert left is not None
    assert shared is not None
    assert "a trunk at its peak learning rate" in repr(left)
    assert "(step 5, seal " in repr(shared)
    [family] = variants([run for group in experiment.groups for run in group.runs])
    points = points_of(family.runs, experiment.measure.of)
    # Three lengths are three values of D, and a law over D needs one group more.
    refused = over_size_and_data(points).refused
    assert refused is not None
    assert refused.reasons[0].endswith("there are 1 and 3.")


def test_decays_of_two_trunks_are_seeds_of_one_group(law: Config) -> None:
    def of_seed(seed: int) -> list[Result]:
        found = [result_of(decay(law, steps)) for steps in (4, 10)]
        return [replace(result, seed=seed, name=f"{result.name}{seed}") for result in found]

    assert [len(group.runs) for group in groups_of([*of_seed(0), *of_seed(1)])] == [2, 2]
    assert len(twice([*of_seed(0), *of_seed(0)])) == 2


def test_the_plan_tells_what_a_trunk_and_its_decays_cost(law: Config) -> None:
    plan = make_plan(law)
    assert [(d.steps, d.begins_after) for d in plan.decays] == [(4, 2), (6, 3), (10, 5)]
    per_step = law.train.tokens_per_step * plan.compute.flops
    assert [d.flops for d in plan.decays] == [pytest.approx(n * per_step) for n in (2, 3, 5)]
    assert plan.disk.most == 1 + 2 + 1  # the newest, two that are kept, the last
    of_decay = make_plan(decays_of(law)[2])
    assert of_decay.own_flops == pytest.approx(5 * per_step)
    assert of_decay.flops == pytest.approx(10 * per_step)


def test_decays_can_be_given_in_tokens_and_tokens_per_parameter(law: Config) -> None:
    def lengths(**given: Any) -> dict[int, int]:
        return changed(law, **{"schedule.decays": None, **given}).branches

    assert lengths(**{"schedule.decays_tokens": [512, 1300]}) == {4: 2, 10: 5}
    each = [0.5, 1.0]
    whole = [
        changed(law, **{"schedule.kind": "wsd", "train.max_tokens_per_parameter": ratio})
        for ratio in each
    ]
    found = lengths(**{"schedule.decays_tokens_per_parameter": each})
    assert list(found) == [run.total_steps for run in whole]


def test_a_decays_name_is_that_which_its_trunk_gives_it(
    law: Config, small: Callable[..., list[str]]
) -> None:
    own = [text for text in small(*WHOLE) if not text.startswith("run.dir")]
    sweep = check([*own, "run.decay_of=runs/law", "train.max_steps=4,6"], multirun=True)
    assert [job.name for job in sweep.jobs] == ["law-4_steps", "law-6_steps"]
    trunk = changed(law, **{"run.dir": None, "run.name": "law"})
    assert [job.name for job in decays_of(trunk)][:2] == ["law-4_steps", "law-6_steps"]


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"decays": None}, "schedule.decays=null: schedule.kind=wsd_s has to know"),
        ({"decays": [6, 4]}, "schedule.decays=[6, 4]: expected lengths above 0 that increase"),
        ({"decays": [0, 4]}, "schedule.decays=[0, 4]: expected lengths above 0"),
        ({"decays": []}, "schedule.decays=[]: expected lengths above 0"),
        ({"decays_tokens": [99]}, "schedule.decays_tokens=[99]: schedule.decays already says"),
        ({"warmup_steps": 3}, "schedule.decays=[4, 6, 10]: the decay of a run of 4 steps begins"),
        ({"decay_fraction": 0.0}, "schedule.decay_fraction=0: the decays of"),
        ({"decay_fraction": 1.0}, "schedule.decays=[4, 6, 10]: a run of 4 steps has no step"),
        ({"train.max_steps": 8}, "a decay ends at step 10, and train.max_steps allows 8 steps"),
        ({"train.flops_of": "phd-2"}, "train.flops_of='phd-2': schedule.decays says how long"),
        ({"copies": {0: 1, 0.5: 2}}, "the runs of schedule.kind=wsd_s have several lengths"),
        ({"run.decay_of": "runs/a"}, "schedule.kind=wsd_s has no end that could start from a"),
        ({"kind": "wsd", "run.decay_of": "runs/a", "decay_fraction": 0.0}, "would have no steps"),
        (
            {"kind": "wsd", "run.decay_of": "runs/a", "copies": {0: 1, 0.5: 2}},
            "a decay has the copies of its trunk in all steps",
        ),
        (
            {"decays": None, "decays_tokens": [256, 300]},
            "schedule.decays_tokens=[256, 300]: in steps these are [2], of which some are equal",
        ),
        (
            {"decays": None, "decays_tokens": [10, 20]},
            "schedule.decays_tokens=[10, 20]: less than one step, which is 128 tokens",
        ),
        (
            {"decays": [2, 4], "decay_fraction": 0.2, "warmup_fraction": 0.0},
            "schedule.decays=[2, 4]: schedule.decay_fraction=0.2 of a run of 2 steps is no whole",
        ),
    ],
)
def test_impossible_decays_are_named(settings: dict[str, Any], problem: str, law: Config) -> None:
    named = {key if "." in key else f"schedule.{key}": value for key, value in settings.items()}
    with pytest.raises(ConfigError) as error:
        changed(law, **named)
    [told] = error.value.problems
    assert problem in str(told)


def test_decays_without_a_trunk_change_nothing_and_are_refused_where_typed(law: Config) -> None:
    other = changed(law, **{"schedule.kind": "cosine", "run.decays": False})
    reason = "schedule.kind=cosine has no decays; leave it out, or choose"
    told = [str(problem) for problem in other.unused()]
    assert [text.partition(":")[0] for text in told if reason in text] == [
        "schedule.decays=[4, 6, 10]",
        "run.decays=false",
    ]


def test_what_is_kept_of_a_trunk_names_the_checkpoint(law: Config) -> None:
    kept = json.loads((decay(law, 6) / "trunk.json").read_text())
    assert kept["step"] == 3
    assert Path(kept["path"]) == (law.run_dir / "checkpoints" / "step_00000003").resolve()
