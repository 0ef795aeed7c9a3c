"""What `make gpu` relies on, tried without a GPU: its engines, its clock, its page."""

import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from conf.arguments import parse
from conf.errors import ConfigError
from conf.validation import keys
from tests.conftest import NEEDS_CUDA
from tests.gpu.command import GpuArguments
from tests.gpu.default_run import apart, losses
from tests.gpu.lines import Row
from tests.gpu.parts import (
    LAST_WORDS_S,
    ROOT,
    Part,
    bench_rows,
    cuda_tests,
    parts,
    rows_of_tests,
    run,
)
from tests.gpu.report import VERSIONS, Report, Section
from tests.gpu.steps import ENGINES, cases, rows
from tests.gpu.targets import TARGETS
from tests.train.many_ranks import run_ranks
from train import bench
from train.arguments import BenchArguments
from train.distributed.process_groups import ProcessGroups

MACHINE: dict[str, Any] = dict.fromkeys(("driver", "cuda", "cudnn", "nccl", "python", "cores"), "1")
MACHINE |= {"device": "A GPU", "processor": "x", "time": "noon", "revision": "abc", "changed": True}
MACHINE["packages"] = dict.fromkeys(VERSIONS)


def rows_of_engines(_: ProcessGroups) -> list[Row]:
    return [row for part in cases("cpu") for row in rows("cpu", part)]


@pytest.mark.process
def test_every_engine_takes_the_steps_of_a_lone_process_and_float8_comes_close() -> None:
    """FSDP2 cut into one shard, DDP and ZeRO of one rank, in the process group of this rank."""
    [found] = run_ranks(1, rows_of_engines)
    assert [row["what"] for row in found] == [
        name for part in cases("cpu").values() for name in part
    ]
    assert [row["result"] for row in found] == ["pass"] * len(found), found
    assert all(row["apart"] < 1e-5 for row in found if row["what"] in ENGINES)
    assert all(row["apart"] > 1e-6 for row in found if row["what"].startswith("float8"))


def python(code: str, limit_s: float = 60, **others: Any) -> Part:
    return Part(code, [sys.executable, "-c", code], limit_s, **others)


@pytest.mark.process
def test_what_a_part_has_told_is_kept_whatever_becomes_of_it(tmp_path: Path) -> None:
    row = 'print(\'{"what": "a product", "TFLOP/s": 7.5}\', flush=True); '
    chosen = {
        "fine": python(row, together=True),
        "slow": python(row + "import time; time.sleep(600)", limit_s=2, together=True),
        "broken": python(row + "raise ValueError('no such kernel')"),
        "silent": python("pass"),
        "wrong": python('print(\'{"what": "a loss", "result": "FAIL"}\')'),
    }
    report = Report(tmp_path / "page.md", MACHINE, {n: Section(n) for n in [*chosen, "late"]})
    run(chosen, tmp_path, monotonic() + 600, report.sections.__setitem__)
    results = {name: section.result for name, section in report.sections.items()}
    assert results == {
        "fine": "pass",
        "slow": "FAIL: out of time",
        "broken": "FAIL: ValueError: no such kernel (broken.log)",
        "silent": "FAIL (silent.log)",
        "wrong": "FAIL (wrong.log)",
        "late": "not begun: out of time",
    }
    told_by = [name for name, section in report.sections.items() if section.rows]
    assert told_by == ["fine", "slow", "broken", "wrong"]
    report.write()
    page = report.path.read_text("utf-8")
    assert page.count("| a product | 7.5 |") == 3
    assert "deepspeed not installed" in page
    assert "| late | not begun: out of time |  |" in page


@pytest.mark.process
def test_what_an_earlier_run_has_measured_is_not_told_again(tmp_path: Path) -> None:
    path = tmp_path / "a" / "step.json"
    path.parent.mkdir()
    measured = '{"rows": [{"work": "a step"}], "ratios": {}}'
    path.write_text(measured, encoding="utf-8")
    found: dict[str, Section] = {}
    chosen = {"a": python("pass", rows=bench_rows(path, {}))}
    run(chosen, tmp_path, monotonic() + 60, found.__setitem__)
    assert found["a"].rows == []
    again = f"open({str(path)!r}, 'w').write({measured!r})"
    chosen = {"a": python(again, rows=bench_rows(path, {}))}
    run(chosen, tmp_path, monotonic() + 60, found.__setitem__)
    assert found["a"].rows == [{"work": "a step"}]


@pytest.mark.process
def test_no_part_begins_after_the_deadline(tmp_path: Path) -> None:
    begun: list[str] = []
    chosen = {"a": python("pass", together=True), "b": python("pass")}
    run(chosen, tmp_path, monotonic() - 1, lambda name, _: begun.append(name))
    assert begun == []


