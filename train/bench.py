"""Measure what PHD costs on this machine.

python train/bench.py attention out=bench
python train/bench.py step out=bench
python train/bench.py data out=bench
python train/bench.py resume out=bench
python train/bench.py checkpoint size=151m out=bench
python train/bench.py inference out=bench
"""

import train  # noqa: F401  # first: how threads wait is settled before torch is loaded

# isort: split
import csv
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from math import ceil
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils import clip_grad_norm_

from conf import arguments
from conf.errors import ConfigError, Problem
from conf.settings import above, at_least
from data.batch import Batch
from phd.attention.attend import attend
from phd.config import Backend, ModelConfig, SpanUnit
from phd.flops import training_flops_per_token
from phd.hf.convert import to_hugging_face
from phd.pattern import Pattern
from train.benchmarks.checkpoint import bench_saving
from train.benchmarks.loader import bench_loading, bench_resuming
from train.benchmarks.timing import Result, Work, interleaved, ratio
from train.compose import load
from train.config import Config
from train.distributed.process_groups import ProcessGroups
from train.engine_config import EngineConfig
from train.engines.device import autocast, choose_device, device_problems
from train.engines.fsdp import FsdpEngine
from train.engines.optimizer import build_optimizer
from train.loop import train_step
from train.run_dir.prepare import environment
from train.run_dir.snapshot import read_revision


@dataclass(frozen=True, kw_only=True)
class BenchArguments:
    """Arguments of `python train/bench.py NAME key=value ...`.

    Attributes:
        name: what is measured. `attention`: the forward and backward pass of one layer's attention.
            `step`: a whole training step, also of transformers' Olmo2. `data`: how fast the loader
            reads text and tokens. `resume`: how long it takes to continue at 1 %, 50 % and 99 % of
            a corpus. `checkpoint`: how long a save takes, and for how much of it the training
            stands still. `inference`: prefill, decode and KV bytes of every variant, with charts.
        out: the directory for `<name>.json` and `<name>.csv`; `checkpoint` measures its disk.
        repeat: how often everything is measured; medians are reported.
        size: the model of `step`, `checkpoint` and `inference`, a file of conf/size/; `inference`
            makes `tiny` wider.
        span_unit: whether W = 16 and C = 32 count `token`s or `hidden` copies in `inference`.
        copies: the values of K in `inference`; an empty list: a few for each chart.
        prompts: the lengths in tokens of the prompts in `inference`; an empty list: a short and a
            long one.
        contexts: the lengths in tokens up to which `inference` decodes; an empty list: a short and
            a long one.
        compile: decode with `torch.compile` in `inference`; compiling takes up to a minute for each
            row of the table.
        rows: the rows of a `step`.
        seq_len: T, the tokens of a row of a `step`.
        gigabytes: the size of the corpus that is written for `resume`.
        device: `auto`, `cpu` or `cuda`.
    """

    name: str
    out: str = "bench"
    repeat: int = 11
    size: str = "tiny"
    span_unit: SpanUnit = "token"
    copies: tuple[int, ...] = ()
    prompts: tuple[int, ...] = ()
    contexts: tuple[int, ...] = ()
    compile: bool = False
    rows: int = 4
    seq_len: int = 1024
    gigabytes: float = 1.0
    device: str = "auto"

    def problems(self) -> list[Problem]:
        """Every impossible setting."""
        found = at_least(self, "", 1, "repeat", "rows", "seq_len")
        for key, least in (("copies", 2), ("prompts", 1), ("contexts", 1)):
            found += [
                Problem(key, value, f"expected integers of at least {least}")
                for value in getattr(self, key)
                if value < least
            ]
        found += above(self, "", 0, "gigabytes")
        if self.name not in BENCHMARKS:
            found.append(Problem("name", self.name, f"expected one of {', '.join(BENCHMARKS)}"))
        return found + device_problems(self.device)


