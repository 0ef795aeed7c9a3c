"""Small files of a run that a loss of power has left empty or torn do not stop it."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from conf.errors import ConfigError, DataError
from data.tokenizer import Tokenizer
from train.checkpoint import manifest
from train.checkpoint.load_run import load_run
from train.checkpoint.reader import flatten
from train.config import Config
from train.export import evaluations

DAMAGES = {
    "empty": lambda _: b"",
    "zeros": lambda content: bytes(len(content)),
    "half": lambda content: content[: len(content) // 2],
    "half and zeros": lambda content: content[: len(content) // 2].ljust(len(content), b"\0"),
}
KEPT = ["checkpoint.every=3", "data.max_quarantined=0.5"]


def small_files(run: Path) -> list[Path]:
    """Every file of a run's directory but those of its checkpoints, which have a manifest."""
    files = [path for path in run.rglob("*") if path.is_file()]
    return [path for path in files if path.relative_to(run).parts[0] != "checkpoints"]


def everything(run) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in flatten(run.engine.state()).items()}


@pytest.fixture(scope="module")
def sources(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The small corpus, and a record that is no document."""
    path = tmp_path_factory.mktemp("sources") / "text.jsonl"
    path.write_bytes(corpus.read_bytes() + b'{"title": "no text"}\n')
    return [f"data.sources.files.paths={path}", *KEPT]


@pytest.fixture
def whole(config, trained, sources: list[str], tmp_path: Path) -> dict[str, Tensor]:
    """What a run of six steps comes to; of its two checkpoints the last is then taken away."""
    tensors = everything(trained(config(*sources)).run)
    shutil.rmtree(tmp_path / "run/checkpoints/step_00000006")
    return tensors


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_run_goes_on_whose_small_files_are_all_damaged(
    damage: str, whole, config, trained, logged, sources: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    before = {path: path.read_bytes() for path in small_files(run)}
    assert {path.name for path in before} == {
        *("config.yaml", "environment.json", "tokenizer.model", "metrics.jsonl"),
        *("quarantine.jsonl", "revision.json", "changes.patch", "source.tar.gz"),
    }
    for path, content in before.items():
        path.write_bytes(DAMAGES[damage](content))
    shutil.rmtree(os.environ["PHD_CACHE"])  # the tokenizer is not found there, either
    loaded = load_run(run, torch.device("cpu"))
    assert loaded.step == 3
    assert evaluations(run / "metrics.jsonl", 6) == {}

    again = trained(config(*sources))
    assert f"going on from {run}/checkpoints/step_00000003" in again.output
    assert f"{run}/environment.json was damaged, and begins anew" in again.output
    assert f"{run}/tokenizer.model was damaged, and is written anew" in again.output
    if damage in ("empty", "zeros"):  # the first half of the lines reaches to the checkpoint
        assert f"{run}/metrics.jsonl: lines are lost; the last one is of step 0" in again.output
    ours = everything(again.run)
    assert [name for name in ours if not torch.equal(ours[name], whole[name])] == []
    saved = OmegaConf.to_container(OmegaConf.load(run / "config.yaml"))
    assert Config.from_dict(saved) == again.run.config
    assert (run / "tokenizer.model").read_bytes() == before[run / "tokenizer.model"]
    assert len(json.loads((run / "environment.json").read_text())) == 1
    assert [line["step"] for line in logged(run)][-3:] == [4, 5, 6]
    for path in run.glob("source/*/*"):
        assert path.read_bytes() == before[path]


@pytest.mark.usefixtures("whole")
def test_nothing_is_told_of_a_directory_that_is_whole(config, trained, sources: list[str]) -> None:
    told = trained(config(*sources)).output
    assert "damaged" not in told
    assert "lost" not in told


def without_tokenizer(checkpoint: Path) -> None:
    """Make it a checkpoint as earlier versions wrote them."""
    entries = json.loads((checkpoint / manifest.MANIFEST).read_text())
    for name in ("tokenizer.model", manifest.MANIFEST, manifest.MARKER):
        (checkpoint / name).unlink()
    del entries["tokenizer.model"]
    manifest.seal(checkpoint, entries)


@pytest.mark.parametrize("damage", ["none", "missing", *DAMAGES])
def test_a_checkpoint_without_a_tokenizer_takes_that_of_the_directory_or_says_what_is_wrong(
    damage: str, whole, config, trained, sources: list[str], tmp_path: Path
) -> None:
    without_tokenizer(tmp_path / "run/checkpoints/step_00000003")
    path = tmp_path / "run/tokenizer.model"
    if damage == "missing":
        path.unlink()
    elif damage != "none":
        path.write_bytes(DAMAGES[damage](path.read_bytes()))
    if damage == "none":
        load_run(tmp_path / "run", torch.device("cpu"))
    else:
        with pytest.raises(DataError, match=f"^{path}: "):
            load_run(tmp_path / "run", torch.device("cpu"))
    if damage in ("none", "missing", "empty"):  # the others are as `empty`
        again = trained(config(*sources))
        told = f"{path} is {'missing' if damage == 'missing' else 'damaged'}; it is made again"
        assert (told in again.output) == (damage != "none")
        ours = everything(again.run)
        assert [name for name in ours if not torch.equal(ours[name], whole[name])] == []


@pytest.mark.usefixtures("whole")
def test_a_tokenizer_of_another_run_is_not_taken_for_the_own_one(
    config, trained, sources: list[str], tmp_path: Path
) -> None:
    other = trained(config("tokenizer.vocab_size=300", f"run.dir={tmp_path / 'other'}")).run
    path = tmp_path / "run/tokenizer.model"
    path.write_bytes(other.tokenizer.model)
    run = tmp_path / "run"
    assert load_run(run, torch.device("cpu")).tokenizer.fingerprint != other.tokenizer.fingerprint
    without_tokenizer(run / "checkpoints/step_00000003")
    with pytest.raises(ConfigError, match="is not the one that it was trained with"):
        load_run(run, torch.device("cpu"))
    again = trained(config(*sources))
    assert f"{path} is not the one that the run began with" in again.output
    assert Tokenizer.load(path).fingerprint == again.run.tokenizer.fingerprint
