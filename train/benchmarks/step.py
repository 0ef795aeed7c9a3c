"""A whole training step: forward, backward, clipping and AdamW, beside transformers' Olmo2."""

import gc
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from math import inf
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from conf.wording import plural
from data.batch import Batch
from phd.flops import training_flops_per_token
from phd.hf.convert import to_hugging_face
from train.benchmarks import ceiling
from train.benchmarks.ceiling import product_flops_per_s, product_work
from train.benchmarks.subject import subject_of
from train.benchmarks.timing import Bar, Kind, Panel, Result, Times, Work, beside
from train.config import Config
from train.distributed.process_groups import ProcessGroups
from train.engines.attention import configure_attention
from train.engines.device import autocast
from train.engines.fsdp import FsdpEngine
from train.engines.optimizer import build_optimizer
from train.loop import train_step
from train.torch_private import compile_each_shape

BASE = "vanilla"
MUON = "vanilla_muon"
COPIES, SHORT_COPIES = (2, 3), (2,)

STEPS = {"cpu": 1, "cuda": 3}
"""Steps of a turn. On CUDA the host runs ahead of the device, as in a run."""

Build = Callable[[int], Work]
"""Makes a step from the rows of its micro-batches."""


class Needs(NamedTuple):
    """What the first steps needed.

    Attributes:
        micro_batch: its rows.
        first_s: seconds of the first step, which compiles.
        peak_gib: memory of model, optimizer and the second step; None on the CPU.
    """

    micro_batch: int
    first_s: float
    peak_gib: float | None


def bench_step(config: Config, repeat: int, device: torch.device, *, short: bool = False) -> Result:
    """A training step of vanilla, also by Muon, of PHD-CSWA at K = 2 and 3, and of transformers.

    The ratio `step_over_flops_K` is the time over vanilla's, divided by the FLOPs over vanilla's:
    at 1, PHD uses the device as well as vanilla does. All steps have the same rows, in the largest
    micro-batches that fit into the device's memory. `muon_over_adamw` goes by the rows: Muon costs
    a step as much whatever its tokens, and so counts the less, the more there are.

    Args:
        config: of a run with AdamW; its variant, its K and its micro-batch are replaced.
        repeat: turns of each piece of work.
        device: of the engine.
        short: leave out K = 3, and transformers' compiled model.
    """
    model, rows, seq_len = config.model, config.train.global_batch, config.train.seq_len
    models = {BASE: model.vanilla_twin}
    for K in SHORT_COPIES if short else COPIES:
        models[f"phd_cswa_K{K}"] = replace(model, variant="phd_cswa", K=K)
    kernels = configure_attention(config, device)  # as a run does it, for all engines here
    generator = torch.Generator().manual_seed(0)
    batch = torch.randint(0, model.vocab_size, (rows, seq_len + 1), generator=generator)
    builds = {name: step_of_engine(replace(config, model=m), batch) for name, m in models.items()}
    muon = replace(config, model=models[BASE], optim=replace(config.optim, kind="muon"))
    builds[MUON] = step_of_engine(muon, batch)
    # A slow vanilla step would flatter PHD's ratios. Transformers' step shows that it is not slow.
    builds |= _transformers_steps(config, batch, device, compiled=not short)
    flops = {
        name: training_flops_per_token(models.get(name, model.vanilla_twin), seq_len)
        for name in builds
    }
    with compile_each_shape():
        times, needs = _measure(builds, rows, repeat, device)
    table = _table(model.size, rows * seq_len, flops, times, needs, device)
    panel = _panel(f"{model.size}, {plural(rows, 'row')} of {seq_len} tokens", table)
    ratios = _ratios(model.size, flops, times)
    subject = f"{subject_of(model, device)}\n{kernels}"
    if not any(name.startswith("transformers") for name in builds):
        subject += "; transformers is not installed, and is left out"
    return Result(table, ratios, subject, panels=[panel])


def _measure(
    builds: dict[str, Build], rows: int, repeat: int, device: torch.device
) -> tuple[Times, dict[str, Needs]]:
    """The times of a step of each work, and of the product as often.

    On CUDA at most two models are held at a time: vanilla, and the one that is timed beside it.
    """
    steps = STEPS[device.type]
    needs: dict[str, Needs] = {}
    base, needs[BASE] = prepare(builds[BASE], rows, device)
    works: dict[str, Work] = {ceiling.NAME: _repeated(product_work(device), steps)}
    others = [name for name in builds if name != BASE]
    groups = [others] if device.type == "cpu" else [[name] for name in others]
    times = None
    for group in groups:
        for name in group:
            work, needs[name] = prepare(builds[name], rows, device)
            works[name] = _repeated(work, steps)
            del work
        measured = beside(BASE, _repeated(base, steps), works, repeat, device)
        times = times.with_works_of(measured) if times else measured
        works = {}
    assert times is not None
    return times.divided(steps), needs


def prepare(build: Build, rows: int, device: torch.device) -> tuple[Work, Needs]:
    """Build a step with the largest micro-batch that fits, and take its first steps.

    Raises:
        torch.OutOfMemoryError: not even one row fits.
    """
    for micro_batch in (n for n in range(rows, 0, -1) if rows % n == 0):
        _free(device)
        try:
            return _first_steps(build, micro_batch, device)
        except torch.OutOfMemoryError:
            if micro_batch == 1:
                raise
        torch.compiler.reset()  # else the next micro-batch would share code with this one
    raise AssertionError(rows)


