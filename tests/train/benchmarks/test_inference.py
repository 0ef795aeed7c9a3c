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
from phd.config import VARIANTS, ModelConfig, Variant
from phd.inference.cache import kv_bytes
from phd.inference.prefill import decode, prefill
from phd.linear import Linear
from phd.model import Transformer
from train import bench
from train.bench import BenchArguments
from train.benchmarks import timing
from train.benchmarks.timing import Result

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.image import imread

from train.benchmarks import ceiling, decoding, inference_plots
from train.benchmarks import inference as inference_benchmark
from train.benchmarks.decoding import Decode, TransformersDecode, in_transformers
from train.benchmarks.family import Models
from train.benchmarks.inference import (
    GRIDS,
    NEIGHBOURS,
    WINDOWED,
    Asked,
    Grid,
    Prefill,
    grid_of,
    measure_inference,
)

CPU = torch.device("cpu")
SHAPE = {"layers": 2, "dim": 32, "ffn_dim": 48, "heads": 4, "kv_heads": 2, "head_dim": 8}
SIZE = ModelConfig(**SHAPE, vocab_size=64, window=4, chunk=8)
GRID = Grid(
    prompts=(12, 24),
    prefill_copies=(2, 16),
    contexts=(9, 18),
    decode_copies=(2, 16),
    naive_copies=(2,),
    steps=3,
    rare_units=("token",),
    neighbours=NEIGHBOURS,
)
TURNS = 3
PHD = ("phd", "phd_swa", "phd_cswa")
UNITS = {("phd_swa", 16): ("hidden", "token"), ("phd_cswa", 16): ("hidden", "token")}
UNITS |= {("phd_swa", 2): ("hidden",), ("phd_cswa", 2): ("hidden",)}


@pytest.fixture(autouse=True)
def little_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ceiling.COPIED_BYTES, "cpu", 1 << 12)


@pytest.fixture(scope="module")
def kept() -> list[Result]:
    """All that was kept on the way, and the end."""
    kept: list[Result] = []
    whole = measure_inference(SIZE, GRID, TURNS, CPU, keep=kept.append)
    return [*kept, whole]


@pytest.fixture(scope="module")
def measured(kept: list[Result]) -> Result:
    return kept[-1]


def config_of(row: dict[str, Any]) -> ModelConfig:
    if row["variant"] == "loop":
        return replace(SIZE, variant="vanilla", K=1, passes=row["K"])
    variant = "vanilla" if row["variant"] == "transformers" else row["variant"]
    return replace(SIZE, variant=variant, K=row["K"], span_unit=row["W_in"] or "hidden")


def find(result: Result, *key: Any) -> dict[str, Any]:
    """The row of (work, variant, K, tokens), and the unit of W if it is measured in both."""
    names = ("work", "variant", "K", "tokens", "W_in")[: len(key)]
    [row] = [row for row in result.rows if tuple(row[name] for name in names) == key]
    return row


def units(variant: str, K: int) -> tuple[str | None, ...]:
    """What the windows of a variant are measured in."""
    return UNITS.get((variant, K), (None,))


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
        kinds += product(NEIGHBOURS, [2])
        expected |= {
            (work, *kind, T, unit) for kind in kinds for T in tokens for unit in units(*kind)
        }
    expected |= {("decode", "transformers", 1, 18, None)}
    found = [
        (row["work"], row["variant"], row["K"], row["tokens"], row["W_in"]) for row in measured.rows
    ]
    assert len(found) == len(set(found))
    assert set(found) == expected


def test_every_length_is_kept_as_soon_as_it_is_measured(kept: list[Result]) -> None:
    *parts, whole = kept
    lengths = [{(row["work"], row["tokens"]) for row in part.rows} for part in parts]
    assert [len(found) for found in lengths] == [1, 2, 3, 4]
    for part in parts:
        assert part.rows == whole.rows[: len(part.rows)]
    assert parts[1].ratios.items() <= whole.ratios.items()
    assert not any(name.startswith("decode") for name in parts[1].ratios)
    assert parts[-1].rows == whole.rows


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
        slow |= row["W_in"] == "token" or row["variant"] in NEIGHBOURS
        assert len(row["seconds"]) == (1 if slow else TURNS)
        assert row["x_vanilla"] == pytest.approx(ratio(row))


