"""Sinks for metrics: a JSON lines file, Weights & Biases, and the console.

A sink that fails warns once and loses its own output. It never stops the run.
"""

import json
import os
import re
from math import isfinite
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from time import time
from typing import Any, NamedTuple, Protocol
from uuid import uuid4

from rich.console import Console

from conf.errors import reason_of
from conf.redaction import holds_secret, redacted_tree
from data.storage.atomic import write_atomic
from train.config import Config
from train.console import duration, print_line, warn
from train.metrics.lines import read_line
from train.metrics.record import Metrics

RUN_ID = "wandb_id.txt"

START_S = 20.0
"""Seconds that the W&B server may take to answer at the start."""

FINISH_S = 20.0
"""Seconds that the W&B server may take for the rest of the metrics at the end."""

CLOSE_S = 30.0
"""Seconds that W&B's service, a process on this machine, may take to finish the run."""

TEAR_DOWN_S = 1.0
"""Seconds that stopping a service that does not answer may take."""


class Sink(Protocol):
    """A place that metrics are written to."""

    def write(self, step: int, metrics: Metrics) -> None: ...

    def close(self) -> None: ...


class FailingSink:
    """A sink whose failures, of whatever kind, cost its own output; the first one is told.

    What a hook of the user's returns may be what a sink cannot write.
    """

    def __init__(self, sink: Sink, console: Console) -> None:
        self.sink, self.console = sink, console
        self._told = False

    def write(self, step: int, metrics: Metrics) -> None:
        """Write what the sink takes."""
        try:
            self.sink.write(step, metrics)
        except Exception as error:
            self._tell(f"does not take the metrics of step {step}", error)

    def close(self) -> None:
        """Close the sink, as far as that can be done."""
        try:
            self.sink.close()
        except Exception as error:
            self._tell("cannot be closed", error)

    def _tell(self, what: str, error: Exception) -> None:
        if not self._told:
            self._told = True
            name = type(self.sink).__name__
            warn(self.console, f"{name} {what}: {type(error).__name__}: {error}; the run goes on")


class MetricsFile:
    """`metrics.jsonl`: one JSON object per line, with `step`, the Unix `time`, and the metrics.

    NaN and infinity become null, because JSON has neither.
    """

    def __init__(self, path: Path, resumed_step: int, console: Console, log_every: int = 1) -> None:
        # A run that crashed after its last checkpoint repeats the steps since, and logs them again.
        try:
            last, damaged = cut_back(path, resumed_step)
        except OSError as error:
            held = f"it may hold lines of steps after {resumed_step}, which are taken again"
            warn(console, f"{path} cannot be cut back ({reason_of(error)}); {held}")
        else:
            if damaged:
                warn(console, f"{path}: damaged lines are left out: {damaged}")
            if resumed_step - last >= log_every:
                warn(console, f"{path}: lines are lost; the last one is of step {last}")
        self.path = path
        self.console = console
        self.full = False

    def write(self, step: int, metrics: Metrics) -> None:
        """Append a line. If the disk refuses, the line is lost; the first time it warns."""
        try:
            append_metrics(self.path, step, metrics)
            self.full = False
        except OSError as error:
            if not self.full:
                warn(self.console, f"{self.path} is not written: {reason_of(error)}")
            self.full = True

    def close(self) -> None:
        pass


