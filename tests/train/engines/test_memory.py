"""The predicted memory is what a step saves, found without having it."""

import os
import subprocess
import sys
from pathlib import Path
from time import process_time

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from phd.model import Transformer, count_parameters
from train.compose import load
from train.config import Config
from train.engines.device import autocast, peak_memory_gib
from train.engines.memory import activation_bytes, predict_memory

REPOSITORY = Path(__file__).parents[3]


def really_saved(config: Config, dtype: torch.dtype) -> int:
    """Bytes of what autograd keeps in a forward pass of the real model, its weights left out."""
    model = Transformer(config.model).reset(0)
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    rows = config.train.micro_batch or config.train.global_batch
    tokens = torch.zeros(rows, config.train.seq_len, dtype=torch.int64)
    with saved_tensors_hooks(keep, lambda tensor: tensor), autocast(torch.device("cpu"), dtype):
        loss = model.loss(tokens, tokens, config.optim.z_loss)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes = [t.untyped_storage().nbytes() for place, t in kept.items() if place not in weights]
    assert loss.total.requires_grad
    return sum(sizes)


@pytest.mark.parametrize(
    "overrides",
    [
        ["model=vanilla"],
        ["model=phd", "model.K=3"],
        ["model=phd_cswa", "train.micro_batch=2"],
        ["model=phd_swa", "model.norm=pre", "model.tied=false"],
        ["model=naive_repeat", "optim.z_loss=1e-4"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_prediction_is_what_the_real_model_saves(
    overrides: list[str], dtype: torch.dtype, config
) -> None:
    settings = config(*overrides)
    assert activation_bytes(settings, dtype) == really_saved(settings, dtype)


def test_weights_gradients_and_moments_are_float32(config) -> None:
    settings = config()
    parameters = sum(count_parameters(settings.model).values())
    memory = predict_memory(settings, parameters, torch.float32)
    assert memory.weights == memory.gradients == 4 * parameters
    assert memory.moments == 8 * parameters
    assert memory.total == 16 * parameters + activation_bytes(settings, torch.float32)


def test_rows_cost_in_proportion_and_accumulated_ones_nothing(config) -> None:
    small, large = (
        activation_bytes(config(f"train.global_batch={n}"), torch.float32) for n in (2, 8)
    )
    assert large == pytest.approx(4 * small, rel=0.05)
    cut = config("train.global_batch=8", "train.micro_batch=2")
    assert activation_bytes(cut, torch.float32) == small


def test_a_model_beyond_this_machine_is_predicted_in_seconds() -> None:
    config = load(["size=7b", "model=phd_cswa"])
    parameters = sum(count_parameters(config.model).values())
    before, start = peak_memory_gib(torch.device("cpu")), process_time()
    memory = predict_memory(config, parameters, torch.bfloat16)
    assert process_time() - start < 60  # seconds of work, however busy the machine is
    assert peak_memory_gib(torch.device("cpu")) - before < 0.5
    assert memory.weights > 25 * 2**30
    assert memory.activations > 10 * 2**30


PEAK = """
import sys, torch
from dataclasses import replace
from data.batch import Batch
from train.compose import load
from train.engines.fsdp import FsdpEngine
from train.distributed.process_groups import ProcessGroups
from train.engines.memory import predict_memory
from train.loop import train_step
from phd.model import count_parameters

def status(name):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024

def step(config, rows):
    engine = FsdpEngine(config, ProcessGroups())
    tokens = torch.zeros(rows, config.train.seq_len + 1, dtype=torch.int64)
    train_step(engine, Batch(tokens.numpy()), 1e-3)

config = load(sys.argv[1:])
step(replace(config, train=replace(config.train, seq_len=16)), 1)
before = status("VmRSS")
step(config, config.train.global_batch)
parameters = sum(count_parameters(config.model).values())
print(status("VmHWM") - before, predict_memory(config, parameters, torch.float32).total)
"""


@pytest.mark.process
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's own figures")
def test_a_step_takes_about_what_was_predicted() -> None:
    settings = ["train.global_batch=8", "train.seq_len=256", "model.vocab_size=512"]
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *settings, "engine.device=cpu", "engine.threads=1"],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=True,
    )
    grown, predicted = map(int, done.stdout.split())
    assert predicted == pytest.approx(grown, rel=0.25)


def test_the_backend_for_cuda_is_predicted_on_any_machine(config) -> None:
    settings = config("engine.device=auto", "model.attention=flex")
    assert activation_bytes(settings, torch.float32) == activation_bytes(config(), torch.float32)
