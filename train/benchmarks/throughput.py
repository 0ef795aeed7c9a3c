"""Tokens per second of a batch, over its rows and K, beside transformers.

decoder        rows of unequal lengths, all of which get a token at each step
generator      requests: a row that is done takes the next one; reading prompts is part of it
transformers   the rows of the decoder, padded, in its static cache
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import Olmo2ForCausalLM

from conf.errors import ConfigError
from phd.config import ModelConfig, SamplingConfig
from phd.inference.generator import Generator, Request
from phd.model import Transformer
from train.benchmarks import ceiling
from train.benchmarks.ceiling import copied_bytes_per_s, copy_work
from train.benchmarks.decoding import Decode, TransformersDecode, floor, in_transformers
from train.benchmarks.family import Models, random_tokens
from train.benchmarks.subject import subject_of
from train.benchmarks.throughput_plot import draw
from train.benchmarks.timing import Keep, Result, Work, beside, keep_nothing
from train.engines.device import autocast

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is decoded.

    Attributes:
        batches: how many rows are decoded at a time.
        copies: K of PHD-CSWA.
        context: the length of the longest row, in tokens; see `lengths_of`.
        steps: tokens of each row that are decoded in a turn. Requests get as many to twice as many.
    """

    batches: tuple[int, ...]
    copies: tuple[int, ...]
    context: int
    steps: int


LOADS = {
    "cpu": Load(batches=(1, 4, 16), copies=(2, 16), context=256, steps=4),
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
    size: ModelConfig,
    load: Load,
    repeat: int,
    device: torch.device,
    *,
    charts: Path,
    keep: Keep = keep_nothing,
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
    subject = f"{subject_of(size, device)}\n{_conditions(size, load)}"
    rows: list[Row] = []
    for batch in load.batches:
        rows += _rows(models, twin, load, batch, repeat, device)
        keep(Result([*rows], _ratios(rows), subject))
    path = charts / "throughput.png"
    draw(rows, subject, path)
    return Result(rows, _ratios(rows), subject, files=[path])


def _conditions(size: ModelConfig, load: Load) -> str:
    half, whole = load.context // 2, load.context
    unit = "hidden copies" if size.span_unit == "hidden" else "tokens"
    window = f"W = {size.window} and C = {size.chunk} in {unit}"
    return f"rows of {half} to {whole} tokens, greedy; PHD-CSWA with {window}"


def requests_of(batch: int, load: Load, vocab_size: int) -> list[Request]:
    """Twice as many requests as rows, with prompts of unequal lengths and unequal new tokens."""
    prompts = [max(1, length // 8) for length in lengths_of(2 * batch, load.context)]
    tokens = random_tokens(vocab_size, max(prompts)).tolist()
    greedy = SamplingConfig(temperature=0)
    return [
        Request(tokens[:length], max_tokens=load.steps * (2 + i % 3) // 2, sampling=greedy)
        for i, length in enumerate(prompts)
    ]


class Serve:
    """Greedy decoding of requests by a `Generator`, the same ones in every turn.

    Attributes:
        tokens: how many new tokens they get in all.
    """

    def __init__(self, model: Transformer, batch: int, requests: Sequence[Request]) -> None:
        self.config = model.config
        self.requests, self.tokens = requests, sum(request.max_tokens for request in requests)
        room = max(len(request.prompt) + request.max_tokens for request in requests)
        self.generator = Generator(model, batch=batch, capacity=room)
        weight = model.embed.weight
        self.precision = partial(autocast, weight.device, weight.dtype)

    @torch.inference_mode()
    def __call__(self) -> None:
        with self.precision():
            self.generator.generate(self.requests)


def _rows(
    models: Models,
    twin: Olmo2ForCausalLM,
    load: Load,
    batch: int,
    repeat: int,
    device: torch.device,
) -> list[Row]:
    """The rows of one batch, of which vanilla's decoder is the first.

    Args:
        twin: vanilla in transformers; one for all batches. torch compiles it for the first batch's
            size, and at the second for any other; both are in a first turn, which is not counted.
    """
    lengths = lengths_of(batch, load.context)
    phd = [models.of("phd_cswa", K) for K in load.copies]
    vanilla = models.of("vanilla", 1)
    requests = requests_of(batch, load, vanilla.config.vocab_size)
    base = Decode(vanilla, lengths, load.steps)
    theirs = TransformersDecode(twin, lengths, load.steps)
    decoders = {f"decoder K{m.config.K}": Decode(m, lengths, load.steps) for m in phd}
    servers = {f"generator K{m.config.K}": Serve(m, batch, requests) for m in [vanilla, *phd]}
    works: dict[str, Work] = {ceiling.COPY: copy_work(device), "transformers": theirs}
    times = beside("vanilla", base, {**works, **decoders, **servers}, repeat, device)
    copy_speed = copied_bytes_per_s(times, device)
    times = times.divided(load.steps)
    # Its own clock leaves out the prompts; the first turn is a warm-up here, too.
    seconds = times.seconds | {"transformers": theirs.seconds[1:]}
    for name, server in servers.items():
        share = load.steps * batch / server.tokens  # of a turn, a token of each row
        seconds[name] = [spent * share for spent in seconds[name]]
    times = replace(times, seconds=seconds)
    rows = [
        _row(batch, "decoder", work.config, times.columns(name))
        | floor(work, times.typical_s(name), copy_speed)
        for name, work in {"vanilla": base, **decoders}.items()
    ]
    rows += [
        _row(batch, "generator", server.config, times.columns(name))
        for name, server in servers.items()
    ]
    return [*rows, _row(batch, "transformers", base.config, times.columns("transformers"))]


def _row(batch: int, by: str, config: ModelConfig, columns: Row) -> Row:
    """The columns that every piece of work has. A time is that of a token of each row."""
    speed = 1e3 * batch / columns["ms"]
    labels = {"batch": batch, "by": by, "variant": config.variant, "K": config.K}
    return labels | {"tokens_per_s": speed} | columns | {"floor_ms": None, "of_copy": None}


def _ratios(rows: list[Row]) -> dict[str, float]:
    """Vanilla's tokens per second, and what PHD-CSWA and transformers reach of them."""
    ratios = {}
    for row in rows:
        of_vanilla, batch = 1 / row["x_vanilla"], f"B{row['batch']}"
        match row["by"], row["variant"]:
            case "decoder", "vanilla":
                ratios[f"vanilla_tokens_per_s_{batch}"] = row["tokens_per_s"]
            case "decoder", _:
                ratios[f"K{row['K']}_of_vanilla_{batch}"] = of_vanilla
            case "generator", _:
                ratios[f"generator_K{row['K']}_of_vanilla_{batch}"] = of_vanilla
            case _:
                ratios[f"vanilla_over_transformers_{batch}"] = row["x_vanilla"]
    return ratios
