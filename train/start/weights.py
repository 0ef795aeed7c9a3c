"""The weights that a new run starts with, and the optimizer's moments if it asks for them.

run.start_from          weights                          run.start_optimizer=true
a Hugging Face model    of an OLMo 2 or Llama model      not possible: it has no moments
a run                   of its newest whole checkpoint   that checkpoint's
a checkpoint            its own                          its own
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from torch import Tensor

from conf.errors import ConfigError, Problem
from conf.validation import build
from data.tokenizer import Tokenizer
from phd.config import ModelConfig
from phd.hf.convert import starting_state
from train.checkpoint.manifest import MARKER
from train.checkpoint.reader import Checkpoint, RejectedCheckpoint
from train.checkpoint.store import CheckpointStore
from train.config import Config
from train.console import warn
from train.distributed.process_groups import ProcessGroups, raise_on_all_ranks
from train.engines.engine import Engine
from train.engines.state_rules import state_shapes
from train.experiments.result import Origin
from train.hf.pretrained import load_pretrained
from train.start.directory import CHECKPOINTS, OTHERWISE, Kind, kind_of

# The settings that must be equal for two models to compute the same from the same weights.
SHAPE = (
    *("layers", "dim", "ffn_dim", "heads", "kv_heads", "head_dim", "vocab_size"),
    *("rope_theta", "norm", "norm_eps", "mup_base_dim", "mup_base_head_dim"),
)


def origin_of(checkpoint: Checkpoint) -> Origin:
    """What a verified checkpoint is to a run that begins with it."""
    seal = (checkpoint.path / MARKER).read_text(encoding="utf-8").strip()
    return Origin(path=str(checkpoint.path.resolve()), step=checkpoint.step, manifest=seal)


class Start(NamedTuple):
    """What the parameters of a new run start as.

    Attributes:
        weights: by parameter name, whole, in float32.
        optimizer: gives the optimizer's state of a parameter, read from disk when it is called;
            None: the run starts with moments of 0.
        tokenizer: the fingerprint of the tokenizer that the weights were trained with; None: a
            Hugging Face directory does not say it.
        rejected: damaged checkpoints that are newer than the one that was taken.
    """

    origin: Origin
    weights: dict[str, Tensor]
    optimizer: Callable[[str], Mapping[str, Tensor]] | None = None
    tokenizer: str | None = None
    rejected: tuple[RejectedCheckpoint, ...] = ()


def load_start(
    config: Config, engine: Engine, tokenizer: Tokenizer, console: Console
) -> Origin | None:
    """Give an engine what `run.start_from` names. Every rank calls this.

    Returns:
        what the weights are of; None: nothing is named, and they stay random.

    Raises:
        DataError, ConfigError: as `read_start`; or the run's tokenizer is not that of the weights.
    """
    if config.run.start_from is None:
        return None
    start = read_start(config, engine.groups)
    if start.tokenizer not in (None, tokenizer.fingerprint):
        another = "its weights were trained with another tokenizer than the run's"
        hint = "give the run that they are of, with its own tokenizer.model"
        raise ConfigError([Problem("run.start_from", config.run.start_from, another, hint)])
    for path, reason in start.rejected:
        warn(console, f"rejected the checkpoint {path}: {reason}")
    console.print(f"starts from {start.origin.path}", markup=False)
    engine.load(start.weights, start.optimizer)
    return start.origin


def read_start(config: Config, groups: ProcessGroups) -> Start:
    """What `run.start_from` gives the parameters of a run. Every rank calls this.

    Raises:
        DataError: the directory cannot be read, or it is damaged.
        ConfigError: settings of the model differ from those of the weights, and the message names
            them all; or `run.start_optimizer` asks for moments that are not there.
    """
    assert config.run.start_from is not None
    path = Path(config.run.start_from).expanduser()
    # A rank that fails alone must not leave the others waiting for it.
    match raise_on_all_ranks(groups, lambda: kind_of(path)):
        case Kind.RUN:
            checkpoint = _newest(path, groups)
        case Kind.CHECKPOINT:
            checkpoint = raise_on_all_ranks(groups, lambda: Checkpoint.open(path))
        case Kind.HUGGING_FACE:
            if config.run.start_optimizer:
                reason = f"{path} is {Kind.HUGGING_FACE.value}, which has none"
                raise ConfigError([_no_moments(reason)])
            weights = raise_on_all_ranks(groups, lambda: pretrained_start(path, config.model))
            return Start(Origin(path=str(path.resolve())), weights)
    return raise_on_all_ranks(groups, lambda: _of_checkpoint(config, path, checkpoint))


def _of_checkpoint(config: Config, path: Path, checkpoint: Checkpoint) -> Start:
    """What a verified checkpoint of another run gives."""
    source = build(ModelConfig, checkpoint.state["config"]["model"], f"the model of {path}")
    checkpoint.refuse_old_form(source)
    _check_shape(path, config.model, source)
    optimizer = None
    if config.run.start_optimizer:
        _check_state(checkpoint, config)

        def optimizer(name: str) -> dict[str, Tensor]:
            prefix = f"optimizer.{name}."
            names = [key for key in checkpoint.specs if key.startswith(prefix)]
            return {n.removeprefix(prefix): x for n, x in checkpoint.read(names).items()}

    weights = starting_state(config.model, checkpoint.load_weights())
    tokenizer = checkpoint.state["stream"]["tokenizer"]
    return Start(origin_of(checkpoint), weights, optimizer, tokenizer, checkpoint.rejected)


def pretrained_start(path: Path, config: ModelConfig) -> dict[str, Tensor]:
    """The weights of an OLMo 2 or Llama directory as the initial weights of any variant.

    The originals of a PHD model attend to originals only, so they compute what that model computes.
    They do not with `naive_repeat`, `pause`, `hidden_decoding` and `sps`, where they see others.

    Raises:
        DataError: the directory cannot be read.
        ConfigError: settings of `config` differ from that model's; the message names them.
    """
    source, state = load_pretrained(path)
    _check_shape(path, config, source)
    return starting_state(config, state)


def _newest(run: Path, groups: ProcessGroups) -> Checkpoint:
    """The newest checkpoint of another run that is not damaged, the same on all ranks."""
    checkpoint = CheckpointStore(run / CHECKPOINTS, keep=1, groups=groups).newest(OTHERWISE)
    assert checkpoint is not None, "`kind_of` has found one"
    return checkpoint


def _check_shape(path: Path, config: ModelConfig, source: ModelConfig) -> None:
    """Refuse weights that a model with this config cannot take, or computes something else with."""
    names = [name for name in SHAPE if getattr(config, name) != getattr(source, name)]
    # A tied model gives an untied one its embedding as a head, and copies may be given vectors of
    # their own, which start at 0. What the weights have cannot be left out.
    names += ["tied"] * (config.tied and not source.tied)
    names += ["copy_embedding"] * (source.copy_embedding and not config.copy_embedding)
    pairs = [(name, getattr(source, name), getattr(config, name)) for name in names]
    theirs, ours = source.hidden_input, config.hidden_input
    pairs += [("copy_input", theirs, ours)] * (theirs not in ("token", ours))
    if pairs:
        differences = ", ".join(
            f"model.{name}={_spelled(their)} (here it is {_spelled(our)})"
            for name, their, our in pairs
        )
        hint = f"set {differences}"
        problem = Problem("run.start_from", str(path), "a model of another shape", hint)
        raise ConfigError([problem])


def _spelled(value: object) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _check_state(checkpoint: Checkpoint, config: Config) -> None:
    """Refuse a checkpoint without moments for one of the parameters.

    Vectors of new copies have none, and another optimizer has others.
    """
    before = checkpoint.state["config"]["optim"]["kind"]
    if before != config.optim.kind:
        raise ConfigError([_no_moments(f"{checkpoint.path} has those of optim={before}")])
    specs = checkpoint.specs
    needed = state_shapes(config.model, config.optim)
    missing = {
        name.rpartition(".")[0]: None
        for name, shape in needed.items()
        for spec in [specs.get(f"optimizer.{name}")]
        if spec is None or spec.shape != shape
    }
    if missing:
        raise ConfigError([_no_moments(f"{checkpoint.path} has none for {', '.join(missing)}")])


def _no_moments(reason: str) -> Problem:
    hint = "set run.start_optimizer=false to start with the weights alone"
    reason = f"the optimizer's moments are asked for; {reason}"
    return Problem("run.start_optimizer", True, reason, hint)
