"""What inference costs is measured on equal work, on caches that are really there, and drawn."""

import csv
import json
from dataclasses import replace
from itertools import count, product
from pathlib import Path
from statistics import median
from typing import Any, get_args

import pytest
import torch

from conf.arguments import parse
from conf.errors import ConfigError
from phd.config import ModelConfig, Variant
from phd.inference.cache import kv_bytes
from phd.inference.prefill import decode, prefill
from train import bench
from train.bench import BenchArguments
from train.benchmarks import timing
from train.benchmarks.timing import Result

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.image import imread

from train.benchmarks import inference as inference_benchmark
from train.benchmarks import inference_plots
from train.benchmarks.inference import (
    GRIDS,
    PHD,
    Decode,
    Grid,
    Models,
    Prefill,
    TransformersDecode,
    grid_of,
    measure_inference,
)

CPU = torch.device("cpu")
SHAPE = {"layers": 2, "dim": 32, "ffn_dim": 48, "heads": 4, "kv_heads": 2, "head_dim": 8}
SIZE = ModelConfig(**SHAPE, vocab_size=64, window=4, chunk=8, span_unit="token")
GRID = Grid(
    prompts=(12, 24),
    prefill_copies=(2, 3),
    contexts=(9, 18),
    decode_copies=(2, 4),
    naive_copies=(2,),
    steps=3,
)
TURNS = 3


@pytest.fixture(autouse=True)
def little_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference_benchmark, "COPIED_BYTES", 1 << 12)


@pytest.fixture(scope="module")
def measured() -> Result:
    return measure_inference(SIZE, GRID, TURNS, CPU)


def config_of(row: dict[str, Any]) -> ModelConfig:
    variant = "vanilla" if row["variant"] == "transformers" else row["variant"]
    return replace(SIZE, variant=variant, K=row["K"])


def find(result: Result, *key: Any) -> dict[str, Any]:
    """The row of (work, variant, K, tokens)."""
    names = ("work", "variant", "K", "tokens")
    [row] = [row for row in result.rows if tuple(row[name] for name in names) == key]
    return row


def ratio(row: dict[str, Any]) -> float:
    """The median over the turns, in which vanilla was measured before and after the work."""
    return median(a / b for a, b in zip(row["seconds"], row["vanilla_seconds"], strict=True))


def models(**settings: Any) -> Models:
    return Models(replace(SIZE, max_seq_len=64, **settings), CPU)


def test_every_variant_is_measured_at_every_length(measured: Result) -> None:
    expected = set()
    for work, tokens, copies in (
        ("prefill", GRID.prompts, GRID.prefill_copies),
        ("decode", GRID.contexts, GRID.decode_copies),
    ):
        kinds = [("vanilla", 1), *product(PHD, copies), ("naive_repeat", 2)]
        expected |= {(work, *kind, T) for kind in kinds for T in tokens}
    expected |= {("decode", "transformers", 1, 18)}
    found = [(row["work"], row["variant"], row["K"], row["tokens"]) for row in measured.rows]
    assert len(found) == len(set(found))
    assert set(found) == expected


def test_table_ratios_and_figures_have_one_statistic(measured: Result) -> None:
    """A ratio is the median of the turns, and a time is vanilla's, multiplied by the ratio."""
    for row in measured.rows:
        vanilla = find(measured, row["work"], "vanilla", 1, row["tokens"])
        assert row["ms"] == pytest.approx(row["x_vanilla"] * vanilla["ms"])
        assert row["x_low"] <= row["x_vanilla"] <= row["x_high"]
        if row is vanilla:
            assert row["ms"] == pytest.approx(1e3 * median(row["seconds"]))
            continue
        slow = (row["work"], row["variant"]) == ("prefill", "naive_repeat")
        assert len(row["seconds"]) == (1 if slow else TURNS)
        assert row["x_vanilla"] == pytest.approx(ratio(row))


def test_a_figure_of_times_shows_vanillas_multiplied_by_the_ratios(measured: Result) -> None:
    prefills, decodes = (inference_plots.longest(measured.rows, w) for w in ("prefill", "decode"))
    [of_ratios] = inference_plots.prefill_over_copies(prefills, "small").axes
    of_times, _ = inference_plots.times_over_copies(prefills, decodes, "small").axes
    for label in ("PHD", "PHD-SWA", "PHD-CSWA"):
        ratios, times = (
            next(line.get_ydata() for line in axes.get_lines() if line.get_label() == label)
            for axes in (of_ratios, of_times)
        )
        expected = [measured.ratios["prefill_vanilla_ms"] * ratio for ratio in ratios]
        assert list(times) == pytest.approx(expected)


