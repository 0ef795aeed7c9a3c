"""Tokenize the data once, for runs that read tokens instead of text.

python train/pretokenize.py data=python out=tokens

This writes a directory for each source, here `tokens/python` (its layout is drawn in
data/sources/token_files.py), and prints how to train on it. After an interruption the same command
resumes.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # first of all: the imports below take seconds
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # see conf/checkout.py
    from train import compose
    from train.arguments import PretokenizeArguments

    compose.run_with(PretokenizeArguments, "train.pretokenize")

import json
import multiprocessing
import os
import re
import shlex
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from threading import Thread
from time import perf_counter
from typing import Any, TypeVar

import numpy as np
from rich.console import Console
from rich.progress import Progress

from conf.errors import ConfigError, DataError, Problem, reason_of
from conf.exit_codes import ExitCode
from conf.validation import OMITTED, as_dict, flatten_keys
from conf.wording import plural
from data.config import DataConfig, Source, TokensSource
from data.source import Document
from data.sources.documents import Documents
from data.sources.token_files import (
    MODEL,
    UNFINISHED,
    TokenIndex,
    TokenShard,
    begin,
    finish,
    new_index,
    shard_name,
    write_shard,
)
from data.tokenizer import Tokenizer
from train.arguments import PretokenizeArguments
from train.config import Config
from train.console import progress_bar
from train.start.tokenizer_of_weights import tokenizer_of_new_run

T = TypeVar("T")
REFRESH_S = 0.5
"""Seconds between two updates of the progress bar."""


@dataclass(frozen=True)
class Written:
    """The token files of a source.

    Attributes:
        index: of the files.
        tokens_per_s: speed of all processes together; None if all files existed already.
    """

    index: TokenIndex
    tokens_per_s: float | None


def pretokenize(args: PretokenizeArguments, config: Config, console: Console) -> dict[str, Written]:
    """Write the token files of every source; return them by the source's name.

    Raises:
        ConfigError: a source is tokens already; or `prepare_tokenizer` refuses the tokenizer.
        DataError: a source has no text, too many bad records, or has changed since the first
            shard was written.
    """
    for name, source in config.data.sources.items():
        if isinstance(source, TokensSource):
            key = f"data.sources.{name}.kind"
            raise ConfigError([Problem(key, "tokens", "is tokens already", "leave it out")])
    documents = Documents(config.data)
    for remark in documents.remarks:
        console.print(remark, markup=False)
    tokenizer = tokenizer_of_new_run(config, documents, console)
    written = {}
    for name, source in config.data.sources.items():
        # The shards do not depend on the mixture, so each source is read alone, at weight 1.
        alone = replace(config.data, sources={name: replace(source, weight=1.0)}, phases={})
        directory = args.directory(name)
        wanted = new_index(tokenizer, made_from(documents, name), args.parts)
        index = begin(directory, wanted, tokenizer)
        with progress_bar(console, "shards, {task.fields[tokens]:,} tokens") as progress:
            written[name] = write_source(alone, directory, index, args.workers, progress)
    return written


def made_from(documents: Documents, name: str) -> dict[str, Any]:
    """The settings that decide which texts of a source are tokenized, with their values."""
    longest = documents.config.max_document_bytes
    return {**documents.corpora[name].fingerprint, "data.max_document_bytes": longest}


def write_source(
    data: DataConfig, directory: Path, index: TokenIndex, workers: int, progress: Progress
) -> Written:
    """Write the missing shards of the only source of `data`."""
    [name] = data.sources
    size = np.dtype(index.dtype).itemsize
    missing, before, started = index.missing, index.tokens, perf_counter()
    bar = progress.add_task(name, total=index.parts, tokens=index.tokens)
    jobs = [partial(write_part, data, directory, number) for number in missing]
    for shards in in_processes(jobs, workers):
        for shard in shards:
            # It is saved after each shard, so that an interruption loses the running shards only.
            index = index.with_shard(shard)
            index.save(directory / UNFINISHED)
        # The index has complete shards only; the files' sizes also show those being written.
        tokens = sum(path.stat().st_size for path in directory.glob("*.tokens")) // size
        progress.update(bar, completed=len(index.shards), tokens=tokens)
    if not index.documents:
        raise DataError(f"data.sources.{name}: no text in it; choose a source with documents")
    finish(directory)
    seconds = perf_counter() - started
    return Written(index, (index.tokens - before) / seconds if missing else None)


def write_part(data: DataConfig, directory: Path, number: int) -> TokenShard:
    """Write one shard: one of `index.parts` equal parts of the only source of `data`.

    Raises:
        DataError: the source has changed, or has too many bad records.
    """
    index = TokenIndex.load(directory / UNFINISHED)
    documents = Documents(data)
    [name] = data.sources
    # Workers read the source themselves. It may have changed since the parent looked at it.
    if made_from(documents, name) != index.made_from:
        raise DataError(
            f"data.sources.{name}: has changed since {directory} was begun; delete that directory "
            "and write it anew"
        )
    documents.quarantine.write_to(directory / f"{shard_name(number)}.quarantine.jsonl")
    texts = (
        (document.text, digest)
        for document, digest, _ in documents.valid_records(name, number, index.parts)
        if isinstance(document, Document)
    )
    shard = write_shard(directory, number, texts, Tokenizer.load(directory / MODEL))
    return replace(shard, quarantined=len(documents.quarantine.bad_records))


def in_processes(jobs: Sequence[Callable[[], T]], workers: int) -> Iterator[list[T]]:
    """Run jobs in processes; yield the results of finished ones, at least every `REFRESH_S`.

    Raises:
        BrokenProcessPool: a process was killed.
    """
    # Forking a process that has threads can deadlock, so workers are spawned.
    context = multiprocessing.get_context("spawn")
    ended, end = context.Pipe(duplex=False)
    with ended, end, ProcessPoolExecutor(workers, context, _end_when, (ended,)) as pool:
        try:
            running = {pool.submit(job) for job in jobs}
            while running:
                done, running = wait(running, timeout=REFRESH_S, return_when=FIRST_COMPLETED)
                yield [future.result() for future in done]
        except BaseException:
            # Otherwise leaving the pool would wait until the running jobs have ended.
            end.close()
            raise


def _end_when(ended: Connection) -> None:
    """End this worker when its parent closes the other end of a pipe, or is gone, also by SIGKILL;
    otherwise it would go on writing."""
    # Ctrl-C reaches the workers, too. If one died of it, the parent might see that first, and tell
    # of a lack of memory instead of the interruption. So the parent alone ends them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow() -> None:
        ended.poll(None)
        os._exit(1)

    Thread(target=follow, daemon=True).start()


def training_arguments(data: DataConfig, directory: Callable[[str], Path]) -> list[str]:
    """The arguments of `python train/main.py` that train on the tokens instead of the text.

    The other settings under `data` stay. A single source is called `tokens` then, as in
    `data=tokens`, and needs no phases.

    Args:
        data: the configuration that was tokenized.
        directory: gives the directory of a source's tokens by its name.
    """
    single = len(data.sources) == 1
    sources: dict[str, Source] = {
        "tokens" if single else name: TokensSource(
            kind="tokens", path=str(directory(name)), weight=source.weight, epochs=source.epochs
        )
        for name, source in data.sources.items()
    }
    wanted = replace(data, sources=sources, phases={} if single else data.phases)
    default = TokensSource(kind="tokens", path=OMITTED)
    # Settings that equal the default are left out, so that the printed command stays short.
    standard = flatten_keys(as_dict(DataConfig(sources=dict.fromkeys(sources, default))), "data.")
    return [
        "data=tokens",
        *([] if single else ["~data.sources.tokens"]),
        *(
            f"{key}={_spelled(value)}"
            for key, value in flatten_keys(as_dict(wanted), "data.").items()
            if standard.get(key, OMITTED) != value or (key.endswith(".kind") and not single)
        ),
    ]


def _spelled(value: Any) -> str:
    """A value in Hydra's syntax. Text with special characters is quoted."""
    plain = isinstance(value, str) and re.fullmatch(r"[\w./-]+", value)
    return value if plain else json.dumps(value, ensure_ascii=False)


