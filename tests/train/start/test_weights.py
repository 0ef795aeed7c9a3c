"""A new run starts from another run's weights, and from its moments if it asks for them."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from conf.errors import ConfigError, DataError
from phd.config import ModelConfig
from phd.model import Transformer
from tests.train.conftest import LoadedRun
from train.checkpoint.reader import Checkpoint, flatten
from train.compose import load
from train.config import Config
from train.hf.pretrained import save_pretrained
from train.run import Run
from train.start.weights import pretrained_start

MakeConfig = Callable[..., Config]
Opened = Callable[[Config], Run]


@pytest.fixture(scope="module")
def first(
    small_at: Callable[..., list[str]],
    trained: Callable[[Config], LoadedRun],
    tmp_path_factory: pytest.TempPathFactory,
) -> LoadedRun:
    """A vanilla run of 6 steps with checkpoints of steps 3 and 6."""
    directory = tmp_path_factory.mktemp("runs") / "first"
    return trained(load(small_at(directory, "model=vanilla", "checkpoint.every=3", "seed=7")))


def saved(run: Run, step: int) -> dict[str, Tensor]:
    """Weights and moments of a checkpoint, by name."""
    checkpoint = Checkpoint.open(run.directory / "checkpoints" / f"step_{step:08d}")
    return checkpoint.read(name for name in checkpoint.specs if not name.startswith("random."))


def state(run: Run) -> dict[str, Tensor]:
    tensors = flatten(run.engine.state())
    return {name: x.clone() for name, x in tensors.items() if not name.startswith("random.")}


def assert_equal_bits(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def refusal(config: Config, opened: Opened) -> str:
    with pytest.raises((ConfigError, DataError)) as error:
        opened(config)
    return " ".join(str(error.value).split())


@pytest.mark.parametrize("variant", ["naive_repeat", "phd", "phd_swa", "phd_cswa"])
def test_any_variant_with_one_copy_has_the_loss_of_the_run_that_it_starts_from(
    variant: str, first: LoadedRun, config: MakeConfig, opened: Opened
) -> None:
    run = opened(config(f"model={variant}", "model.K=1", f"run.start_from={first.run.directory}"))
    assert run.step == 0
    measured = run.measure()
    assert measured["eval/heldout/loss"] == first.metrics["eval/heldout/loss"]


def test_copies_are_added_to_the_originals_of_a_vanilla_run(
    first: LoadedRun, config: MakeConfig, opened: Opened
) -> None:
    run = opened(config("model=phd", f"run.start_from={first.run.directory}"))
    tensors, theirs = state(run), saved(first.run, 6)
    weights = {name for name in theirs if name.startswith("model.")}
    assert_equal_bits({n: tensors[n] for n in weights}, {n: theirs[n] for n in weights})
    assert not any(x.any() for name, x in tensors.items() if name not in weights)
    assert run.measure()["eval/heldout/loss"] != first.metrics["eval/heldout/loss"]
    # The originals alone are the vanilla run's model.
    model = run.engine.model
    model.set_copies(1)
    again = run.measure()
    assert again["eval/heldout/loss"] == first.metrics["eval/heldout/loss"]


def test_one_checkpoint_of_a_run_may_be_meant(
    first: LoadedRun, config: MakeConfig, opened: Opened
) -> None:
    path = first.run.directory / "checkpoints" / "step_00000003"
    run = opened(config("model=phd", f"run.start_from={path}", "run.start_optimizer=true"))
    assert_equal_bits(state(run), saved(first.run, 3))
    assert run.tokenizer.fingerprint == first.run.tokenizer.fingerprint


def test_a_run_tells_which_checkpoint_it_has_started_from(
    first: LoadedRun, config: MakeConfig, trained: Callable[..., LoadedRun], tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(first.run.directory, source)
    newest, earlier = (source / f"checkpoints/step_{n:08d}" for n in (6, 3))
    state = newest / "state.json"  # of the same length, so that its contents alone are wrong
    state.write_bytes(state.read_bytes().replace(b'"step"', b'"stop"'))
    settings = ("model=vanilla", f"run.start_from={source}")
    run = trained(config(*settings, "train.max_steps=1"))
    output = " ".join(run.output.split())
    assert f"rejected the checkpoint {newest}" in output
    assert f"starts from {earlier}" in output
    told = json.loads((run.run.directory / "start.json").read_bytes())
    seal = (earlier / "COMPLETE").read_text().strip()
    assert told == {"path": str(earlier), "step": 3, "manifest": seal}
    # What the run began with is still told when it goes on.
    shutil.rmtree(source)
    trained(config(*settings, "train.max_steps=2"))
    assert json.loads((run.run.directory / "start.json").read_bytes()) == told


def test_moments_come_along_and_text_and_steps_begin_anew(
    first: LoadedRun, config: MakeConfig, trained: Callable[..., LoadedRun], tmp_path: Path
) -> None:
    """A second stage: another schedule on another text, from the first one's optimizer."""
    text = tmp_path / "other.jsonl"
    lines = (f'{{"text": "{n} quite another text, of Latin words: et cetera"}}' for n in range(40))
    text.write_text("\n".join(lines))
    settings = (
        *("model=vanilla", "train.max_steps=4", "optim.lr=1e-3"),
        *(f"data.sources.files.paths={text}", f"run.start_from={first.run.directory}"),
    )
    second = trained(config("experiment=anneal", *settings))
    assert second.record.step == 4
    assert second.record.tokens == 4 * second.run.config.train.tokens_per_step
    tensors = state(second.run)
    assert tensors["optimizer.embed.weight.step"] == 6 + 4
    assert second.record.lr == 0
    weights_alone = trained(config(*settings, f"run.dir={tmp_path / 'alone'}"))
    assert state(weights_alone.run)["optimizer.embed.weight.step"] == 4
    assert not torch.equal(
        state(weights_alone.run)["model.embed.weight"], tensors["model.embed.weight"]
    )
    # The same command goes on from its own moments.
    longer = trained(config("experiment=anneal", *settings, "train.max_steps=5"))
    assert state(longer.run)["optimizer.embed.weight.step"] == 6 + 5


