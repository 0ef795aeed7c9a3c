"""Runs that differ in their seed alone are one group, and each group has a label of its own."""

from dataclasses import replace

from tests.train.experiments.made_up import a_run, an_experiment
from train.experiments.groups import groups_of, twice
from train.experiments.source import source_of
from train.experiments.theme import VANILLA


def test_groups_and_labels() -> None:
    groups = groups_of(an_experiment())
    assert [(group.label, len(group.runs)) for group in groups] == [
        ("vanilla", 3),
        ("vanilla (1.74M tokens)", 3),
        ("naive_repeat-2", 3),
        ("phd-2", 3),
        ("phd-2 (copy_embedding=true)", 1),
        ("phd_swa-2-16-inf", 3),
        ("phd_cswa-2-4-32", 1),
        ("phd_cswa-2-16-32", 3),
        ("phd_cswa-3-16-32", 3),
    ]
    assert [group.style.role == VANILLA for group in groups] == [True] * 2 + [False] * 7


def test_a_label_says_no_more_than_it_has_to() -> None:
    groups = groups_of([a_run("vanilla", 0, gain=0.0), a_run("phd-2", 0, gain=0.0)])
    assert [group.label for group in groups] == ["vanilla", "phd-2"]


def test_a_label_tells_what_has_no_usual_value() -> None:
    runs = [a_run("phd-2", 0, gain=0.0, steps=steps) for steps in (512, 1024)]
    runs += [a_run("phd-3", 0, gain=0.0, steps=512, settings={"optim.lr": 0.001})]
    runs += [a_run("phd-3", 0, gain=0.0, steps=1024, settings={"optim.lr": 0.001})]
    assert [group.label for group in groups_of(runs)] == [
        "phd-2 (1.05M tokens, lr=0.003)",
        "phd-2 (2.1M tokens, lr=0.003)",
        "phd-3 (1.05M tokens, lr=0.001)",
        "phd-3 (2.1M tokens, lr=0.001)",
    ]


def test_labels_differ_also_where_no_setting_tells_why() -> None:
    runs = [a_run("phd-2", 0, gain=0.0, name=name, group=name) for name in ("a", "b")]
    assert [group.label for group in groups_of(runs)] == ["phd-2 (a)", "phd-2 (b)"]


def test_a_source_says_how_many_seeds_it_has() -> None:
    runs = [a_run("phd-2", seed, gain=0.0) for seed in range(3)]
    vanilla = a_run("vanilla", 0, gain=0.0)
    assert str(source_of(runs)) == "3 runs, 3 seeds"
    assert str(source_of(runs[:1])) == "1 run, one seed"
    assert str(source_of([runs[0], vanilla])) == "2 runs, one seed each"
    assert str(source_of([*runs, vanilla])) == "4 runs, 1 to 3 seeds each"


def test_a_run_that_is_given_twice_is_one_seed() -> None:
    run = a_run("phd-2", 0, gain=0.0)
    again = replace(run, name="a copy")
    (group,) = groups_of([run, again])
    assert group.runs == (run,)
    assert twice([run, again]) == [(again, run)]
    source = source_of([run, again])
    assert source.one_seed
    assert source.alone == (run.name, again.name)
