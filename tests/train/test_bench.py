"""The benchmarks give the ratios that are relied on, of medians, of work taken in turn."""

import inspect
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest
import torch

from conf.arguments import parse
from conf.errors import ConfigError
from phd.hf.convert import to_hugging_face
from phd.torch_private import HAS_LINEAR_CROSS_ENTROPY
from train.bench import BENCHMARKS, BenchArguments, main
from train.benchmarks import attention as attention_benchmark
from train.benchmarks import ceiling, timing
from train.benchmarks import loader as loader_benchmark
from train.benchmarks import step as step_benchmark
from train.benchmarks.step import prepare, step_of_engine, step_of_transformers
from train.benchmarks.timing import beside, interleaved, within_turns
from train.compose import load

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
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ceiling.SIDES, "cpu", 64)
    out = tmp_path / "new" / "bench"
    given = {"rows": 1, "seq_len": 32, "repeat": 3, "device": "cpu", "out": str(out)}
    assert main(BenchArguments(name="step", **given)) == 0
    report = json.loads((out / "step.json").read_text(encoding="utf-8"))
    rows = {row["work"]: row for row in report["rows"]}
    works = {"vanilla", "vanilla_muon", "phd_cswa_K2", "phd_cswa_K3", "transformers", "product"}
    assert set(rows) == works
    product = rows.pop("product")
    assert product["of_product"] == 1
    assert product["tokens_per_s"] is None
    for row in rows.values():
        # Of vanilla, which is the base, every run: one before each work and one at the end.
        assert len(row["seconds"]) == (18 if row["work"] == "vanilla" else 3)
        assert row["of_product"] == pytest.approx(row["tflop/s"] / product["tflop/s"])
        assert row["tflop/s"] / row["tokens_per_s"] == pytest.approx(
            rows["vanilla"]["tflop/s"] / rows["vanilla"]["tokens_per_s"] * row["x_flops"]
        )
        assert row["first_s"] > 0
        assert (row["micro"], row["peak_gib"]) == (1, None)
        assert row["ms"] == pytest.approx(rows["vanilla"]["ms"] * row["x_vanilla"])
        assert row["x_low"] <= row["x_vanilla"] <= row["x_high"]
        assert row["tokens_per_s"] == pytest.approx(32e3 / row["ms"])
    assert rows["vanilla"]["ms"] == pytest.approx(1e3 * median(rows["vanilla"]["seconds"]))
    ratios = report["ratios"]
    assert set(ratios) == {
        *(f"step_over_{what}_K{K}_tiny" for what in ("flops", "vanilla") for K in (2, 3)),
        *("muon_over_adamw_tiny", "vanilla_over_transformers_tiny"),
    }

    def ratio(work: str) -> float:
        """The median over the turns, in which vanilla was measured before and after the work."""
        pairs = zip(rows[work]["seconds"], rows[work]["vanilla_seconds"], strict=True)
        return median(a / b for a, b in pairs)

    assert ratios["vanilla_over_transformers_tiny"] == 1 / ratio("transformers")
    assert ratios["muon_over_adamw_tiny"] == ratio("vanilla_muon")
    for K in (2, 3):
        row = rows[f"phd_cswa_K{K}"]
        assert 1 < row["x_flops"] < K
        assert row["x_vanilla"] == ratio(row["work"]) == ratios[f"step_over_vanilla_K{K}_tiny"]
        expected = ratio(row["work"]) / row["x_flops"]
        assert ratios[f"step_over_flops_K{K}_tiny"] == pytest.approx(expected)
    assert report["machine"]["packages"]["torch"] == torch.__version__
    text = capsys.readouterr().out
    files = [f"written: {out / name}" for name in ("step.json", "step.csv", "step.png")]
    assert all(name in text for name in [*rows, *ratios, *files])
    model, kernels = report["subject"].splitlines()
    assert model == "tiny: 3 layers, D = 256, 3.41 M parameters; float32, CPU"
    assert kernels.startswith("rule 1 by ")
    assert model in text
    assert kernels in text


