"""An exported Hugging Face directory as the harness sees it.

Only what evaluates such a directory imports this module: `lm-eval` and `transformers` are optional.
"""

from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from conf.errors import ConfigError, reason_of

BATCH = 16
"""Texts that are read at the same time."""


class ExportedLM(HFLM):
    """The harness's own class for Hugging Face models, with each text after one separator.

    By itself it puts the separator before whole texts, but not before contexts.
    """

    add_bos_token: bool | None

    def loglikelihood_rolling(self, requests: list[Instance], **kwargs: Any) -> list[float]:
        """The log-likelihood of each whole text in nats, in windows that begin with a separator."""
        before, self.add_bos_token = self.add_bos_token, False
        try:
            return super().loglikelihood_rolling(requests, **kwargs)
        finally:
            self.add_bos_token = before


def load_exported(directory: Path, device: torch.device) -> ExportedLM:
    """Load a directory that `train/export.py` has written, or another one of its kind.

    Its own code is run, as a PHD model needs.

    Raises:
        ConfigError: it is no such directory.
    """
    if not (directory / "config.json").is_file():
        problem = f"model={directory}: no config.json there"
        hint = "give a directory that train/export.py has written"
        raise ConfigError([f"{problem}; {hint}"], "the arguments")
    try:
        return ExportedLM(
            pretrained=str(directory),
            backend="causal",
            device=str(device),
            dtype=torch.float32,  # it computes under the autocast of the caller, as a run's model
            batch_size=BATCH,
            add_bos_token=True,
            trust_remote_code=True,
        )
    except (OSError, ValueError) as error:
        problem = f"model={directory}: transformers cannot load it ({reason_of(error)})"
        raise ConfigError([problem], "the arguments") from error
