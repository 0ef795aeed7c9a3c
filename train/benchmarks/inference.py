"""What PHD costs at inference: prefill, decode and the bytes of the KV cache, beside vanilla."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import Olmo2Config, Olmo2ForCausalLM
from transformers.generation.streamers import BaseStreamer

from phd.config import ModelConfig, Variant
from phd.hf.convert import to_hugging_face
from phd.inference.cuda_graph import Decoder
from phd.inference.prefill import decode, new_cache, prefill
from phd.model import Transformer
from train.benchmarks.timing import Result, Work, interleaved, ratio
from train.engines.device import autocast

Row = dict[str, Any]

PHD: tuple[Variant, ...] = ("phd", "phd_swa", "phd_cswa")
SHORT = {"naive_repeat": "_naive", "phd": "_phd", "phd_swa": "_swa", "phd_cswa": "_cswa"}

# Of the copy that measures the memory's bandwidth: more than any cache of a processor holds.
COPIED_BYTES = 1 << 28


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What is measured.

    Attributes:
        prompts: tokens of the prompts that are read.
        prefill_copies: K of PHD's variants, where a prompt is read.
        contexts: tokens up to which is decoded.
        decode_copies: K of PHD's variants, where is decoded.
        naive_copies: K of naive repetition, which soon costs too much.
        steps: tokens that are decoded in a turn, the last ones of the context.
        compiled: decode by `torch.compile`.
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
    """What is measured on a device, or what is asked instead."""
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
    """Models of one size, which share their weights: float32 on the CPU, bfloat16 on CUDA."""

    def __init__(self, size: ModelConfig, device: torch.device) -> None:
        self.size, self.device = size, device
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        vanilla = Transformer(size.vanilla_twin).reset(seed=0)
        self.weights = vanilla.to(device, dtype).fuse_projections().state_dict()

    def of(self, variant: Variant, K: int) -> Transformer:
        """The model of a variant, without copying a weight."""
        with torch.device("meta"):
            model = Transformer(replace(self.size, variant=variant, K=K))
        model.load_state_dict(self.weights, assign=True)
        model.rope.build(self.device)
        return model.eval()


class Measured:
    """A piece of work of one model, one row of the table.

    Attributes:
        kind: what is done.
        tokens: T of the prompt, or of the context.
        steps: how often it is done in a turn.
        kv_bytes: of the cache that was allocated for so many tokens.
    """

    kind: str
    kv_bytes: int

    def __init__(self, model: Transformer, tokens: int, steps: int = 1) -> None:
        self.model, self.config, self.tokens, self.steps = model, model.config, tokens, steps
        weight = model.embed.weight
        self.precision = partial(autocast, weight.device, weight.dtype)

    @property
    def name(self) -> str:
        """Of the work, for the turns."""
        return f"{self.config.variant} {self.config.K} {self.tokens}"


class Prefill(Measured):
    """Reads a prompt into a new cache, which is a part of the price."""

    kind = "prefill"

    def __init__(self, model: Transformer, tokens: int) -> None:
        super().__init__(model, tokens)
        self.prompt = random_tokens(model, tokens)

    @torch.inference_mode()
    def __call__(self) -> None:
        with self.precision():
            _, cache = prefill(self.model, self.prompt)
        self.kv_bytes = cache.nbytes


class Decode(Measured):
    """Greedily decodes the last `steps` tokens of a context, the same ones in every turn.

    The keys and values before them are random numbers, which takes as long as any others. In a
    ring there are those of the turn before, in the places of those that were there before them.
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
        if compiled or self.first.is_cuda:
            self.decode = Decoder(model, self.cache, compiled=compiled)

    @torch.inference_mode()
    def __call__(self) -> None:
        begin = self.tokens - self.steps
        self.cache.host_lengths = [begin]
        self.cache.lengths.fill_(begin)
        token = self.first
        with self.precision():
            for _ in range(self.steps):
                token = self.decode(token).argmax(-1)

    @property
    def bytes_read(self) -> int:
        """By a step at the end of the context: all weights once, and the whole cache."""
        unread = 0 if self.config.tied else self.model.embed.weight.nbytes
        return sum(p.nbytes for p in self.model.parameters()) - unread + self.kv_bytes


class Ticks(BaseStreamer):
    """When each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:  # noqa: ARG002
        self.times.append(perf_counter())

    def end(self) -> None:
        pass


class Generate:
    """The same tokens by `transformers`: `generate`, greedily, with its static cache.

    Attributes:
        seconds: a token took in each turn; the clock runs from the token that the prompt gives.
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
        ticks = Ticks()
        self.model.generate(
            self.prompt,
            attention_mask=torch.ones_like(self.prompt),
            max_new_tokens=self.steps + 1,
            do_sample=False,
            cache_implementation="static",
            streamer=ticks,
        )
        _prompt, first, *_, last = ticks.times
        self.seconds.append((last - first) / self.steps)


