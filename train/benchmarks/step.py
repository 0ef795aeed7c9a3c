"""A whole training step: forward, backward, clipping and AdamW, beside transformers' Olmo2."""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from conf.errors import ConfigError
from conf.extras import pip_command
from data.batch import Batch
from phd.flops import training_flops_per_token
from phd.hf.convert import to_hugging_face
from train.benchmarks.subject import subject_of
from train.benchmarks.timing import Result, Work, beside
from train.config import Config
from train.distributed.process_groups import ProcessGroups
from train.engines.device import autocast
from train.engines.fsdp import FsdpEngine
from train.engines.optimizer import build_optimizer
from train.loop import train_step

COPIES = (2, 3)


def bench_step(config: Config, repeat: int, device: torch.device) -> Result:
    """A training step of vanilla, of PHD-CSWA at K = 2 and 3, and of transformers' Olmo2.

    The ratio `step_over_flops_K` is the time over vanilla's, divided by the FLOPs over vanilla's:
    at 1, PHD uses the device as well as vanilla does.

    Args:
        config: of a run whose steps are one micro-batch; its variant and K are replaced.
        repeat: turns of each piece of work.
        device: of the engine.
    """
    model, rows, seq_len = config.model, config.train.global_batch, config.train.seq_len
    models = {"vanilla": model.vanilla_twin}
    models |= {f"phd_cswa_K{K}": replace(model, variant="phd_cswa", K=K) for K in COPIES}
    generator = torch.Generator().manual_seed(0)
    batch = torch.randint(0, model.vocab_size, (rows, seq_len + 1), generator=generator)
    works = {name: _step_work(replace(config, model=m), batch) for name, m in models.items()}
    # A slow vanilla step would flatter PHD's ratios. Transformers' step shows that it is not slow.
    works["transformers"] = _transformers_work(config, batch)
    times = beside("vanilla", works.pop("vanilla"), works, repeat, device)
    flops = {name: training_flops_per_token(m, seq_len) for name, m in models.items()}
    flops["transformers"] = flops["vanilla"]  # the same shape
    table = [
        {"work": name}
        | times.columns(name)
        | {
            "flops_x_vanilla": flops[name] / flops["vanilla"],
            "tokens_per_s": rows * seq_len / times.typical_s(name),
        }
        for name in times.seconds
    ]
    ratios = {
        f"step_over_flops_K{K}": times.ratio(name).median * flops["vanilla"] / flops[name]
        for K, name in ((K, f"phd_cswa_K{K}") for K in COPIES)
    }
    ratios["vanilla_over_transformers"] = 1 / times.ratio("transformers").median
    return Result(table, ratios, subject_of(model, device))


def _step_work(config: Config, batch: Tensor) -> Work:
    engine = FsdpEngine(config, ProcessGroups())
    return lambda: train_step(engine, Batch(batch.numpy()), config.optim.lr)


def _transformers_work(config: Config, batch: Tensor) -> Work:
    """The same step of `Olmo2ForCausalLM`: same weights, batch, clipping and optimizer."""
    try:
        from transformers import Olmo2Config, Olmo2ForCausalLM
    except ImportError:
        add = pip_command("phd-transformer[hf]")
        problem = f"name=step: compares with transformers, which is not installed; {add}"
        raise ConfigError([problem], "the arguments") from None
    vanilla = replace(config, model=config.model.vanilla_twin)
    # The engine draws the weights, so that both start from the same ones.
    engine = FsdpEngine(vanilla, ProcessGroups())
    hf_config, weights = to_hugging_face(vanilla.model, engine.model.state_dict())
    model = Olmo2ForCausalLM(Olmo2Config(**hf_config, use_cache=False))
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
