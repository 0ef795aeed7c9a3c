"""Each section says what it is for, of runs of which the right words are known."""

from dataclasses import fields, replace

import pytest

pytest.importorskip("matplotlib")

from tests.train.experiments.made_up import a_run, an_experiment
from train.experiments.charts import Chart
from train.experiments.document import Section, charts, tables
from train.experiments.experiment import Experiment, experiment_of
from train.experiments.groups import groups_of
from train.experiments.result import Curve, Estimate, Origin, TaskScore
from train.experiments.sections.ablations import ablations
from train.experiments.sections.costs import costs
from train.experiments.sections.curves import Seeds, curves
from train.experiments.sections.equal import equal
from train.experiments.sections.final import final
from train.experiments.sections.settings import settings
from train.experiments.sections.tasks import tasks
from train.experiments.sections.unfinished import unfinished
from train.experiments.tables import MISSING, Table


@pytest.fixture(scope="module")
def experiment() -> Experiment:
    return experiment_of(an_experiment())


def table(section: Section | None, name: str) -> dict[str, dict[str, str]]:
    """The texts of a table by their row's first cell and the key of the column."""
    assert section
    (found,) = (table for table in tables((section,)) if table.name == name)
    assert isinstance(found, Table)
    keys = [column.key for column in found.columns]
    return {row[0].text: dict(zip(keys, (c.text for c in row), strict=True)) for row in found.rows}


def chart(section: Section | None, name: str) -> Chart:
    assert section
    return next(chart for chart in charts((section,)) if chart.name == name)


def test_the_final_table_has_the_spread_and_the_difference_to_vanilla(
    experiment: Experiment,
) -> None:
    rows = table(final(experiment), "final")
    assert rows["vanilla"]["difference"] == MISSING
    assert rows["phd-2"]["base"] == "vanilla"
    assert rows["phd-2"]["difference"] == rows["phd-2"]["low"] == "\N{MINUS SIGN}0.024"
    assert rows["phd-2"]["deviation"] == "0.0060"
    assert rows["phd_cswa-2-4-32"]["seeds"] == "one seed"
    assert rows["phd_cswa-2-4-32"]["low"] == MISSING


def test_vanilla_of_equal_flops_stands_beside_the_variants(experiment: Experiment) -> None:
    rows = table(equal(experiment), "equal-cost")
    assert rows["vanilla"]["at_equal_flops"] == "not reached"
    longer, phd = (
        float(rows[name]["at_equal_flops"]) for name in ("vanilla (1.74M tokens)", "phd-2")
    )
    assert longer < phd
    assert rows["naive_repeat-2"]["at_equal_kv_bytes"] == "costs more"
    assert rows["phd-2"]["at_equal_decode_ms"] == "not measured"
    assert rows["phd_cswa-3-16-32"]["at_equal_flops"].endswith("*")


def test_the_differences_of_all_costs_have_the_same_rows(experiment: Experiment) -> None:
    found = chart(equal(experiment), "against-vanilla")
    # Of the time of training no vanilla run has as much; the longer one is better with less.
    names = ["tokens", "flops", "seconds", "decode-ms", "kv-bytes"]
    assert [p.name for p in found.panels] == names
    assert len({panel.height for panel in found.panels}) == 1


def test_costs_are_told_beside_those_of_vanilla(experiment: Experiment) -> None:
    rows = table(costs(experiment), "costs")
    assert rows["phd_cswa-3-16-32"]["flops_per_token_ratio"] == "2.30"
    assert rows["naive_repeat-2"]["kv_bytes_ratio"] == "2.000"
    assert "mfu" not in rows["vanilla"]
    latency = table(costs(experiment), "latency")
    assert latency["phd_cswa-2-16-32"]["prefill_ratio"] == "1.10"


def test_only_runs_that_differ_in_nothing_else_are_joined(experiment: Experiment) -> None:
    section = ablations(experiment)
    K = chart(section, "over-k")
    assert [label for label, _ in K.legend] == [
        "naive_repeat-K",
        "phd-K",
        "phd_swa-K-16-inf",
        "phd_cswa-K-4-32",
        "phd_cswa-K-16-32",
    ]
    assert "phd-2-micro-copy_embedding" not in K.source.runs
    W = chart(section, "over-window")
    assert {run.rsplit("-micro")[0] for run in W.source.runs} == {
        "phd_cswa-2-4-32",
        "phd_cswa-2-16-32",
    }
    # W = 4 has the first seed alone, and is compared with that one.
    assert W.source.runs == ("phd_cswa-2-4-32-micro-seed_0", "phd_cswa-2-16-32-micro-seed_0")
    C = chart(section, "over-chunk")
    assert {run.rsplit("-micro")[0] for run in C.source.runs} == {
        "phd_swa-2-16-inf",
        "phd_cswa-2-16-32",
    }


