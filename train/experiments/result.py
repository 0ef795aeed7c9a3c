"""What came of one run: the `result.json` of its directory, from which reports are made.

It holds all that a report says of the run, its curves included. So a folder of these files is
enough to make the report again, without the checkpoints.
"""

import json
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import TypeAdapter, ValidationError

from conf.errors import DataError, reason_of
from data.storage.atomic import write_atomic

FILE = "result.json"
VERSION = 1

EVAL = "eval/"
"""How the names of metrics of evaluations begin."""

Status = Literal["finished", "unfinished", "diverged", "failed"]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A measured value and its standard error, which is None where one measurement has none."""

    value: float
    standard_error: float | None = None


@dataclass(frozen=True, kw_only=True)
class Heldout:
    """The loss on the held-out documents of a source, or of a file of the user's.

    Attributes:
        bits_per_byte: the mean over all bytes; its standard error is over documents.
        loss: nats per token.
        tokens: targets, of which the loss is the mean; None where this was not kept, as in the
            middle of a run.
        bytes: of the text in UTF-8; None likewise.
        documents: how many; None likewise.
        fingerprint: xxh3 of the rows of tokens that were read; None where it was not kept.
        step: of the run at which it was evaluated; None where it was not kept.
    """

    bits_per_byte: Estimate
    loss: float
    tokens: int | None = None
    bytes: int | None = None
    documents: int | None = None
    fingerprint: str | None = None
    step: int | None = None


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """The accuracy in a task of many choices.

    Attributes:
        accuracy: how often the choice with the greatest log-likelihood is the right one.
        accuracy_norm: the same of the log-likelihoods divided by the choices' lengths; None where
            the task has no such score.
        shots: solved examples in front of each question.
        questions: how many were asked.
        all_questions: how many the task has; None where it is not known. With fewer asked, the
            score is that of a part of the task.
        chance: the accuracy of guessing.
    """

    accuracy: Estimate
    accuracy_norm: Estimate | None
    shots: int
    questions: int
    chance: float | None = None
    all_questions: int | None = None


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The losses of a run at the steps that were logged; all lists are equally long.

    Attributes:
        step: optimizer steps.
        tokens: tokens of text so far.
        flops: training FLOPs so far.
        seconds: of training so far, over all starts, without evaluations and saves.
        loss: of training, of the step's own batch, in nats per token.
        loss_ema: the exponential moving average, with 0.99 per step as in arXiv 2504.14992.
    """

    step: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    flops: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    loss_ema: list[float] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class HeldoutCurve:
    """Held-out bits per byte of a source at the steps that were evaluated."""

    step: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    flops: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    bits_per_byte: list[float] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Latency:
    """The speed of inference, as `bench.py inference` measured it for this model.

    Attributes:
        device: on which.
        context: tokens in the cache.
        batch: sequences at once.
        prefill_ms: the time to read `context` tokens.
        decode_ms: the time of one further token of each sequence.
    """

    device: str
    dtype: str
    context: int
    batch: int
    prefill_ms: float | None
    decode_ms: float | None


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The weights that `run.start_from` or `run.decay_of` has given a run.

    Attributes:
        path: of the checkpoint, or of the Hugging Face directory.
        step: of the checkpoint; None: a Hugging Face directory has none.
        manifest: the hash that seals the checkpoint's files; None: they are not sealed.
    """

    path: str
    step: int | None = None
    manifest: str | None = None


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came of one run.

    Attributes:
        name: of the run.
        status: `finished`: it has reached its last step. `unfinished`: it was interrupted, or is
            still at work. `diverged`: its loss is not finite, or it gave up for bad steps.
            `failed`: it crashed or was refused.
        reason: why it is not `finished`, in one line.
        model: the name of the variant, such as `phd_cswa-2-16-32`.
        size: the name of the size.
        seed: of the run.
        config_hash: equal for runs of the same settings; see `train.run_dir.name.identity`.
        group: equal for runs that differ in nothing but their seed.
        differences: the settings that differ from the defaults of this size, by full names.
        settings: all settings by full names, without secrets.
        began_with: None: random weights, or those of a run of a version that did not keep it.
        trunk: of a decay: the checkpoint of the run that has taken its first steps, which are part
            of what is told here; None of other runs.
        command: what was typed.
        commit: of the source; None if it is not known.
        changed: whether the source had changes that were not committed; None if it is not known.
        versions: of Python and of packages.
        device: the name of the GPU or of the processor.
        devices: how many ranks trained.
        parameters: of the model, with the embedding.
        embedding_parameters: of the embedding, and of a head of its own.
        steps, tokens, train_flops, train_s: of the whole run so far; see `Curve`.
        total_steps: that its schedule has; None: it has no end, or that was not kept.
        tokens_per_s: the median over the logged intervals; None if none was logged.
        mfu: model FLOPs utilization, the median; None where the device's peak is not known.
        loss: training loss at the end, of the last batch.
        loss_ema: the smoothed training loss at the end; see `Curve`.
        heldout: by the name of the source or file; of the last step that was evaluated.
        tasks: by the name of the task and its shots; see `train.experiments.task_scores`.
        kv_context: the tokens of the sequence whose cache is counted.
        kv_bytes: of the whole cache.
        kv_hidden_bytes: of those, of hidden copies.
        flops_per_token: of training.
        latency: None where `bench.py inference` was not run.
        curve, heldout_curves: over the run; the latter by source.
        version: of this file's form.
    """

    name: str
    status: Status
    reason: str | None = None
    model: str
    size: str
    seed: int
    config_hash: str
    group: str
    differences: dict[str, Any]
    settings: dict[str, Any]
    command: str
    commit: str | None
    changed: bool | None
    versions: dict[str, str | None]
    device: str
    devices: int
    parameters: int
    embedding_parameters: int
    steps: int
    tokens: int
    train_flops: float
    train_s: float
    tokens_per_s: float | None
    mfu: float | None
    loss: float | None
    loss_ema: float | None
    heldout: dict[str, Heldout] = field(default_factory=dict)
    tasks: dict[str, TaskScore] = field(default_factory=dict)
    kv_context: int
    kv_bytes: int
    kv_hidden_bytes: int
    flops_per_token: float
    latency: list[Latency] = field(default_factory=list)
    curve: Curve = field(default_factory=Curve)
    heldout_curves: dict[str, HeldoutCurve] = field(default_factory=dict)
    began_with: Origin | None = None
    trunk: Origin | None = None
    total_steps: int | None = None
    version: int = VERSION

    @property
    def at_end(self) -> bool:
        """Whether it has come to the end of its schedule; no run that was out of text before."""
        return self.total_steps is None or self.steps >= self.total_steps

    @property
    def is_trunk(self) -> bool:
        """Whether it has no end of its own, but decays, which are runs themselves."""
        return self.settings.get("schedule.kind") == "wsd_s"


class Unread(NamedTuple):
    """A run whose directory cannot be read.

    Attributes:
        name: of the directory, or of the file of a result.
        reason: why, in one line.
        kept: whether the `result.json` that it has written takes its place.
    """

    name: str
    reason: str
    kept: bool


def write_result(directory: Path, result: Result) -> Path:
    """Write `result.json` into the run's directory, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    path = directory / FILE
    write_atomic(path, json.dumps(asdict(result), indent=1, allow_nan=False) + "\n")
    return path


def read_result(path: Path) -> Result:
    """Read a `result.json`.

    Raises:
        OSError: there is no such file, or it cannot be read.
        DataError: it is damaged, or of a form that this version does not know.
    """
    try:
        values = json.loads(path.read_bytes())
        version = values["version"]
        if version != VERSION:
            raise DataError(
                f"{path}: has the form {version!r}, and this version of the program reads {VERSION}"
            )
        return _adapter().validate_python(values)
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: is no result of a run: {reason_of(error)}") from None


@cache
def _adapter() -> TypeAdapter[Result]:
    return TypeAdapter(Result)
