"""Tokens per second of a batch of rows, over the batch and K, beside transformers."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import Olmo2ForCausalLM

from conf.errors import ConfigError
from phd.config import ModelConfig
from train.benchmarks import ceiling
from train.benchmarks.ceiling import copied_bytes_per_s, copy_work
from train.benchmarks.decoding import Decode, TransformersDecode, floor, in_transformers
from train.benchmarks.family import Models
from train.benchmarks.subject import subject_of
from train.benchmarks.throughput_plot import draw
from train.benchmarks.timing import Result, Times, Work, beside

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is decoded.

    Attributes:
        batches: how many rows are decoded at a time.
        copies: K of PHD-CSWA.
        context: the length of the longest row, in tokens; see `lengths_of`.
        steps: tokens of each row that are decoded in a turn.
    """

    batches: tuple[int, ...]
    copies: tuple[int, ...]
    context: int
    steps: int


LOADS = {
    "cpu": Load(batches=(1, 4, 16), copies=(2, 4, 16), context=256, steps=4),
    "cuda": Load(batches=(1, 4, 16, 64), copies=(2, 4, 16, 64), context=1024, steps=32),
}


def load_of(
    device: torch.device,
    batches: tuple[int, ...] = (),
    contexts: tuple[int, ...] = (),
    copies: tuple[int, ...] = (),
) -> Load:
    """The usual load of a device, with what is asked for in its place; of contexts the longest."""
    usual = LOADS[device.type]
    return replace(
        usual,
        batches=tuple(sorted(set(batches))) or usual.batches,
        copies=tuple(sorted(set(copies))) or usual.copies,
        context=max(contexts, default=usual.context),
    )


def lengths_of(batch: int, context: int) -> list[int]:
    """The tokens of each row in the end: from half the context to all of it, evenly.

    >>> lengths_of(1, 1024), lengths_of(4, 1024)
    ([1024], [640, 768, 896, 1024])
    """
    return [context * (batch + row + 1) // (2 * batch) for row in range(batch)]


def bench_throughput(
    size: ModelConfig, load: Load, repeat: int, device: torch.device, *, charts: Path
) -> Result:
    """Measure vanilla, PHD-CSWA and transformers at every batch, and draw tokens/s over the batch.

    Raises:
        ConfigError: the context is too short for the tokens that are decoded in it.
    """
    if load.context // 2 <= load.steps:
        expected = f"expected more than {2 * load.steps}: rows of half of it decode {load.steps}"
        raise ConfigError([f"contexts={load.context}: {expected} tokens"], "the arguments")
    models = Models(replace(size, max_seq_len=load.context), device)
    twin = in_transformers(models.of("vanilla", 1))
    rows = [
        row for batch in load.batches for row in _rows(models, twin, load, batch, repeat, device)
    ]
    subject = f"{subject_of(size, device)}\n{_conditions(size, load)}"
    path = charts / "throughput.png"
    draw(rows, subject, path)
    return Result(rows, _ratios(rows), subject, files=[path])


def _conditions(size: ModelConfig, load: Load) -> str:
    half, whole = load.context // 2, load.context
    unit = "hidden copies" if size.span_unit == "hidden" else "tokens"
    window = f"W = {size.window} and C = {size.chunk} in {unit}"
    return f"rows of {half} to {whole} tokens, greedy; PHD-CSWA with {window}"


def _rows(
    models: Models,
    twin: Olmo2ForCausalLM,
    load: Load,
    batch: int,
    repeat: int,
    device: torch.device,
) -> list[Row]:
    """The rows of one batch, of which vanilla's is the first.

    Args:
        twin: vanilla in transformers; one for all batches, so that it is compiled once.
    """
    lengths = lengths_of(batch, load.context)
    base = Decode(models.of("vanilla", 1), lengths, load.steps)
    decodes = {K: Decode(models.of("phd_cswa", K), lengths, load.steps) for K in load.copies}
    theirs = TransformersDecode(twin, lengths, load.steps)
    works: dict[str, Work] = {ceiling.COPY: copy_work(device), "transformers": theirs}
    named = {f"phd_cswa K{K}": work for K, work in decodes.items()}
    times = beside("vanilla", base, works | named, repeat, device)
    copy_speed = copied_bytes_per_s(times, device)
    times = times.divided(load.steps)
    # Its own clock leaves out the prompts; the first turn is a warm-up here, too.
    times = replace(times, seconds=times.seconds | {"transformers": theirs.seconds[1:]})
    rows = [
        _row(batch, name, times)
        | {"variant": work.config.variant, "K": work.config.K}
        | floor(work, times.typical_s(name), copy_speed)
        for name, work in {"vanilla": base, **named}.items()
    ]
    nothing = {"floor_ms": None, "of_copy": None}
    return [
        *rows,
        _row(batch, "transformers", times) | {"variant": "transformers", "K": 1} | nothing,
    ]


def _row(batch: int, name: str, times: Times) -> Row:
    """The columns that every piece of work has. A time is that of a token of each row."""
    return {
        "batch": batch,
        "variant": None,
        "K": None,
        "tokens_per_s": batch / times.typical_s(name),
        **times.columns(name),
    }


def _ratios(rows: list[Row]) -> dict[str, float]:
    """Tokens per second of all, and vanilla's over transformers'."""
    ratios = {}
    for row in rows:
        batch = f"B{row['batch']}"
        match row["variant"]:
            case "transformers":
                ratios[f"vanilla_over_transformers_{batch}"] = row["x_vanilla"]
            case "vanilla":
                ratios[f"vanilla_tokens_per_s_{batch}"] = row["tokens_per_s"]
            case _:
                ratios[f"over_vanilla_K{row['K']}_{batch}"] = 1 / row["x_vanilla"]
    return ratios