def bench_attention(given: BenchArguments, device: torch.device) -> Result:
    """Forward and backward at B = 1, N = 8, G = 2, H = 64; W = 16 and C = 32.

    The dense mask takes seconds and gigabytes, so it has turns of its own, a quarter as many.
    """
    rows, ratios = [], {}
    for T in (1024, 2048):
        vanilla = _vanilla_work(T, device)
        works: dict[str, Work] = {"vanilla": vanilla}
        for K in (2, 3, 4):
            config = ModelConfig(variant="phd_cswa", K=K)
            works[f"packed_K{K}"] = _attention_work(config, "packed", T, device)
        naive = ModelConfig(variant="naive_repeat", K=3)
        works["naive_K3"] = _attention_work(naive, "packed", T, device)
        config = ModelConfig(variant="phd_cswa", K=3)
        if device.type == "cuda":
            works["flex_K3"] = _attention_work(config, "flex", T, device)
        seconds = interleaved(works, given.repeat, device)
        for K in (2, 3, 4):
            ratios[f"packed_over_vanilla_K{K}_T{T}"] = ratio(seconds, f"packed_K{K}", "vanilla")
        ratios[f"naive_over_packed_K3_T{T}"] = ratio(seconds, "naive_K3", "packed_K3")
        dense = _attention_work(config, "reference", T, device)
        turns = ceil(given.repeat / 4)
        slow = interleaved({"vanilla": vanilla, "dense_mask_K3": dense}, turns, device)
        rows += [_attention_row(T, name, seconds) for name in works]
        rows.append(_attention_row(T, "dense_mask_K3", slow))
    return Result(rows, ratios)


def _attention_row(T: int, work: str, seconds: dict[str, list[float]]) -> dict[str, Any]:
    return {
        "T": T,
        "work": work,
        "median_ms": median(seconds[work]) * 1e3,
        "x_vanilla": ratio(seconds, work, "vanilla"),
        "seconds": seconds[work],
    }


def _inputs(K: int, T: int, device: torch.device) -> tuple[list[Tensor], Tensor]:
    """q, k, v and the gradient of the output."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k, v, dout = (
        torch.randn(1, heads, K, T, 64, device=device, dtype=dtype) for heads in (8, 2, 2, 8)
    )
    return [x.requires_grad_() for x in (q, k, v)], dout


def _attention_work(config: ModelConfig, backend: Backend, T: int, device: torch.device) -> Work:
    inputs, dout = _inputs(config.K, T, device)
    pattern = Pattern.of(config)
    q, k, v = inputs
    return lambda: torch.autograd.grad(attend(q, k, v, pattern, backend), inputs, dout)


def _vanilla_work(T: int, device: torch.device) -> Work:
    inputs, dout = _inputs(1, T, device)
    q, k, v, dout = (x.detach().squeeze(2) for x in (*inputs, dout))
    inputs = [x.requires_grad_() for x in (q, k, v)]

    def work() -> None:
        out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        torch.autograd.grad(out, inputs, dout)

    return work


def bench_step(given: BenchArguments, device: torch.device) -> Result:
    """A training step of vanilla, of PHD-CSWA at K = 2 and 3, and of transformers' Olmo2."""
    base = load(
        [
            f"size={given.size}",
            f"train.seq_len={given.seq_len}",
            f"train.global_batch={given.rows}",
            "data.lanes=1",
            "train.max_steps=1",
            "train.max_tokens=null",
            "train.micro_batch=null",
            "schedule.warmup_tokens=null",
            f"engine.device={device.type}",
        ]
    )
    models = {"vanilla": base.model.vanilla_twin}
    models |= {f"phd_cswa_K{K}": replace(base.model, variant="phd_cswa", K=K) for K in (2, 3)}
    V, T = base.model.vocab_size, given.seq_len
    batch = torch.randint(0, V, (given.rows, T + 1), generator=torch.Generator().manual_seed(0))
    works = {name: _step_work(replace(base, model=m), batch) for name, m in models.items()}
    works["transformers"] = _transformers_work(base, batch)
    seconds = interleaved(works, given.repeat, device)
    typical = {name: median(values) for name, values in seconds.items()}
    flops = {name: training_flops_per_token(m, T) for name, m in models.items()}
    flops["transformers"] = flops["vanilla"]
    rows = [
        {
            "work": name,
            "median_ms": typical[name] * 1e3,
            "x_vanilla": ratio(seconds, name, "vanilla"),
            "flops_x_vanilla": flops[name] / flops["vanilla"],
            "tokens_per_s": given.rows * T / typical[name],
            "seconds": values,
        }
        for name, values in seconds.items()
    ]
    ratios = {
        f"step_over_flops_K{K}": ratio(seconds, name, "vanilla") * flops["vanilla"] / flops[name]
        for K, name in ((2, "phd_cswa_K2"), (3, "phd_cswa_K3"))
    }
    ratios["vanilla_over_transformers"] = ratio(seconds, "vanilla", "transformers")
    return Result(rows, ratios)


def _step_work(config: Config, batch: Tensor) -> Work:
    engine = FsdpEngine(config, ProcessGroups())
    return lambda: train_step(engine, Batch(batch.numpy()), config.optim.lr)


