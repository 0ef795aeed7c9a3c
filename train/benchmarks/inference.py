"""The costs of PHD at inference: prefill time, decode latency and KV bytes, beside vanilla."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import Olmo2Config, Olmo2ForCausalLM
from transformers.generation.streamers import BaseStreamer

from conf.errors import ConfigError
from phd.config import ModelConfig, Variant
from phd.hf.convert import to_hugging_face
from phd.inference.cuda_graph import Decoder
from phd.inference.prefill import decode, new_cache, prefill
from phd.model import Transformer
from train.benchmarks.inference_plots import draw
from train.benchmarks.subject import subject_of
from train.benchmarks.timing import Result, Times, Work, beside
from train.engines.device import autocast

Measurement = dict[str, Any]
"""One row of the table: the work, the variant, K, its length, its times and its bytes."""

PHD: tuple[Variant, ...] = ("phd", "phd_swa", "phd_cswa")
SHORT = {"naive_repeat": "_naive", "phd": "_phd", "phd_swa": "_swa", "phd_cswa": "_cswa"}

COPIED_BYTES = 1 << 28
"""Size of the copy that measures the memory's bandwidth: 256 MiB, more than any CPU cache."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The lengths and copies that are measured.

    Attributes:
        prompts: lengths of the prompts for prefill, in tokens.
        prefill_copies: K of PHD's variants in prefill.
        contexts: lengths of the contexts for decode, in tokens.
        decode_copies: K of PHD's variants in decode.
        naive_copies: K of naive repetition. They are few, because its cost grows as K^2.
        steps: tokens that are decoded in a turn. They are the last ones of the context.
        compiled: whether decode uses `torch.compile`.
    """

    prompts: tuple[int, ...]
    prefill_copies: tuple[int, ...]
    contexts: tuple[int, ...]
    decode_copies: tuple[int, ...]
    naive_copies: tuple[int, ...]
    steps: int
    compiled: bool = False


GRIDS = {
    "cpu": Grid(
        prompts=(512, 2048),
        prefill_copies=(2, 4, 16),
        contexts=(256, 1024),
        decode_copies=(2, 4, 8, 16),
        naive_copies=(2, 4),
        steps=8,
    ),
    "cuda": Grid(
        prompts=(1024, 8192),
        prefill_copies=(2, 4, 8, 16),
        contexts=(1024, 8192),
        decode_copies=(2, 4, 8, 16, 64, 256),
        naive_copies=(2, 4, 8),
        steps=64,
    ),
}


def grid_of(
    device: torch.device,
    prompts: tuple[int, ...] = (),
    contexts: tuple[int, ...] = (),
    copies: tuple[int, ...] = (),
    *,
    compiled: bool = False,
) -> Grid:
    """The usual grid of a device, with the lengths and copies that are given in their place."""
    usual = GRIDS[device.type]
    prompts, contexts, copies = (tuple(dict.fromkeys(x)) for x in (prompts, contexts, copies))
    return replace(
        usual,
        prompts=prompts or usual.prompts,
        contexts=contexts or usual.contexts,
        prefill_copies=copies or usual.prefill_copies,
        decode_copies=copies or usual.decode_copies,
        naive_copies=tuple(K for K in usual.naive_copies if not copies or K in copies),
        compiled=compiled,
    )


class Models:
    """Models of one size that share their weights: float32 on the CPU, bfloat16 on CUDA."""

    # Sharing saves memory: the grid for CUDA has 34 models.
    def __init__(self, size: ModelConfig, device: torch.device) -> None:
        self.size, self.device = size, device
        vanilla = Transformer(size.vanilla_twin).reset(seed=0)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.weights = vanilla.to(device, dtype).fuse_projections().state_dict()

    def of(self, variant: Variant, K: int) -> Transformer:
        """Return the model of a variant. It holds the shared weights, not a copy of them."""
        with torch.device("meta"):
            model = Transformer(replace(self.size, variant=variant, K=K))
        model.load_state_dict(self.weights, assign=True)
        model.rope.build(self.device)
        return model.eval()


class InferenceWork:
    """A piece of work of one model, which becomes one row of the table.

    Attributes:
        kind: `prefill` or `decode`.
        tokens: length of the prompt or of the context.
        steps: how many tokens are decoded in a turn; 1 for prefill.
        kv_bytes: bytes of the KV cache that was allocated for `tokens`.
    """

    kind: str
    kv_bytes: int

    def __init__(self, model: Transformer, tokens: int, steps: int = 1) -> None:
        self.model, self.config, self.tokens, self.steps = model, model.config, tokens, steps
        weight = model.embed.weight
        self.precision = partial(autocast, weight.device, weight.dtype)

    @property
    def name(self) -> str:
        """The key of this work among all that are timed in turn."""
        return f"{self.config.variant} {self.config.K} {self.tokens}"


class Prefill(InferenceWork):
    """Prefill of a prompt into a new KV cache. Allocating the cache is part of the time."""

    kind = "prefill"

    def __init__(self, model: Transformer, tokens: int) -> None:
        super().__init__(model, tokens)
        self.prompt = random_tokens(model, tokens)

    @torch.inference_mode()
    def __call__(self) -> None:
        with self.precision():
            _, cache = prefill(self.model, self.prompt)
        self.kv_bytes = cache.nbytes


class Decode(InferenceWork):
    """Greedy decoding of the last `steps` tokens of a context, the same tokens in every turn.

    The keys and values of earlier tokens are random numbers: their values do not change the time,
    and filling the cache by a prefill would take minutes at 8192 tokens and K = 256. A ring of
    hidden copies still holds those of the turn before.
    """

    kind = "decode"

    def __init__(
        self, model: Transformer, tokens: int, steps: int, *, compiled: bool = False
    ) -> None:
        super().__init__(model, tokens, steps)
        with self.precision():
            self.cache = new_cache(model, 1, capacity=tokens)
        for x in (*self.cache.originals, *self.cache.ring):
            x.normal_()
        self.kv_bytes = self.cache.nbytes
        self.first = random_tokens(model, 1)[0]
        self.decode: Callable[[Tensor], Tensor] = partial(decode, model, cache=self.cache)
        # `Decoder` replays a CUDA graph. On the CPU it pays off only if it is compiled.
        if compiled or self.first.is_cuda:
            self.decode = Decoder(model, self.cache, compiled=compiled)

    @torch.inference_mode()
    def __call__(self) -> None:
        # The cache is set back, so that every turn does the same work.
        begin = self.tokens - self.steps
        self.cache.host_lengths = [begin]
        self.cache.lengths.fill_(begin)
        token = self.first
        with self.precision():
            for _ in range(self.steps):
                token = self.decode(token).argmax(-1)

    @property
    def bytes_read(self) -> int:
        """Bytes that a step at the end of the context reads: each weight once, and the cache."""
        # An untied embedding is a table: a token reads one row of it.
        unread = 0 if self.config.tied else self.model.embed.weight.nbytes
        return sum(p.nbytes for p in self.model.parameters()) - unread + self.kv_bytes


class TokenTimes(BaseStreamer):
    """A streamer of transformers that notes the time at which each token arrives."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:  # noqa: ARG002
        self.times.append(perf_counter())

    def end(self) -> None:
        pass


