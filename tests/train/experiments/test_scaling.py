"""The section on fits: what it finds in runs of known laws, and what it says of those without."""

import csv
import io
import re
from dataclasses import replace

import pytest

pytest.importorskip("matplotlib")

from tests.train.experiments.fits.synthetic import TRUTH, synthetic
from tests.train.experiments.made_up import an_experiment
from tests.train.experiments.scaling_runs import a_scaled_run, scaled_runs
from train.experiments.document import Note, Section, charts, tables
from train.experiments.experiment import experiment_of
from train.experiments.fits.families import copies, families, points_of, variants
from train.experiments.page import Report, html, markdown
from train.experiments.result import Heldout, Result
from train.experiments.sections.scaling import scaling
from train.experiments.tables import as_csv


def section_of(runs: list[Result]) -> Section:
    found = scaling(experiment_of(runs))
    assert found
    return found


def words(section: Section) -> str:
    return markdown(Report("a title", "a subject", (section,)))


def read(section: Section, name: str) -> list[dict[str, str]]:
    table = next(t for t in tables((section,)) if t.name == name)
    return list(csv.DictReader(io.StringIO(as_csv(table))))


@pytest.fixture(scope="module")
def runs() -> list[Result]:
    return scaled_runs()


@pytest.fixture(scope="module")
def section(runs: list[Result]) -> Section:
    return section_of(runs)


def test_phi_is_told_with_its_interval_and_what_it_means(section: Section) -> None:
    found = re.search(
        r"phd_cswa-K-16-32: phi = (\S+) \\\[(\S+), (\S+)\]\. .* (\S+) times", words(section)
    )
    assert found
    phi, low, high, twice = map(float, found.groups())
    assert low < 0.45 < high
    assert low < phi < high
    assert twice == pytest.approx(2**phi, abs=0.01)


def test_each_variant_has_a_law_and_nothing_is_missing(section: Section) -> None:
    rows = read(section, "laws")
    assert [row["runs"] for row in rows] == [
        *("vanilla", "phd_cswa-2-16-32", "phd_cswa-3-16-32", "phd_cswa-K-16-32")
    ]
    for row in rows[:3]:
        assert float(row["a"]) == pytest.approx(0.3, abs=0.1)
        assert row["phi"] == ""
    assert not any(isinstance(b, Note) and b.kind == "missing" for b in section.blocks)
    assert {chart.name for chart in charts((section,))} == {"laws", "phi"}


def test_the_csv_has_the_points_and_constants_of_every_fit(section: Section) -> None:
    constants = read(section, "fit-constants")
    assert len(constants) == 3 * 5 + 6
    for row in constants:
        assert float(row["low"]) <= float(row["value"]) <= float(row["high"])
    points = read(section, "fit-points")
    assert len(points) == 2 * 3 * 18
    for row in points:
        assert float(row["loss"]) == pytest.approx(float(row["law_loss"]), abs=0.01)


def test_what_copies_are_worth_and_what_they_cost_stand_side_by_side(section: Section) -> None:
    rows = read(section, "equivalents")
    assert len(rows) == 2 * 3 * 3
    for row in rows:
        ratio = float(row["equivalent_parameters"]) / float(row["parameters"])
        assert float(row["parameters_ratio"]) == pytest.approx(ratio)
        assert 1 < ratio < float(row["flops_ratio"]) == float(row["K"])
        assert row["equivalent_tokens"] == "" or (
            float(row["equivalent_tokens"]) > float(row["tokens"])
        )


def test_every_figure_names_the_runs_that_it_is_made_of(
    section: Section, runs: list[Result]
) -> None:
    names = {run.name for run in runs}
    for block in (*charts((section,)), *tables((section,))):
        assert set(block.source.runs) == names
    html(Report("a title", "a subject", (section, section)))  # every panel can be drawn


def test_of_one_size_nothing_is_drawn_and_it_is_said_once_what_is_missing() -> None:
    section = section_of(an_experiment())
    assert charts((section,)) == []
    assert tables((section,)) == []
    text = words(section)
    assert text.count("3 sizes and 3 lengths are needed for a and b; there are 1 and 1.") == 1
    assert "No phi is fitted for naive_repeat-K; phd-K" in text
    assert "train.max\\_tokens" in text or "max_tokens_per_parameter=5,20,80" in text


def test_a_ladder_has_a_law_over_flops_and_says_what_one_over_both_needs() -> None:
    sizes = (1e6, 2e6, 4e6, 8e6, 16e6)
    section = section_of(scaled_runs(copies=(1,), per_parameter=(20,), sizes=sizes))
    [row] = read(section, "laws")
    assert row["law"] == "L = E + A C^-a"
    assert "In these runs the length follows from the size" in words(section)


def test_copies_at_one_length_give_phi_without_equivalent_tokens() -> None:
    sizes = (1e6, 3e6, 9e6, 27e6)
    section = section_of(scaled_runs(copies=(1, 2), lengths=(1e7,), sizes=sizes, seeds=3))
    assert {row["equivalent_tokens"] for row in read(section, "equivalents")} == {""}
    assert "phi = 0." in words(section)
    assert "there are 4 and 1." in words(section)


def test_without_a_finished_run_there_is_no_section(runs: list[Result]) -> None:
    assert scaling(replace(experiment_of(runs[:1]), groups=())) is None


# Which runs belong together


