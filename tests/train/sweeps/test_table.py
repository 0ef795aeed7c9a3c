"""Claims about what a sweep prints at its end."""

import io
from dataclasses import replace
from pathlib import Path
from statistics import stdev

import pytest
from rich.console import Console

from tests.train.experiments.results import a_result
from train.compose import load
from train.config import Config
from train.distributed.process_groups import ProcessGroups
from train.experiments.ledger import Ended, record_end
from train.experiments.recorder import record_complete
from train.experiments.result import Estimate, Heldout, Result, read_result, write_result
from train.run_dir.lock import hold_run_dir
from train.run_dir.name import named
from train.sweeps.finished import finished
from train.sweeps.table import comparison, print_comparison, runs_argument


def result(model: str, seed: int, bits: float) -> Result:
    found = Heldout(bits_per_byte=Estimate(value=bits), loss=1.0)
    name = f"{model}-micro" + (f"-seed_{seed}" if seed else "")
    return a_result(name=name, model=model, group=model, seed=seed, heldout={"python": found})


def cells(results: list[Result]) -> list[tuple[str, ...]]:
    """The rows of the table, with its heads."""
    columns = comparison(results).columns
    rows = zip(*(column.cells for column in columns), strict=True)
    return [tuple(str(c.header) for c in columns), *(tuple(map(str, row)) for row in rows)]


def phd_and_vanilla() -> tuple[list[Result], list[Result]]:
    """Three seeds of one group, and two of the other."""
    phd = [result("phd-2", seed, bits) for seed, bits in enumerate([1.9, 2.0, 2.6])]
    return phd, [result("vanilla", seed, bits) for seed, bits in enumerate([2.0, 2.2])]


def test_groups_are_compared_over_the_seeds_that_all_of_them_have() -> None:
    phd, vanilla = phd_and_vanilla()
    heads, *rows = cells([*phd, *vanilla])
    assert heads[-2:] == ("bits per byte, seeds 0, 1", "to vanilla")
    assert [row[:2] for row in rows] == [("vanilla", "2"), ("phd-2", "3")]
    # Student's t for 95 % is 12.706 with one degree of freedom.
    half = 12.706 * stdev([0.1, 0.2]) / 2**0.5
    assert rows[1][-1] == f"-0.1500 ± {half:.4f}"
    assert rows[1][-2] == f"1.9500 ± {12.706 * stdev([1.9, 2.0]) / 2**0.5:.4f}"
    assert rows[0][-1] == ""
    note = comparison([*phd, *vanilla]).caption
    assert note == (
        "All groups that can be compared have seeds 0, 1; other seeds may be easier or harder."
    )
    assert comparison(vanilla).caption is None


def test_a_reports_page_has_the_same_values_and_notes() -> None:
    pytest.importorskip("matplotlib")
    from train.experiments.document import tables
    from train.experiments.experiment import experiment_of
    from train.experiments.sections.final import final

    phd, vanilla = phd_and_vanilla()
    _, *rows = cells([*phd, *vanilla])
    section = final(experiment_of([*phd, *vanilla]))
    assert section
    (table,) = tables((section,))
    place = [column.key for column in table.columns].index("mean_of_shared_seeds")
    assert table.columns[place].unit == "seeds 0, 1"
    assert [row[place].text for row in table.rows] == [row[-2].split()[0] for row in rows]
    assert str(comparison([*phd, *vanilla]).caption) in table.note


def test_one_seed_has_no_interval_and_a_run_that_has_not_finished_no_place() -> None:
    broken = replace(result("phd-3", 0, 1.8), status="failed", reason="it crashed")
    _, vanilla, phd = cells([result("vanilla", 0, 2.0), result("phd-2", 0, 1.9), broken])
    assert (vanilla[-2:], phd[-2:]) == (("2.0000", ""), ("1.9000", "-0.1000"))


def test_the_end_of_a_sweep_names_its_runs_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    configs = [load([f"seed={seed}"]) for seed in (0, 1, 2)]
    for config in configs[:2]:
        config.run_dir.mkdir(parents=True)
        (config.run_dir / "config.yaml").touch()
        write_result(config.run_dir, result("phd_cswa-2-16-32", config.seed, 2.0))
    print_comparison(configs)
    printed = capsys.readouterr().out
    assert "│ phd_cswa-2-16-32 │     2 │" in printed
    assert "1 run of 3 not finished\n" in printed
    assert "report.py 'runs=runs/*' out=report" in printed
    assert runs_argument([configs[0].run_dir]) == '["runs/phd_cswa-2-16-32-tiny"]'


def test_only_a_run_that_has_nothing_left_to_do_is_passed_over(config, small, trained) -> None:
    own: Config = config()
    assert finished(own) is None
    trained(own)
    assert finished(own) is None  # nobody has noted how it ended
    record_end(own.run_dir, Ended(status="finished"))
    assert finished(own) == "6 steps"
    for more in (
        "train.max_steps=7",
        "eval.rows=2",
        "run.resume=never",
        "seed=1",
        "optim.lr=1e-4",
        "schedule=constant train.max_steps=null train.max_time=1",
    ):
        assert finished(named(load(small(*more.split())), {})) is None, more
    assert finished(load(small("train.max_steps=5"))) == "6 steps"
    assert finished(load(small("checkpoint.every=3"))) == "6 steps"
    record_end(own.run_dir, Ended(status="failed", reason="it crashed"))
    assert finished(own) is None


def test_a_finished_run_that_was_measured_again_is_passed_over(config, trained) -> None:
    own, console = config(), Console(file=io.StringIO())
    metrics = trained(own).metrics
    with hold_run_dir(own.run_dir, ProcessGroups(), console):  # as the command does to its end
        record_complete(own, ProcessGroups(), console, 6, metrics)
    found = read_result(own.run_dir / "result.json")
    assert found.status == "finished"
    assert found.heldout["heldout"].bits_per_byte.value == metrics["eval/heldout/bits_per_byte"]
    assert finished(own) == "6 steps"