def test_a_token_takes_its_share_of_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "perf_counter", count(0, 6).__next__)  # all work takes 6 s
    for row in measure_inference(SIZE, GRID, 2, CPU).rows:
        if row["variant"] != "transformers":
            expected = 6000 / (GRID.steps if row["work"] == "decode" else 1)
            assert row["ms"] == pytest.approx(expected)
            assert row["x_vanilla"] == 1


def test_the_ratios_are_those_of_the_longest_prompt_and_context(measured: Result) -> None:
    short = {"phd": "_phd", "phd_swa": "_swa", "phd_cswa": "_cswa"}
    vanilla = {
        "prefill": find(measured, "prefill", "vanilla", 1, 24),
        "decode": find(measured, "decode", "vanilla", 1, 18),
    }
    expected = {f"{work}_vanilla_ms": row["ms"] for work, row in vanilla.items()}
    for variant, K in product(PHD, (2, 3)):
        row = find(measured, "prefill", variant, K, 24)
        expected[f"prefill{short[variant]}_K{K}"] = ratio(row)
    for variant, K in product(PHD, (2, 4)):
        name = "" if variant == "phd_cswa" else short[variant]
        row = find(measured, "decode", variant, K, 18)
        expected[f"decode{name}_K{K}"] = ratio(row)
    row = find(measured, "decode", "naive_repeat", 2, 18)
    expected["decode_naive_K2"] = ratio(row)
    theirs = find(measured, "decode", "transformers", 1, 18)
    expected["decode_vanilla_over_transformers"] = 1 / ratio(theirs)
    expected["prefill_naive_K2"] = ratio(find(measured, "prefill", "naive_repeat", 2, 24))
    expected["copy_gb_per_s"] = measured.ratios["copy_gb_per_s"]
    assert measured.ratios == pytest.approx(expected)


def test_the_kv_bytes_are_those_of_the_caches_that_were_allocated(measured: Result) -> None:
    for row in measured.rows:
        if row["variant"] == "transformers":
            assert row["kv_bytes"] is None
            continue
        expected = kv_bytes(config_of(row), row["tokens"], torch.float32).total
        assert row["kv_bytes"] == expected
        vanilla = find(measured, row["work"], "vanilla", 1, row["tokens"])["kv_bytes"]
        slot = vanilla // row["tokens"]
        hidden = min(SIZE.window, row["tokens"]) * (row["K"] - 1) * slot
        more = {"phd_swa": hidden, "phd_cswa": hidden, "naive_repeat": (row["K"] - 1) * vanilla}
        assert row["kv_bytes"] == vanilla + more.get(row["variant"], 0)


def test_the_bandwidth_is_what_is_read_over_what_a_copy_reads_and_writes() -> None:
    result = measure_inference(SIZE, GRID, 1, CPU)
    matrices = 64 * 32 + 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32)
    norms = 2 * (32 + 16 + 32 + 32) + 32
    speeds: dict[int, set[float]] = {}
    for row in result.rows:
        if row["work"] == "prefill" or row["variant"] == "transformers":
            assert row["bandwidth_used"] is None
            continue
        read = 4 * (matrices + norms) + row["kv_bytes"]
        copy_speed = read / row["ms"] / 1e6 / row["bandwidth_used"]
        speeds.setdefault(row["tokens"], set()).add(round(copy_speed, 6))
    # All rows of a length are beside the same copy; the copy of the longest is told.
    assert [len(found) for found in speeds.values()] == [1, 1]
    assert speeds[18] == {round(result.ratios["copy_gb_per_s"], 6)}


def test_an_untied_embedding_is_not_read() -> None:
    tied, untied = (Decode(models(tied=tied).of("vanilla", 1), 9, 3) for tied in (True, False))
    assert tied.bytes_read == untied.bytes_read


