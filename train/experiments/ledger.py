"""The ledger: the result of each run, made of what lies in the run's directory.

    config.yaml, environment.json    the settings, and what the run was started with
    start.json                       the weights that run.start_from has given
    trunk.json                       the checkpoint that run.decay_of has given
    metrics.jsonl                    the curves, and the last evaluation
    scores.json                      what evaluate.py has found; see scores.py
    inference.json                   what bench.py inference has measured; see latency.py
    ended.json                       how the last start ended; absent while one is at work

A run writes `result.json` at its end. It holds nothing that is not in these files, so a result can
be made again, also of a run of an earlier version or of one that was killed.
"""

import json
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from pydantic import TypeAdapter, ValidationError

from conf.errors import ConfigError, DataError, reason_of
from conf.redaction import redacted, redacted_tree
from conf.validation import as_dict, defaults, flatten_keys, nest_keys
from data.storage.atomic import write_atomic
from phd.inference.cache import kv_bytes
from phd.model import count_parameters
from train.config import Config
from train.engines.device import precision
from train.experiments.curves import (
    BITS,
    Line,
    bits_by_source,
    curve_of,
    heldout_curves,
    median_of,
    progress_of,
    read_lines,
)
from train.experiments.latency import read_latency
from train.experiments.result import (
    EVAL,
    Estimate,
    Heldout,
    Origin,
    Result,
    Status,
    TaskScore,
    read_result,
    write_result,
)
from train.experiments.result import FILE as RESULT
from train.experiments.scores import Scores, read_scores, write_scores
from train.experiments.task_scores import joined, scores_in
from train.run_dir.environment import TIME
from train.run_dir.lock import holder_of
from train.run_dir.name import identity, short_hash, usual_settings
from train.run_dir.prepare import START, TRUNK

ENDED = "ended.json"

TRAINED_ALIKE = ("engine.precision", "engine.fp8_scaling", "eval.rows")
"""Settings that a run may change when it goes on, and that two seeds of one group share."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How the last start of a run ended; `reason` is empty where it is finished."""

    status: Status
    reason: str = ""


def record_end(directory: Path, ended: Ended) -> Path:
    """Note how a run has ended, and write its result.

    Raises:
        OSError: a file cannot be written.
        DataError: see `result_of`.
    """
    ended = Ended(status=ended.status, reason=redacted(ended.reason))
    write_atomic(directory / ENDED, json.dumps(as_dict(ended), indent=1) + "\n")
    # Its own process, which is about to end, still holds the directory.
    return write_result(directory, result_of(directory, held=False))


def forget_end(directory: Path) -> None:
    """The run goes on: until it ends again, it is unfinished, whatever kills it.

    Its result goes, too, which would still tell how it had ended; it can be made anew.
    """
    for name in (ENDED, RESULT):
        (directory / name).unlink(missing_ok=True)


def add_scores(
    directory: Path,
    *,
    step: int,
    heldout: Mapping[str, Heldout] | None = None,
    tasks: Mapping[str, TaskScore] | None = None,
) -> Path:
    """Add the scores of a checkpoint to the result of its run; returns the path of the result.

    They stay when the result is made again, until the run has a later checkpoint.

    Args:
        directory: of the run.
        step: of the checkpoint.
        heldout: by the name of the source or file.
        tasks: by the name of the task and its shots.

    Raises:
        OSError: a file cannot be written.
        DataError: see `result_of`.
    """
    stepped = {name: replace(text, step=step) for name, text in (heldout or {}).items()}
    write_scores(directory, Scores(step=step, heldout=stepped, tasks=tasks or {}))
    return update(directory)


def update(directory: Path) -> Path:
    """Make the result of a run anew, and write it; returns its path."""
    return write_result(directory, result_of(directory))


def read_run(path: Path) -> Result:
    """The result of a run: of its directory, or of a `result.json` that lies anywhere.

    A directory's is made anew, because a run that was killed could not write it; where only the
    result was kept, that is taken; see `kept_result`.

    Raises:
        OSError: there is no such file, or it cannot be read.
        DataError: it is damaged, or of another version.
    """
    if not path.is_dir():
        return kept_result(path)
    if not is_run(path):
        return kept_result(path / RESULT)
    return result_of(path)