def loss_of(result: Result) -> float | None:
    return result.heldout["heldout"].bits_per_byte.value if result.heldout else None


def with_settings(loss: float, **settings: object) -> list[Result]:
    """Runs of all sizes and lengths whose loss is greater by some number."""
    points = synthetic(copies=(1, 2), truth=TRUTH | {"E": TRUTH["E"] + loss}, noise=0.0).runs
    named = {f"model.{name}" if "." not in name else name: x for name, x in settings.items()}
    return [a_scaled_run(point, **named) for point in points]


def test_of_several_settings_of_a_size_and_length_the_best_is_taken() -> None:
    runs = [
        *with_settings(0.1, **{"optim.lr": 0.1}),
        *with_settings(0.0, **{"optim.lr": 0.2}),
        *with_settings(0.3, **{"optim.lr": 0.4}),
    ]
    [vanilla, _] = variants(runs)
    points = points_of(vanilla.runs, loss_of)
    assert len(points.runs) == 2 * 3 * 3
    assert all("'optim.lr': 0.2" in point.group for point in points.runs)


def test_no_setting_is_the_best_by_an_easy_seed() -> None:
    """The worse one has the easy seed alone; the better one has that and two hard ones."""
    better, worse = (with_settings(x, **{"optim.lr": x}) for x in (0.0, 0.01))
    easy = {0: -0.07, 1: 0.07}
    runs = [replace(run, heldout=shifted(run, easy[run.seed])) for run in better]
    runs += [replace(run, heldout=shifted(run, easy[0])) for run in worse if run.seed == 0]
    points = points_of(variants(runs)[0].runs, loss_of)
    assert {point.group.rpartition("'optim.lr': ")[2] for point in points.runs} == {"0.0}"}


def shifted(run: Result, by: float) -> dict[str, Heldout]:
    found = run.heldout["heldout"]
    bits = replace(found.bits_per_byte, value=found.bits_per_byte.value + by)
    return {"heldout": replace(found, bits_per_byte=bits)}


def test_another_kind_of_model_or_text_is_another_family() -> None:
    runs = [
        *with_settings(0.0, copy_embedding=False, **{"data.sources.python.kind": "python"}),
        *with_settings(0.0, copy_embedding=True, **{"data.sources.python.kind": "python"}),
        *with_settings(0.0, copy_embedding=False, **{"data.sources.python.kind": "files"}),
    ]
    assert [family.label for family in variants(runs)] == [
        *("vanilla", "phd_cswa-2-16-32", "phd_cswa-2-16-32, copy_embedding True"),
        *("vanilla, sources.python.kind files", "phd_cswa-2-16-32, sources.python.kind files"),
    ]
    found = families(runs)
    assert [family.label for family in found] == [
        *("phd_cswa-K-16-32", "phd_cswa-K-16-32, copy_embedding True"),
        "phd_cswa-K-16-32, sources.python.kind files",
    ]
    # Vanilla has no copies to embed, so that both kinds of PHD are compared with all of it.
    assert [sum(copies(run) == 1 for run in family.runs) for family in found] == [36, 36, 18]


def test_runs_that_were_evaluated_on_another_text_are_other_families() -> None:
    """As those of another machine, whose files of the same names are others."""

    def read(runs: list[Result], fingerprint: str) -> list[Result]:
        texts = [replace(run.heldout["heldout"], fingerprint=fingerprint) for run in runs]
        return [replace(r, heldout={"heldout": t}) for r, t in zip(runs, texts, strict=True)]

    here, there = read(with_settings(0.0), "a"), read(with_settings(0.2), "b")
    other = [replace(run, size=f"{run.size} there") for run in there]
    text_of = experiment_of([*here, *other]).text_of
    labels = ["vanilla", "phd_cswa-2-16-32", "vanilla, text 2", "phd_cswa-2-16-32, text 2"]
    assert [family.label for family in variants([*here, *other], text_of)] == labels
    found = families([*here, *other], text_of)
    assert [len(family.runs) for family in found] == [36, 36]
    assert {run.heldout["heldout"].fingerprint for run in found[0].runs} == {"a"}


def test_runs_that_switch_copies_on_or_start_from_another_are_families_of_their_own() -> None:
    late = {"schedule.copies.0": 1, "schedule.copies.0.75": 2}
    runs = [
        *with_settings(0.0),
        *with_settings(0.0, **late),
        *with_settings(0.0, **{"run.start_from": "runs/a"}),
    ]
    assert len(variants(runs)) == 2 * 3
    assert len(families(runs)) == 3


def test_runs_that_did_not_finish_and_those_without_a_loss_are_no_points() -> None:
    runs = with_settings(0.0)
    short = replace(runs[2], total_steps=runs[2].steps + 1)
    others = [replace(runs[0], status="diverged"), replace(runs[1], heldout={}), short]
    assert len(points_of([*others, *runs[3:]], loss_of).runs) == len(runs) - 3


def test_parameters_are_parted_into_those_of_the_embedding_and_those_of_blocks() -> None:
    [run, *_] = with_settings(0.0)
    [point] = points_of([run], loss_of).runs
    assert point.once == run.embedding_parameters
    assert point.once + point.repeated == run.parameters
    assert [
        copies(replace(run, model=name)) for name in ("vanilla", "naive_repeat-3", "phd-2")
    ] == [*(1, 3, 2)]
