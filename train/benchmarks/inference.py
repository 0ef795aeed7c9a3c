"""The costs of PHD at inference: prefill time, decode latency and KV bytes, beside vanilla."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any, cast

import torch

from conf.errors import ConfigError
from phd.config import ModelConfig, SpanUnit, Variant
from phd.inference.prefill import prefill
from phd.model import Transformer
from train.benchmarks import ceiling
from train.benchmarks.ceiling import copied_bytes_per_s, copy_work
from train.benchmarks.decoding import Decode, TransformersDecode, floor, in_transformers
from train.benchmarks.family import Models, random_tokens
from train.benchmarks.inference_plots import draw
from train.benchmarks.subject import subject_of
from train.benchmarks.timing import Keep, Result, Times, Work, beside, keep_nothing
from train.engines.device import autocast

Measurement = dict[str, Any]
"""One row of the table: the work, the variant, K, W's unit, its length, its times and its bytes."""

SHORT = {"naive_repeat": "_naive", "phd": "_phd", "phd_swa": "_swa", "phd_cswa": "_cswa"}
"""What the variants are called in the names of ratios, where not by their own."""

LOOP = "loop"
"""A plain transformer that goes through its layers several times, among the neighbours."""

NEIGHBOURS = ("pause", "free_pause", "sps", "hidden_decoding", LOOP)
"""PHD's neighbours, which are measured at a K of 2: a loop's is its passes."""

WINDOWED = ("phd_swa", "phd_cswa")
"""The variants that have a window."""

TOKENS_FROM_K = 16
"""From this K on, windows in tokens are measured beside those in hidden copies. At K = 2 both are
the same, and at few copies they cost almost the same."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The variants, lengths and copies that are measured.

    Attributes:
        prompts: lengths of the prompts for prefill, in tokens.
        prefill_copies: K of PHD's variants in prefill.
        contexts: lengths of the contexts for decode, in tokens.
        decode_copies: K of PHD's variants in decode.
        naive_copies: K of naive repetition. They are few, because its cost grows as K^2.
        steps: tokens that are decoded in a turn. They are the last ones of the context.
        variants: those of PHD that are measured.
        neighbours: those of `NEIGHBOURS` that are measured.
        span_unit: what windows and chunks count; None: hidden copies, and from `TOKENS_FROM_K` on
            tokens as well.
        compiled: whether decode uses `torch.compile`.
        rare_units: windows in these units, measured beside others, have a quarter of the turns, as
            have neighbours.
        transformers: whether decode is measured in transformers, too.
    """

    prompts: tuple[int, ...]
    prefill_copies: tuple[int, ...]
    contexts: tuple[int, ...]
    decode_copies: tuple[int, ...]
    naive_copies: tuple[int, ...]
    steps: int
    variants: tuple[Variant, ...] = ("phd", "phd_swa", "phd_cswa")
    neighbours: tuple[str, ...] = ()
    span_unit: SpanUnit | None = None
    compiled: bool = False
    rare_units: tuple[SpanUnit, ...] = ()
    transformers: bool = True

    def is_rare(self, config: ModelConfig) -> bool:
        """Whether a model has a quarter of the turns, so that all of them take less time."""
        in_rare_unit = config.variant in WINDOWED and config.span_unit in self.rare_units
        beside_others = bool(self.variants) and config.kind[0] in self.neighbours
        return beside_others or (self.span_unit is None and in_rare_unit)

    def phd_models(self, models: Models, copies: Iterable[int]) -> list[Transformer]:
        """PHD's variants for these K, each with the units that its window is measured in."""
        return [
            models.of(variant, K, unit)
            for K in copies
            for variant in self.variants
            for unit in self.units(variant, K)
        ]

    def neighbour_models(self, models: Models) -> list[Transformer]:
        """The neighbours, each with K = 2, or a loop with the passes of the size."""
        return [
            models.of("vanilla", 1, passes=max(2, models.size.passes))
            if name == LOOP
            else models.of(cast(Variant, name), 2)
            for name in self.neighbours
        ]

    def units(self, variant: Variant, K: int) -> tuple[SpanUnit, ...]:
        """The units that a variant's window is measured in; of one without a window only one."""
        if self.span_unit is not None:
            return (self.span_unit,)
        both = variant in WINDOWED and K >= TOKENS_FROM_K
        return ("hidden", "token") if both else ("hidden",)