def test_all_variants_share_the_weights_of_one_model() -> None:
    family = models()
    places = [
        [weight.data_ptr() for weight in family.of(variant, K).parameters()]
        for variant, K in (("vanilla", 1), ("phd", 2), ("phd_cswa", 16), ("naive_repeat", 4))
    ]
    assert all(place == places[0] for place in places)


@pytest.mark.parametrize("variant", get_args(Variant))
def test_a_prompt_is_read_into_a_cache_of_its_size(variant: Variant) -> None:
    model = models().of(variant, 1 if variant == "vanilla" else 3)
    work = Prefill(model, 24)
    work()
    assert work.prompt.shape == (1, 24)
    assert work.kv_bytes == prefill(model, work.prompt)[1].nbytes


@pytest.mark.parametrize("variant", get_args(Variant))
def test_every_turn_decodes_the_last_tokens_of_the_context(variant: Variant) -> None:
    work = Decode(models().of(variant, 1 if variant == "vanilla" else 3), 18, 4)
    before = [x.clone() for x in work.cache.originals]
    written = 4 * work.cache.pattern.cached_slots_per_token
    for _ in range(2):
        work()
        assert work.cache.host_lengths == work.cache.lengths.tolist() == [18]
        assert work.cache.nbytes == work.kv_bytes
    for old, new in zip(before, work.cache.originals, strict=True):
        assert torch.equal(old[:, :, :, :-written], new[:, :, :, :-written])
        assert not (old == new)[:, :, :, -written:].any()


def test_transformers_decodes_the_same_tokens() -> None:
    vanilla = models().of("vanilla", 1)
    theirs = TransformersDecode(vanilla, tokens=18, steps=6)
    logits, cache = prefill(vanilla, theirs.prompt, capacity=18)
    ours = [logits.argmax(-1)]
    for _ in range(6):
        ours.append(decode(vanilla, ours[-1], cache).argmax(-1))
    assert cache.host_lengths == [18]
    written = theirs.model.generate(theirs.prompt, max_new_tokens=7, do_sample=False)
    assert written[0, 12:].tolist() == torch.cat(ours).tolist()


def test_the_clock_of_transformers_stands_still_while_the_prompt_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = iter(range(100))
    theirs = TransformersDecode(models().of("vanilla", 1), tokens=18, steps=6)
    monkeypatch.setattr(inference_benchmark, "perf_counter", lambda: next(now) ** 2)
    theirs()
    # The prompt comes at 0, the first token at 1, and the last of six others at 7 * 7.
    assert theirs.seconds == [(49 - 1) / 6]


def test_charts_show_the_rows(measured: Result, tmp_path: Path) -> None:
    told = inference_plots.draw(measured.rows, "small", tmp_path / "new")
    assert sorted(told) == sorted((tmp_path / "new").iterdir())
    charts = sorted(path.name for path in told)
    assert charts == ["figure_1c.png", "figure_1d.png", "figure_9.png", "kv_bytes.png"]
    for name in charts:
        assert imread(tmp_path / "new" / name).std() > 0
    rows = inference_plots.longest(measured.rows, "prefill")
    [axes] = inference_plots.prefill_over_copies(rows, "small").axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
    expected = [[K, measured.ratios[f"prefill_cswa_K{K}"]] for K in (2, 3)]
    assert lines["PHD-CSWA"] == [[1, 1], *expected]
    assert lines["naive repetition"] == [[1, 1], [2, measured.ratios["prefill_naive_K2"]]]


def test_no_marker_or_bar_is_clipped(measured: Result) -> None:
    """Each lies within the axes, with the room that its size takes."""
    rows = measured.rows
    prefills, decodes = (inference_plots.longest(rows, work) for work in ("prefill", "decode"))
    for figure in (
        inference_plots.latency_over_cache(decodes, "small"),
        inference_plots.prefill_over_copies(prefills, "small"),
        inference_plots.times_over_copies(prefills, decodes, "small"),
        inference_plots.cache_over_context(rows, "small"),
    ):
        FigureCanvasAgg(figure).draw()
        for axes in figure.axes:
            for line in axes.get_lines():
                highest = axes.transData.transform(line.get_xydata())[:, 1].max()
                marker = 0 if line.get_marker() == "None" else line.get_markersize()
                assert highest + marker / 72 * figure.dpi / 2 < axes.get_window_extent().y1


