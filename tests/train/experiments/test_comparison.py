"""Comparisons of results whose answers are known by hand."""

from dataclasses import replace
from math import sqrt
from typing import Any

import pytest
from scipy.stats import t, ttest_ind

from tests.train.experiments.results import a_result
from train.experiments.comparison import (
    Cost,
    Lack,
    against_vanilla,
    difference,
    final_table,
    notes_at_end,
    side_by_side,
)
from train.experiments.experiment import Experiment, experiment_of
from train.experiments.result import Estimate, Heldout, HeldoutCurve, Latency, Origin, Result

SPEED = ("threads", "compile", "precision")


def run(model: str, seed: int, bits: float, *, tokens: int = 1000, **others: Any) -> Result:
    """A run that was evaluated at its half and its end; a token of vanilla is 10 FLOPs and 1 ms."""
    cost = others.pop("cost", 1.0 if model == "vanilla" else 2.0)
    curve = HeldoutCurve(
        step=[1, 2],
        tokens=[tokens // 2, tokens],
        flops=[5 * cost * tokens, 10 * cost * tokens],
        seconds=[tokens * cost / 2000, tokens * cost / 1000],
        bits_per_byte=[bits + 1, bits],
    )
    text = Heldout(bits_per_byte=Estimate(value=bits, standard_error=0.02), loss=3.0)
    return replace(
        a_result(),
        name=f"{model}-{tokens}-{seed}",
        model=model,
        seed=seed,
        tokens=tokens,
        train_flops=10 * cost * tokens,
        train_s=tokens * cost / 1000,
        group=f"{model}-{tokens}-{others.get('size', 'micro')}",
        settings={"model.variant": model},
        heldout={"heldout": text},
        heldout_curves={"heldout": curve},
        **others,
    )


@pytest.fixture
def experiment() -> Experiment:
    """Two variants with three seeds, and vanilla with as many FLOPs as the second one, one seed."""
    return experiment_of(
        [
            *(run("vanilla", seed, 2.0 + seed) for seed in range(3)),
            *(run("phd-2", seed, 1.7 + 1.1 * seed, kv_bytes=1005) for seed in range(3)),
            run("naive_repeat-2", 0, 1.9, kv_bytes=2000),
            run("vanilla", 0, 1.6, tokens=2000),
            replace(run("phd-3", 0, 0.0), status="failed"),
        ]
    )


def test_pairs_of_seeds_give_students_interval() -> None:
    found = difference(((0, 1.7), (1, 2.8), (2, 3.9)), ((0, 2.0), (1, 3.0), (2, 4.0), (3, 9.0)))
    half = t.ppf(0.975, 2) * 0.1 / sqrt(3)  # of -0.3, -0.2, -0.1
    assert (found.mean, found.low, found.high) == pytest.approx((-0.2, -0.2 - half, -0.2 + half))
    assert (found.seeds, found.paired, found.is_clear) == (3, True, False)


def test_groups_without_common_seeds_give_welchs_interval() -> None:
    ours, theirs = ((0, 1.0), (1, 1.2), (2, 1.1)), ((3, 2.0), (4, 2.5))
    found = difference(ours, theirs)
    a, b = ([value for _, value in values] for values in (ours, theirs))
    low, high = ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    assert (found.mean, found.low, found.high) == pytest.approx((1.1 - 2.25, low, high))
    assert (found.seeds, found.paired) == (2, False)
    same = difference(((0, 1.0), (1, 1.0)), ((2, 3.0), (3, 3.0)))
    assert (same.low, same.high, same.is_clear) == (-2.0, -2.0, True)


@pytest.mark.parametrize("theirs", [((0, 5.0),), ((1, 5.0),)])
def test_one_seed_gives_no_interval(theirs) -> None:
    found = difference(((0, 4.0), (9, 0.0)) if theirs[0][0] == 0 else ((0, 4.0),), theirs)
    assert (found.mean, found.low, found.high) == (-1.0, None, None)
    assert (found.seeds, found.paired, found.is_clear) == (1, theirs[0][0] == 0, False)


def test_at_the_end_each_group_is_compared_with_the_usual_vanilla(experiment: Experiment) -> None:
    rows = {row.group.key: row for row in final_table(experiment)}
    assert list(rows) == [
        "vanilla-1000-micro",
        "vanilla-2000-micro",
        "naive_repeat-2-1000-micro",
        "phd-2-1000-micro",
    ]
    base, longer, naive, phd = rows.values()
    assert base.base is None
    assert base.difference is None
    assert (base.value.mean, base.value.deviation, base.value.seeds) == (3.0, 1.0, 3)
    assert base.text_error == 0.02
    for row, mean, seeds in ((longer, -0.4, 1), (naive, -0.1, 1), (phd, -0.2, 3)):
        assert row.base.key == "vanilla-1000-micro"
        assert (row.difference.mean, row.difference.seeds) == (pytest.approx(mean), seeds)


def test_side_by_side_each_cost_has_its_own_winner(experiment: Experiment) -> None:
    tokens, flops, seconds, decode, kv = side_by_side(experiment)

    def values(cost: Any) -> list[float | Lack]:
        return [s.value.mean if s.value else s.lack for s in cost.standings.values()]

    # At half of its tokens the longer vanilla is 1 worse than at its end.
    assert tokens.amount == 1000
    assert values(tokens) == pytest.approx([3.0, 2.6, 1.9, 2.8])
    assert [s.at_end for s in tokens.standings.values()] == [True, False, True, True]
    # PHD is better at equal tokens, and worse at equal FLOPs.
    phd = [cost.standings["phd-2-1000-micro"] for cost in (tokens, flops)]
    assert [s.rival.key for s in phd] == ["vanilla-1000-micro", "vanilla-2000-micro"]
    assert [s.difference.mean for s in phd] == pytest.approx([-0.2, 0.1])
    assert (flops.amount, seconds.amount) == (20000, 2)
    assert values(flops) == values(seconds) == [Lack.NOT_REACHED, 1.6, 1.9, pytest.approx(2.8)]
    # A window's 0.5 % count as equal; twice as much does not.
    assert kv.amount == 1005
    assert values(kv) == [3.0, pytest.approx(2.6), Lack.OVER, pytest.approx(2.8)]
    assert (decode.amount, decode.lack) == (None, Lack.NOT_MEASURED)


def test_a_curve_is_a_straight_line_between_evaluations_and_ends_where_it_ends() -> None:
    experiment = experiment_of([run("vanilla", 0, 2.0), run("phd-2", 0, 1.0, tokens=1600)])
    [tokens, flops, *_] = side_by_side(experiment)
    assert tokens.amount == 1000
    # 2 at 800 tokens, 1 at 1600.
    assert tokens.standings["phd-2-1600-micro"].value.mean == pytest.approx(1.75)
    assert flops.amount == 10000
    assert flops.standings["phd-2-1600-micro"].lack == Lack.NOT_EVALUATED
    [row] = against_vanilla(experiment)
    assert {s.lack for s in row.standings.values()} == {Lack.NOT_REACHED, Lack.NOT_MEASURED}


def test_each_group_stands_beside_the_best_vanilla_that_had_as_much() -> None:
    def latency(ms: float) -> list[Latency]:
        return [
            Latency(
                device="GPU", dtype="bfloat16", context=9, batch=1, prefill_ms=None, decode_ms=ms
            )
        ]

    large = {"size": "large", "parameters": 1700, "kv_bytes": 2000}
    experiment = experiment_of(
        [
            run("vanilla", 0, 2.0, latency=latency(1.0)),
            run("vanilla", 0, 1.5, cost=2.0, latency=latency(1.9), **large),
            run("phd-2", 0, 1.8, latency=latency(1.2)),
            run("phd-3", 0, 1.6, cost=3.0, latency=latency(2.0)),
            run("naive_repeat-2", 0, 1.9, kv_bytes=2000, device="another"),
        ]
    )
    rows = {row.group.model: row.standings for row in against_vanilla(experiment)}
    means = {
        model: {
            cost: round(s.difference.mean, 3) if s.difference else s.lack
            for cost, s in standings.items()
        }
        for model, standings in rows.items()
    }
    assert means["phd-2"] == {
        Cost.TOKENS: -0.2,  # only vanilla of its size
        Cost.FLOPS: 0.3,  # the larger one has as many FLOPs
        Cost.SECONDS: 0.3,
        Cost.DECODE_MS: -0.2,  # the larger one is slower
        Cost.KV_BYTES: -0.2,  # the larger one has more
    }
    assert means["phd-3"] == {
        Cost.TOKENS: -0.4,
        Cost.FLOPS: 0.1,  # the larger one is better with two thirds
        Cost.SECONDS: 0.1,
        Cost.DECODE_MS: 0.1,  # the larger one is as fast
        Cost.KV_BYTES: -0.4,
    }
    assert means["naive_repeat-2"][Cost.SECONDS] == Lack.OTHER_DEVICE
    assert means["naive_repeat-2"][Cost.DECODE_MS] == Lack.NOT_MEASURED
    assert means["naive_repeat-2"][Cost.KV_BYTES] == 0.4
    decode = side_by_side(experiment)[3]
    assert decode.amount == 1.2
    assert decode.setting == "GPU, bfloat16, 9 tokens of context, batch 1"
    assert [s.lack for s in decode.standings.values()] == [
        None,
        Lack.OVER,
        Lack.NOT_MEASURED,
        None,
        Lack.OVER,
    ]


def test_vanilla_that_is_better_with_less_wins_and_is_marked() -> None:
    """Cheaper vanilla is not passed over for a dearer one that is worse."""
    cheap = run("vanilla", 0, 1.5, cost=1.5, size="large", parameters=1700)
    dear = run("vanilla", 0, 2.2, cost=2.0, size="huge", parameters=2500)
    for others in ([cheap], [cheap, dear]):
        [row] = against_vanilla(experiment_of([*others, run("phd-2", 0, 2.0)]))
        for cost in (Cost.FLOPS, Cost.SECONDS):
            standing = row.standings[cost]
            assert standing.rival.key == "vanilla-1000-large"
            assert standing.difference.mean == pytest.approx(0.5)
            assert standing.rival_with_less
    # Vanilla that is worse with less says nothing of what it would be with as much.
    [row] = against_vanilla(experiment_of([cheap, run("phd-2", 0, 1.0)]))
    assert row.standings[Cost.FLOPS].lack == Lack.NOT_REACHED
    assert row.standings[Cost.FLOPS].reason == "vanilla: not reached"
    assert row.standings[Cost.DECODE_MS].reason == "not measured"  # of its own model
    [row] = against_vanilla(experiment_of([dear, run("phd-2", 0, 2.0)]))
    assert not row.standings[Cost.FLOPS].rival_with_less


def test_tables_for_the_copies_do_not_make_it_a_larger_model_at_equal_tokens() -> None:
    tables = run("hidden_decoding-2", 0, 1.5, parameters=1300, embedding_parameters=400)
    larger = run("phd-2", 0, 1.4, parameters=1300)
    rows = against_vanilla(experiment_of([run("vanilla", 0, 2.0), tables, larger]))
    found = {row.group.model: row.standings[Cost.TOKENS] for row in rows}
    assert found["hidden_decoding-2"].difference.mean == pytest.approx(-0.5)
    assert found["phd-2"].lack == Lack.NO_VANILLA


def on(result: Result, **text: Any) -> Result:
    """The run as evaluated on a text."""
    return replace(result, heldout={"heldout": replace(result.heldout["heldout"], **text)})


@pytest.mark.parametrize("told", ["fingerprint", "bytes", "documents"])
def test_runs_on_other_text_are_not_compared(told: str) -> None:
    ours, theirs = {told: "1"}, {told: "2"}
    runs = [on(run("phd-2", 0, 1.0), **ours), on(run("phd-3", 0, 1.1), **ours)]
    found = experiment_of([on(run("vanilla", 0, 2.0), **theirs), *runs])
    rows = {row.group.model: row for row in final_table(found)}
    assert {row.base for row in rows.values()} == {None}
    for row in against_vanilla(found):
        standings = dict(row.standings)
        assert standings.pop(Cost.DECODE_MS).lack == Lack.NOT_MEASURED
        assert {standing.lack for standing in standings.values()} == {Lack.OTHER_TEXT}
    assert [cost.amount for cost in side_by_side(found)] == [None] * 5
    # Where vanilla was evaluated on both, each is compared with its own, also of one seed.
    again = replace(on(run("vanilla", 0, 2.0), **theirs), name="on another machine")
    found = experiment_of([on(run("vanilla", 0, 1.5), **ours), *runs, again])
    assert [len(group.runs) for group in found.groups] == [1, 1, 1, 1]
    for row in against_vanilla(found):
        assert row.standings[Cost.TOKENS].difference.mean == pytest.approx(row.value.mean - 1.5)
    [tokens, *_] = side_by_side(found)
    assert [s.lack for s in tokens.standings.values()] == [None, Lack.OTHER_TEXT, None, None]
    assert "vanilla (on another machine)" in found.not_alike


@pytest.mark.parametrize(
    ("setting", "same"),
    [
        ("data.sources.a.path", False),
        ("tokenizer.vocab_size", False),
        ("eval.rows", False),
        ("train.seq_len", False),
        ("data.workers", True),
        ("optim.lr", True),
    ],
)
def test_settings_tell_the_text_where_a_run_has_no_fingerprint(setting: str, same: bool) -> None:
    runs = [run("vanilla", 0, 2.0), run("phd-2", 0, 1.0)]
    runs = [replace(r, settings=r.settings | {setting: n}) for n, r in enumerate(runs)]
    row = final_table(experiment_of(runs))[1]
    assert (row.base is not None) == same
    read = [on(r, fingerprint="1") for r in runs]
    assert final_table(experiment_of(read))[1].base is not None


def test_groups_that_time_has_ended_tell_their_range_of_tokens() -> None:
    timed = [run("phd-2", seed, 1.9, tokens=n) for seed, n in enumerate((800, 1200))]
    timed = [replace(r, group="timed") for r in timed]
    found = experiment_of([*(run("vanilla", seed, 2.0) for seed in range(2)), *timed])
    group = found.groups[1]
    assert (group.length, group.is_of_one_length) == ("800 to 1.2k", False)
    assert [group.length for group in found.groups[:1]] == ["1k"]
    told = f"Runs of {group.label} have 800 to 1.2k tokens, and stand at their mean."
    assert told in notes_at_end(found)
    # At their mean they stand at their ends, which are those of their schedules: it has none.
    [tokens, *_] = side_by_side(found)
    assert tokens.standings[group.key].at_end


def test_runs_that_were_out_of_text_before_their_schedule_are_not_at_its_end() -> None:
    short = replace(run("vanilla", 0, 2.0), steps=10, total_steps=20)
    whole = replace(run("phd-2", 0, 1.9), steps=20, total_steps=20)
    found = experiment_of([short, whole])
    assert notes_at_end(found) == ["Ended before their schedule, for want of text: vanilla."]
    [tokens, *_] = side_by_side(found)
    assert [s.at_end for s in tokens.standings.values()] == [False, True]
    [row] = against_vanilla(found)
    assert (row.standings[Cost.TOKENS].at_end, row.standings[Cost.TOKENS].rival_at_end) == (
        *(True, False),
    )


def began(result: Result, start: str | None) -> Result:
    settings = result.settings | {"run.start_from": start}
    return replace(result, group=f"{result.group} {start}", settings=settings)


def test_runs_are_compared_only_with_runs_that_began_with_the_same_weights() -> None:
    usual = [began(run(model, 0, bits), None) for model, bits in (("vanilla", 2.0), ("phd-2", 1.9))]
    ours = began(run("phd-2", 0, 1.0), "runs/first")
    found = experiment_of([*usual, ours])
    labels = [group.label for group in found.groups]
    assert labels == ["vanilla", "phd-2", "phd-2 (from first)"]
    assert final_table(found)[2].base is None
    standings = against_vanilla(found)[1].standings
    assert standings[Cost.TOKENS].lack == standings[Cost.FLOPS].lack == Lack.OTHER_START
    [tokens, *_] = side_by_side(found)
    assert [s.lack for s in tokens.standings.values()] == [None, None, Lack.OTHER_START]
    assert found.not_alike == "Began with other weights than most: phd-2 (from first)."
    # Two that begin with the same weights can be compared.
    found = experiment_of([*usual, ours, began(run("vanilla", 0, 1.2), "runs/first")])
    (gap,) = (r.difference for r in final_table(found) if r.group.label == "phd-2 (from first)")
    assert gap.mean == pytest.approx(-0.2)


def test_runs_that_began_with_other_checkpoints_of_one_run_are_two_groups() -> None:
    def at(result: Result, seal: str | None) -> Result:
        start = Origin(path="runs/first/step_9", step=9, manifest=seal)
        return replace(began(result, "runs/first"), began_with=start)

    same = [at(run("phd-2", seed, 1.0), "a") for seed in (0, 1)]
    found = experiment_of([*same, at(run("phd-2", 2, 1.0), "b"), at(run("vanilla", 0, 2.0), "a")])
    assert [[r.seed for r in group.runs] for group in found.groups] == [[0], [0, 1], [2]]
    assert [row.base is not None for row in final_table(found)] == [False, True, False]
    # What was not kept cannot tell them apart.
    old = began(run("phd-2", 3, 1.0), "runs/first")
    assert len(experiment_of([*same, old]).groups) == 1


@pytest.mark.parametrize(
    "other",
    [{"device": "b"}, {"devices": 2}, *({"settings": {f"engine.{key}": 2}} for key in SPEED)],
)
def test_times_are_compared_only_of_runs_that_trained_in_the_same_way(other: Any) -> None:
    vanilla, ours = run("vanilla", 0, 2.0), run("phd-2", 0, 1.9, cost=1.0)
    ours = replace(ours, settings=ours.settings | {f"engine.{key}": 1 for key in SPEED})
    same = ours.settings | {"model.variant": "vanilla"}
    other = {**other, "settings": same | other.get("settings", {})}
    alike = replace(vanilla, settings=same)
    unlike = replace(vanilla, seed=1, **other)
    other_device = Lack.OTHER_DEVICE
    for runs, lack in ([alike], None), ([unlike], other_device), ([alike, unlike], other_device):
        [row] = against_vanilla(experiment_of([*runs, ours]))
        assert row.standings[Cost.SECONDS].lack == lack
        assert row.standings[Cost.FLOPS].lack is None


@pytest.mark.parametrize(("seconds", "at_end"), [(1.14, True), (1.25, False)])
def test_times_are_equal_within_what_equal_runs_differ_by(seconds: float, at_end: bool) -> None:
    longer = run("vanilla", 0, 2.0, cost=seconds)
    [row] = against_vanilla(experiment_of([longer, run("phd-2", 0, 1.9, cost=1.0)]))
    assert row.standings[Cost.SECONDS].rival_at_end == at_end


@pytest.mark.parametrize("other", [{"kv_context": 2048, "kv_bytes": 500}, {"kv_bytes": 500}])
def test_kv_bytes_are_compared_only_at_the_same_context_and_dtype(other: Any) -> None:
    """Vanilla whose cache was counted at half the context, or of half as long numbers, is no rival.

    It has half the bytes, and nobody would keep to them.
    """
    shape = {"model.layers": 1, "model.kv_heads": 1, "model.head_dim": 1}
    runs = [run(model, 0, bits) for model, bits in (("vanilla", 2.0), ("phd-2", 1.9), ("phd-3", 1))]
    runs = [replace(r, settings=r.settings | shape) for r in runs]
    lacks = [row.standings[Cost.KV_BYTES].lack for row in against_vanilla(experiment_of(runs))]
    assert lacks == [None, None]
    found = experiment_of([replace(runs[0], **other), *runs[1:]])
    lacks = [row.standings[Cost.KV_BYTES].lack for row in against_vanilla(found)]
    assert lacks == [Lack.NOT_MEASURED] * 2
    found = experiment_of([*runs[:2], replace(runs[2], **other)])
    kv = side_by_side(found)[-1]
    assert kv.amount == 1000
    assert [s.lack for s in kv.standings.values()] == [None, None, Lack.NOT_MEASURED]


def test_without_vanilla_nothing_is_compared() -> None:
    experiment = experiment_of([run("phd-2", 0, 1.0)])
    assert [cost.amount for cost in side_by_side(experiment)] == [None] * 5
    assert final_table(experiment)[0].difference is None
    [row] = against_vanilla(experiment)
    lacks = {cost: standing.lack for cost, standing in row.standings.items()}
    assert lacks.pop(Cost.DECODE_MS) == Lack.NOT_MEASURED
    assert set(lacks.values()) == {Lack.NO_VANILLA}