def test_a_step_is_measured_without_transformers_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(ceiling.SIDES, "cpu", 64)
    monkeypatch.setattr(step_benchmark, "find_spec", lambda _: None)
    given = {"short": True, "repeat": 1, "seq_len": 16, "rows": 1, "device": "cpu"}
    assert main(BenchArguments(name="step", out=str(tmp_path), **given)) == 0
    report = json.loads((tmp_path / "step.json").read_text(encoding="utf-8"))
    works = [row["work"] for row in report["rows"]]
    assert works == ["vanilla", "phd_cswa_K2", "vanilla_muon", "product"]
    assert "transformers is not installed" in report["subject"]


def test_a_step_has_the_largest_micro_batch_that_fits() -> None:
    tried: list[int] = []

    def build(micro_batch: int) -> Callable[[], None]:
        """A step that has no room for more than 2 rows."""

        def step() -> None:
            tried.append(micro_batch)
            if micro_batch > 2:
                raise torch.OutOfMemoryError

        return step

    _, needs = prepare(build, 6, CPU)
    assert tried == [6, 3, 2]
    assert needs.micro_batch == 2
    with pytest.raises(torch.OutOfMemoryError):
        prepare(lambda _: build(3), 6, CPU)


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_transformers_takes_the_step_that_vanilla_takes(micro_batch: int) -> None:
    """The same weights after two steps: the peer does the work that it is timed for."""
    given = ["size=tiny", "train.seq_len=16", "train.global_batch=2", "data.lanes=1"]
    # The names of transformers' embeddings do not keep them from weight decay.
    given += ["train.max_steps=1", "engine.device=cpu", "optim.weight_decay=0"]
    # A large eps keeps the update of a gradient of almost 0 from being one of its rounding.
    config = load([*given, "optim.grad_clip=0.1", "optim.eps=1e-3"])
    config = replace(config, model=config.model.vanilla_twin)
    batch = torch.randint(0, 4096, (2, 17), generator=torch.Generator().manual_seed(0))
    ours, theirs = step_of_engine(config, batch), step_of_transformers(config, batch, "sdpa")
    works = ours(2), theirs(micro_batch)
    engine, model = (inspect.getclosurevars(work).nonlocals for work in works)
    for work in (*works, *works):
        work()
    _, weights = to_hugging_face(config.model, engine["engine"].model.state_dict())
    found = model["model"].state_dict()
    for name, weight in weights.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-5)


