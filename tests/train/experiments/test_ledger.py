"""A result tells what a run's directory holds, once each, and survives being made again."""

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from conf.errors import DataError
from train.compose import load
from train.config import Config
from train.distributed.process_groups import ProcessGroups
from train.experiments import curves
from train.experiments.ledger import (
    Ended,
    add_scores,
    forget_end,
    group_of,
    of_fewer_questions,
    read_run,
    record_end,
    result_of,
    update,
)
from train.experiments.recorder import failures_recorded
from train.experiments.result import (
    Estimate,
    Heldout,
    Origin,
    TaskScore,
    read_result,
    write_result,
)

SCORE = TaskScore(
    accuracy=Estimate(value=0.5, standard_error=0.1), accuracy_norm=None, shots=0, questions=20
)
TEXT = Heldout(bits_per_byte=Estimate(value=1.5, standard_error=0.1), loss=3.0, tokens=5, bytes=9)


def line(step: int, loss: float | None, step_s: float = 0.5, **others: Any) -> dict[str, Any]:
    """A line of `metrics.jsonl` of a run with 10 tokens and 100 FLOPs a step."""
    return {
        "step": step,
        "train/loss": loss,
        "progress/tokens": 10 * step,
        "progress/train_flops": 100.0 * step,
        "throughput/step_s": step_s,
        "throughput/tokens_per_s": 10 / step_s,
        "throughput/tokens_per_s_per_device": 5 / step_s,
        **others,
    }


def evaluated(bits: float, **others: Any) -> dict[str, Any]:
    told = {"loss": 2 * bits, "bits_per_byte": bits, **others}
    return {f"eval/heldout/{name}": value for name, value in told.items()}


@pytest.fixture(scope="module")
def settings(small_at: Callable[..., list[str]]) -> Config:
    """Of a run of six steps."""
    return load(small_at(Path("runs/small")))


@pytest.fixture
def run(settings: Config, tmp_path: Path) -> Callable[..., Path]:
    """Writes the directory of a run of six steps that logged these lines."""

    def written(*lines: dict[str, Any]) -> Path:
        directory = tmp_path / "run"
        directory.mkdir(exist_ok=True)
        (directory / "config.yaml").write_text(yaml.safe_dump(settings.to_dict()))
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (directory / "metrics.jsonl").write_text(text)
        return directory

    return written


def test_an_old_run_gives_a_result(run) -> None:
    last = evaluated(2.0, bits_per_byte_stderr=0.1, documents=7, tokens=50, bytes=90)
    directory = run(line(2, 4.0, 1.0), {"step": 4, **evaluated(3.0)}, line(6, 3.0, 0.5, **last))
    start = {"argv": ["/bin/python", "train/main.py", "seed=0"], "revision": "abc", "device": "GPU"}
    (directory / "environment.json").write_text(json.dumps([{}, start]))
    found = result_of(directory)
    assert (found.status, found.reason) == ("finished", None)
    assert (found.steps, found.tokens, found.train_flops, found.train_s) == (6, 60, 600.0, 4.0)
    assert (found.total_steps, found.at_end) == (6, True)
    assert (found.devices, found.device, found.commit) == (2, "GPU", "abc")
    assert found.command == "python train/main.py seed=0"
    assert (found.loss, found.tokens_per_s) == (3.0, 15.0)
    assert found.heldout == {
        "heldout": Heldout(
            bits_per_byte=Estimate(value=2.0, standard_error=0.1),
            loss=4.0,
            tokens=50,
            bytes=90,
            documents=7,
            step=6,
        )
    }
    curve = found.heldout_curves["heldout"]
    assert (curve.step, curve.bits_per_byte) == ([4, 6], [3.0, 2.0])
    assert (curve.tokens, curve.flops, curve.seconds) == ([40, 60], [400.0, 600.0], [3.0, 4.0])
    assert found.differences["model.dim"] == 16
    assert not {"engine.compile", "run.dir"} & found.differences.keys()
    assert read_result(update(directory)) == found == read_run(directory)