def test_curves_are_of_all_groups_over_tokens_flops_and_time(experiment: Experiment) -> None:
    for name in ("training-loss", "heldout-bits"):
        found = chart(curves(experiment), name)
        assert [panel.name for panel in found.panels] == ["tokens", "flops", "time"]
        assert len(found.legend) == len(experiment.groups)
    assert (
        "at the end it is 3.425 to 3.515"
        in chart(curves(experiment), "training-loss").panels[0].alt
    )


def test_only_settings_that_differ_are_unfolded(experiment: Experiment) -> None:
    differing = table(settings(experiment), "settings")["vanilla-micro-seed_0"]
    common = table(settings(experiment), "common-settings")
    assert {"model.K", "model.window", "train.max_steps", "model.copy_embedding"} <= set(differing)
    assert {"optim.lr", "model.size"} <= set(common)
    assert not set(differing) & set(common)


def test_with_which_weights_a_run_began_is_told() -> None:
    runs = [a_run("phd-2", 0, gain=0.0, settings={"run.start_from": None})]
    first = {"run.start_from": "runs/first"}
    runs += [a_run(f"phd-{K}", 0, gain=0.0, settings=first) for K in (3, 4, 5)]
    step = Origin(path="/runs/first/checkpoints/step_7", step=7, manifest="0123456789abcdef")
    runs[2] = replace(runs[2], began_with=step)
    runs[3] = replace(runs[3], began_with=Origin(path="/models/olmo"))
    rows = table(settings(experiment_of(runs)), "settings")
    told = ["null", "runs/first", "runs/first (step 7, seal 0123456789ab)", "runs/first"]
    assert [row["run.start_from"] for row in rows.values()] == told


def test_tasks_are_told_with_their_errors(experiment: Experiment) -> None:
    assert (
        table(tasks(experiment), "tasks")["vanilla"]["arc_easy"] == "30.0 \N{PLUS-MINUS SIGN} 1.0"
    )


def test_a_task_that_was_asked_otherwise_has_a_column_of_its_own() -> None:
    score = TaskScore(
        accuracy=Estimate(value=0.5), accuracy_norm=None, shots=0, questions=100, chance=0.25
    )
    tasks_of = {
        "vanilla": {"arc": score, "boolq": score},
        "phd-2": {"arc": replace(score, shots=5), "boolq": score},
        "phd-3": {"arc": replace(score, questions=200), "boolq": score},
    }
    found = experiment_of([a_run(m, 0, gain=0.0, tasks=asked) for m, asked in tasks_of.items()])
    rows = table(tasks(found), "tasks")
    known = {
        label: sorted(key for key, words in row.items() if words == "50.0")
        for label, row in rows.items()
    }
    assert known == {
        "vanilla": ["arc_100_questions_0_shots", "boolq"],
        "phd-2": ["arc_100_questions_5_shots", "boolq"],
        "phd-3": ["arc_200_questions_0_shots", "boolq"],
    }
    assert "average" not in rows["vanilla"]


def test_no_average_counts_a_task_twice_of_which_two_numbers_of_questions_were_asked() -> None:
    score = TaskScore(accuracy=Estimate(value=0.5), accuracy_norm=None, shots=0, questions=100)
    most = replace(score, questions=200, accuracy=Estimate(value=0.9))
    runs = [
        a_run("phd-2", 0, gain=0.0, tasks={"arc": most, "boolq": score}),
        a_run("phd-2", 1, gain=0.0, tasks={"arc": score, "boolq": score}),
    ]
    row = table(tasks(experiment_of(runs)), "tasks")["phd-2"]
    assert (row["arc_100_questions_0_shots"], row["arc_200_questions_0_shots"]) == ("50.0", "90.0")
    assert not any(key.startswith("average") for key in row)


def test_a_task_with_other_examples_has_columns_and_averages_of_its_own() -> None:
    score = TaskScore(
        accuracy=Estimate(value=0.5), accuracy_norm=None, shots=0, questions=200, all_questions=570
    )
    five = replace(score, shots=5, accuracy=Estimate(value=0.7))
    asked = {"arc": score, "piqa": score, "arc_5shot": five, "piqa_5shot": five}
    found = tasks(experiment_of([a_run("vanilla", 0, gain=0.0, tasks=asked)]))
    row = table(found, "tasks")["vanilla"]
    assert (row["arc_200_questions_0_shots"], row["piqa_200_questions_5_shots"]) == ("50.0", "70.0")
    assert (row["average_0_shots"], row["average_5_shots"]) == ("50.0", "70.0")
    assert found
    (shown,) = (t for t in tables((found,)) if t.name == "tasks")
    assert shown.columns[1].unit == "200 of 570 questions, 0 shots"
    assert "it is always the same part of them" in shown.note


def test_accuracies_are_compared_by_the_seeds_that_all_groups_have() -> None:
    def a_score(value: float) -> dict[str, TaskScore]:
        estimate = Estimate(value=value)
        return {"arc": TaskScore(accuracy=estimate, accuracy_norm=None, shots=0, questions=9)}

    of = {("vanilla", 0): 0.5, ("vanilla", 1): 0.9, ("phd-2", 0): 0.6, ("phd-3", 0): 0.4}
    runs = [a_run(m, seed, gain=0.0, tasks=a_score(x)) for (m, seed), x in of.items()]
    found = tasks(experiment_of(runs))
    assert [row["arc"] for row in table(found, "tasks").values()] == ["50.0", "60.0", "40.0"]
    assert found
    (shown,) = tables((found,))
    assert "means are of seed 0, which all of them have" in shown.note


