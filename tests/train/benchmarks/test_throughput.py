"""Throughput is measured on the same rows for everybody, told per batch, and drawn."""

import json
from dataclasses import replace
from itertools import count
from pathlib import Path
from statistics import median

import pytest
import torch

from conf.arguments import parse
from conf.errors import ConfigError
from phd.config import ModelConfig
from train import bench
from train.bench import BenchArguments
from train.benchmarks import timing
from train.benchmarks.timing import Result

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from matplotlib.backends.backend_agg import FigureCanvasAgg

from train.benchmarks import ceiling, throughput
from train.benchmarks.family import Models
from train.benchmarks.throughput import (
    LOADS,
    Load,
    Serve,
    bench_throughput,
    lengths_of,
    load_of,
    requests_of,
)
from train.benchmarks.throughput_plot import chart

CPU = torch.device("cpu")
SHAPE = {"layers": 2, "dim": 32, "ffn_dim": 48, "heads": 4, "kv_heads": 2, "head_dim": 8}
SIZE = ModelConfig(**SHAPE, vocab_size=64, window=4, chunk=8)
LOAD = Load(batches=(1, 4), copies=(2, 5), context=16, steps=3)


@pytest.fixture(autouse=True)
def little_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ceiling.COPIED_BYTES, "cpu", 1 << 12)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Result:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ceiling.COPIED_BYTES, "cpu", 1 << 12)
        return bench_throughput(SIZE, LOAD, 3, CPU, charts=tmp_path_factory.mktemp("charts"))


def test_every_batch_has_vanilla_and_every_k_by_both_and_transformers(measured: Result) -> None:
    found = [(row["batch"], row["by"], row["variant"], row["K"]) for row in measured.rows]
    models = [("vanilla", 1), ("phd_cswa", 2), ("phd_cswa", 5)]
    works = [(by, *model) for by in ("decoder", "generator") for model in models]
    works.append(("transformers", "vanilla", 1))
    assert found == [(batch, *work) for batch in (1, 4) for work in works]


def test_a_row_of_the_table_agrees_with_itself(measured: Result) -> None:
    for row in measured.rows:
        assert row["tokens_per_s"] == pytest.approx(1e3 * row["batch"] / row["ms"])
        if (row["by"], row["variant"]) == ("decoder", "vanilla"):
            assert row["x_vanilla"] == 1
            vanilla = row
            continue
        pairs = zip(row["seconds"], row["vanilla_seconds"], strict=True)
        assert row["x_vanilla"] == pytest.approx(median(a / b for a, b in pairs))
        assert row["ms"] == pytest.approx(row["x_vanilla"] * vanilla["ms"])
        if row["by"] == "decoder":
            assert row["floor_ms"] == pytest.approx(row["of_copy"] * row["ms"])
        else:
            assert row["floor_ms"] is row["of_copy"] is None