def test_a_start_that_only_measured_is_not_the_one_that_trained(run) -> None:
    directory = run(*(line(step, 3.0, time=1000.0 + step) for step in range(1, 7)))
    trained = {"time": "1970-01-01 00:16:30 +0000", "revision": "abc", "device": "GPU"}
    measured = {"time": "1970-01-01 00:20:00 +0000", "revision": "def", "device": "cpu"}
    with (directory / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 6, "time": 1200.5, **evaluated(2.0)}) + "\n")
    for starts in ([trained], [trained, measured]):
        (directory / "environment.json").write_text(json.dumps(starts))
        found = result_of(directory)
        assert (found.commit, found.device) == ("abc", "GPU")
    (directory / "environment.json").write_text(json.dumps([trained, trained | {"revision": "x"}]))
    assert result_of(directory).commit == "x"  # it trained on


def test_a_step_that_was_taken_again_counts_once(run) -> None:
    before = [line(2, 9.0), line(4, 9.0, **evaluated(9.0))]
    again = [line(3, 4.0), line(4, 4.0), {"step": 3, **evaluated(5.0)}]
    found = result_of(run(*before, *again))
    assert (found.curve.step, found.curve.loss) == ([2, 3, 4], [9.0, 4.0, 4.0])
    assert found.train_s == 4 * 0.5
    assert found.heldout_curves["heldout"].bits_per_byte == [5.0]


def test_losses_are_smoothed_by_steps_and_then_thinned(
    run, monkeypatch: pytest.MonkeyPatch
) -> None:
    each = [line(step, float(step % 3)) for step in range(1, 7)]
    slow, weight = 0.0, 0.0
    for step in range(1, 7):
        slow, weight = 0.99 * slow + 0.01 * (step % 3), 0.99 * weight + 0.01
    assert result_of(run(*each)).loss_ema == pytest.approx(slow / weight)
    monkeypatch.setattr(curves, "MOST_POINTS", 3)
    thin = result_of(run(*each)).curve
    assert thin.step == [1, 3, 6]
    assert thin.loss_ema[-1] == pytest.approx(slow / weight)


@pytest.mark.parametrize(
    ("losses", "status", "says"),
    [
        ([3.0], "unfinished", "step 1 of 6; it ended without a word"),
        ([], "unfinished", "step 0 of 6; it ended without a word"),
        ([3.0, None], "diverged", "the loss of step 2 is not finite"),
        ([3.0] * 6, "finished", None),
    ],
)
def test_a_run_that_noted_no_end_stands_as_its_metrics_tell(run, losses, status, says) -> None:
    found = result_of(run(*(line(step, loss) for step, loss in enumerate(losses, 1))))
    assert (found.status, found.reason) == (status, says)


def test_a_run_that_was_killed_before_its_last_evaluation_is_not_finished(run) -> None:
    before = [line(3, 4.0), {"step": 3, **evaluated(9.0)}, line(6, 3.0)]
    directory = run(*before)
    found = result_of(directory)
    assert found.status == "unfinished"
    assert found.reason is not None
    assert "before heldout was evaluated after its last step" in found.reason
    assert found.heldout["heldout"].step == 3
    assert result_of(run(*before, {"step": 6, **evaluated(2.0)})).status == "finished"
    of_the_users = {key.replace("heldout", "my.jsonl"): 1.0 for key in evaluated(1.0)}
    assert result_of(run({"step": 3, **of_the_users}, line(6, 3.0))).status == "finished"
    task = {"step": 3, "eval/olmo_piqa/acc": 0.5}
    assert result_of(run(task, line(6, 3.0))).status == "finished"  # none that the run asks for


@pytest.mark.parametrize("logged", ["olmo_piqa_5shot", "olmo_piqa"])  # as earlier versions named it
def test_a_run_that_was_killed_before_its_last_tasks_is_not_finished(
    logged: str, run, settings: Config
) -> None:
    directory = run({"step": 3, f"eval/{logged}/acc": 0.5}, line(6, 3.0))
    tasks = replace(settings.eval, tasks=("olmo_piqa",), task_shots=5)
    told = yaml.safe_dump(replace(settings, eval=tasks).to_dict())
    (directory / "config.yaml").write_text(told)
    found = result_of(directory)
    assert found.status == "unfinished"
    assert "before olmo_piqa was evaluated after its last step" in str(found.reason)