def test_the_second_axis_of_each_figure_is_vanillas_time_multiplied_by_the_ratio(
    measured: Result,
) -> None:
    prefills, decodes = (inference_plots.longest(measured.rows, w) for w in ("prefill", "decode"))
    vanilla = {work: measured.ratios[f"{work}_vanilla_ms"] for work in ("prefill", "decode")}
    prefill, decode = inference_plots.times_over_copies(prefills, decodes, "small").axes
    [over_copies] = inference_plots.prefill_over_copies(prefills, "small").axes
    [over_cache] = inference_plots.latency_over_cache(decodes, "small").axes
    for axes, work in (
        (prefill, "prefill"),
        (decode, "decode"),
        (over_copies, "prefill"),
        (over_cache, "decode"),
    ):
        FigureCanvasAgg(axes.figure).draw()
        [right] = axes.child_axes
        assert "(ms" in right.get_ylabel()
        assert right.get_ylim() == pytest.approx([vanilla[work] * y for y in axes.get_ylim()])
        lines = {line.get_label(): line for line in axes.get_lines()}
        for name, short in (("PHD", "phd"), ("PHD-SWA", "swa"), ("PHD-CSWA", "cswa")):
            short = "" if (work, short) == ("decode", "cswa") else f"_{short}"
            ratios = [measured.ratios[f"{work}{short}_K{K}"] for K in (2, 16)]
            assert sorted(lines[name].get_ydata()) == pytest.approx(sorted([1, *ratios]))
        # The least that vanilla could take, on both scales.
        floors = [line for label, line in lines.items() if label == inference_plots.FLOOR]
        assert len(floors) == (work == "decode")
        for line in floors:
            row = find(measured, "decode", "vanilla", 1, 18)
            assert line.get_ydata()[0] * vanilla[work] == pytest.approx(row["floor_ms"])


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
    for (variant, K), (work, tokens) in product(
        product(PHD, (2, 16)), (("prefill", 24), ("decode", 18))
    ):
        for unit in units(variant, K):
            name = "" if (work, variant) == ("decode", "phd_cswa") else short[variant]
            row = find(measured, work, variant, K, tokens, unit)
            expected[f"{work}{name}_K{K}{'_token' * (unit == 'token')}"] = ratio(row)
    row = find(measured, "decode", "naive_repeat", 2, 18)
    expected["decode_naive_K2"] = ratio(row)
    for name, (work, tokens) in product(NEIGHBOURS, (("prefill", 24), ("decode", 18))):
        expected[f"{work}_{name}_K2"] = ratio(find(measured, work, name, 2, tokens))
    theirs = find(measured, "decode", "transformers", 1, 18)
    expected["decode_vanilla_over_transformers"] = 1 / ratio(theirs)
    expected["prefill_naive_K2"] = ratio(find(measured, "prefill", "naive_repeat", 2, 24))
    expected["copy_gb_per_s"] = measured.ratios["copy_gb_per_s"]
    expected["decode_vanilla_of_copy"] = vanilla["decode"]["of_copy"]
    assert measured.ratios == pytest.approx(expected)


def test_the_kv_bytes_are_those_of_the_caches_that_were_allocated(measured: Result) -> None:
    for row in measured.rows:
        if row["variant"] == "transformers":
            assert row["kv_mib"] is None
            continue
        expected = kv_bytes(config_of(row), row["tokens"], torch.float32).total
        assert row["kv_mib"] * 2**20 == expected
        vanilla = find(measured, row["work"], "vanilla", 1, row["tokens"])["kv_mib"]
        slot = vanilla / row["tokens"]
        # W counts 4 hidden copies, or those of 4 tokens.
        hidden = 4 * (row["K"] - 1 if row["W_in"] == "token" else 1) * slot
        more = {"phd_swa": hidden, "phd_cswa": hidden, "sps": hidden}
        all_kept = dict.fromkeys(("naive_repeat", "pause", "hidden_decoding"), vanilla)
        more |= {name: (row["K"] - 1) * kept for name, kept in all_kept.items()}
        assert row["kv_mib"] == vanilla + more.get(row["variant"], 0)


