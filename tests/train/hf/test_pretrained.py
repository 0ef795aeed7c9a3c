"""Model directories pass between us and transformers, and say what is wrong with them."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from phd.config import ModelConfig
from phd.model import Transformer
from train.hf.pretrained import load_pretrained, save_pretrained

transformers = pytest.importorskip("transformers", reason="needs transformers")
safetensors = pytest.importorskip("safetensors", reason="needs safetensors")

V = 61
TEXT = torch.randint(V, (2, 19), generator=torch.Generator().manual_seed(0))

every_model = pytest.mark.parametrize("name", ["Olmo2", "Llama"])
tied_or_not = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


def their_model(name: str = "Llama", *, tied: bool = False) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    )
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def our_model(norm: Any = "reordered", *, tied: bool = False) -> Transformer:
    return Transformer(
        ModelConfig(
            variant="vanilla",
            K=1,
            layers=2,
            dim=32,
            ffn_dim=48,
            head_dim=16,
            vocab_size=V,
            norm=norm,
            tied=tied,
        )
    ).reset(0)


def loaded_logits(path: Path) -> Tensor:
    config, state = load_pretrained(path)
    model = Transformer(config)
    model.load_state_dict(state)
    return model.logits(TEXT)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    their_model().save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


def refusal(message: str) -> Any:
    """Expects a ValueError whose message begins so."""
    return pytest.raises(ValueError, match=rf"\A{re.escape(message)}")


@every_model
@tied_or_not
@pytest.mark.parametrize("shard", ["1GB", "10KB"], ids=["one file", "shards"])
def test_a_directory_of_transformers_loads_as_the_same_model(
    name: str, tied: bool, shard: str, tmp_path: Path
) -> None:
    theirs = their_model(name, tied=tied)
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "10KB")
    torch.testing.assert_close(loaded_logits(tmp_path), theirs(TEXT).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm", ["reordered", "pre"])
@tied_or_not
def test_a_directory_of_ours_loads_into_transformers(norm: str, tied: bool, tmp_path: Path) -> None:
    model = our_model(norm, tied=tied)
    save_pretrained(tmp_path / "new" / "ours", model.config, model.state_dict())
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "new" / "ours", output_loading_info=True
    )
    assert not any(report.values()), report
    torch.testing.assert_close(theirs(TEXT).logits, model.logits(TEXT), rtol=1e-5, atol=1e-5)


def test_the_weight_file_says_its_format_as_that_of_transformers_does(
    checkpoint: Path, tmp_path: Path
) -> None:
    model = our_model()
    save_pretrained(tmp_path / "ours", model.config, model.state_dict())
    for path in (checkpoint, tmp_path / "ours"):
        with safetensors.safe_open(path / "model.safetensors", "pt") as file:
            assert file.metadata() == {"format": "pt"}


@tied_or_not
def test_what_is_saved_comes_back_bit_for_bit(tied: bool, tmp_path: Path) -> None:
    model = our_model(tied=tied)
    save_pretrained(tmp_path, model.config, model.state_dict())
    _, state = load_pretrained(tmp_path)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], weight) for name, weight in model.state_dict().items())


def test_nothing_is_written_over(checkpoint: Path) -> None:
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    model = our_model()
    with pytest.raises(ValueError, match="not an empty directory; choose another one"):
        save_pretrained(checkpoint, model.config, model.state_dict())
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before


def test_a_missing_directory_is_refused_with_the_command_that_downloads_one(
    tmp_path: Path,
) -> None:
    path = tmp_path / "none"
    with refusal(
        f"{path}: no such directory; download a model from the Hub first, for example with "
        f"`hf download allenai/OLMo-2-0425-1B --local-dir {path}`"
    ):
        load_pretrained(path)


def test_missing_files_are_refused_by_name(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    with refusal(
        f"{checkpoint}: no model.safetensors in it; download the model's .safetensors files"
    ):
        load_pretrained(checkpoint)
    (checkpoint / "config.json").unlink()
    with refusal(
        f"{checkpoint}: no config.json in it; expected the directory of a Hugging Face model"
    ):
        load_pretrained(checkpoint)

    shards = tmp_path / "shards"
    their_model().save_pretrained(shards, max_shard_size="10KB")
    shard = sorted(shards.glob("*.safetensors"))[1]
    shard.unlink()
    with refusal(f"{shards}: no {shard.name} in it; download the model's .safetensors files"):
        load_pretrained(shards)


def test_damaged_files_are_refused_by_name(checkpoint: Path) -> None:
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with refusal(f"{weights} is damaged: "):
        load_pretrained(checkpoint)
    config = checkpoint / "config.json"
    config.write_text("{")
    with refusal(f"{config} is damaged: "):
        load_pretrained(checkpoint)


def test_a_model_that_does_not_fit_is_refused_with_its_directory(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    with refusal(f"{checkpoint}: model_type='gpt2': expected one of olmo2, llama"):
        load_pretrained(checkpoint)


def test_without_safetensors_the_extra_is_named(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    message = (
        "1 problem in the configuration:\n"
        "  safetensors is not installed; Hugging Face models need it: "
        f'{sys.executable} -m pip install "phd-transformer[hf]"'
    )
    with refusal(message):
        load_pretrained(checkpoint)
    model = our_model()
    with refusal(message):
        save_pretrained(tmp_path / "new", model.config, model.state_dict())
    assert not (tmp_path / "new").exists()