def test_vectors_of_copies_are_kept_and_new_ones_start_at_zero(
    config: MakeConfig, trained: Callable[..., LoadedRun], opened: Opened, tmp_path: Path
) -> None:
    source = trained(
        config("model=phd", "model.copy_embedding=true", f"run.dir={tmp_path / 'source'}")
    ).run
    given = source.engine.model.copy_embed.weight
    assert given.any()
    start = f"run.start_from={source.directory}"
    run = opened(config("model=phd", "model.K=3", "model.copy_embedding=true", start))
    vectors = run.engine.model.copy_embed.weight
    assert torch.equal(vectors[:2], given)
    assert not vectors[2].any()
    others = (start, f"run.dir={tmp_path / 'other'}", "model=phd")
    told = refusal(config(*others), opened)
    assert "set model.copy_embedding=true (here it is false)" in told
    told = refusal(
        config(*others, "model.K=3", "model.copy_embedding=true", "run.start_optimizer=true"),
        opened,
    )
    assert "has none for copy_embed.weight; set run.start_optimizer=false" in told


def test_a_run_of_another_shape_is_refused_with_all_that_differs(
    first: LoadedRun, config: MakeConfig, opened: Opened
) -> None:
    start = f"run.start_from={first.run.directory}"
    told = refusal(config(start, "model.dim=32", "model.layers=3", "model.norm=pre"), opened)
    differing = "model.layers=2 (here it is 3), model.dim=16 (here it is 32), "
    assert f"a model of another shape; set {differing}" in told
    assert "model.norm=reordered (here it is pre)" in told


def test_what_cannot_be_started_from_is_refused(
    first: LoadedRun, config: MakeConfig, opened: Opened, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"run\.start_optimizer=true: there is no other run"):
        config("run.start_optimizer=true")
    path = tmp_path / "copy"
    shutil.copytree(first.run.directory, path)
    newest = path / "checkpoints" / "step_00000006"
    weights = newest / "__0_0.distcp"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    run = opened(config("model=vanilla", f"run.start_from={path}"))
    older = saved(first.run, 3)
    assert torch.equal(state(run)["model.embed.weight"], older["model.embed.weight"])
    told = refusal(config(f"run.start_from={newest}", f"run.dir={tmp_path / 'other'}"), opened)
    assert "is not a complete checkpoint" in told
    # Nothing is left to take; `run.resume=never` would take nothing else.
    earlier = path / "checkpoints" / "step_00000003" / "__0_0.distcp"
    for number, damage in enumerate((b"?", b"")):  # other contents, then another size
        for file in (weights, earlier):
            file.write_bytes(file.read_bytes()[:-1] + damage)
        told = refusal(
            config(f"run.start_from={path}", f"run.dir={tmp_path / str(number)}"), opened
        )
        assert "is damaged: step_00000006: " in told
        assert "or choose another run.start_from" in told
        assert "run.resume" not in told


# Hugging Face directories


def vanilla(*, tied: bool) -> Transformer:
    shape = {"layers": 2, "dim": 32, "ffn_dim": 48, "head_dim": 16, "vocab_size": 61}
    return Transformer(ModelConfig(variant="vanilla", K=1, tied=tied, **shape)).reset(0)


def test_a_phd_model_starts_from_a_pretrained_directory(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    source = vanilla(tied=True)
    save_pretrained(tmp_path / "hf", source.config, source.state_dict())
    config = replace(source.config, variant="phd_cswa", K=3, copy_embedding=True)
    model = Transformer(config).reset(1).load(pretrained_start(tmp_path / "hf", config))
    started = dict(model.named_parameters())
    assert torch.equal(started.pop("copy_embed.weight"), torch.zeros(3, 32))
    assert started.keys() == source.state_dict().keys()
    assert all(torch.equal(started[n], weight) for n, weight in source.state_dict().items())


def test_a_start_of_another_shape_names_what_to_change(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    source = vanilla(tied=False)
    save_pretrained(tmp_path / "hf", source.config, source.state_dict())
    other = replace(source.config, dim=48, rope_theta=1e4, tied=True, mup_base_dim=16)
    with pytest.raises(ValueError, match=r"run\.start_from=.*: a model of another shape") as error:
        pretrained_start(tmp_path / "hf", other)
    assert str(error.value).endswith(
        "model.dim=32 (here it is 48), model.rope_theta=500000.0 (here it is 10000.0), "
        "model.mup_base_dim=null (here it is 16), "
        "model.tied=false (here it is true)"
    )


def test_a_pretrained_directory_has_no_moments(
    first: LoadedRun, config: MakeConfig, opened: Opened, tmp_path: Path
) -> None:
    pytest.importorskip("safetensors")
    model = first.run.engine.model
    save_pretrained(tmp_path / "hf", model.config, model.state_dict())
    start = (f"run.start_from={tmp_path / 'hf'}", "run.start_optimizer=true")
    told = refusal(config("model=vanilla", *start), opened)
    assert "is a Hugging Face model, which has none; set run.start_optimizer=false" in told