def kept_result(path: Path) -> Result:
    """What a `result.json` holds, with the settings that are newer than it at their defaults.

    These were the values then, so that runs of several versions do not seem to differ in them, and
    seeds of one experiment are of one group.

    Raises:
        OSError, DataError: as `read_result`.
    """
    result = read_result(path)
    settings = {**_defaults(), **result.settings}
    try:
        group = group_of(Config.from_dict(nest_keys(settings)))
    except ConfigError:  # a link without its password, or a setting that is no longer there
        group = result.group
    return replace(result, settings=settings, group=group)


@cache
def _defaults() -> dict[str, Any]:
    """The defaults of the sections that every run has, whatever its engine, text and hooks."""
    sections = defaults(Config)
    return flatten_keys({name: sections[name] for name in ("model", "train", "optim", "schedule")})


def is_run(directory: Path) -> bool:
    """Whether a directory is one of a run, from which a result can be made."""
    return (directory / "config.yaml").is_file()


def result_of(directory: Path, *, held: Literal[False] | None = None) -> Result:
    """What came of a run, from the files in its directory.

    Args:
        directory: of the run.
        held: false: no process but this one is at work there; None: the lock tells.

    Raises:
        OSError: `config.yaml` cannot be read.
        DataError: a file is damaged, or `config.yaml` holds settings that this version does not
            know.
    """
    config = config_of(directory)
    lines = read_lines(directory / "metrics.jsonl")
    trained = [line for line in lines if "train/loss" in line]
    start = _training_start(directory, trained)
    progress = progress_of(trained, config.train.tokens_per_step, config.flops_per_step)
    curve, last = curve_of(trained, progress), trained[-1] if trained else {}
    ended = _ended(directory, config, lines, held=held)
    scores = _scores_of_newest(directory)
    parameters = count_parameters(config.model)
    context, dtype = config.hooks.kv.context, trained_dtype(directory, config)
    cost = kv_bytes(config.model, context, dtype)
    settings = flatten_keys(redacted_tree(config.to_dict()))
    return Result(
        began_with=_origin_in(directory / START),
        trunk=_origin_in(directory / TRUNK),
        name=config.run.name or directory.resolve().name,
        status=ended.status,
        reason=ended.reason or None,
        model=config.model.name,
        size=config.model.size,
        seed=config.seed,
        config_hash=short_hash(identity(config)),
        group=group_of(config),
        differences=_differences(config, settings),
        settings=settings,
        command=shlex.join(start.get("launcher") or ["python", *start.get("argv", [])[1:]]),
        commit=start.get("revision"),
        changed=start.get("changed"),
        versions={"python": start.get("python"), **start.get("packages", {})},
        device=_device_name(start),
        devices=_devices(trained),
        parameters=sum(parameters.values()),
        embedding_parameters=parameters["embedding"] + parameters["head"],
        steps=int(last.get("step", 0)),
        total_steps=config.total_steps,
        tokens=int(progress.tokens[-1]) if trained else 0,
        train_flops=float(progress.flops[-1]) if trained else 0.0,
        train_s=float(progress.seconds[-1]) if trained else 0.0,
        tokens_per_s=median_of(trained, "throughput/tokens_per_s"),
        mfu=median_of(trained, "throughput/mfu"),
        loss=last.get("train/loss"),
        loss_ema=curve.loss_ema[-1] if curve.loss_ema else None,
        heldout=_newest(heldout_of(lines), scores, ended, steps=int(last.get("step", 0))),
        tasks=_tasks(lines, scores, ended, steps=int(last.get("step", 0))),
        kv_context=context,
        kv_bytes=int(last.get("kv/bytes_per_sequence", cost.total)),
        kv_hidden_bytes=int(last.get("kv/hidden_bytes_per_sequence", cost.hidden)),
        flops_per_token=config.mean_step_flops / config.train.tokens_per_step,
        latency=read_latency(directory, config.model),
        curve=curve,
        heldout_curves=heldout_curves(lines, progress),
    )


def group_of(config: Config) -> str:
    """A name that is equal for runs that differ in nothing but their seed.

    Unlike `identity`, it tells runs of different lengths apart.
    """
    settings = flatten_keys(redacted_tree(config.to_dict()))
    alike = {key: value for key, value in settings.items() if key.startswith(TRAINED_ALIKE)}
    alike |= {key: value for key, value in settings.items() if key.endswith(".epochs")}
    length = config.total_steps or f"{config.train.max_time} s"
    own = identity(config) | alike | {"length": length}
    del own["seed"]
    return f"{config.model.name}-{config.model.size}-{short_hash(own)}"