def test_all_tokens_of_all_requests_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With a clock by which every piece of work takes 6 s."""
    monkeypatch.setattr(timing, "perf_counter", count(0, 6).__next__)
    load = replace(LOAD, batches=(4,))
    rows = bench_throughput(SIZE, load, 1, CPU, charts=tmp_path).rows
    tokens = sum(request.max_tokens for request in requests_of(4, load, SIZE.vocab_size))
    assert tokens == 3 + 4 + 6 + 3 + 4 + 6 + 3 + 4
    for row in rows:
        expected = {"decoder": 4 * 3 / 6, "generator": tokens / 6}
        if row["by"] in expected:
            assert row["tokens_per_s"] == pytest.approx(expected[row["by"]])


def test_requests_have_unequal_prompts_and_new_tokens_and_all_are_served() -> None:
    requests = requests_of(4, LOAD, SIZE.vocab_size)
    assert len({len(request.prompt) for request in requests}) > 1
    assert {request.max_tokens for request in requests} == {3, 4, 6}
    model = Models(replace(SIZE, max_seq_len=16), CPU).of("phd_cswa", 3)
    served = Serve(model, 4, requests)
    texts = served.generator.generate(requests)
    assert served.tokens == sum(map(len, texts))
    assert [len(text) for text in texts] == [request.max_tokens for request in requests]


def test_rows_have_unequal_lengths_up_to_the_context() -> None:
    assert lengths_of(4, 16) == [10, 12, 14, 16]
    for batch in (1, 3, 64):
        lengths = lengths_of(batch, 1024)
        assert max(lengths) == 1024
        assert min(lengths) >= 512
        assert len(set(lengths)) == len(lengths) == batch


def test_the_ratios_are_told_for_every_batch(measured: Result) -> None:
    speeds = {(row["batch"], row["by"], row["K"]): row["tokens_per_s"] for row in measured.rows}
    expected = {}
    for batch in (1, 4):
        vanilla = speeds[batch, "decoder", 1]
        expected[f"vanilla_tokens_per_s_B{batch}"] = vanilla
        theirs = speeds[batch, "transformers", 1]
        expected[f"vanilla_over_transformers_B{batch}"] = vanilla / theirs
        for K in (1, 2, 5):
            served = speeds[batch, "generator", K]
            expected[f"generator_K{K}_of_vanilla_B{batch}"] = served / vanilla
        for K in (2, 5):
            expected[f"K{K}_of_vanilla_B{batch}"] = speeds[batch, "decoder", K] / vanilla
    assert measured.ratios == pytest.approx(expected)


def test_the_chart_has_a_line_for_each_k_and_clips_nothing(measured: Result) -> None:
    figure = chart(measured.rows, measured.subject)
    FigureCanvasAgg(figure).draw()
    whole, relative = figure.axes
    for axes, value in ((whole, "tokens_per_s"), (relative, None)):
        lines = [line for line in axes.get_lines() if len(line.get_xdata())]
        assert [line.get_linestyle() for line in lines] == ["-"] * 3 + ["--"] * 3 + ["-"]
        labels = [line.get_label() for line in lines if line.get_linestyle() == "-"]
        ours = ["vanilla", "PHD-CSWA, K = 2", "PHD-CSWA, K = 5"]
        assert labels == [*ours, "transformers, static cache"]
        colors = [line.get_color() for line in lines]
        assert colors[:3] == colors[3:6]
        assert len(set(colors)) == 4
        for by, line in (("decoder", lines[2]), ("generator", lines[5])):
            found = [row for row in measured.rows if (row["by"], row["K"]) == (by, 5)]
            assert list(line.get_xdata()) == [1, 4]
            expected = [row[value] if value else 1 / row["x_vanilla"] for row in found]
            assert list(line.get_ydata()) == pytest.approx(expected)
        frame = axes.get_window_extent()
        for line in lines:
            x, y = axes.transData.transform(line.get_xydata()).T
            assert frame.x0 < x.min() < x.max() < frame.x1
            assert frame.y0 < y.min() <= y.max() < frame.y1


def test_what_is_asked_takes_the_place_of_what_is_usual() -> None:
    usual = LOADS["cpu"]
    assert load_of(CPU) == usual
    asked = load_of(CPU, (4, 2), (99, 50), (3, 2))
    assert asked == replace(usual, batches=(2, 4), context=99, copies=(2, 3))


def test_the_command_writes_a_table_json_csv_and_a_chart(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(throughput.LOADS, "cpu", LOAD)
    monkeypatch.setattr(bench, "WIDENED", [f"{name}={value}" for name, value in SHAPE.items()])
    given = ["throughput", "repeat=1", "device=cpu", "copies=3", f"out={tmp_path}"]
    assert bench.main(parse(BenchArguments, given, positional=["name"])) == 0
    written = sorted(path.name for path in tmp_path.iterdir())
    assert written == ["throughput.csv", "throughput.json", "throughput.png"]
    report = json.loads((tmp_path / "throughput.json").read_text(encoding="utf-8"))
    assert report["complete"]
    assert {row["K"] for row in report["rows"]} == {1, 3}
    text = capsys.readouterr().out
    assert report["subject"] in text
    assert "rows of 8 to 16 tokens" in text
    assert "W = 16 and C = 32 in hidden copies" in text


def test_batches_that_were_measured_are_kept_when_it_is_interrupted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(throughput.LOADS, "cpu", LOAD)
    monkeypatch.setattr(bench, "WIDENED", [f"{name}={value}" for name, value in SHAPE.items()])
    works = iter([throughput.copy_work])

    def copy_work(device: torch.device) -> timing.Work:
        for work in works:
            return work(device)
        raise KeyboardInterrupt

    monkeypatch.setattr(throughput, "copy_work", copy_work)
    given = ["throughput", "repeat=1", "device=cpu", "copies=3", f"out={tmp_path}"]
    with pytest.raises(KeyboardInterrupt):
        bench.main(parse(BenchArguments, given, positional=["name"]))
    report = json.loads((tmp_path / "throughput.json").read_text(encoding="utf-8"))
    assert not report["complete"]
    assert {row["batch"] for row in report["rows"]} == {1}
    assert len(report["rows"]) == 5
    assert "K3_of_vanilla_B1" in report["ratios"]
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".csv", ".json"]


def test_a_context_that_is_too_short_and_an_empty_batch_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"contexts=8: expected more than 8: rows of half of it"):
        bench.main(BenchArguments(name="throughput", contexts=(8,), device="cpu"))
    with pytest.raises(ConfigError, match=r"batches=0: expected integers of at least 1"):
        parse(BenchArguments, ["throughput", "batches=[4,0]"], positional=["name"])
