"""A run that takes a second: a small corpus, a small model, and the settings that fit them."""

import functools
import io
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import NamedTuple

import pytest
import torch
from rich.console import Console
from rich.progress import Progress

from train.compose import load
from train.config import Config
from train.loop import train
from train.metrics.record import Hook, Metrics, StepRecord
from train.metrics.sinks import Sink
from train.run import Run, open_run

PHRASE = "def keep(only, its): return [original for token in hidden] # é 😀 </s>"

SMALL = (
    "data=files",
    "data.lanes=2",
    "data.block_documents=4",
    "data.holdout=0.2",
    "data.prefetch=2",
    "model.layers=2",
    "model.dim=16",
    "model.ffn_dim=24",
    "model.heads=2",
    "model.kv_heads=1",
    "model.head_dim=8",
    "model.vocab_size=320",
    "model.max_seq_len=64",
    "train.max_steps=6",
    "train.global_batch=4",
    "train.seq_len=32",
    "checkpoint.every=0",
    "eval.every=0",
    "eval.rows=4",
    "hooks=quiet",
    "hooks.log_every=1",
    "hooks.sample.tokens=4",
    "engine.device=cpu",
    "engine.threads=1",
)

# The spans of the variants that have them: to type one for another variant is an error.
SPANS = {"phd_swa": ["model.window=3"], "phd_cswa": ["model.window=3", "model.chunk=4"]}

# What a resumed run may measure anew: clocks and this process's memory.
MEASURED = ("time", "throughput/", "memory/", "checkpoint/")


class LoadedRun(NamedTuple):
    """A run that came to its end, what it returned, and what it printed."""

    run: Run
    record: StepRecord
    metrics: Metrics
    output: str


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The tests' own cache of trained tokenizers."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PHD_CACHE", str(folder))
        yield folder


@pytest.fixture(autouse=True)
def torch_as_it_was() -> Iterator[None]:
    """Opening a run sets the process's threads and, when it resumes, the random numbers."""
    threads, random = torch.get_num_threads(), torch.get_rng_state()
    yield
    torch.set_num_threads(threads)
    torch.set_rng_state(random)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """53 different documents of 5 to 60 words."""
    rng, words = Random(0), PHRASE.split(" ")
    texts = [f"{i} " + " ".join(rng.choices(words, k=rng.randint(5, 60))) for i in range(53)]
    path = tmp_path_factory.mktemp("corpus") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="session")
def small_at(corpus: Path) -> Callable[..., list[str]]:
    """The overrides of a small run in a directory, and others after them."""

    def overrides(directory: Path, *others: str) -> list[str]:
        named = [o.removeprefix("model=") for o in others if o.startswith("model=")]
        spans = SPANS.get(named[-1] if named else "phd_cswa", [])
        return [
            *SMALL,
            *spans,
            f"data.sources.files.paths={corpus}",
            f"run.dir={directory}",
            *others,
        ]

    return overrides


@pytest.fixture
def small(small_at: Callable[..., list[str]], tmp_path: Path) -> Callable[..., list[str]]:
    """The overrides of a small run in a directory of this test, and others after them."""
    return lambda *others: small_at(tmp_path / "run", *others)


@pytest.fixture
def config(small: Callable[..., list[str]]) -> Callable[..., Config]:
    """The config of a small run with other overrides."""
    return lambda *others: _config_of(small(*others))


def _config_of(overrides: list[str]) -> Config:
    """What `load` makes of overrides. It takes 0.1 s; those that only differ in their directory
    are composed once."""
    *_, last = (text for text in overrides if text.startswith("run.dir="))
    directory = last.removeprefix("run.dir=")
    if not directory.startswith("/"):
        return load(overrides)
    others = [text for text in overrides if not text.startswith("run.dir=")]
    config = _composed((*others, "run.dir=/nowhere"))
    return replace(config, run=replace(config.run, dir=directory))


@functools.cache
def _composed(overrides: tuple[str, ...]) -> Config:
    return load(overrides)


@pytest.fixture
def opened() -> Iterator[Callable[[Config], Run]]:
    """Opens a run; the test's end closes it."""
    with ExitStack() as runs:
        yield lambda config: runs.enter_context(open_run(config, Console(file=io.StringIO())))


@pytest.fixture(scope="session")
def trained() -> Callable[..., LoadedRun]:
    """Opens a run, trains it to its end, and closes it."""

    def to_the_end(
        config: Config,
        *,
        hooks: tuple[Hook, ...] | Callable[[Run], tuple[Hook, ...]] = (),
        sinks: tuple[Sink, ...] = (),
    ) -> LoadedRun:
        written = io.StringIO()
        console = Console(file=written, width=300)
        with open_run(config, console) as run:
            assert not run.finished
            more = hooks(run) if callable(hooks) else hooks
            run = replace(run, hooks=(*more, *run.hooks), sinks=(*run.sinks, *sinks))
            record, metrics = train(run, Progress(disable=True))
        return LoadedRun(run, record, metrics, written.getvalue())

    return to_the_end


@pytest.fixture(scope="session")
def logged() -> Callable[..., list[Metrics]]:
    """The lines of a run's metrics.jsonl; of a step's figures only what must come back equal."""

    def read(directory: Path, *, measured: bool = False) -> list[Metrics]:
        text = (directory / "metrics.jsonl").read_text(encoding="utf-8")
        lines = [json.loads(line) for line in text.splitlines()]
        if measured:
            return lines
        return [{k: v for k, v in line.items() if not k.startswith(MEASURED)} for line in lines]

    return read