def print_written(written: Mapping[str, Written], console: Console) -> None:
    """Print a line for each source."""
    for name, source in written.items():
        index, speed = source.index, source.tokens_per_s
        console.print(
            f"{name}: {plural(index.documents, 'document')}, {plural(index.tokens, 'token')} of "
            f"{plural(index.bytes, 'byte')} ({index.bytes / index.tokens:.2f} bytes per token), "
            f"{plural(index.quarantined, 'record')} quarantined, "
            f"{'was there already' if speed is None else f'{speed:,.0f} tokens/s'}"
        )


def main(args: PretokenizeArguments, config: Config) -> int:
    """Write the tokens and print how to train on them; return the exit code."""
    console = Console(soft_wrap=True, highlight=False)
    try:
        written = pretokenize(args, config, console)
    except OSError as error:
        raise ConfigError(
            [Problem("out", args.out, f"cannot be written ({reason_of(error)})")]
        ) from error
    except BrokenProcessPool as error:
        killed = (
            f"processes={args.workers}: one was killed, perhaps because memory ran out; lower it, "
            "and the same command goes on"
        )
        raise ConfigError([killed]) from error
    except KeyboardInterrupt:
        console.print("interrupted: the same command goes on with the missing shards")
        return ExitCode.INTERRUPTED
    print_written(written, console)
    command = ["python", "train/main.py", *training_arguments(config.data, args.directory)]
    console.print(f"train on it: {shlex.join(command)}")
    return 0