def random_tokens(model: Transformer, tokens: int) -> Tensor:
    """int64 (1, tokens) on the model's device, equal in every model of a size."""
    dice = torch.Generator().manual_seed(0)
    drawn = torch.randint(model.config.vocab_size, (1, tokens), generator=dice)
    return drawn.to(model.embed.weight.device)


def bench_inferring(size: ModelConfig, grid: Grid, repeat: int, device: torch.device) -> Result:
    """Vanilla, naive repetition, PHD, PHD-SWA and PHD-CSWA of one size, all of the same weights.

    Naive repetition takes K times as long and more, so where prompts are read it has turns of its
    own beside vanilla, a quarter as many.
    """
    models = Models(replace(size, max_seq_len=max(*grid.prompts, *grid.contexts)), device)
    vanilla = models.of("vanilla", 1)
    naive = [models.of("naive_repeat", K) for K in grid.naive_copies]
    read = [models.of(variant, K) for K in grid.prefill_copies for variant in PHD]
    written = [models.of(variant, K) for K in grid.decode_copies for variant in PHD]
    rows = _prefill_rows([vanilla, *read], grid, repeat, device)
    if naive:
        slow = _prefill_rows([vanilla, *naive], grid, ceil(repeat / 4), device)
        rows += [row for row in slow if row["variant"] != "vanilla"]
    decoded, copied = _decode_rows([vanilla, *naive, *written], grid, repeat, device)
    rows += decoded
    return Result(rows, _ratios(rows) | {"copy_gb_per_s": copied / 1e9})


def _prefill_rows(
    models: list[Transformer], grid: Grid, repeat: int, device: torch.device
) -> list[Row]:
    works = [Prefill(model, tokens) for tokens in grid.prompts for model in models]
    seconds = interleaved({work.name: work for work in works}, repeat, device)
    return [_row(work, seconds) for work in works]


def _decode_rows(
    models: list[Transformer], grid: Grid, repeat: int, device: torch.device
) -> tuple[list[Row], float]:
    """The rows, and the bandwidth of a copy in bytes read and written per second."""
    works = [
        Decode(model, tokens, grid.steps, compiled=grid.compiled)
        for tokens in grid.contexts
        for model in models
    ]
    source = torch.zeros(COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    turns: dict[str, Work] = {"copy": lambda: target.copy_(source)}
    theirs = Generate(models[0], max(grid.contexts), grid.steps)
    turns["transformers"] = theirs
    # The longest context first, so that vanilla's follows transformers' of the same length.
    turns |= {work.name: work for work in sorted(works, key=lambda work: -work.tokens)}
    seconds = interleaved(turns, repeat, device)
    for work in works:
        seconds[work.name] = [spent / grid.steps for spent in seconds[work.name]]
    seconds["transformers"] = theirs.seconds[1:]
    rows = []
    for work in works:
        # Bytes per second of the one over bytes per second of the other.
        used = work.bytes_read / (2 * COPIED_BYTES) * ratio(seconds, "copy", work.name)
        rows.append(_row(work, seconds) | {"bandwidth_used": used})
    longest = next(work for work in works if work.tokens == max(grid.contexts))
    row = _row(longest, seconds, "transformers")
    rows.append(row | {"variant": "transformers", "kv_bytes": None})
    return rows, 2 * COPIED_BYTES / median(seconds["copy"])


def _row(work: Prefill | Decode, seconds: dict[str, list[float]], name: str | None = None) -> Row:
    """What is told of a piece of work, or of another of that name which does the same."""
    name = name or work.name
    return {
        "work": work.kind,
        "variant": work.config.variant,
        "K": work.config.K,
        "tokens": work.tokens,
        "median_ms": median(seconds[name]) * 1e3,
        "x_vanilla": ratio(seconds, name, f"vanilla 1 {work.tokens}"),
        "kv_bytes": work.kv_bytes,
        "bandwidth_used": None,
        "seconds": seconds[name],
    }


def _ratios(rows: list[Row]) -> dict[str, float]:
    """Of the longest prompt and the longest context; `decode_K2` is PHD-CSWA's."""
    ratios = {}
    for kind in ("prefill", "decode"):
        tokens = max(row["tokens"] for row in rows if row["work"] == kind)
        found = [row for row in rows if (row["work"], row["tokens"]) == (kind, tokens)]
        for row in found:
            match row["variant"]:
                case "vanilla":
                    ratios[f"{kind}_vanilla_ms"] = row["median_ms"]
                case "transformers":
                    ratios["decode_vanilla_over_transformers"] = 1 / row["x_vanilla"]
                case variant:
                    short = "" if (kind, variant) == ("decode", "phd_cswa") else SHORT[variant]
                    ratios[f"{kind}{short}_K{row['K']}"] = row["x_vanilla"]
    return ratios