def test_the_attention_benchmark_gives_the_promised_ratios(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(ceiling.SIDES, "cpu", 64)
    out = str(tmp_path)
    assert main(BenchArguments(name="attention", short=True, device="cpu", out=out)) == 0
    report = json.loads((tmp_path / "attention.json").read_text(encoding="utf-8"))
    rows = {(row["pass"], row["work"]): row for row in report["rows"]}
    works = {"vanilla", "vanilla_ours", "dense_mask_K3", "product"}
    works |= {f"{variant}_K{K}" for variant in ("phd_cswa", "naive_repeat") for K in (2, 3)}
    works |= {"free_pause_K2", "sps_K2"}
    passes = ("forward", "+ backward")
    assert set(rows) == {(name, work) for name in passes for work in works}
    for (_, work), row in rows.items():
        copies = 1 if work.startswith("vanilla") else int(work[-1]) if "_K" in work else None
        assert row["over_K"] == (copies and row["x_vanilla"] / copies)
    ms = {work: rows["+ backward", work]["ms"] for work in works}
    expected = {}
    for K in (2, 3):
        phd, naive = ms[f"phd_cswa_K{K}"], ms[f"naive_repeat_K{K}"]
        expected[f"phd_cswa_over_vanilla_K{K}_H32_T128"] = phd / ms["vanilla"]
        expected[f"phd_cswa_over_K_vanilla_K{K}_H32_T128"] = phd / ms["vanilla"] / K
        expected[f"naive_over_phd_cswa_K{K}_H32_T128"] = naive / phd
    assert report["ratios"] == pytest.approx(expected)


@pytest.mark.parametrize("grids", [attention_benchmark.GRIDS, attention_benchmark.SHORT_GRIDS])
def test_the_attention_benchmark_has_vanilla_first_and_on_cuda_every_peer(
    grids: dict[str, attention_benchmark.Grid],
) -> None:
    """Only what runs on CUDA alone is left out here: nothing is computed."""
    shape = attention_benchmark.Shape(1, 4, 2, 8, 16)
    for grid in grids.values():
        subjects = attention_benchmark.subjects_of(shape, grid, CPU)
        assert next(iter(subjects)) == "vanilla"
        assert {f"phd_cswa_K{K}" for K in grid.copies} <= set(subjects)
        assert {f"phd_cswa_K{K}_flex" for K in grid.flex} <= set(subjects)
        assert {f"rule_1_K{K}" for K in grid.rule_1} <= set(subjects)


def test_the_head_benchmark_tells_speed_and_error_of_every_implementation(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(ceiling.SIDES, "cpu", 64)
    out = str(tmp_path)
    assert main(BenchArguments(name="head", short=True, device="cpu", out=out)) == 0
    report = json.loads((tmp_path / "head.json").read_text(encoding="utf-8"))
    rows = {row["work"]: row for row in report["rows"]}
    peers = {"plain", "chunked"} | ({"torch"} if HAS_LINEAR_CROSS_ENTROPY else set())
    assert set(rows) == {"ours", "ours_z_loss", "product"} | peers
    flops = 6 * 256 * 64 * 512
    for work in set(rows) - {"product"}:
        assert rows[work]["tflop/s"] == pytest.approx(flops / rows[work]["ms"] / 1e9)
        # The z-loss has another gradient; all others are float32's.
        assert (rows[work]["d_weight error %"] < 1e-3) == (work != "ours_z_loss")
    product = rows["product"]["tflop/s"]
    expected = {f"{work}_over_ours": rows[work]["ms"] / rows["ours"]["ms"] for work in peers}
    expected["ours_over_product"] = rows["ours"]["tflop/s"] / product
    assert report["ratios"] == pytest.approx(expected)
    assert "256 rows, D 64, V 512" in report["subject"]


def test_flops_are_those_of_the_pairs_that_a_pattern_allows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(ceiling.SIDES, "cpu", 100)
    B, N, _, H, T = shape = attention_benchmark.Shape(2, 4, 2, 8, 16)
    subjects = attention_benchmark.subjects_of(shape, attention_benchmark.GRIDS["cuda"], CPU)
    pairs = T * (T + 1) // 2
    assert subjects["vanilla"].flops == 4 * B * N * H * pairs
    assert subjects["rule_1_K3"].flops == 3 * subjects["vanilla"].flops
    # Token-major rows of K T slots; and with `phd`, K = 2, a hidden copy sees itself as well.
    assert subjects["naive_repeat_K2"].flops == 4 * B * N * H * (2 * T) * (2 * T + 1) // 2
    assert subjects["phd_K2"].flops == 4 * B * N * H * (2 * pairs + T)
    # Vanilla takes a second, and the product, of 2 million operations, a half.
    times = within_turns("vanilla", {work: [1.0] for work in subjects} | {"product": [0.5]})
    rows = attention_benchmark.table(shape, "+ backward", subjects, times, CPU)
    found = {row["work"]: row for row in rows}
    assert found["product"]["tflop/s"] == pytest.approx(4e-6)
    assert found["product"]["of_product"] == 1
    assert found["vanilla"]["tflop/s"] == pytest.approx(3.5e-12 * subjects["vanilla"].flops)
    assert found["vanilla"]["of_product"] == pytest.approx(subjects["vanilla"].flops * 3.5 / 4e6)


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