class TransformersDecode:
    """The same decoding by transformers: greedy `generate` with its static cache.

    Attributes:
        seconds: time per token of each turn. The clock starts when the prompt has given the first
            token, so that prefill does not count.
    """

    def __init__(self, vanilla: Transformer, tokens: int, steps: int) -> None:
        weight = vanilla.embed.weight
        shape, weights = to_hugging_face(vanilla.config, vanilla.state_dict())
        self.model = Olmo2ForCausalLM(Olmo2Config(**shape)).to(weight.device, weight.dtype).eval()  # type: ignore[arg-type]
        self.model.load_state_dict(weights)
        self.prompt = random_tokens(vanilla, tokens - steps)
        self.steps = steps
        self.seconds: list[float] = []

    def __call__(self) -> None:
        arrivals = TokenTimes()
        self.model.generate(
            self.prompt,
            attention_mask=torch.ones_like(self.prompt),
            max_new_tokens=self.steps + 1,
            do_sample=False,
            cache_implementation="static",
            streamer=arrivals,
        )
        # The streamer is also called with the prompt.
        _prompt, first, *_, last = arrivals.times
        self.seconds.append((last - first) / self.steps)


def random_tokens(model: Transformer, tokens: int) -> Tensor:
    """int64 (1, tokens) on the model's device; the same tokens for every model of a size."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(model.config.vocab_size, (1, tokens), generator=generator)
    return drawn.to(model.embed.weight.device)


def bench_inference(
    model: ModelConfig, grid: Grid, repeat: int, device: torch.device, *, charts: Path
) -> Result:
    """Measure every variant beside transformers, and draw the paper's charts into `charts`.

    Raises:
        ConfigError: a context is too short for the tokens that are decoded in it.
    """
    if short := [tokens for tokens in grid.contexts if tokens <= grid.steps]:
        problem = f"contexts={short}: expected more than the {grid.steps} tokens that are decoded"
        raise ConfigError([problem], "the arguments")
    result = measure_inference(model, grid, repeat, device)
    subject = subject_of(model, device)
    return replace(result, subject=subject, files=draw(result.rows, subject, charts))


def measure_inference(size: ModelConfig, grid: Grid, repeat: int, device: torch.device) -> Result:
    """Measure vanilla, naive repetition, PHD, PHD-SWA and PHD-CSWA of one size at batch 1.

    All of them have the same weights. Prefill of naive repetition takes more than K times as long
    as vanilla's (2.3 times at K = 2, 2048 tokens, two CPU cores). So it has turns of its own beside
    vanilla, a quarter as many as the others.
    """
    models = Models(replace(size, max_seq_len=max(*grid.prompts, *grid.contexts)), device)
    vanilla = models.of("vanilla", 1)
    naive = [models.of("naive_repeat", K) for K in grid.naive_copies]
    prefilled = [models.of(variant, K) for K in grid.prefill_copies for variant in PHD]
    decoded = [models.of(variant, K) for K in grid.decode_copies for variant in PHD]
    rows: list[Measurement] = []
    for tokens in grid.prompts:
        rows += _prefill_rows(vanilla, prefilled, naive, tokens, repeat, device)
    for tokens in sorted(grid.contexts):  # the ratios are those of the longest, the last
        decode_rows, copy_speed = _decode_rows(
            [vanilla, *naive, *decoded], grid, tokens, repeat, device
        )
        rows += decode_rows
    return Result(rows, _ratios(rows) | {"copy_gb_per_s": copy_speed / 1e9})


def _prefill_rows(
    vanilla: Transformer,
    models: list[Transformer],
    naive: list[Transformer],
    tokens: int,
    repeat: int,
    device: torch.device,
) -> list[Measurement]:
    """The rows of one length of prompts."""
    base = Prefill(vanilla, tokens)
    works = {work.name: work for work in (Prefill(model, tokens) for model in models)}
    slow = {work.name: work for work in (Prefill(model, tokens) for model in naive)}
    times = beside("vanilla", base, dict(works), repeat, device)
    if slow:
        turns = ceil(repeat / 4)
        times = times.with_works_of(beside("vanilla", base, dict(slow), turns, device))
    return [
        _measurement(work, times, name) for name, work in ({"vanilla": base} | works | slow).items()
    ]


def _decode_rows(
    models: list[Transformer], grid: Grid, tokens: int, repeat: int, device: torch.device
) -> tuple[list[Measurement], float]:
    """The rows of one length of contexts, and the memory's bandwidth.

    That is in bytes read plus written per second, by a copy that is timed beside vanilla like all
    the rest.
    """
    base, *works = (Decode(model, tokens, grid.steps, compiled=grid.compiled) for model in models)
    source = torch.zeros(COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    turns: dict[str, Work] = {"copy": lambda: target.copy_(source)}
    transformers = None
    if tokens == max(grid.contexts):
        transformers = TransformersDecode(models[0], tokens, grid.steps)
        turns["transformers"] = transformers
    times = beside("vanilla", base, turns | {work.name: work for work in works}, repeat, device)
    copy_speed = 2 * COPIED_BYTES / times.typical_s("copy")
    rows = []
    for name, work in {"vanilla": base, **{work.name: work for work in works}}.items():
        read_speed = work.bytes_read * work.steps / times.typical_s(name)
        rows.append(_measurement(work, times, name) | {"bandwidth_used": read_speed / copy_speed})
    if transformers is not None:
        # Its own clock leaves out the prompt; the first turn is a warm-up here, too.
        spent = [seconds * grid.steps for seconds in transformers.seconds[1:]]
        times = replace(times, seconds=times.seconds | {"transformers": spent})
        row = _measurement(base, times, "transformers")
        rows.append(row | {"variant": "transformers", "kv_bytes": None})
    return rows, copy_speed


def _measurement(work: Prefill | Decode, times: Times, name: str) -> Measurement:
    """The row of a piece of work, with the times of `name`, by which another program may be meant.

    A time is that of one token in decode.
    """
    columns = times.columns(name)
    shares = {
        "ms": columns["ms"] / work.steps,
        "seconds": [seconds / work.steps for seconds in columns["seconds"]],
        "vanilla_seconds": [seconds / work.steps for seconds in columns["vanilla_seconds"]],
    }
    return {
        "work": work.kind,
        "variant": work.config.variant,
        "K": work.config.K,
        "tokens": work.tokens,
        **columns,
        **shares,
        "kv_bytes": work.kv_bytes,
        "bandwidth_used": None,
    }


def _ratios(rows: list[Measurement]) -> dict[str, float]:
    """The ratios to vanilla at the longest prompt and context; `decode_K2` is PHD-CSWA's."""
    ratios = {}
    for kind in ("prefill", "decode"):
        tokens = max(row["tokens"] for row in rows if row["work"] == kind)
        found = [row for row in rows if (row["work"], row["tokens"]) == (kind, tokens)]
        for row in found:
            match row["variant"]:
                case "vanilla":
                    ratios[f"{kind}_vanilla_ms"] = row["ms"]
                case "transformers":
                    ratios["decode_vanilla_over_transformers"] = 1 / row["x_vanilla"]
                case variant:
                    short = "" if (kind, variant) == ("decode", "phd_cswa") else SHORT[variant]
                    ratios[f"{kind}{short}_K{row['K']}"] = row["x_vanilla"]
    return ratios