def _transformers_work(config: Config, batch: Tensor) -> Work:
    """The same step of `Olmo2ForCausalLM`: same weights, batch, clipping and optimizer."""
    try:
        from transformers import Olmo2Config, Olmo2ForCausalLM
    except ImportError:
        raise ConfigError(
            ['name=step: compares with transformers; pip install "phd-transformer[hf]"'],
            "the arguments",
        ) from None
    twin = replace(config, model=config.model.vanilla_twin)
    engine = FsdpEngine(twin, ProcessGroups())
    shape, weights = to_hugging_face(twin.model, engine.model.state_dict())
    model = Olmo2ForCausalLM(Olmo2Config(**shape, use_cache=False))
    model.to(device=engine.device)  # type: ignore[call-arg]
    model.load_state_dict(weights)
    optimizer = build_optimizer(model, config.optim)
    batch = batch.to(engine.device)
    tokens, targets = batch[:, :-1], batch[:, 1:].contiguous()

    def work() -> None:
        with autocast(engine.device, engine.dtype):
            loss = model(input_ids=tokens, labels=targets, shift_labels=targets).loss
        loss.backward()
        clip_grad_norm_(model.parameters(), config.optim.grad_clip or torch.inf)
        optimizer.step()
        optimizer.zero_grad()

    return work


def bench_checkpoint(given: BenchArguments, device: torch.device) -> Result:
    """A save of a model with its optimizer's moments, 12 bytes for each parameter."""
    config = load([f"size={given.size}", f"engine.device={device.type}"])
    return bench_saving(config, given.repeat, Path(given.out), device)


# Wide enough that a token's time is that of its matrices.
WIDENED = ("layers=8", "dim=512", "ffn_dim=1536", "heads=8", "kv_heads=2", "head_dim=64")


def bench_inference(given: BenchArguments, device: torch.device) -> Result:
    """Prefill and decode of every variant, batch 1, beside transformers'; W = 16 and C = 32."""
    if missing := [name for name in ("transformers", "matplotlib") if find_spec(name) is None]:
        problem = f"name=inference: needs {' and '.join(missing)}"
        raise ConfigError([f'{problem}; pip install "phd-transformer[bench]"'], "the arguments")
    from train.benchmarks.inference import bench_inferring, grid_of
    from train.benchmarks.inference_plots import draw

    wider = [f"model.{setting}" for setting in WIDENED] if given.size == "tiny" else []
    model = load([f"size={given.size}", f"engine.device={device.type}", *wider]).model
    model = replace(model, window=16, chunk=32, span_unit=given.span_unit)
    grid = grid_of(device, given.prompts, given.contexts, given.copies, compiled=given.compile)
    if short := [tokens for tokens in grid.contexts if tokens <= grid.steps]:
        problem = f"contexts={short}: expected more than the {grid.steps} tokens that are decoded"
        raise ConfigError([problem], "the arguments")
    result = bench_inferring(model, grid, given.repeat, device)
    subject = f"{model.size}: {model.layers} layers, D = {model.dim}, on {device.type}"
    draw(result.rows, subject, Path(given.out))
    return result


# Characters of a table's line at least: into a file rich would cut it to 80.
WIDTH = 100

BENCHMARKS: dict[str, Callable[[BenchArguments, torch.device], Result]] = {
    "attention": bench_attention,
    "step": bench_step,
    "data": lambda given, _: bench_loading(given.repeat),
    "resume": lambda given, _: bench_resuming(given.repeat, given.gigabytes),
    "checkpoint": bench_checkpoint,
    "inference": bench_inference,
}


def main(given: BenchArguments) -> int:
    """Run one benchmark, print its table and write it as JSON and as CSV."""
    device = choose_device(EngineConfig(device=given.device))  # type: ignore[arg-type]
    console = Console(soft_wrap=True, highlight=False)
    console.width = max(console.width, WIDTH)
    result = BENCHMARKS[given.name](given, device)
    table = Table(title=f"{given.name} on {device}, medians of {given.repeat}")
    columns = [key for key in result.rows[0] if key != "seconds"]
    for column in columns:
        table.add_column(column, justify="left" if column == "work" else "right")
    for row in result.rows:
        table.add_row(*(_cell(row[column]) for column in columns))
    console.print(table)
    for name, value in result.ratios.items():
        console.print(f"{name:32} {value:.3f}")
    path = Path(given.out, f"{given.name}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    report = {"machine": environment(read_revision()), "ratios": result.ratios, "rows": result.rows}
    path.write_text(json.dumps(report, indent=1), encoding="utf-8")
    with path.with_suffix(".csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(result.rows)
    console.print(f"written: {path} and {path.with_suffix('.csv').name}")
    return 0


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:,.2f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    arguments.run(BenchArguments, main, positional=["name"])