GRIDS = {
    "cpu": Grid(
        prompts=(512, 2048),
        prefill_copies=(2, 4, 16),
        contexts=(256, 1024),
        decode_copies=(2, 4, 8, 16),
        naive_copies=(2, 4),
        steps=8,
        rare_units=("token",),
        neighbours=NEIGHBOURS,
    ),
    "cuda": Grid(
        prompts=(1024, 8192),
        prefill_copies=(2, 4, 8, 16),
        contexts=(1024, 8192),
        decode_copies=(2, 4, 8, 16, 64, 256),
        naive_copies=(2, 4, 8),
        steps=64,
        neighbours=NEIGHBOURS,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a user asks for in place of what is usual; empty: nothing."""

    prompts: tuple[int, ...] = ()
    contexts: tuple[int, ...] = ()
    copies: tuple[int, ...] = ()
    variants: tuple[Variant, ...] = ()
    span_unit: SpanUnit | None = None
    compiled: bool = False


def grid_of(device: torch.device, asked: Asked = Asked()) -> Grid:
    """The usual grid of a device, with what is asked for in place of what is usual."""
    usual = GRIDS[device.type]
    copies = tuple(dict.fromkeys(asked.copies))
    variants = asked.variants or ("naive_repeat", *usual.variants)
    naive = "naive_repeat" in variants
    chosen = [name for name in NEIGHBOURS if not asked.variants or name in asked.variants]
    return replace(
        usual,
        prompts=tuple(dict.fromkeys(asked.prompts)) or usual.prompts,
        contexts=tuple(dict.fromkeys(asked.contexts)) or usual.contexts,
        prefill_copies=copies or usual.prefill_copies,
        decode_copies=copies or usual.decode_copies,
        naive_copies=tuple(K for K in usual.naive_copies if naive and (not copies or K in copies)),
        variants=tuple(x for x in dict.fromkeys(variants) if x in SHORT and x != "naive_repeat"),
        neighbours=tuple(chosen) if not copies or 2 in copies else (),
        span_unit=asked.span_unit,
        compiled=asked.compiled,
    )


def grid_of_model(model: ModelConfig, device: torch.device, asked: Asked = Asked()) -> Grid:
    """What measures one model beside vanilla, prefill and decode at the same lengths."""
    usual = GRIDS[device.type]
    contexts = tuple(dict.fromkeys(asked.contexts)) or usual.contexts
    copies = () if model.variant == "vanilla" else (model.K,)
    naive = model.variant == "naive_repeat"
    return replace(
        usual,
        prompts=tuple(dict.fromkeys(asked.prompts)) or contexts,
        contexts=contexts,
        prefill_copies=copies,
        decode_copies=copies,
        naive_copies=copies if naive else (),
        variants=() if naive or not copies else (model.variant,),
        neighbours=(LOOP,) if model.passes > 1 else (),
        span_unit=model.span_unit,
        compiled=asked.compiled,
        transformers=False,
    )


class Prefill:
    """Prefill of a prompt into a new KV cache. Allocating the cache is part of the time.

    Attributes:
        kv_bytes: bytes of the KV cache that was allocated for the prompt.
    """

    kv_bytes: int

    def __init__(self, model: Transformer, tokens: int) -> None:
        self.model, self.config = model, model.config
        weight = model.embed.weight
        self.precision = partial(autocast, weight.device, weight.dtype)
        self.prompt = random_tokens(self.config.vocab_size, 1, tokens).to(weight.device)

    @torch.inference_mode()
    def __call__(self) -> None:
        with self.precision():
            _, cache = prefill(self.model, self.prompt)
        self.kv_bytes = cache.nbytes


def bench_inference(
    model: ModelConfig,
    grid: Grid,
    repeat: int,
    device: torch.device,
    *,
    charts: Path,
    keep: Keep = keep_nothing,
) -> Result:
    """Measure every variant beside transformers, and draw the paper's charts into `charts`.

    Raises:
        ConfigError: a context is too short for the tokens that are decoded in it.
    """
    _check_contexts(grid)
    subject = subject_of(model, device)
    result = measure_inference(
        model, grid, repeat, device, keep=lambda found: keep(replace(found, subject=subject))
    )
    files = draw(result.rows, subject, charts)
    return replace(result, subject=f"{subject}\n{_legend(model, result)}", files=files)


def bench_model(model: ModelConfig, grid: Grid, repeat: int, device: torch.device) -> Result:
    """Measure one model beside vanilla of its shape, without charts.

    Raises:
        ConfigError: a context is too short for the tokens that are decoded in it.
    """
    _check_contexts(grid)
    result = measure_inference(model, grid, repeat, device)
    return replace(result, subject=f"{model.name}, {subject_of(model, device)}")


def _check_contexts(grid: Grid) -> None:
    if short := [tokens for tokens in grid.contexts if tokens <= grid.steps]:
        problem = f"contexts={short}: expected more than the {grid.steps} tokens that are decoded"
        raise ConfigError([problem], "the arguments")


def _legend(model: ModelConfig, result: Result) -> str:
    """What the columns mean, in a line."""
    speed = result.ratios["copy_gb_per_s"]
    return (
        f"W = {model.window} and C = {model.chunk} in hidden copies or tokens (W_in); floor_ms: "
        f"weights and cache read once at the {speed:,.3g} GB/s of a copy; of_copy: floor_ms / ms"
    )


def measure_inference(
    size: ModelConfig,
    grid: Grid,
    repeat: int,
    device: torch.device,
    *,
    keep: Keep = keep_nothing,
) -> Result:
    """Measure vanilla, naive repetition, PHD's variants and its neighbours of one size at batch 1.

    All of them have the same weights. Prefill of naive repetition takes more than K times as long
    as vanilla's (2.3 times at K = 2, 2048 tokens, two CPU cores). So it has turns of its own beside
    vanilla, a quarter as many as the others, like windows in tokens on the CPU.
    """
    models = Models(replace(size, max_seq_len=max(*grid.prompts, *grid.contexts)), device)
    vanilla = models.of("vanilla", 1)
    naive = [models.of("naive_repeat", K) for K in grid.naive_copies]
    others = [*naive, *grid.neighbour_models(models)]
    prefilled = [vanilla, *grid.phd_models(models, grid.prefill_copies), *others]
    decoded = [vanilla, *others, *grid.phd_models(models, grid.decode_copies)]
    rows: list[Measurement] = []
    for tokens in grid.prompts:
        rows += _prefill_rows(prefilled, grid, tokens, repeat, device)
        keep(Result([*rows], _ratios(rows)))
    for tokens in sorted(grid.contexts):  # the ratios are those of the longest, the last
        decode_rows, copy_speed = _decode_rows(decoded, grid, tokens, repeat, device)
        rows += decode_rows
        keep(Result([*rows], _ratios(rows)))
    return Result(rows, _ratios(rows) | {"copy_gb_per_s": copy_speed / 1e9})


def _prefill_rows(
    models: list[Transformer], grid: Grid, tokens: int, repeat: int, device: torch.device
) -> list[Measurement]:
    """The rows of one length of prompts; the first model is vanilla."""
    base, *others = (Prefill(model, tokens) for model in models)
    works = {_name(work.config): work for work in others}
    rare = {
        name
        for name, work in works.items()
        if work.config.variant == "naive_repeat" or grid.is_rare(work.config)
    }
    times = _beside(base, works, rare, repeat, device)
    return [
        {"work": "prefill", **_labels(work.config), "tokens": tokens}
        | times.columns(name)
        | {"step": None, "floor_ms": None, "of_copy": None, "kv_mib": work.kv_bytes / 2**20}
        for name, work in ({"vanilla": base} | works).items()
    ]


def _decode_rows(
    models: list[Transformer], grid: Grid, tokens: int, repeat: int, device: torch.device
) -> tuple[list[Measurement], float]:
    """The rows of one length of contexts, and the memory's bandwidth; the first model is vanilla.

    That is in bytes read plus written per second, by a copy that is timed beside vanilla like all
    the rest.
    """
    base, *others = (
        Decode(model, [tokens], grid.steps, compiled=grid.compiled) for model in models
    )
    works = {_name(work.config): work for work in others}
    turns: dict[str, Work] = {ceiling.COPY: copy_work(device)}
    transformers = None
    if grid.transformers and tokens == max(grid.contexts):
        transformers = TransformersDecode(in_transformers(models[0]), [tokens], grid.steps)
        turns["transformers"] = transformers
    rare = {name for name, work in works.items() if grid.is_rare(work.config)}
    times = _beside(base, turns | works, rare, repeat, device)
    copy_speed = copied_bytes_per_s(times, device)
    times = times.divided(grid.steps)
    rows = [
        {"work": "decode", **_labels(work.config), "tokens": tokens}
        | times.columns(name)
        | {"step": work.step}
        | floor(work, times.typical_s(name), copy_speed)
        | {"kv_mib": work.kv_bytes / 2**20}
        for name, work in {"vanilla": base, **works}.items()
    ]
    if transformers is not None:
        # Its own clock leaves out the prompt; the first turn is a warm-up here, too.
        times = replace(times, seconds=times.seconds | {"transformers": transformers.seconds[1:]})
        rows.append(
            {**dict.fromkeys(rows[0]), "work": "decode", "variant": "transformers", "K": 1}
            | {"tokens": tokens, **times.columns("transformers")}
        )
    return rows, copy_speed


def _beside(
    base: Work, works: Mapping[str, Work], rare: set[str], repeat: int, device: torch.device
) -> Times:
    """Time works beside vanilla, the rare ones in turns of their own."""
    often = {name: work for name, work in works.items() if name not in rare}
    times = beside("vanilla", base, often, repeat, device)
    if rare:
        few = {name: works[name] for name in works if name in rare}
        times = times.with_works_of(beside("vanilla", base, few, ceil(repeat / 4), device))
    return times


def _name(config: ModelConfig) -> str:
    """The key of a model's work among all that are timed in turn."""
    return f"{config.kind} {config.span_unit}"


def _labels(config: ModelConfig) -> Measurement:
    """The columns that tell which model a row is of."""
    unit = config.span_unit if config.variant in WINDOWED else None
    variant, K = config.kind
    return {"variant": variant, "K": K, "W_in": unit}


def _ratios(rows: list[Measurement]) -> dict[str, float]:
    """The ratios to vanilla at the longest prompt and context; `decode_K2` is PHD-CSWA's.

    A name that ends in `_token` is of a window in tokens, the others are of one in hidden copies.
    """
    ratios = {}
    for kind in ("prefill", "decode"):
        tokens = max((row["tokens"] for row in rows if row["work"] == kind), default=0)
        found = [row for row in rows if (row["work"], row["tokens"]) == (kind, tokens)]
        for row in found:
            match row["variant"]:
                case "vanilla":
                    ratios[f"{kind}_vanilla_ms"] = row["ms"]
                    if kind == "decode":
                        ratios["decode_vanilla_of_copy"] = row["of_copy"]
                case "transformers":
                    ratios["decode_vanilla_over_transformers"] = 1 / row["x_vanilla"]
                case variant:
                    short = SHORT.get(variant, f"_{variant}")
                    short = "" if (kind, variant) == ("decode", "phd_cswa") else short
                    unit = "_token" if row["W_in"] == "token" else ""
                    ratios[f"{kind}{short}_K{row['K']}{unit}"] = row["x_vanilla"]
    return ratios
