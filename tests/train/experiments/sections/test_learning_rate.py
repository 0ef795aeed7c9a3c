"""The loss over the learning rate: a line for each model that had several, and the best of each."""

from dataclasses import replace
from math import log2

import pytest

pytest.importorskip("matplotlib")

from tests.train.experiments.made_up import a_run, an_experiment
from train.experiments.charts import figure_of
from train.experiments.document import charts, tables
from train.experiments.experiment import Experiment, experiment_of
from train.experiments.result import Result
from train.experiments.sections.learning_rate import learning_rate, sweeps_of

RATES = (0.001, 0.002, 0.004, 0.008, 0.016)
WIDTHS = (64, 128, 256)


def swept(width: int, base: int | None, lr: float, seed: int = 0) -> Result:
    """A run whose loss is a parabola of log(lr), best at 0.005, or at 0.005 * 64 / D."""
    best = 0.005 if base else 0.005 * 64 / width
    settings = {
        "model.dim": width,
        "model.heads": width // 32,
        "model.mup_base_dim": base,
        "optim.lr": lr,
    }
    gain = 0.05 * log2(lr / best) ** 2 - width / 1000
    return a_run("vanilla", seed, gain=gain, settings=settings, parameters=width**2)


@pytest.fixture(scope="module")
def experiment() -> Experiment:
    runs = [swept(width, base, lr) for base in (None, 64) for width in WIDTHS for lr in RATES]
    alone = a_run("phd-2", 0, gain=0.0, settings={"model.dim": 64, "optim.lr": 0.1})
    return experiment_of([*runs, alone])


def test_each_width_and_parametrisation_has_its_line_and_its_best(experiment: Experiment) -> None:
    sweeps = sweeps_of(experiment)
    assert [(s.panel, s.label) for s in sweeps] == [
        (panel, f"dim={width}") for panel in ("without muP", "muP, from D = 64") for width in WIDTHS
    ]
    assert [s.best.lr for s in sweeps] == [0.004, 0.002, 0.001, 0.004, 0.004, 0.004]
    assert [s.is_at_edge for s in sweeps] == [False, False, True, False, False, False]
    assert sweeps[2].between is None
    # The parabola through three of its points is the parabola.
    found = [s.between for s in sweeps if s.between]
    assert found == pytest.approx([0.005, 0.0025, 0.005, 0.005, 0.005])
    assert all(len(s.entries) == len(RATES) for s in sweeps)


def test_the_section_has_a_panel_for_each_parametrisation_and_a_row_for_each_line(
    experiment: Experiment,
) -> None:
    section = learning_rate(experiment)
    assert section
    (chart,), (table,) = charts((section,)), tables((section,))
    assert [label for label, _ in chart.legend] == [f"dim={width}" for width in WIDTHS]
    assert "best: 0.004 of dim=64, 0.002 of dim=128, 0.001 of dim=256." in chart.panels[0].alt
    assert len(chart.source.runs) == 2 * len(WIDTHS) * len(RATES)
    figure = figure_of(chart)
    assert [axes.get_title() for axes in figure.axes] == ["without muP", "muP, from D = 64"]
    assert len({axes.get_ylim() for axes in figure.axes}) == 1
    rows = [[cell.text for cell in row] for row in table.rows]
    assert rows[1][:4] == ["dim=128", "without muP", "0.002", "0.0025"]
    assert rows[2][-1] == "at the edge of what has finished"
    assert [row[2] for row in rows[3:]] == ["0.004"] * 3


def test_a_line_is_of_the_seeds_that_all_its_rates_have() -> None:
    runs = [swept(64, 64, lr, seed) for lr in RATES[:2] for seed in range(3)]
    (sweep,) = sweeps_of(experiment_of([*runs, swept(64, 64, RATES[2], seed=1)]))
    assert [[run.seed for run in entry.runs.runs] for entry in sweep.entries] == [[1], [1], [1]]
    assert (sweep.panel, sweep.label) == ("", "vanilla")


def test_bars_of_seeds_are_whole() -> None:
    runs = [swept(64, None, lr, seed) for lr in RATES[:3] for seed in (0, 1, 40)]
    experiment = experiment_of(runs)
    (sweep,), section = sweeps_of(experiment), learning_rate(experiment)
    assert section
    (axes,) = figure_of(charts((section,))[0]).axes
    low, high = axes.get_ylim()
    for spread in (entry.spread for entry in sweep.entries):
        assert spread.least
        assert spread.greatest
        assert low < spread.least < spread.greatest < high


def test_a_rate_that_diverged_is_not_said_to_be_untried() -> None:
    runs = [swept(64, None, lr) for lr in RATES[:3]]
    diverged = replace(swept(64, None, RATES[3]), status="diverged")
    section = learning_rate(experiment_of([*runs, diverged]))
    assert section
    (table,) = tables((section,))
    heads = {column.key: f"{column.title} {column.unit}" for column in table.columns}
    told = dict(zip(heads, (cell.text for cell in table.rows[0]), strict=True))
    assert (heads["highest_lr"], told["highest_lr"]) == ("finished to", "0.004")
    assert told["note"] == "at the edge of what has finished"


def test_runs_of_one_learning_rate_have_no_such_section() -> None:
    assert learning_rate(experiment_of(an_experiment())) is None