def _newest(
    logged: Mapping[str, Heldout], scores: Scores | None, ended: Ended, *, steps: int
) -> dict[str, Heldout]:
    """The held-out losses of a run's newest model that was evaluated, all at one step.

    A file that was measured in the middle of a run says nothing of the model at its end, so those
    of a finished run are of its last step.
    """
    found = dict(logged)
    for name, text in scores.heldout.items() if scores else ():
        assert scores is not None
        if name not in found or (found[name].step or 0) <= scores.step:
            found[name] = replace(text, step=scores.step)
    newest = max((text.step or 0 for text in found.values()), default=0)
    if ended.status == "finished":
        newest = max(newest, steps)
    return {name: text for name, text in found.items() if text.step == newest}


def _tasks(
    lines: Sequence[Line], scores: Scores | None, ended: Ended, *, steps: int
) -> dict[str, TaskScore]:
    """The scores of one step: those of `evaluate.py`, and those that the run has logged.

    That is the last step of a finished run; else the newest one that has any. The run asks a part
    of the questions, so that a score of more of them counts.
    """
    found = {scores.step: scores.tasks} if scores else {}
    step = max(found, default=0)
    if ended.status == "finished":
        step = max(step, steps)
    else:
        step = max([step, *(line["step"] for line in lines if scores_in(line))])
    return joined(found.get(step, {}), _logged_tasks(lines, step))


def _logged_tasks(lines: Iterable[Line], step: int) -> dict[str, TaskScore]:
    return next((scores_in(line) for line in lines if line["step"] == step), {})


def of_fewer_questions(directory: Path, *, step: int, tasks: Mapping[str, TaskScore]) -> list[str]:
    """The tasks of which the run has a score of more questions already, of the same step."""
    before = read_scores(directory)
    kept = before.tasks if before is not None and before.step == step else {}
    kept = joined(kept, _logged_tasks(read_lines(directory / "metrics.jsonl"), step))
    return [n for n, score in tasks.items() if n in kept and score.questions < kept[n].questions]


def heldout_of(lines: Sequence[Line]) -> dict[str, Heldout]:
    """The last evaluation of each source that `metrics.jsonl` tells of."""
    found = {}
    for line in lines:
        for source, bits in bits_by_source(line).items():
            told = {name: line.get(f"{EVAL}{source}/{name}") for name in _TOLD}
            error = line.get(f"{EVAL}{source}{BITS}_stderr")
            found[source] = Heldout(
                step=line.get("step"),
                bits_per_byte=Estimate(value=bits, standard_error=error),
                loss=line[f"{EVAL}{source}/loss"],
                **told,
            )
    return found


_TOLD = ("tokens", "bytes", "documents", "fingerprint")


def config_of(directory: Path) -> Config:
    """The settings of a run's last start.

    Raises:
        OSError: `config.yaml` cannot be read.
        DataError: it is damaged, or holds settings that this version does not know.
    """
    path = directory / "config.yaml"
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: is damaged ({reason_of(error)})") from None
    if not isinstance(values, dict):
        raise DataError(f"{path}: holds no settings")
    try:
        return Config.from_dict(values)
    except ConfigError as error:
        problems = "; ".join(map(str, error.problems))
        raise DataError(f"{path}: is of another version, or damaged: {problems}") from None


