"""What `bench.py inference run=...` measures of a run's model reaches its result."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from conf.errors import ConfigError, DataError
from conf.validation import build
from phd.config import ModelConfig
from phd.inference.cache import kv_bytes
from train import bench
from train.arguments import BenchArguments
from train.compose import load
from train.config import Config
from train.experiments.ledger import result_of
from train.experiments.result import Latency, read_result


@pytest.fixture(scope="module")
def settings(small_at: Callable[..., list[str]]) -> Config:
    return load(small_at(Path("runs/small")))


@pytest.fixture
def run_of(settings: Config, tmp_path: Path) -> Callable[[ModelConfig], Path]:
    """Writes the directory of a run of a model that has not begun."""

    def written(model: ModelConfig) -> Path:
        config = replace(settings, model=model)
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.to_dict()))
        return tmp_path

    return written


MODELS = {
    "vanilla": {"variant": "vanilla", "K": 1},
    "naive_repeat-3": {"variant": "naive_repeat", "K": 3},
    "phd_cswa-2-3-4": {"K": 2, "copy_embedding": True},
    "sps-3-3": {"variant": "sps", "K": 3},
    "hidden_decoding-3": {"variant": "hidden_decoding", "K": 3, "full_every": 2},
    "loop-3-own": {"variant": "vanilla", "K": 1, "passes": 3, "loop_keys": "own"},
}


@pytest.mark.parametrize("name", MODELS)
def test_the_models_speed_is_part_of_its_result(
    name: str, settings: Config, run_of, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    model = replace(settings.model, **MODELS[name])
    assert model.name == name
    directory = run_of(model)
    given = BenchArguments(
        name="inference", run=str(directory), repeat=1, contexts=(12, 16), device="cpu"
    )
    assert bench.main(given) == 0
    assert f"written: {directory / 'result.json'}\n" in capsys.readouterr().out
    rows = json.loads((directory / "inference.json").read_text())["rows"]
    name, K = ("loop", 3) if model.passes == 3 else (model.variant, model.K)
    assert {(row["variant"], row["K"]) for row in rows} == {("vanilla", 1), (name, K)}
    own = {(row["work"], row["tokens"]): row["ms"] for row in rows if row["variant"] == name}
    vanilla, ours = (
        {row["kv_mib"] for row in rows if row["variant"] == x and row["tokens"] == 16}
        for x in ("vanilla", name)
    )
    assert ours == {kv_bytes(model, 16, torch.float32).total / 2**20}
    assert vanilla == {kv_bytes(model.vanilla_twin, 16, torch.float32).total / 2**20}
    found = read_result(directory / "result.json").latency
    assert [(x.context, x.batch, x.dtype) for x in found] == [
        (12, 1, "float32"),
        (16, 1, "float32"),
    ]
    for latency in found:
        assert latency.prefill_ms == own["prefill", latency.context] > 0
        assert latency.decode_ms == own["decode", latency.context] > 0


def test_only_whole_measurements_of_the_runs_own_model_count(settings: Config, run_of) -> None:
    directory = run_of(settings.model)
    row = {"work": "decode", "variant": "phd_cswa", "K": 2, "tokens": 9, "ms": 1.5}
    rows = [row, {**row, "K": 4}, {**row, "variant": "transformers", "K": 1}]
    report = {"machine": {"device": "a GPU"}, "complete": True, "rows": rows}
    path = directory / "inference.json"
    path.write_text(json.dumps(report))
    [found] = result_of(directory).latency
    assert found == Latency(
        device="a GPU", dtype="bfloat16", context=9, batch=1, prefill_ms=None, decode_ms=1.5
    )
    path.write_text(json.dumps({**report, "complete": False}))
    assert result_of(directory).latency == []
    path.write_text("{}")
    with pytest.raises(DataError, match=r"inference\.json: is damaged"):
        result_of(directory)


def test_a_run_decides_what_is_measured_of_it(settings: Config, run_of) -> None:
    directory = str(run_of(settings.model))
    for wrong, says in (
        ({"name": "step", "run": directory}, "run=.*only name=inference measures a run"),
        ({"name": "inference", "run": directory, "copies": (2,)}, "copies=.*the run decides"),
    ):
        with pytest.raises(ConfigError, match=says):
            build(BenchArguments, wrong)
    with pytest.raises(ConfigError, match=r"no: no config\.yaml there"):
        bench.main(BenchArguments(name="inference", run=f"{directory}/no", device="cpu"))
    assert not (Path(directory) / "no").exists()
