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
from train.benchmarks import timing
from train.benchmarks.timing import beside, interleaved, within_turns

CPU = torch.device("cpu")
pytest.importorskip("transformers")


def test_work_is_taken_in_turn_and_the_first_turn_is_not_counted() -> None:
    done: list[str] = []
    works = {name: (lambda name=name: done.append(name)) for name in "abc"}
    seconds = interleaved(works, 3, CPU)
    assert "".join(done) == "abc" * 4
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3, "c": 3}
    assert all(value >= 0 for values in seconds.values() for value in values)


def clock(monkeypatch: pytest.MonkeyPatch, seconds: list[float]) -> None:
    """Let the timed runs take these seconds, one after the other."""
    ends = [moment for spent in seconds for moment in (0.0, spent)]
    monkeypatch.setattr(timing, "perf_counter", iter(ends).__next__)


def test_each_work_is_timed_between_two_runs_of_the_base() -> None:
    done: list[str] = []
    works = {name: (lambda name=name: done.append(name)) for name in "ab"}
    times = beside("base", lambda: done.append("-"), works, 2, CPU)
    assert "".join(done) == "-a-b-" * 3
    counts = {name: len(spent) for name, spent in times.seconds.items()}
    assert counts == {"base": 6, "a": 2, "b": 2}


def test_a_machine_with_two_speeds_gives_one_ratio_in_times_and_ratios(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A work that takes 1.2 times as long. In the second of three turns the machine is half as fast
    # from the work on, and in the last one from the start. The medians of the times would say
    # 2.4 / 1.0, or 1.2 / 2.0 if the speeds came in another order.
    warm_up = [9.0, 9.0, 9.0]
    clock(monkeypatch, [*warm_up, *(1.0, 1.2, 1.0), *(1.0, 2.4, 2.0), *(2.0, 2.4, 2.0)])
    times = beside("vanilla", lambda: None, {"K2": lambda: None}, 3, CPU)
    assert times.seconds["vanilla"] == [1.0, 1.0, 1.0, 2.0, 2.0, 2.0]
    assert times.beside["K2"] == [1.0, 1.5, 2.0]
    assert times.ratio("K2") == pytest.approx((1.2, 1.2, 1.4))
    assert times.columns("K2")["ms"] == pytest.approx(1.2 * times.columns("vanilla")["ms"])


@pytest.mark.parametrize(
    ("own", "base"),
    [
        ([49.9] * 5, [50.7] * 5),
        ([49.9, 49.9, 49.9, 80, 80], [50.7, 50.7, 45, 72, 50.7]),
        ([10, 20, 30, 40, 50], [50, 10, 40, 20, 30]),
        ([3.0], [2.0]),
    ],
)
def test_the_printed_times_and_ratios_never_contradict_each_other(
    own: list[float], base: list[float]
) -> None:
    """A work that is told to take 49.9 ms beside 50.7 is told to be 0.98 times as long."""
    times = within_turns("vanilla", {"vanilla": base, "K2": own})
    row, vanilla = times.columns("K2"), times.columns("vanilla")
    assert row["ms"] / vanilla["ms"] == pytest.approx(row["x_vanilla"])
    assert row["x_low"] <= row["x_vanilla"] <= row["x_high"]
    assert vanilla["x_vanilla"] == 1
    ratios = sorted(a / b for a, b in zip(own, base, strict=True))
    assert ratios[0] <= row["x_low"]
    assert row["x_high"] <= ratios[-1]


def test_the_base_tells_the_noise_of_the_machine() -> None:
    for runs, low, high in (
        ([1.0, 3.0, 1.0, 3.0, 1.0, 3.0], 1 / 3, 3),  # 3, 1/3, 3 and 1/3 times their neighbours
        ([2.0] * 5, 1, 1),
        ([1.0, 3.0, 1.0], 1, 3),
        ([2.0], 1, 1),
    ):
        times = within_turns("base", {"base": runs, "work": runs})
        assert times.ratio("base") == pytest.approx((1, low, high))


@pytest.mark.parametrize("out", ["{file}", "{file}/below", "/proc/nowhere"])
def test_an_out_that_cannot_be_written_is_told_before_anything_is_measured(
    out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setitem(BENCHMARKS, "step", None)
    with pytest.raises(ConfigError, match=r"out='.*': not a directory that can be written to"):
        main(BenchArguments(name="step", device="cpu", out=out.format(file=tmp_path / "file")))


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
        # Of vanilla, which is the base, every run: one before each work and one at the end.
        assert len(row["seconds"]) == (12 if row["work"] == "vanilla" else 3)
        assert row["ms"] == pytest.approx(rows["vanilla"]["ms"] * row["x_vanilla"])
        assert row["x_low"] <= row["x_vanilla"] <= row["x_high"]
        assert row["tokens_per_s"] == pytest.approx(32e3 / row["ms"])
    assert rows["vanilla"]["ms"] == pytest.approx(1e3 * median(rows["vanilla"]["seconds"]))
    ratios = report["ratios"]
    assert set(ratios) == {
        "step_over_flops_K2",
        "step_over_flops_K3",
        "vanilla_over_transformers",
    }

    def ratio(work: str) -> float:
        """The median over the turns, in which vanilla was measured before and after the work."""
        pairs = zip(rows[work]["seconds"], rows[work]["vanilla_seconds"], strict=True)
        return median(a / b for a, b in pairs)

    assert ratios["vanilla_over_transformers"] == 1 / ratio("transformers")
    for K in (2, 3):
        row = rows[f"phd_cswa_K{K}"]
        assert 1 < row["flops_x_vanilla"] < K
        assert row["x_vanilla"] == ratio(row["work"])
        expected = ratio(row["work"]) / row["flops_x_vanilla"]
        assert ratios[f"step_over_flops_K{K}"] == pytest.approx(expected)
    assert report["machine"]["packages"]["torch"] == torch.__version__
    text = capsys.readouterr().out
    files = [f"written: {out / name}" for name in ("step.json", "step.csv")]
    assert all(name in text for name in [*rows, *ratios, *files])
    assert report["subject"] == "tiny: 3 layers, D = 256, 3.41 M parameters; float32, CPU"
    assert report["subject"] in text


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
    typical = {(row["T"], row["work"]): row["ms"] for row in result.rows}
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