def test_a_tokens_floor_is_what_it_must_read_at_the_speed_of_a_copy() -> None:
    result = measure_inference(SIZE, GRID, 1, CPU)
    matrices = 64 * 32 + 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32)
    norms = 2 * (32 + 16 + 32 + 32) + 32
    speeds: dict[int, set[float]] = {}
    for row in result.rows:
        if row["work"] == "prefill" or row["variant"] == "transformers":
            assert row["step"] is row["floor_ms"] is row["of_copy"] is None
            continue
        assert row["step"] == "eager"  # on the CPU
        vector = 32 if row["variant"] in ("pause", "free_pause", "sps") else 0
        read = 4 * (matrices + norms + vector) + row["kv_mib"] * 2**20
        assert row["floor_ms"] == pytest.approx(row["of_copy"] * row["ms"])
        speeds.setdefault(row["tokens"], set()).add(round(read / row["floor_ms"] / 1e6, 6))
    # All rows of a length are beside the same copy; the copy of the longest is told.
    assert [len(found) for found in speeds.values()] == [1, 1]
    assert speeds[18] == {round(result.ratios["copy_gb_per_s"], 6)}


def test_of_rows_of_unequal_length_what_each_has_cached_is_read() -> None:
    work = Decode(models().of("phd_cswa", 3), [9, 18, 12], 3)
    weights = sum(weight.nbytes for weight in work.model.parameters())
    slot = 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, width, bytes
    assert work.bytes_read == weights + slot * (9 + 18 + 12 + 3 * 4)
    assert work.kv_bytes == slot * 3 * (18 + 4)


def test_an_untied_embedding_is_not_read() -> None:
    tied, untied = (Decode(models(tied=tied).of("vanilla", 1), [9], 3) for tied in (True, False))
    assert tied.bytes_read == untied.bytes_read


def test_all_variants_share_the_weights_of_one_model() -> None:
    family = models()
    places = [
        [weight.data_ptr() for weight in family.of(variant, K).parameters()]
        for variant, K in (("vanilla", 1), ("phd", 2), ("phd_cswa", 16), ("naive_repeat", 4))
    ]
    assert all(place == places[0] for place in places)


def test_every_model_multiplies_by_fused_weights() -> None:
    """As those that write text do, and with the same result as of weights of its own."""
    family = models()
    for variant, K in (("vanilla", 1), ("phd_cswa", 3)):
        model = family.of(variant, K)
        linear = [layer for layer in model.modules() if isinstance(layer, Linear)]
        assert all(layer.fused for layer in linear)
        before = [weight.data_ptr() for weight in model.parameters()]
        tokens = torch.arange(12)[None]
        expected = Transformer(model.config).load(dict(model.named_parameters())).logits(tokens)
        with torch.inference_mode():
            torch.testing.assert_close(model.logits(tokens), expected)
        assert [weight.data_ptr() for weight in model.parameters()] == before


@pytest.mark.parametrize("variant", get_args(Variant))
def test_a_prompt_is_read_into_a_cache_of_its_size(variant: Variant) -> None:
    model = models().of(variant, min(3, VARIANTS[variant].most_copies or 3))
    work = Prefill(model, 24)
    work()
    assert work.prompt.shape == (1, 24)
    assert work.kv_bytes == prefill(model, work.prompt)[1].nbytes


@pytest.mark.parametrize("variant", get_args(Variant))
def test_every_turn_decodes_the_last_tokens_of_the_context(variant: Variant) -> None:
    work = Decode(models().of(variant, min(3, VARIANTS[variant].most_copies or 3)), [18], 4)
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
    theirs = TransformersDecode(in_transformers(vanilla), [18], steps=6)
    logits, cache = prefill(vanilla, theirs.prompt, capacity=18)
    ours = [logits.argmax(-1)]
    for _ in range(6):
        ours.append(decode(vanilla, ours[-1], cache).argmax(-1))
    assert cache.host_lengths == [18]
    written = theirs.model.generate(theirs.prompt, max_new_tokens=7, do_sample=False)
    assert written[0, 12:].tolist() == torch.cat(ours).tolist()