def append_metrics(path: Path, step: int, metrics: Metrics) -> None:
    """Append a line to a `metrics.jsonl`, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    plain = {k: None if isinstance(v, float) and not isfinite(v) else v for k, v in metrics.items()}
    # `allow_nan=False`: Python would write NaN, which other JSON readers refuse.
    line = json.dumps({"step": step, "time": time(), **plain}, allow_nan=False) + "\n"
    _append(path, line.encode())


def _append(path: Path, line: bytes) -> None:
    """Append a complete line to a file. On an OSError nothing of it remains.

    Not flushed to the disk: the training waits here, and a busy file server takes seconds for it.
    What a loss of power takes is told on resume.
    """
    with path.open("ab", buffering=0) as file:
        size = file.tell()
        try:
            # A nearly full disk takes the first bytes of a line, and refuses the rest then.
            while line:
                line = line[file.write(line) :]
        except OSError:
            file.truncate(size)
            raise


class CutBack(NamedTuple):
    """What `cut_back` has found: the last step that is kept (0: none), and damaged lines."""

    last: int = 0
    damaged: int = 0


def cut_back(path: Path, step: int) -> CutBack:
    """Delete the lines of steps after `step`, and damaged lines.

    A last line without an end is not counted as damaged: a process that was killed leaves it.
    """
    if not path.exists():
        return CutBack()
    kept, last, damaged = [], 0, 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        written = read_line(line)
        if written is None:
            damaged += line.endswith("\n")
        elif written["step"] <= step and line.endswith("\n"):
            kept.append(line)
            last = max(last, written["step"])  # an evaluation may add one of an earlier step
    write_atomic(path, "".join(kept))
    return CutBack(last, damaged)


class ConsoleLine:
    """Prints one line per logging step, above the progress bar.

    In a file, where there is no bar, the line also tells how long the training will still take.
    """

    def __init__(self, console: Console, total_steps: int | None) -> None:
        self.console = console
        self.total = f"/{total_steps}" if total_steps else ""

    def write(self, step: int, metrics: Metrics) -> None:
        for line in console_lines(metrics, eta=not self.console.is_terminal):
            print_line(self.console, f"step {step}{self.total}  {line}")

    def close(self) -> None:
        pass


def console_lines(metrics: Metrics, *, eta: bool = False) -> list[str]:
    """The metrics that a person follows, as text; with `eta` also the time that is left.

    >>> console_lines({"train/loss": 3.21, "throughput/tokens_per_s": 5123.4, "optim/lr": 3e-4})
    ['loss 3.210  lr 3.00e-04  5,123 tokens/s']
    """
    formats = {
        "train/loss": "loss {:.3f}",
        "train/bits_per_byte": "{:.3f} bits/byte",
        "optim/lr": "lr {:.2e}",
        "optim/grad_norm": "grad {:.2f}",
        "throughput/tokens_per_s": "{:,.0f} tokens/s",
        "throughput/mfu": "mfu {:.1%}",
        "memory/peak_gib": "{:.2f} GiB",
    }
    line = "  ".join(text.format(metrics[key]) for key, text in formats.items() if key in metrics)
    if line and eta and isinstance(left := metrics.get("throughput/eta_s"), float):
        line += f"  eta {duration(left)}"
    lines = [line] if line else []
    for key, value in metrics.items():
        if key.startswith("eval/") and key.endswith("/loss"):
            name = key.removeprefix("eval/").removesuffix("/loss")
            bits = metrics.get(f"eval/{name}/bits_per_byte")
            per_byte = "" if bits is None else f"  {bits:.3f} bits/byte"
            lines.append(f"{name} loss {value:.3f}{per_byte}")
        elif key == "sample/text":
            lines.append(f"a sample:\n{value}")
        elif isinstance(value, str) and not key.endswith("/fingerprint"):  # for machines
            lines.append(f"{key}: {value}")
    return lines + accuracy_lines(metrics)


def accuracy_lines(metrics: Metrics) -> list[str]:
    """The accuracies in downstream tasks, as text.

    >>> metrics = {"eval/x/acc": 0.25, "eval/x/acc_stderr": 0.05, "eval/x/acc_norm": 0.5}
    >>> accuracy_lines(metrics)
    ['x acc 25.0 % +- 5.0  acc_norm 50.0 %']
    """
    lines = []
    for key in metrics:
        if not (key.startswith("eval/") and key.endswith("/acc")):
            continue
        parts = []
        for name in (key, f"{key}_norm"):
            if (value := metrics.get(name)) is not None:
                error = metrics.get(f"{name}_stderr")
                spread = "" if error is None else f" +- {100 * float(error):.1f}"
                parts.append(f"{name.rpartition('/')[2]} {100 * float(value):.1f} %{spread}")
        task = key.removeprefix("eval/").removesuffix("/acc")
        lines.append(f"{task} {'  '.join(parts)}")
    return lines


class Wandb:
    """The run on Weights & Biases: offline unless logged in, with the same id after a resume.

    A thread makes all calls, so that a slow or unreachable server does not slow the training. If
    the server cannot be reached at the start, the run is logged offline. If it fails later, the
    metrics are still in the run's directory. `wandb sync` uploads both. A failure is reported once.
    """

    def __init__(self, config: Config, run_dir: Path, console: Console) -> None:
        self.config, self.run_dir, self.console = config, run_dir, console
        self._calls: SimpleQueue[tuple[int, Metrics] | None] = SimpleQueue()
        self._given_up = False
        # A daemon thread does not keep the process alive if the service hangs.
        self._thread = Thread(target=self._serve, name="wandb", daemon=True)
        self._thread.start()

    def write(self, step: int, metrics: Metrics) -> None:
        """Queue the metrics for the thread."""
        self._calls.put((step, metrics))

    def close(self) -> None:
        """Finish the run within `CLOSE_S`, or give up and stop W&B's service."""
        self._calls.put(None)
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            self._given_up = True
            self._failed(f"its service has not answered for {CLOSE_S:g} s")
            # W&B registers an exit hook that waits for the service without a limit. The first thing
            # that a teardown does is to remove this hook.
            tearing = Thread(target=_tear_down, daemon=True)
            tearing.start()
            tearing.join(TEAR_DOWN_S)

    def _serve(self) -> None:
        try:
            run = self._start()
            while (call := self._calls.get()) is not None:
                self._log(run, *call)
            run.finish()
            _tear_down()
        except Exception as error:
            if not self._given_up:
                self._failed(reason_of(error))

    def _log(self, run: Any, step: int, metrics: Metrics) -> None:
        run.log(metrics, step=step)

    def _start(self) -> Any:
        mode = _mode(self.config)
        try:
            return self._init(mode)
        except Exception as error:
            if mode != "online" or self._given_up:
                raise
            warn(self.console, f"Weights & Biases is not reached, {self._kept}: {reason_of(error)}")
            _tear_down()  # otherwise the same id cannot be initialized again in this process
            return self._init("offline")

    def _failed(self, problem: str) -> None:
        warn(
            self.console,
            f"Weights & Biases failed and is left out from here on, {self._kept}: {problem}",
        )

    @property
    def _kept(self) -> str:
        return f"but `wandb sync` can upload what is in {self.run_dir / 'wandb'}"

    def _init(self, mode: Any) -> Any:
        import wandb

        model, own = self.config.model, self.config.hooks.wandb
        return wandb.init(
            project=own.project,
            group=own.group,
            name=self.config.name,
            job_type="train",
            tags=list(dict.fromkeys([model.name, model.size, *own.tags])),
            # The same id after a resume continues the same curves.
            id=keep_run_id(self.run_dir, None, self.console),
            resume="allow",
            dir=self.run_dir,
            mode=mode,
            config=redacted_tree(self.config.to_dict()),
            settings=wandb.Settings(
                silent=True,
                # It would take what is printed before the standard streams have hidden secrets.
                console="off" if holds_secret(self.config.to_dict()) else "auto",
                init_timeout=START_S,
                finish_timeout=FINISH_S,
                # Otherwise the timeout only prints a message, and this thread would not know.
                finish_timeout_raises=True,
            ),
        )


