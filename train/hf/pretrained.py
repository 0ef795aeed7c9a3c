"""Hugging Face model directories: reading one to start a model from it, and writing one."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from conf.errors import ConfigError, DataError, reason_of
from conf.extras import pip_command
from conf.text import read_text
from phd.config import ModelConfig
from phd.hf.convert import from_hugging_face, to_hugging_face
from train.hf.directory import CONFIG, check_directory

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
FORMAT = {"format": "pt"}  # without it, transformers 4 refuses the file


def load_pretrained(path: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Read an OLMo 2 or Llama directory as a vanilla model: its config and float32 state dict.

    Args:
        path: a directory with `config.json`, and `model.safetensors` or its shards and their index.

    Raises:
        DataError: a file is missing or damaged, or the model has features that
            `phd.hf.convert.from_hugging_face` does not support.
    """
    check_directory(path)
    hf_config = _read_json(path / CONFIG)
    hf_state = _read_weights(path)
    try:
        return from_hugging_face(hf_config, hf_state)
    except ValueError as error:
        raise DataError(f"{path}: {reason_of(error)}") from error


def save_pretrained(path: Path, config: ModelConfig, state: dict[str, Tensor]) -> None:
    """Write a model into a new directory that transformers' `from_pretrained` reads.

    Args:
        path: the directory. It must be empty, or not exist.
        config: of the model.
        state: its weights, by parameter name.

    Raises:
        DataError: the directory is not empty.
        ValueError: transformers has no class that computes the same; see
            `phd.hf.convert.to_hugging_face`.
    """
    hf_config, hf_state = to_hugging_face(config, state)
    safetensors = _safetensors()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise DataError(f"{path}: not an empty directory; choose another one, or empty it")
    if config.tied:
        del hf_state["lm_head.weight"]  # safetensors refuses to hold a tensor twice
    path.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(hf_state, path / WEIGHTS, metadata=FORMAT)
    (path / CONFIG).write_text(json.dumps(hf_config, indent=2) + "\n", encoding="utf-8")
    share_weights(path)


def share_weights(directory: Path) -> None:
    """Let those read a model's weights who may read its config.

    safetensors (0.8) writes under a temporary name, in a file that only its owner may read
    whatever the umask is, and renames it.
    """
    mode = (directory / CONFIG).stat().st_mode & 0o777
    for file in directory.glob("*.safetensors"):
        file.chmod(mode)


def _read_weights(path: Path) -> dict[str, Tensor]:
    """Read all tensors of the weight file, or of its shards."""
    safetensors = _safetensors()
    names = [WEIGHTS]
    if (path / INDEX).is_file():
        # Large models are stored as shards; the index has the shard of each tensor.
        names = sorted(set(_read_json(path / INDEX)["weight_map"].values()))
    if missing := [name for name in names if not (path / name).is_file()]:
        raise DataError(
            f"{path}: no {', '.join(missing)} in it; download the model's .safetensors files"
        )
    state: dict[str, Tensor] = {}
    for name in names:
        try:
            state |= safetensors.torch.load_file(path / name)
        except safetensors.SafetensorError as error:
            raise DataError(
                f"{path / name} is damaged: {reason_of(error)}; download it again"
            ) from error
    return state


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(read_text(path))
    except FileNotFoundError:
        raise DataError(
            f"{path.parent}: no {path.name} in it; expected the directory of a Hugging Face model"
        ) from None
    except ValueError as error:
        raise DataError(f"{path} is damaged: {reason_of(error)}; download it again") from error


def _safetensors() -> ModuleType:
    """Import safetensors, which is optional: only Hugging Face directories need it."""
    try:
        import safetensors.torch
    except ImportError:
        missing = "safetensors is not installed; Hugging Face models need it: "
        raise ConfigError([missing + pip_command("phd-transformer[hf]")]) from None
    return safetensors
