"""The answer is what was found: a gain, one that may be chance, none, or that vanilla wins."""

from dataclasses import replace

import pytest

pytest.importorskip("matplotlib")

from tests.train.experiments.made_up import STEPS, a_run
from train.experiments.document import Note
from train.experiments.experiment import experiment_of
from train.experiments.result import Result
from train.experiments.sections.answer import answer

VANILLA = [a_run("vanilla", seed, gain=0.0) for seed in range(3)]


def words(runs: list[Result]) -> tuple[str, ...]:
    """The paragraphs of the answer, then its bullets."""
    (note,) = answer(experiment_of(runs)).blocks
    assert isinstance(note, Note)
    return note.paragraphs + note.bullets


def variant(*gains: float, model: str = "phd-2") -> list[Result]:
    return [a_run(model, seed, gain=gain) for seed, gain in enumerate(gains)]


def test_a_gain_is_told_with_its_interval() -> None:
    tokens, flops, *_ = words([*VANILLA, *variant(-0.10, -0.11, -0.12)])
    # The mean of the gains times 0.6, see `a_run`, and Student's t of two degrees of freedom.
    assert tokens.startswith(
        "At equal tokens, phd-2 gains 0.066 bits per byte (3.1 %) over vanilla"
    )
    assert (
        "interval of the difference \N{MINUS SIGN}0.081 to \N{MINUS SIGN}0.051, 3 seeds" in tokens
    )
    assert flops == "At equal training FLOPs, nothing can be compared (vanilla: not reached)."


def test_vanilla_that_wins_at_equal_flops_is_told() -> None:
    longer = [a_run("vanilla", seed, gain=-0.2, steps=round(1.65 * STEPS)) for seed in range(3)]
    _, flops, *_ = words([*VANILLA, *longer, *variant(-0.1, -0.1, -0.1)])
    assert flops.startswith("At equal training FLOPs, vanilla wins: vanilla (1.73M tokens) is 0.0")
    assert "below the best variant, phd-2" in flops


def test_a_difference_within_the_spread_is_no_gain() -> None:
    tokens, *_ = words([*VANILLA, *variant(-0.2, 0.1, -0.02)])
    assert "no variant can be told from vanilla" in tokens
    assert "the interval includes 0" in tokens


def test_one_seed_may_be_chance() -> None:
    tokens, *_ = words([VANILLA[0], *variant(-0.1)])
    assert tokens.endswith("over vanilla (one seed, so that it may be chance).")


def test_a_clear_gain_comes_before_a_greater_one_that_may_be_chance() -> None:
    unsure = variant(-0.4, 0.1, -0.02, model="phd-3")
    tokens, *_ = words([*VANILLA, *variant(-0.05, -0.05, -0.05), *unsure])
    assert tokens.startswith("At equal tokens, phd-2 gains 0.030 bits per byte")
    assert "phd-3 gains more, 0.064 bits per byte (3.0 %), but that may be chance." in tokens
    assert "Of 2 variants: 1 better than vanilla, 1 that cannot be told from it." in tokens


def test_clear_losses_are_not_called_unclear() -> None:
    unsure, worse = variant(-0.2, 0.1, -0.02), variant(0.5, 0.5, 0.5, model="phd-3")
    tokens, *_ = words([*VANILLA, *unsure, *worse])
    assert "no variant is clearly better than vanilla: the best one, phd-2, is 0.0" in tokens
    assert "can be told from vanilla" not in tokens
    assert "Of 2 variants: 1 worse than vanilla, 1 that cannot be told from it." in tokens


@pytest.mark.parametrize(("gain", "does"), [(0.1, "loses less"), (-0.1, "gains")])
def test_a_clear_loss_comes_before_a_difference_of_one_seed(gain: float, does: str) -> None:
    worse = variant(0.5, 0.5, 0.5, model="phd-3")
    tokens, *_ = words([*VANILLA, *variant(gain), *worse])
    assert tokens.startswith("At equal tokens, vanilla wins: vanilla is 0.300")
    assert "below the best variant that can be told from it, phd-3 (95 %" in tokens
    assert f"phd-2 {does}, 0.060 bits per byte" in tokens
    assert "but that may be chance." in tokens


@pytest.mark.parametrize("seeds", [1, 3])
def test_equality_is_no_win_of_either(seeds: int) -> None:
    tokens, *_ = words([*VANILLA[:seeds], *variant(*[0.0] * seeds)])
    told = "nothing is gained: the best variant, phd-2, is exactly as good as vanilla"
    assert tokens.startswith(f"At equal tokens, {told} (")
    assert "ahead" not in tokens


def test_the_same_is_not_said_twice() -> None:
    assert "At equal KV bytes, the same holds as at equal tokens." in words(
        [*VANILLA, *variant(-0.1, -0.1, -0.1)]
    )


def test_a_run_without_evaluation_is_left_out_and_the_others_are_compared() -> None:
    """The whole page does not go over to the training loss because of it."""
    alone = a_run("phd-3", 5, gain=-1.0, heldout={})
    told = words([*VANILLA, *variant(-0.10, -0.11, -0.12), alone])
    assert told[0].startswith("At equal tokens, phd-2 gains 0.066 bits per byte (3.1 %) over")
    assert "Without held-out bits per byte, and so in no comparison: phd-3." in told
    assert "smoothed training loss" in experiment_of([alone]).measure.words


def test_the_answer_says_of_which_text_it_is() -> None:
    runs = [*VANILLA, *variant(-0.10, -0.11, -0.12)]

    def on(*names: str) -> list[Result]:
        return [replace(r, heldout=dict.fromkeys(names, r.heldout["heldout"])) for r in runs]

    assert not any("All of this" in each for each in words(runs))
    assert "All of this is of the text code, and not of web." in words(on("web", "code"))
    assert "All of this is of the text web." in words(on("web"))
    told = "All of this is of the runs' own held-out text, and not of code."
    assert told in words(on("code", "heldout"))
    told = "No run has held-out losses: what is compared is the smoothed training loss."
    assert told in words(on())


@pytest.mark.parametrize(
    "runs", [VANILLA, variant(-0.1), [a_run("phd-2", 0, gain=0.0, status="failed")]]
)
def test_nothing_to_compare_is_told(runs: list[Result]) -> None:
    assert "no gain is known" in words(runs)[0]