def test_transformers_decodes_the_same_tokens_of_rows_of_unequal_length() -> None:
    vanilla, lengths = models().of("vanilla", 1), [12, 18]
    theirs = TransformersDecode(in_transformers(vanilla), lengths, steps=6)
    written = theirs.model.generate(
        theirs.prompt, attention_mask=theirs.mask, max_new_tokens=7, do_sample=False
    )
    for row, length in enumerate(lengths):
        prompt = theirs.prompt[row : row + 1, 18 - length :]
        logits, cache = prefill(vanilla, prompt)
        ours = [logits.argmax(-1)]
        for _ in range(6):
            ours.append(decode(vanilla, ours[-1], cache).argmax(-1))
        assert cache.host_lengths == [length]
        assert written[row, 12:].tolist() == torch.cat(ours).tolist()


def test_the_clock_of_transformers_stands_still_while_the_prompt_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = iter(range(100))
    theirs = TransformersDecode(in_transformers(models().of("vanilla", 1)), [18], steps=6)
    monkeypatch.setattr(decoding, "perf_counter", lambda: next(now) ** 2)
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
    expected = [[K, measured.ratios[f"prefill_cswa_K{K}"]] for K in (2, 16)]
    assert lines["PHD-CSWA"] == [[1, 1], *expected]
    # At K = 2 windows in tokens are windows in hidden copies.
    in_tokens = [16, measured.ratios["prefill_cswa_K16_token"]]
    assert lines["PHD-CSWA, W in tokens"] == [[1, 1], expected[0], in_tokens]
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


@pytest.mark.parametrize(
    ("settings", "windows"),
    [
        ({}, {"hidden": 16, "token": 16 * 15}),
        ({"span_unit": "token"}, {"token": 16 * 15}),
        ({"span_unit": "hidden"}, {"hidden": 16}),
    ],
)
def test_the_command_writes_a_table_json_csv_and_charts(
    settings: dict[str, Any],
    windows: dict[str, int],
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
    decodes = [row for row in report["rows"] if (row["work"], row["tokens"]) == ("decode", 18)]
    slot = next(row["kv_mib"] for row in decodes if row["variant"] == "vanilla") / 18
    found = {
        row["W_in"]: row["kv_mib"] / slot - 18
        for row in decodes
        if (row["variant"], row["K"]) == ("phd_swa", 16)
    }
    # 16 hidden copies, or 16 tokens of 15 hidden copies each
    assert found == pytest.approx(windows)


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
    assert grid_of(CPU, Asked()) == usual
    asked = Asked(prompts=(100,), contexts=(50, 60), copies=(2, 64), compiled=True)
    expected = replace(
        usual,
        prompts=(100,),
        contexts=(50, 60),
        prefill_copies=(2, 64),
        decode_copies=(2, 64),
        naive_copies=(2,),
        compiled=True,
    )
    assert grid_of(CPU, asked) == expected
    some = grid_of(CPU, replace(asked, variants=("phd_cswa", "vanilla"), span_unit="token"))
    alone = {"naive_copies": (), "neighbours": ()}
    assert some == replace(expected, variants=("phd_cswa",), span_unit="token", **alone)
    of_neighbours = grid_of(CPU, replace(asked, variants=("sps", "phd_swa")))
    assert (of_neighbours.variants, of_neighbours.neighbours) == (("phd_swa",), ("sps",))
    assert grid_of(CPU, replace(asked, variants=("naive_repeat",))).variants == ()


@pytest.mark.parametrize("grid", GRIDS.values())
def test_windows_in_hidden_copies_are_always_measured_and_in_tokens_where_they_differ(
    grid: Grid,
) -> None:
    for variant, K in product(PHD, grid.decode_copies):
        expected = ("hidden", "token") if variant in WINDOWED and K >= 16 else ("hidden",)
        assert grid.units(variant, K) == expected
        assert replace(grid, span_unit="token").units(variant, K) == ("token",)


def test_windows_that_are_measured_in_one_unit_alone_have_all_turns() -> None:
    in_tokens, in_hidden = (replace(SIZE, K=16, span_unit=unit) for unit in ("token", "hidden"))
    grid = GRIDS["cpu"]
    assert grid.is_rare(in_tokens)
    assert not grid.is_rare(in_hidden)
    assert not replace(grid, span_unit="token").is_rare(in_tokens)
    assert not grid.is_rare(replace(in_tokens, variant="phd"))
    assert not GRIDS["cuda"].is_rare(in_tokens)


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
