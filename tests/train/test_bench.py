"""The benchmarks give the ratios that are relied on, of medians, of work taken in turn."""

import json
from pathlib import Path
from statistics import median

import pytest
import torch

from conf.arguments import parse
from conf.errors import ConfigError
from train.bench import BENCHMARKS, BenchArguments, main
from train.benchmarks import loader as loader_benchmark
from train.benchmarks.timing import interleaved

CPU = torch.device("cpu")
pytest.importorskip("transformers")


def test_work_is_taken_in_turn_and_the_first_turn_is_not_counted() -> None:
    done: list[str] = []
    works = {name: (lambda name=name: done.append(name)) for name in "abc"}
    seconds = interleaved(works, 3, CPU)
    assert "".join(done) == "abc" * 4
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3, "c": 3}
    assert all(value >= 0 for values in seconds.values() for value in values)


def test_the_step_benchmark_writes_its_ratios_and_what_they_are_made_of(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "new" / "bench"
    given = {"rows": 1, "seq_len": 32, "repeat": 3, "device": "cpu", "out": str(out)}
    assert main(BenchArguments(name="step", **given)) == 0
    report = json.loads((out / "step.json").read_text(encoding="utf-8"))
    rows = {row["work"]: row for row in report["rows"]}
    assert set(rows) == {"vanilla", "phd_cswa_K2", "phd_cswa_K3", "transformers"}
    for row in rows.values():
        assert len(row["seconds"]) == 3
        assert row["median_ms"] == pytest.approx(1000 * median(row["seconds"]))
        assert row["tokens_per_s"] == pytest.approx(32 / median(row["seconds"]))
    ratios = report["ratios"]
    assert set(ratios) == {
        "step_over_flops_K2",
        "step_over_flops_K3",
        "vanilla_over_transformers",
    }

    def ratio(work: str, base: str) -> float:
        """The median over the turns, in which both were measured one after the other."""
        pairs = zip(rows[work]["seconds"], rows[base]["seconds"], strict=True)
        return median(a / b for a, b in pairs)

    assert ratios["vanilla_over_transformers"] == ratio("vanilla", "transformers")
    for K in (2, 3):
        row = rows[f"phd_cswa_K{K}"]
        assert 1 < row["flops_x_vanilla"] < K
        expected = ratio(row["work"], "vanilla") / row["flops_x_vanilla"]
        assert ratios[f"step_over_flops_K{K}"] == pytest.approx(expected)
    assert report["machine"]["packages"]["torch"] == torch.__version__
    text = capsys.readouterr().out
    assert all(name in text for name in [*rows, *ratios, str(out / "step.json")])


def test_the_attention_benchmark_gives_the_promised_ratios(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    randn = torch.randn  # what it measures is cut short: only the times depend on that
    monkeypatch.setattr(
        torch, "randn", lambda B, N, K, T, H, **kw: randn(B, N, K, T // 64, H, **kw)
    )
    result = BENCHMARKS["attention"](BenchArguments(name="attention", repeat=1), CPU)
    promised = {f"packed_over_vanilla_K{K}_T{T}" for K in (2, 3, 4) for T in (1024, 2048)}
    promised |= {f"naive_over_packed_K3_T{T}" for T in (1024, 2048)}
    assert set(result.ratios) == promised
    typical = {(row["T"], row["work"]): row["median_ms"] for row in result.rows}
    works = ["vanilla", "packed_K2", "packed_K3", "packed_K4", "naive_K3", "dense_mask_K3"]
    assert set(typical) == {(T, work) for T in (1024, 2048) for work in works}
    for T in (1024, 2048):
        for K in (2, 3, 4):
            expected = typical[T, f"packed_K{K}"] / typical[T, "vanilla"]
            assert result.ratios[f"packed_over_vanilla_K{K}_T{T}"] == pytest.approx(expected)
        expected = typical[T, "naive_K3"] / typical[T, "packed_K3"]
        assert result.ratios[f"naive_over_packed_K3_T{T}"] == pytest.approx(expected)


def test_impossible_arguments_are_all_told_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        parse(BenchArguments, ["speed", "repeat=0", "device=tpu"], positional=["name"])
    assert list(map(str, error.value.problems)) == [
        "repeat=0: expected an integer of at least 1",
        f"name='speed': expected one of {', '.join(BENCHMARKS)}",
        "device='tpu': expected auto, cpu or cuda",
    ]


def test_the_loaders_benchmarks_measure_every_form(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader_benchmark, "MANY_TOKENS", 1_000_000)
    monkeypatch.setattr(loader_benchmark, "_texts", lambda: ["a text of words " * 40] * 300)
    out = str(tmp_path)
    assert main(BenchArguments(name="data", repeat=1, out=out)) == 0
    rows = json.loads((tmp_path / "data.json").read_text(encoding="utf-8"))["rows"]
    assert [row["work"] for row in rows] == ["SentencePiece", "jsonl", "parquet", "pre-tokenised"]
    assert rows[0]["x_SentencePiece"] == 1
    assert main(BenchArguments(name="resume", repeat=1, out=out, gigabytes=0.002)) == 0
    rows = json.loads((tmp_path / "resume.json").read_text(encoding="utf-8"))["rows"]
    assert [row["work"] for row in rows] == ["jsonl", "jsonl.gz", "parquet", "tokens"]
    assert all(row[f"at {place} ms"] > 0 for row in rows for place in ("1%", "50%", "99%"))
    assert "99%_over_1%" in capsys.readouterr().out