@pytest.mark.parametrize(("settings", "window"), [({}, 16 * 3), ({"span_unit": "hidden"}, 16)])
def test_the_command_writes_a_table_json_csv_and_charts(
    settings: dict[str, Any],
    window: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(inference_benchmark.GRIDS, "cpu", GRID)
    monkeypatch.setattr(bench, "WIDENED", [f"{name}={value}" for name, value in SHAPE.items()])
    out = tmp_path / "out"
    given = BenchArguments(name="inference", repeat=1, device="cpu", out=str(out), **settings)
    assert bench.main(given) == 0
    assert len(list(out.glob("*.png"))) == 4
    report = json.loads((out / "inference.json").read_text(encoding="utf-8"))
    with (out / "inference.csv").open(encoding="utf-8") as file:
        told = list(csv.DictReader(file))
    assert [{name: row[name] for name in told[0]} for row in report["rows"]] == [
        {name: None if value == "" else read(value) for name, value in row.items()} for row in told
    ]
    text = capsys.readouterr().out
    files = [line.removeprefix("written: ") for line in text.splitlines() if "written: " in line]
    assert sorted(files) == sorted(map(str, out.iterdir()))
    assert "tiny, widened: 2 layers, D = 32, " in text
    assert report["subject"] in text
    assert all(name in text for name in [*report["ratios"], "naive_repeat", "transformers"])
    by_key = {(row["work"], row["variant"], row["K"], row["tokens"]): row for row in report["rows"]}
    slot = by_key["decode", "vanilla", 1, 18]["kv_bytes"] // 18
    more = by_key["decode", "phd_swa", 4, 18]["kv_bytes"] - 18 * slot
    assert more == window * slot  # 16 tokens of 3 hidden copies each, or 16 hidden copies


def read(value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def test_what_is_missing_is_told_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bench, "find_spec", lambda name: None if name == "matplotlib" else name)
    monkeypatch.setattr(bench, "load", None)  # what is measured would be made of this
    with pytest.raises(ConfigError, match=r"needs matplotlib; .* -m pip install .*\[bench\]"):
        bench.main(BenchArguments(name="inference", device="cpu"))


def test_what_is_asked_takes_the_place_of_what_is_usual() -> None:
    usual = GRIDS["cpu"]
    assert grid_of(CPU) == usual
    asked = grid_of(CPU, prompts=(100,), contexts=(50, 60), copies=(2, 64), compiled=True)
    assert asked == replace(
        usual,
        prompts=(100,),
        contexts=(50, 60),
        prefill_copies=(2, 64),
        decode_copies=(2, 64),
        naive_copies=(2,),
        compiled=True,
    )


def test_one_number_of_copies_without_naive_repetition_is_drawn_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bench, "WIDENED", [f"{name}={value}" for name, value in SHAPE.items()])
    given = ["copies=7", "prompts=9", "contexts=[10]", "repeat=1", "device=cpu", f"out={tmp_path}"]
    assert bench.main(parse(BenchArguments, ["inference", *given], positional=["name"])) == 0
    rows = json.loads((tmp_path / "inference.json").read_text(encoding="utf-8"))["rows"]
    assert {(row["work"], row["K"], row["tokens"]) for row in rows} == {
        *(("prefill", K, 9) for K in (1, 7)),
        *(("decode", K, 10) for K in (1, 7)),
    }
    assert len(list(tmp_path.glob("*.png"))) == 4


def test_lengths_and_copies_that_cannot_be_measured_are_refused() -> None:
    with pytest.raises(ConfigError) as error:
        parse(
            BenchArguments,
            ["inference", "copies=[2,1]", "prompts=0", "contexts=x"],
            positional=["name"],
        )
    assert set(map(str, error.value.problems)) >= {
        "copies=1: expected integers of at least 2",
        "prompts=0: expected integers of at least 1",
    }
    with pytest.raises(ConfigError, match=r"contexts=\[8\]: expected more than the 8 tokens"):
        bench.main(BenchArguments(name="inference", contexts=(8,), device="cpu"))


def test_an_unknown_unit_or_size_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="span_unit"):
        parse(BenchArguments, ["inference", "span_unit=words"], positional=["name"])
    with pytest.raises(ConfigError, match="size=huge"):
        bench.main(BenchArguments(name="inference", size="huge", device="cpu"))
