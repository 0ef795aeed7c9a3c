"""Evaluate a trained model: its loss on any text, and its answers to downstream tasks.

python train/evaluate.py run=runs/phd_cswa-2-16-32-tiny                        held-out documents
python train/evaluate.py run=runs/phd_cswa-2-16-32-tiny text=my.jsonl          a file
python train/evaluate.py run=runs/phd_cswa-2-16-32-tiny tasks=paper shots=5    the paper's tasks
python train/evaluate.py model=exported tasks=paper shots=5                    by transformers
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # first of all: the imports below take seconds
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # see conf/checkout.py
    from conf import arguments
    from train.arguments import EvaluateArguments

    arguments.run(EvaluateArguments, "train.evaluate")

from collections.abc import Mapping
from math import isfinite
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from conf.errors import ConfigError, DataError, Problem, reason_of
from conf.extras import not_installed
from conf.task_names import OLMO_TASKS
from data.batch import Batch
from data.config import FilesSource
from train.arguments import EvaluateArguments
from train.console import warn
from train.engines.device import autocast, choose_device, configure_process, precision
from train.evaluation.questions import check_lengths, check_there, read_questions
from train.evaluation.subject import Subject, of_export, of_run
from train.evaluation.text import measure_text, rows_of_run, rows_of_text
from train.experiments.ledger import add_scores, of_fewer_questions, trained_dtype
from train.experiments.result import Estimate, Heldout, TaskScore
from train.experiments.task_scores import score_name
from train.metrics.record import Metrics
from train.metrics.sinks import FailingSink, WandbSummary, append_metrics, run_id
from train.settings.engine import EngineConfig


def main(args: EvaluateArguments) -> int:
    """Measure, print, and keep what was found; return the exit code."""
    check(args)
    console = Console(soft_wrap=True, highlight=False)
    config = EngineConfig(device=args.device, precision=args.precision)  # type: ignore[arg-type]
    device = choose_device(config)
    configure_process(config, device)
    dtype = precision(config, device)
    if args.run is not None:
        subject = of_run(Path(args.run).expanduser(), device)
    else:
        assert args.model is not None
        subject = of_export(Path(args.model).expanduser(), device)
    console.print(subject.name, markup=False)
    with autocast(device, dtype):
        texts = measure_texts(args, subject)
        if texts:
            console.print(text_table(texts))
        tasks = measure_tasks(args, subject)
        if tasks:
            console.print(task_table(tasks))
    if args.run is not None and args.save:
        texts = comparable(args, subject, texts, dtype, console)
        tasks = not_limited(subject, tasks, console)
        if texts or tasks:
            save(subject, texts, tasks, console)
    return 0


def check(args: EvaluateArguments) -> None:
    """Refuse what is not on this machine, before a model is loaded.

    Raises:
        ConfigError: a package or the questions of a task are missing.
    """
    problems = []
    if args.model is not None:
        problems += not_installed("lm-eval", "phd-transformer[eval]", "model", args.model)
    if args.task_names:
        problems += not_installed("lm-eval", "phd-transformer[eval]", "tasks", args.tasks)
    if problems:
        raise ConfigError(problems, "the arguments")
    check_there([name for name in args.task_names if name in OLMO_TASKS], "tasks")


def measure_texts(args: EvaluateArguments, subject: Subject) -> dict[str, Heldout]:
    """The losses on the run's held-out documents and on the user's files, by name."""
    found: dict[str, Batch] = {}
    seq_len = args.seq_len or subject.seq_len
    problems = []
    if seq_len > subject.longest:
        reason = f"the model's longest context is {subject.longest} tokens"
        problems.append(Problem("seq_len", seq_len, reason))
    own = names_of_run(subject)
    for name in own & args.texts.keys():
        reason = f"the run's own held-out documents are kept under the name {name}"
        hint = "rename the file"
        problems.append(Problem("text", args.texts[name], reason, hint))
    if problems:
        raise ConfigError(problems, "the arguments")
    if args.measures_heldout:
        assert subject.config is not None
        rows = args.rows or subject.config.eval.rows
        data = subject.config.data
        found |= rows_of_run(data, subject.tokenizer, seq_len=seq_len, limit=rows)
    for name, pattern in args.texts.items():
        source = FilesSource(kind="files", paths=pattern, text_field=args.text_field)
        found[name] = rows_of_text(
            source,
            subject.tokenizer,
            seq_len=seq_len,
            limit=args.rows,
            isolate=subject.config is not None and subject.config.data.documents == "isolate",
        )
    return {
        name: measure_text(subject.per_target, rows, subject.tokenizer, subject.device)
        for name, rows in found.items()
    }


def names_of_run(subject: Subject) -> set[str]:
    """The names under which the losses on a run's own held-out documents are kept."""
    return set() if subject.config is None else set(subject.config.data.heldout_names.values())


def comparable(
    args: EvaluateArguments,
    subject: Subject,
    texts: dict[str, Heldout],
    dtype: torch.dtype,
    console: Console,
) -> dict[str, Heldout]:
    """What is kept of the losses: not those of the run's held-out documents that it measures itself
    in another way, because reports compare them with other runs' own; says so.
    """
    config = subject.config
    assert config is not None
    trained = trained_dtype(subject.directory, config)
    others = []
    if args.rows not in (None, config.eval.rows):
        others.append(f"eval.rows={config.eval.rows}")
    if args.seq_len not in (None, config.train.seq_len):
        others.append(f"train.seq_len={config.train.seq_len}")
    if dtype != trained:
        others.append(f"{str(trained).removeprefix('torch.')} products")
    left = texts.keys() & names_of_run(subject) if others else set()
    if left:
        why = f"the run measures itself with {' and '.join(others)}"
        warn(console, f"not kept: {', '.join(sorted(left))}; {why}, and reports compare that")
    return {name: text for name, text in texts.items() if name not in left}


