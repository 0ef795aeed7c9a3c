"""Which state the optimizer keeps of a parameter, by the parameter's name.

    parameter                      optim=adamw     optim=muon
    matrices of the blocks         AdamW           Muon
    embeddings, head, norms        AdamW           AdamW

Engines and checkpoints know of an optimizer only this.
"""

from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

import torch

from phd.config import ModelConfig
from phd.model import Transformer
from train.settings.optim import OptimConfig

STEP = "step"
"""The name of the count of updates, a scalar, among the state of a parameter."""


class Rule(NamedTuple):
    """How a parameter is updated, as far as it is seen in its state.

    Attributes:
        name: of the rule.
        moments: the names of the tensors of the parameter's shape.
        counts: whether there is a count of updates as well.
    """

    name: str
    moments: tuple[str, ...]
    counts: bool

    @property
    def state(self) -> tuple[str, ...]:
        """The names of all tensors, as in a checkpoint."""
        return (*self.moments, STEP) if self.counts else self.moments


ADAMW = Rule("AdamW", ("exp_avg", "exp_avg_sq"), counts=True)
MUON = Rule("Muon", ("momentum_buffer",), counts=False)


def is_embedding(name: str) -> bool:
    """Whether a parameter is an embedding. A tied LM head is one, too: it has the same name."""
    return name.startswith(("embed.", "copy_embed.", "copy_input."))


def is_matrix(name: str) -> bool:
    """Whether a parameter is a matrix of the blocks; all else there is the weights of norms."""
    return name.startswith("blocks.") and "norm" not in name


def rule_of(name: str, config: OptimConfig) -> Rule:
    """The rule of a parameter of a `Transformer`."""
    return MUON if config.kind == "muon" and is_matrix(name) else ADAMW


def rules_of(names: Iterable[str], config: OptimConfig) -> dict[str, Rule]:
    """The rule of each parameter by name."""
    return {name: rule_of(name, config) for name in names}


def state_shapes(model: ModelConfig, config: OptimConfig) -> dict[str, torch.Size]:
    """The shape of each tensor of the optimizer's state, as `<parameter>.<name>`."""
    return {
        f"{name}.{key}": torch.Size() if key == STEP else shape
        for name, shape in parameter_shapes(model).items()
        for key in rule_of(name, config).state
    }


def moment_bytes(model: ModelConfig, config: OptimConfig) -> int:
    """Bytes of all moments, which are float32."""
    return 4 * sum(shape.numel() for shape in state_shapes(model, config).values() if shape)


def matrix_shapes(model: ModelConfig, config: OptimConfig) -> dict[str, torch.Size]:
    """The shape of each matrix that Muon updates, by the parameter's name."""
    shapes = parameter_shapes(model)
    return {name: shapes[name] for name, rule in rules_of(shapes, config).items() if rule is MUON}


@lru_cache(maxsize=16)
def parameter_shapes(model: ModelConfig) -> dict[str, torch.Size]:
    """The shape of each parameter of a model by name; the model is never allocated."""
    with torch.device("meta"):
        return {name: p.shape for name, p in Transformer(model).named_parameters()}