class WandbSummary(Wandb):
    """The same run after its end: what is written becomes part of its summary.

    Weights & Biases takes no more points of steps that it has had.
    """

    def _log(self, run: Any, step: int, metrics: Metrics) -> None:  # noqa: ARG002
        run.summary.update(metrics)


def _tear_down() -> None:
    import wandb

    wandb.teardown()


def run_id(run_dir: Path) -> str | None:
    """The W&B id of the run in this directory; None if there is none, or a damaged one."""
    try:
        text = (run_dir / RUN_ID).read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        return None
    return text if re.fullmatch(r"[\w-]+", text) else None


def keep_run_id(run_dir: Path, saved: str | None, console: Console) -> str:
    """The W&B id of the run, which is written down; a new run gets a new one.

    Args:
        run_dir: the run's directory.
        saved: the id in the checkpoint, in case that of the directory is lost.
        console: for a warning if both are.
    """
    path = run_dir / RUN_ID
    found = run_id(run_dir)
    if found is None and saved is None and path.exists():
        warn(console, f"{path} is damaged; the curves of Weights & Biases begin a new run")
    # The server of a W&B sweep knows its runs by the ids that it gives its agents.
    given = os.environ.get("WANDB_RUN_ID") if "WANDB_SWEEP_ID" in os.environ else None
    own = found or saved or given or uuid4().hex[:16]
    if own != found:
        write_atomic(path, own)
    return own


def _mode(config: Config) -> Any:
    mode = config.hooks.wandb.mode
    if mode != "auto":
        return mode
    # `verify=False` reads the stored key without asking the server, which may be unreachable.
    import wandb

    return os.environ.get("WANDB_MODE") or (
        "online" if wandb.login(prompt=False, verify=False) else "offline"
    )