def not_limited(subject: Subject, tasks: dict[str, Any], console: Console) -> dict[str, Any]:
    """What is kept of the tasks: not those that were asked more questions before; says so."""
    scores = scores_of(tasks)
    left = of_fewer_questions(subject.directory, step=subject.step, tasks=scores)
    if left:
        warn(console, f"not kept: {', '.join(left)}; the scores there are of more questions")
    return {n: task for n, task in tasks.items() if score_name(n, task.shots) not in left}


def scores_of(tasks: Mapping[str, Any]) -> dict[str, TaskScore]:
    """The scores of those tasks that have an accuracy, by the names of scores."""
    return {
        score_name(name, task.shots): task.score
        for name, task in tasks.items()
        if task.score is not None
    }


def measure_tasks(args: EvaluateArguments, subject: Subject) -> dict[str, Any]:
    """The scores in downstream tasks, by name."""
    if not args.task_names:
        return {}
    from train.evaluation.harness import measure, measure_of_harness  # optional

    names = [name for name in args.task_names if name in OLMO_TASKS]
    here = [read_questions(name, args.shots or 0, args.limit) for name in names]
    check_lengths(here, subject.tokenizer, subject.longest, "tasks")
    lm = subject.lm()
    found = measure(lm, here)
    others = [name for name in args.task_names if name not in OLMO_TASKS]
    if others:
        found |= measure_of_harness(lm, others, shots=args.shots, limit=args.limit)
    return found


def text_table(found: Mapping[str, Heldout]) -> Table:
    """Losses by text."""
    table = Table(title="bits per byte, +- standard error over documents", title_justify="left")
    for column in ("text", "bits per byte", "nats per token", "documents", "tokens", "bytes"):
        table.add_column(column, justify="left" if column == "text" else "right")
    for name, text in found.items():
        counts = (f"{n or 0:,}" for n in (text.documents, text.tokens, text.bytes))
        table.add_row(name, told(text.bits_per_byte, 4), f"{text.loss:.4f}", *counts)
    return table


def task_table(found: Mapping[str, Any]) -> Table:
    """Scores by task: accuracies in per cent, other metrics as they are."""
    table = Table(title="tasks, +- standard error over questions", title_justify="left")
    for column in ("task", "metric", "value", "chance", "shots", "questions"):
        table.add_column(column, justify="left" if column in ("task", "metric") else "right")
    for name, task in found.items():
        for metric, value in task.metrics.items():
            is_accuracy = metric.startswith("acc")
            shown = told(value, 1, scale=100) + " %" if is_accuracy else told(value, 4)
            chance = f"{100 * task.chance:.1f} %" if is_accuracy and task.chance else ""
            table.add_row(name, metric, shown, chance, str(task.shots), f"{task.questions:,}")
    return table


def told(estimate: Estimate, digits: int, scale: float = 1) -> str:
    """An estimate and its standard error.

    >>> told(Estimate(value=0.25, standard_error=0.0433), 1, scale=100)
    '25.0 +- 4.3'
    """
    value = f"{scale * estimate.value:.{digits}f}"
    error = estimate.standard_error
    return value if error is None else f"{value} +- {scale * error:.{digits}f}"


def save(
    subject: Subject, texts: Mapping[str, Heldout], tasks: Mapping[str, Any], console: Console
) -> None:
    """Add what was found to the run's result, its metrics.jsonl, and its Weights & Biases run.

    Raises:
        DataError: something is not finite.
        ConfigError: a file cannot be written.
    """
    config, directory, step = subject.config, subject.directory, subject.step
    assert config is not None
    metrics = logged(texts, tasks)
    if not all(isfinite(value) for value in metrics.values() if not isinstance(value, str)):
        problem = f"run={directory}: a loss or a score is not finite, and is not kept"
        raise DataError(f"{problem}. Its weights are damaged, or its training has diverged.")
    try:
        path = add_scores(directory, step=step, heldout=texts, tasks=scores_of(tasks))
        append_metrics(directory / "metrics.jsonl", step, metrics)
    except OSError as error:
        problem = f"run={directory}: cannot be written ({reason_of(error)}); give save=false"
        raise ConfigError([problem], "the arguments") from error
    if config.hooks.wandb.mode != "disabled" and run_id(directory) is not None:
        sink = FailingSink(WandbSummary(config, directory, console), console)
        sink.write(step, metrics)
        sink.close()
    elif config.hooks.wandb.mode != "disabled":
        warn(console, f"{directory} has no run of Weights & Biases, which would get them, too")
    console.print(f"kept in {path} and metrics.jsonl, as of step {step}", markup=False)


def logged(texts: Mapping[str, Heldout], tasks: Mapping[str, Any]) -> Metrics:
    """What was found, by the names of metrics."""
    metrics: Metrics = {}
    for name, text in texts.items():
        bits = text.bits_per_byte
        metrics[f"eval/{name}/loss"] = text.loss
        metrics[f"eval/{name}/bits_per_byte"] = bits.value
        if bits.standard_error is not None:
            metrics[f"eval/{name}/bits_per_byte_stderr"] = bits.standard_error
        for what in ("documents", "tokens", "bytes", "fingerprint"):
            metrics[f"eval/{name}/{what}"] = getattr(text, what)
    for name, task in tasks.items():
        metrics |= task.logged(name)
    return metrics