def _training_start(directory: Path, trained: Sequence[Line]) -> dict[str, Any]:
    """The environment of the start that took the newest step; empty where it is not known.

    A later start may have measured the finished run once more, on another machine.

    Args:
        directory: of the run.
        trained: the lines of its steps.
    """
    try:
        starts = json.loads((directory / "environment.json").read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    if not isinstance(starts, list) or not starts:
        return {}
    end = trained[-1].get("time") if trained else None
    before = [start for start in starts if end is None or _begun(start) <= end]
    return (before or starts)[-1]


def _begun(start: Mapping[str, Any]) -> float:
    """When a start began, in seconds since 1970; 0 where it is not told."""
    return datetime.strptime(text, TIME).timestamp() if (text := start.get("time")) else 0.0


def _origin_in(path: Path) -> Origin | None:
    """What another run has given; None where no such thing is kept.

    Raises:
        DataError: the file is damaged.
    """
    try:
        return _origin().validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise DataError(f"{path}: is damaged ({reason_of(error)}); delete it") from None


@cache
def _origin() -> TypeAdapter[Origin]:
    return TypeAdapter(Origin)


def _ended(
    directory: Path, config: Config, lines: Sequence[Line], *, held: Literal[False] | None
) -> Ended:
    """How a run stands: as it has noted, or as its metrics and its lock tell."""
    last = next((line for line in reversed(lines) if "train/loss" in line), {})
    holder = holder_of(directory) if held is None else None
    if holder is not None:
        return Ended(status="unfinished", reason=f"is at work: {holder}")
    if last and last["train/loss"] is None:
        return Ended(status="diverged", reason=f"the loss of step {last['step']} is not finite")
    try:
        return _adapter().validate_json((directory / ENDED).read_bytes())
    except FileNotFoundError:
        pass
    except ValidationError as error:
        raise DataError(
            f"{directory / ENDED}: is damaged ({reason_of(error)}); delete it"
        ) from None
    steps, total = last.get("step", 0), config.total_steps
    if total is not None and steps >= total:
        if missing := _not_evaluated(config, lines, steps):
            reason = f"it ended before {', '.join(missing)} was evaluated after its last step"
            return Ended(status="unfinished", reason=f"{reason}; its command, given again, does it")
        return Ended(status="finished")
    length = f" of {total}" if total is not None else ""
    return Ended(status="unfinished", reason=f"step {steps}{length}; it ended without a word")


def _not_evaluated(config: Config, lines: Sequence[Line], last: int) -> list[str]:
    """What a run has evaluated in its course, and not after its last step.

    Runs that never had an evaluation, or of which only `evaluate.py` has made one, lack none.
    """
    own = (*config.data.heldout_names.values(), *config.eval.task_names)
    evaluated = {
        name: {line["step"] for line in lines if any(map(_evaluates(name), line))} for name in own
    }
    return [name for name, steps in evaluated.items() if steps and max(steps) < last]


def _evaluates(name: str) -> Callable[[str], object]:
    """Whether a metric is of a source or task, whatever the examples before its questions."""
    return re.compile(rf"{EVAL}{re.escape(name)}(_\d+shot)?/").match


@cache
def _adapter() -> TypeAdapter[Ended]:
    return TypeAdapter(Ended)


def _scores_of_newest(directory: Path) -> Scores | None:
    """The scores of a run's newest checkpoint; None if only an earlier one was evaluated."""
    scores = read_scores(directory)
    newest = max((path.parent.name for path in directory.glob(CHECKPOINTS)), default="")
    step = int(newest.removeprefix("step_") or 0)
    return scores if scores is not None and scores.step >= step else None


CHECKPOINTS = "checkpoints/step_*/COMPLETE"


def _differences(config: Config, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that differ from the defaults of the run's size and text."""
    usual, _ = usual_settings(config)
    # Of what has several kinds, those defaults tell the kind alone.
    usual = flatten_keys(as_dict(type(config.engine)()), "engine.") | usual
    unused = {problem.key for problem in config.unused()}
    return {
        key: value
        for key, value in settings.items()
        if not key.startswith("run.") and key not in unused
        if key not in usual or usual[key] != value
    }


def trained_dtype(directory: Path, config: Config) -> torch.dtype:
    """The dtype of the matrix products of a run's last start, with which it evaluates itself."""
    lines = read_lines(directory / "metrics.jsonl")
    start = _training_start(directory, [line for line in lines if "train/loss" in line])
    on_cpu = start.get("device", "cpu") == "cpu"
    return precision(config.engine, torch.device("cpu" if on_cpu else "cuda"))


def _device_name(start: Mapping[str, Any]) -> str:
    name = start.get("device") or "not known"
    return start.get("processor") or name if name == "cpu" else name


def _devices(lines: Sequence[Line]) -> int:
    """How many ranks have trained; 1 where no speed was logged."""
    for line in reversed(lines):
        if each := line.get("throughput/tokens_per_s_per_device"):
            return round(line["throughput/tokens_per_s"] / each)
    return 1