def _first_steps(build: Build, micro_batch: int, device: torch.device) -> tuple[Work, Needs]:
    held = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    work = build(micro_batch)
    start = perf_counter()
    work()
    if device.type == "cpu":
        return work, Needs(micro_batch, perf_counter() - start, None)
    torch.cuda.synchronize(device)
    first_s = perf_counter() - start
    # The first step's peak would count what kernels were tried with.
    torch.cuda.reset_peak_memory_stats(device)
    work()
    peak = torch.cuda.max_memory_allocated(device) - held
    return work, Needs(micro_batch, first_s, peak / 2**30)


def _free(device: torch.device) -> None:
    """Give the memory of dropped models back. Modules and their hooks form circles."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _repeated(work: Work, steps: int) -> Work:
    def repeated() -> None:
        for _ in range(steps):
            work()

    return repeated


def _table(
    size: str,
    tokens: int,
    flops: dict[str, float],
    times: Times,
    needs: dict[str, Needs],
    device: torch.device,
) -> list[dict[str, Any]]:
    """A row for each step of so many tokens, and one for the product."""
    ceiling_flops = product_flops_per_s(times, device)
    rows = []
    for name, needed in needs.items():
        tokens_per_s = tokens / times.typical_s(name)
        speed = flops[name] * tokens_per_s
        rows.append(
            {"size": size, "work": name, "micro": needed.micro_batch}
            | times.columns(name)
            | {"x_flops": flops[name] / flops[BASE], "tokens_per_s": tokens_per_s}
            | {"tflop/s": speed / 1e12, "of_product": speed / ceiling_flops}
            | {"peak_gib": needed.peak_gib, "first_s": needed.first_s}
        )
    return [
        *rows,
        dict.fromkeys(rows[0])
        | {"size": size, "work": ceiling.NAME, **times.columns(ceiling.NAME)}
        | {"tflop/s": ceiling_flops / 1e12, "of_product": 1.0},
    ]


def _ratios(size: str, flops: dict[str, float], times: Times) -> dict[str, float]:
    ratios = {}
    for name in flops:
        ratio = times.ratio(name).median
        if name.startswith("phd_cswa_"):
            K = name.removeprefix("phd_cswa_")
            ratios[f"step_over_vanilla_{K}_{size}"] = ratio
            ratios[f"step_over_flops_{K}_{size}"] = ratio * flops[BASE] / flops[name]
        elif name == MUON:
            ratios[f"muon_over_adamw_{size}"] = ratio
        elif name != BASE:
            ratios[f"vanilla_over_{name}_{size}"] = 1 / ratio
    return ratios


def _panel(title: str, table: list[dict[str, Any]]) -> Panel:
    bars = []
    for row in table:
        if row["tokens_per_s"] is not None:
            peer = row["work"].startswith("transformers")
            kind = Kind.BASE if row["work"] == BASE else Kind.PEER if peer else Kind.OURS
            label = f"{row['work'].replace('_', ' ')} ({row['of_product']:.0%} of the product)"
            ends = [
                row["tokens_per_s"] * row[f"x_{BASE}"] / row[end] for end in ("x_high", "x_low")
            ]
            bars.append(Bar(label, row["tokens_per_s"], kind, *ends))
    return Panel(title, "tokens/s", bars)


def step_of_engine(config: Config, batch: Tensor) -> Build:
    """A step of the engine, as `python train/main.py` takes it."""

    def build(micro_batch: int) -> Work:
        train = replace(config.train, micro_batch=micro_batch)
        engine = FsdpEngine(replace(config, train=train), ProcessGroups())
        return lambda: train_step(engine, Batch(batch.numpy()), config.optim.lr)

    return build


def _transformers_steps(
    config: Config, batch: Tensor, device: torch.device, *, compiled: bool
) -> dict[str, Build]:
    """The steps of `Olmo2ForCausalLM`: with each attention that is installed, and compiled.

    None where transformers is missing, as on a bare machine that is to be measured.
    """
    if find_spec("transformers") is None:
        return {}
    from transformers.utils import is_flash_attn_2_available

    steps = {"transformers": step_of_transformers(config, batch, "sdpa")}
    if device.type == "cuda" and is_flash_attn_2_available():
        steps["transformers_fa2"] = step_of_transformers(config, batch, "flash_attention_2")
    if device.type == "cuda" and compiled:
        steps["transformers_compiled"] = step_of_transformers(config, batch, "sdpa", compiled=True)
    return steps


def step_of_transformers(
    config: Config, batch: Tensor, attention: str, *, compiled: bool = False
) -> Build:
    """The same step of transformers: same weights, batch, clipping and optimizer."""

    def build(micro_batch: int) -> Work:
        from transformers import Olmo2Config, Olmo2ForCausalLM

        vanilla = replace(config, model=config.model.vanilla_twin)
        # The engine draws the weights, so that both start from the same ones.
        engine = FsdpEngine(vanilla, ProcessGroups())
        device, dtype = engine.device, engine.dtype
        hf_config, weights = to_hugging_face(vanilla.model, engine.model.state_dict())
        settings = {**hf_config, "use_cache": False, "attn_implementation": attention}
        model = Olmo2ForCausalLM(Olmo2Config(**settings))
        model.to(device=device)  # type: ignore[call-arg]
        model.load_state_dict(weights)
        del engine, weights
        if compiled:
            model.compile()
        optimizer = build_optimizer(model, config.optim)
        rows = batch.to(device)
        micro_batches = [(x[:, :-1], x[:, 1:].contiguous()) for x in rows.split(micro_batch)]

        def work() -> None:
            for tokens, targets in micro_batches:
                with autocast(device, dtype):
                    found = model(input_ids=tokens, labels=targets, shift_labels=targets)
                (found.loss / len(micro_batches)).backward()
            clip_grad_norm_(model.parameters(), config.optim.grad_clip or inf)
            optimizer.step()
            optimizer.zero_grad()

        return work

    return build