def test_failures_are_found_in_what_pytest_prints_with_one_process_or_several() -> None:
    several = """
[gw1] [ 25%] PASSED tests/a.py::test_a
[gw0] [ 50%] SKIPPED tests/a.py::test_b
tests/a.py::test_c[x y]
[gw0] [ 75%] FAILED tests/a.py::test_c[x y]
ERROR tests/b.py - ModuleNotFoundError: No module named 'hypothesis'
"""
    one = """
tests/a.py::test_a PASSED                    [ 25%]
tests/a.py::test_b SKIPPED (needs an N...)   [ 50%]
tests/a.py::test_c[x y] FAILED               [ 75%]
ERROR tests/b.py
"""
    for text in (several, one):
        assert rows_of_tests(text) == [
            {"what": "1 passed, 1 skipped"},
            {"what": "tests/a.py::test_c[x y]", "result": "FAIL"},
            {"what": "tests/b.py", "result": "FAIL"},
        ]


def test_a_resumed_run_without_a_step_of_the_other_is_not_equal(tmp_path: Path) -> None:
    lines = '{"step": 1, "train/loss": 4.0}\n{"step": 2, "eval/loss": 3.0}\n{"step": 2, "train/l'
    (tmp_path / "metrics.jsonl").write_text(lines, encoding="utf-8")
    assert losses(tmp_path) == {1: 4.0}
    assert apart({1: 4.1, 2: 2.0}, {1: 4.0, 2: 2.0}) == pytest.approx(0.025)
    assert apart({1: 4.0}, {1: 4.0, 2: 2.0}) == apart({}, {}) == float("inf")


def test_a_test_that_needs_a_gpu_says_so_as_the_others_do() -> None:
    """By the reason it is chosen for `make gpu`."""
    condition = re.compile(r"skipif\(\s*not torch\.cuda\.is_available\(\),\s*reason=\"([^\"]*)\"")
    reasons = [
        reason for path in cuda_tests() for reason in condition.findall(Path(path).read_text())
    ]
    assert len(reasons) > 5
    assert {reason for reason in reasons if not NEEDS_CUDA.match(reason)} == set()


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_is_one_of_a_ratio_that_its_part_measures(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The part's own command at a smaller size and length, with the numbers beside its ratios."""
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    from train.benchmarks import ceiling

    monkeypatch.setitem(ceiling.COPIED_BYTES, "cpu", 1 << 12)
    shape = {"layers": 2, "dim": 32, "ffn_dim": 48, "heads": 4, "kv_heads": 2, "head_dim": 8}
    monkeypatch.setattr(bench, "WIDENED", [f"{key}={value}" for key, value in shape.items()])
    words = [w.replace("=cuda", "=cpu") for w in parts("cuda", tmp_path, 1)[name].words[2:]]
    given = parse(BenchArguments, words, positional=["name"])
    assert given.contexts == (1024,)  # of which the targets are
    smaller = replace(given, size=None, prompts=(6,), contexts=(10,), repeat=1)
    assert bench.main(smaller) == 0
    written = tmp_path / name / "inference.json"
    rows = {row["ratio"]: row for row in bench_rows(written, TARGETS[name])("") if "ratio" in row}
    for ratio, target in TARGETS[name].items():
        assert rows[ratio] == {"ratio": ratio, "is": rows[ratio]["is"], **target._asdict()}
    assert "must" not in rows["copy_gb_per_s"]


def test_the_names_of_parts_are_checked() -> None:
    names = parts("cuda", Path("logs"), 8)
    first = ["tests", "default_run", "ceilings"]
    first += ["inference_1b2", "inference_550m", "throughput", "decode"]
    assert list(names)[:7] == first
    # Even where all take as long as they may, there is time for more after them.
    beside = max(part.limit_s for part in names.values() if part.together)
    alone = [names[name].limit_s for name in first if not names[name].together]
    assert beside + sum(alone) + LAST_WORDS_S * (1 + len(alone)) <= GpuArguments().budget_s
    given = parse(GpuArguments, ["parts=engines,ceilings", "device=cpu"])
    assert given.names(names) == ["engines", "ceilings"]
    assert parse(GpuArguments, ["device=cpu"]).names(names) == list(names)
    with pytest.raises(ConfigError, match=r"parts='engine': expected one of tests, default_run"):
        parse(GpuArguments, ["parts=ceilings,engine", "device=cpu"])


@pytest.mark.process
def test_make_gpu_takes_wheels_from_a_folder(tmp_path: Path) -> None:
    made = ["make", "--dry-run", "-f", str(ROOT / "Makefile"), "gpu", "ARGS=device=cpu"]
    for given, installs in (([], False), (["WHEELS=w", "PYTHON=/x/python3"], True)):
        done = subprocess.run(
            [*made, *given], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        assert ("pip install" in done.stdout) == installs
        assert "-m tests.gpu device=cpu" in done.stdout
    assert "/x/python3 -m pip install --quiet --no-index" in done.stdout
    assert "--target .venv-gpu w/*.whl" in done.stdout


def test_the_documented_arguments_exist() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    given = [shlex.split(words) for words in re.findall(r'make gpu .*ARGS="(.*)"', page)]
    names = {word.partition("=")[0] for words in given for word in words}
    assert {"out", "logs", "parts", "budget_s", "commit"} <= names <= set(keys(GpuArguments))
