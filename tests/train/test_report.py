"""The command that compares runs: what it reads, what it refuses, and where the page is."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from conf.arguments import parse
from conf.errors import ConfigError, DataError
from tests.train.experiments.made_up import a_run
from train import report
from train.arguments import ReportArguments
from train.experiments.contents import report_of
from train.experiments.page import markdown
from train.experiments.result import Curve, write_result
from train.report import main, read_results

NAMES = ["vanilla-micro-seed_0", "vanilla-micro-seed_1"]


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A folder of the results of two runs, as they are kept without the runs."""
    for seed, name in enumerate(NAMES):
        directory = tmp_path / "kept" / name
        directory.mkdir(parents=True)
        short: dict[str, Any] = {"curve": Curve(), "heldout_curves": {}}  # there is no chart
        write_result(directory, a_run("vanilla", seed, gain=0.0, **short))
    return tmp_path / "kept"


def arguments(*texts: str) -> ReportArguments:
    return parse(ReportArguments, texts)


def test_results_are_read_by_their_directories_or_files_and_each_once(kept: Path) -> None:
    for patterns in ([f"{kept}/*"], [f"{kept}/*/result.json"], [f"{kept}/**", f"{kept}/*"]):
        assert [result.name for result in read_results(patterns).results] == NAMES


def test_a_pattern_without_a_run_is_refused(kept: Path) -> None:
    with pytest.raises(ConfigError, match=r"no directory of a run and no result\.json is there"):
        read_results([f"{kept}/*", f"{kept}/none/*"])


def test_all_damaged_results_are_named(kept: Path) -> None:
    for name in NAMES:
        (kept / name / "result.json").write_text("{")
    with pytest.raises(DataError, match=f"(?s)2 runs cannot be read.*{NAMES[0]}.*{NAMES[1]}"):
        read_results([f"{kept}/*"])


def test_a_run_that_cannot_be_read_does_not_stop_the_report(
    kept: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = (kept / name for name in NAMES)
    (first / "config.yaml").write_text("modle: 1")  # as one of another version
    found = read_results([f"{kept}/*"])
    assert [result.name for result in found.results] == NAMES
    assert [(run.name, run.kept) for run in found.unread] == [(NAMES[0], True)]
    told = capsys.readouterr().err
    assert f"{first}/config.yaml: is of another version" in told
    assert "its result.json is taken as it is" in told
    (second / "result.json").write_text("{")
    found = read_results([f"{kept}/*"])
    assert [result.name for result in found.results] == NAMES[:1]
    assert [(run.name, run.kept) for run in found.unread] == [(NAMES[0], True), (NAMES[1], False)]
    page = markdown(report_of(found.results, "a title", found.unread))
    assert "1 run, of which 1 finished" in page
    assert "1 further run cannot be read" in page
    assert f"- {NAMES[1]}: result.json: is no result of a run" in page.replace("\\", "")
    assert f"- {NAMES[0]}: config.yaml: is of another version" in page.replace("\\", "")
    assert str(kept.parent) not in page
    told = capsys.readouterr().err
    assert "left out: 1 run cannot be read:" in told
    assert f"{second}/result.json: is no result of a run" in told
    (first / "result.json").unlink()
    with pytest.raises(DataError, match=r"(?s)2 runs cannot be read.*another version"):
        read_results([f"{kept}/*"])


def test_a_report_replaces_an_earlier_one_and_nothing_else(kept: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds other files than a report"):
        arguments(f"runs={kept}/*", f"out={tmp_path / 'mine'}")
    out = tmp_path / "new" / "report"
    for title in ("a title", "another title"):
        args = arguments(f"runs={json.dumps([f'{kept}/*'])}", f"out={out}", f"title={title}")
        assert main(args) == 0
        assert f"<h1>{title}</h1>" in (out / "report.html").read_text(encoding="utf-8")


def test_a_missing_package_is_named_with_its_command(
    kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "find_spec", lambda name: None if name == "scipy" else name)
    with pytest.raises(ConfigError, match=r"scipy not installed.*phd-transformer\[report\]"):
        main(arguments(f"runs={kept}/*", f"out={tmp_path / 'out'}"))