def test_seeds_are_compared_at_the_same_steps() -> None:
    group = groups_of([a_run("vanilla", seed, gain=0.0) for seed in range(2)])[0]
    whole, other = (run.curve for run in group.runs)
    odd = Curve(**{field.name: getattr(other, field.name)[1::2] for field in fields(Curve)})
    first, second = Seeds(group, [whole, odd]).values(lambda curve: curve.loss_ema)
    assert second == odd.loss_ema
    assert first == whole.loss_ema[1::2]


def test_the_costs_of_a_larger_vanilla_are_told_beside_those_of_the_usual_one() -> None:
    runs = [a_run(model, 0, gain=0.0) for model in ("vanilla", "phd-2")]
    larger = {"parameters": 2000, "flops_per_token": 2 * runs[0].flops_per_token}
    runs.append(a_run("vanilla", 0, gain=0.0, settings={"model.layers": 7}, **larger))
    rows = table(costs(experiment_of(runs)), "costs")
    assert rows["vanilla (layers=7)"]["flops_per_token_ratio"] == "2.00"


def test_values_side_by_side_are_of_the_seeds_that_all_groups_have() -> None:
    """Two groups that are equal for each seed look equal, however many seeds each of them has."""
    runs = [a_run(model, seed, gain=0.0) for model in ("vanilla", "phd-2") for seed in range(3)]
    found = experiment_of([*runs, a_run("phd_swa-2-1-inf", 0, gain=0.0)])
    (side,) = (t for t in tables((equal(found),)) if t.name == "equal-cost")
    of = {row[0].text: row[1].value for row in side.rows}
    assert of["phd-2"] == of["phd_swa-2-1-inf"] == runs[0].heldout["heldout"].bits_per_byte.value
    assert "Of seed 0 alone, which all groups that can be compared have" in side.note
    rows = table(final(found), "final")
    one, three = rows["phd_swa-2-1-inf"], rows["phd-2"]
    assert one["mean_of_shared_seeds"] == three["mean_of_shared_seeds"] == one["mean"]
    assert three["mean"] != one["mean"]
    (end,) = (t for t in tables((final(found),)) if t.name == "final")
    assert "All groups that can be compared have seed 0;" in end.note
    prices = chart(costs(found), "prices")
    assert len(prices.source.runs) == 3
    assert "Of seed 0 alone" in prices.note


def test_without_a_common_seed_the_page_says_that_means_tell_little() -> None:
    found = experiment_of([a_run("vanilla", 0, gain=0.0), a_run("phd-2", 1, gain=0.0)])
    for section, name in ((equal, "equal-cost"), (final, "final")):
        (side,) = (t for t in tables((section(found),)) if t.name == name)
        assert "There is no seed that all groups have" in side.note
        assert len(side.source.runs) == 2


def test_a_run_given_twice_is_named_and_makes_no_interval() -> None:
    runs = [a_run(model, 0, gain=0.0) for model in ("vanilla", "phd-2")]
    found = experiment_of([*runs, *(replace(run, name=f"{run.name}-again") for run in runs)])
    assert "low" not in table(final(found), "final")["phd-2"]
    rows = table(unfinished(found), "unfinished")
    assert [row["status"] for row in rows.values()] == ["given twice"] * 2
    assert rows["phd-2-micro-seed_0-again"]["reason"].endswith("phd-2-micro-seed_0, which counts")


def test_a_group_without_the_measure_is_in_every_table_and_cuts_no_seed() -> None:
    runs = [a_run(model, seed, gain=0.0) for model in ("vanilla", "phd-2") for seed in range(2)]
    found = experiment_of([*runs, a_run("phd-3", 7, gain=0.0, heldout={}, heldout_curves={})])
    assert table(equal(found), "equal-cost")["phd-3"]["at_equal_tokens"] == "not measured"
    rows = table(final(found), "final")
    assert (rows["phd-3"]["mean"], rows["phd-2"]["mean"]) == (MISSING, rows["vanilla"]["mean"])
    (side,) = (t for t in tables((final(found),)) if t.name == "final")
    assert "seed 7" not in side.note
    assert side.note.endswith("in no comparison: phd-3.")


def test_a_kv_cache_of_another_context_has_no_ratio() -> None:
    runs = [a_run("vanilla", 0, gain=0.0), a_run("phd-2", 0, gain=0.0)]
    runs.append(a_run("phd-3", 0, gain=0.0, kv_context=2048))
    rows = table(costs(experiment_of(runs)), "costs")
    assert [row["kv_bytes_ratio"] for row in rows.values()] == ["1.000", "1.000", MISSING]
