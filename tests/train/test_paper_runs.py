"""The paper's runs compose, pass the plan, and cost what the documentation says."""

import re
from pathlib import Path
from typing import NamedTuple

import pytest

from conf.errors import ConfigError
from train.arguments import PlanArguments
from train.compose import load
from train.engines.accelerators import ACCELERATORS
from train.plan import make_plan

DOCS = (Path(__file__).parents[2] / "docs" / "running.md").read_text(encoding="utf-8")
SECTION = DOCS.partition("## The paper's runs")[2].partition("\n## ")[0]
MFU = 0.445


class PaperRun(NamedTuple):
    """A line of the table: what is typed, the run's name, and what it costs."""

    experiment: str
    settings: str
    name: str
    flops: str
    hours: int


def table() -> list[PaperRun]:
    line = re.compile(r"^\|[^|]*\| `(\w+)` \| `([^`]+)` \| `([^`]+)` \| (\S+) \| (\d+) \|$", re.M)
    return [PaperRun(*found[:4], int(found[4])) for found in line.findall(SECTION)]


RUNS = table()
# Of each experiment, the run that needs the most memory; to trace compiled blocks takes seconds.
LARGEST = [
    ("paper_151m", "model.K=4", "false"),
    ("paper_550m", "model.K=5", "false"),
    ("paper_1b2", "model.K=3", "auto"),
]


def test_the_table_has_every_run_of_the_paper() -> None:
    runs = {(run.experiment, run.name) for run in RUNS}
    assert len(runs) == len(RUNS) == 16
    swa = [f"phd_swa-{K}-16-inf" for K in (2, 3, 5)] + [f"phd_swa-2-{W}-inf" for W in (1, 2, 4)]
    assert runs == {
        *(("paper_151m", name) for name in ("vanilla", *(f"naive_repeat-{K}" for K in (2, 3, 4)))),
        *(("paper_550m", name) for name in ("vanilla", *swa)),
        *(("paper_550m", f"phd_cswa-2-16-{C}") for C in (16, 32)),
        *(("paper_1b2", name) for name in ("vanilla", "phd_cswa-2-16-32", "phd_cswa-3-16-32")),
    }


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run.experiment}-{run.name}")
def test_a_run_of_the_paper_costs_what_the_table_says(run: PaperRun) -> None:
    config = load([f"experiment={run.experiment}", *run.settings.split()])
    assert config.model.name == run.name
    steps = config.total_steps
    assert steps is not None
    flops = config.flops_between(0, steps)
    assert f"{flops:.2e}".replace("e+", "e") == run.flops
    assert round(flops / (MFU * ACCELERATORS["H200"].peak_flops) / 3600) == run.hours
    # What its file says of it.
    text = (Path(__file__).parents[2] / f"conf/experiment/{run.experiment}.yaml").read_text()
    assert ("Table 1" in text) == (run.experiment == "paper_1b2")
    assert ("Figure" in text) == (run.experiment != "paper_1b2")
    if "window" not in run.settings and "chunk" not in run.settings:
        assert str(run.hours) in text


@pytest.mark.parametrize(("experiment", "settings", "compiled"), LARGEST)
def test_a_run_of_the_paper_passes_the_plan(experiment: str, settings: str, compiled: str) -> None:
    [run] = [run for run in RUNS if (run.experiment, run.settings) == (experiment, settings)]
    config = load([f"experiment={experiment}", settings, f"engine.compile={compiled}"])
    plan = make_plan(config, 64, arguments=PlanArguments(device="H200", processes=64, mfu=MFU))
    assert plan.warnings == ()
    assert plan.time_s is not None
    assert round(plan.time_s * 64 / 3600) == run.hours
    with pytest.raises(ConfigError, match=r"not divisible by 100 ranks"):
        make_plan(config, 100)
