"""What is evaluated: the checkpoint of a run, or an exported Hugging Face directory."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from conf.errors import ConfigError
from data.tokenizer import Tokenizer
from phd.loss import IGNORED, cross_entropy_per_target
from phd.segments import Segments
from train.checkpoint.format import TOKENIZER
from train.checkpoint.load_run import load_run
from train.config import Config
from train.evaluation.text import PerTarget


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model that is evaluated.

    Attributes:
        name: what is printed of it.
        directory: of the run or the export.
        step: of the checkpoint; 0 of an export.
        config: of the run; None of an export.
        seq_len: tokens of the rows on which its loss is measured.
        longest: tokens of its longest context.
        per_target: its loss.
        lm: makes the model as lm-evaluation-harness sees it.
    """

    name: str
    directory: Path
    device: torch.device
    step: int
    config: Config | None
    tokenizer: Tokenizer
    seq_len: int
    longest: int
    per_target: PerTarget
    lm: Callable[[], Any]


def of_run(directory: Path, device: torch.device) -> Subject:
    """The newest complete checkpoint of a run.

    Raises:
        ConfigError, DataError: see `load_run`.
    """
    model, tokenizer, step, config = load_run(directory, device)

    def per_target(tokens: Tensor, targets: Tensor, segments: Segments | None) -> Tensor:
        return cross_entropy_per_target(model(tokens, segments), model.head_weight, targets)

    def lm() -> Any:
        from train.evaluation.harness import CachedLM  # optional

        return CachedLM(model, tokenizer)

    return Subject(
        name=f"{config.name}, step {step}",
        directory=directory,
        device=device,
        step=step,
        config=config,
        tokenizer=tokenizer,
        seq_len=config.train.seq_len,
        longest=config.model.max_seq_len,
        per_target=per_target,
        lm=lm,
    )


def of_export(directory: Path, device: torch.device) -> Subject:
    """A directory that `train/export.py` has written, computed by transformers.

    Raises:
        ConfigError: it is no such directory.
        DataError: its tokenizer is damaged.
    """
    from train.evaluation.exported import load_exported  # optional

    exported = load_exported(directory, device)
    try:
        tokenizer = Tokenizer.load(directory / TOKENIZER)
    except FileNotFoundError as error:
        problem = f"model={directory}: no {TOKENIZER} there, as train/export.py writes it"
        raise ConfigError([problem], "the arguments") from error

    def per_target(tokens: Tensor, targets: Tensor, segments: Segments | None) -> Tensor:
        assert segments is None
        logits = exported.model(tokens).logits.float()
        return cross_entropy(
            logits.transpose(1, 2), targets, reduction="none", ignore_index=IGNORED
        )

    return Subject(
        name=str(directory),
        directory=directory,
        device=device,
        step=0,
        config=None,
        tokenizer=tokenizer,
        seq_len=min(exported.max_length, DEFAULT_ROW),
        longest=exported.max_length,
        per_target=per_target,
        lm=lambda: exported,
    )


DEFAULT_ROW = 1024
"""Tokens of a row on which an export's loss is measured where nothing else is asked for: the
export does not tell how long the rows of its training were."""