def test_how_a_run_has_ended_is_kept_until_it_goes_on(run) -> None:
    directory = run(line(1, 3.0))
    ended = Ended(status="failed", reason="DataError: https://me:secret@host/a is missing")
    for found in (read_result(record_end(directory, ended)), result_of(directory)):
        assert found.status == "failed"
        assert found.reason == "DataError: https://***@host/a is missing"
    forget_end(directory)
    assert result_of(directory).status == "unfinished"
    assert not (directory / "result.json").exists()  # it would still say that the run has failed


def test_a_refused_command_says_nothing_of_a_run_that_it_is_not(run, settings: Config) -> None:
    def status_after_refusal(config: Config, *lines: dict[str, Any]) -> str:
        directory = run(*lines)
        config = replace(config, run=replace(config.run, dir=str(directory)))
        console = Console(file=io.StringIO())
        with (
            pytest.raises(DataError, match="no such text"),
            failures_recorded(config, ProcessGroups(), console),
        ):
            raise DataError("no such text")
        assert console.file.getvalue() == ""
        return result_of(directory).status

    assert status_after_refusal(replace(settings, seed=5), line(1, 3.0)) == "unfinished"
    assert status_after_refusal(settings, line(6, 3.0)) == "finished"
    assert status_after_refusal(settings, line(1, 3.0)) == "failed"


def test_scores_stay_until_there_is_a_later_checkpoint(run) -> None:
    directory = run(line(6, 3.0, **evaluated(2.0)))
    add_scores(directory, step=6, tasks={"arc": SCORE})
    found = read_result(add_scores(directory, step=6, heldout={"my.jsonl": TEXT}))
    assert found.tasks == {"arc": SCORE}
    assert found.heldout.keys() == {"heldout", "my.jsonl"}
    assert result_of(directory) == found
    add_scores(directory, step=6, tasks={"arc": replace(SCORE, questions=5)})
    assert result_of(directory) == found  # what was asked fewer questions says less
    later = directory / "checkpoints" / "step_00000009"
    later.mkdir(parents=True)
    assert result_of(directory) == found  # it is not complete
    (later / "COMPLETE").touch()
    assert result_of(directory).tasks == {}
    assert add_scores(directory, step=9, heldout={"my.jsonl": TEXT})
    assert result_of(directory).tasks == {}


def asked(name: str, accuracy: float, questions: int) -> dict[str, Any]:
    told = {"acc": accuracy, "acc_stderr": 0.1, "shots": 0, "questions": questions, "chance": 0.25}
    return {f"eval/{name}/{what}": value for what, value in told.items()}


def test_scores_that_a_run_has_logged_at_its_end_are_part_of_its_result(run) -> None:
    halfway = {"step": 3, **asked("arc", 0.3, 200)}
    old = {"step": 6, "eval/piqa/acc": 0.5}  # of a version that did not say how it asked
    directory = run(line(3, 4.0), halfway, line(6, 3.0), old)
    record_end(directory, Ended(status="finished"))
    assert result_of(directory).tasks == {}
    directory = run(line(3, 4.0), halfway, line(6, 3.0, **asked("arc", 0.4, 200)))
    own = result_of(directory).tasks["arc"]
    assert own == TaskScore(
        accuracy=Estimate(value=0.4, standard_error=0.1),
        accuracy_norm=None,
        shots=0,
        questions=200,
        chance=0.25,
    )
    few, full = (replace(own, questions=n, accuracy=Estimate(value=0.9)) for n in (20, 500))
    assert of_fewer_questions(directory, step=6, tasks={"arc": few, "other": few}) == ["arc"]
    assert of_fewer_questions(directory, step=6, tasks={"arc": full}) == []
    for score, kept in ((few, own), (full, full)):
        add_scores(directory, step=6, tasks={"arc": score})
        assert result_of(directory).tasks == {"arc": kept}


def test_the_scores_of_an_unfinished_run_are_of_one_step(run) -> None:
    first, second = asked("arc", 0.3, 200), asked("arc", 0.4, 200)
    directory = run(line(3, 4.0, **first), line(4, 3.0))
    assert result_of(directory).tasks["arc"].accuracy.value == 0.3
    add_scores(directory, step=3, tasks={"piqa": SCORE})
    assert result_of(directory).tasks.keys() == {"arc", "piqa"}
    directory = run(line(3, 4.0, **first), line(4, 3.0, **second), line(5, 3.0))
    assert result_of(directory).tasks.keys() == {"arc"}
    assert result_of(directory).tasks["arc"].accuracy.value == 0.4


def test_scores_of_a_task_with_other_examples_stay_beside_each_other(run) -> None:
    directory = run(line(6, 3.0))
    five = replace(SCORE, shots=5)
    # As an earlier version has named it.
    add_scores(directory, step=6, tasks={"arc": five})
    add_scores(directory, step=6, tasks={"arc": SCORE})
    assert result_of(directory).tasks == {"arc": SCORE, "arc_5shot": five}


def test_losses_of_earlier_checkpoints_do_not_stay_as_the_runs_own(run) -> None:
    mine = {key.replace("heldout", "my.jsonl"): x for key, x in evaluated(1.0).items()}
    halfway = [line(3, 4.0), {"step": 3, **evaluated(3.0)}, {"step": 3, **mine}]
    directory = run(*halfway)
    add_scores(directory, step=3, heldout={"other.jsonl": TEXT})
    there = result_of(directory)
    assert there.heldout.keys() == {"heldout", "my.jsonl", "other.jsonl"}
    assert {text.step for text in there.heldout.values()} == {3}
    # No later checkpoint is there: the scores alone do not tell that they are old.
    done = result_of(run(*halfway, line(6, 3.0, **evaluated(2.0))))
    assert done.heldout.keys() == {"heldout"}
    assert (done.heldout["heldout"].bits_per_byte.value, done.heldout["heldout"].step) == (2.0, 6)
    record_end(run(*halfway, line(6, 3.0)), Ended(status="finished"))
    assert result_of(directory).heldout == {}


def test_a_kept_result_of_an_earlier_version_has_the_settings_that_came_later(
    run, tmp_path
) -> None:
    whole = result_of(run(line(6, 3.0)))
    kept = tmp_path / "kept"
    kept.mkdir()
    without = {key: x for key, x in whole.settings.items() if key != "model.mup_base_dim"}
    path = write_result(kept, replace(whole, settings=without))
    assert read_run(path).settings == read_run(kept).settings == whole.settings


def test_a_kept_result_of_an_earlier_version_is_of_the_group_of_todays_seeds(run, tmp_path) -> None:
    """The key of a group is made of all settings, so a new setting would make it another one."""
    whole = result_of(run(line(6, 3.0)))
    assert read_run(write_result(tmp_path, replace(whole, group="earlier"))).group == whole.group
    # What cannot be made anew stays.
    unknown = {**whole.settings, "model.gone": 1}
    earlier = replace(whole, group="earlier", settings=unknown)
    assert read_run(write_result(tmp_path, earlier)).group == "earlier"


def test_a_metric_of_the_users_that_is_named_like_an_evaluation_is_none(run) -> None:
    theirs = {"eval/theirs/bits_per_byte": 1.0}
    found = result_of(run(line(6, 3.0, **evaluated(2.0), **theirs)))
    assert found.heldout.keys() == found.heldout_curves.keys() == {"heldout"}


def test_runs_are_of_one_group_if_only_their_seed_differs(settings) -> None:
    named = replace(settings.run, name="a", dir="b")
    same = replace(settings, run=named, seed=3, checkpoint=replace(settings.checkpoint, every=7))
    longer = replace(settings, train=replace(settings.train, max_steps=7))
    faster = replace(settings, optim=replace(settings.optim, lr=0.5))
    groups = [group_of(config) for config in (settings, same, longer, faster)]
    assert groups[0] == groups[1]
    assert len(set(groups)) == 3


def test_the_weights_that_a_run_began_with_are_part_of_its_result(run) -> None:
    directory = run(line(1, 3.0))
    assert result_of(directory).began_with is None
    start = {"path": "/runs/first/checkpoints/step_00000003", "step": 3, "manifest": "ab"}
    (directory / "start.json").write_text(json.dumps(start))
    assert read_result(update(directory)).began_with == Origin(**start)


def test_damaged_files_are_told(run) -> None:
    directory = run(line(1, 3.0))
    for name in ("scores.json", "ended.json", "start.json"):
        (directory / name).write_text("{")
        with pytest.raises(DataError, match=f"{name}: is damaged"):
            result_of(directory)
        (directory / name).unlink()
    (directory / "config.yaml").write_text("modle: 1")
    with pytest.raises(DataError, match=r"config\.yaml: is of another version"):
        result_of(directory)
