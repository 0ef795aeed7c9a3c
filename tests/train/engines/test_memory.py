"""The predicted memory is what a step saves, found without having it."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from time import process_time

import pytest
import torch

from phd.loss_memory import fused_loss_bytes
from phd.model import Transformer, count_parameters
from train.compose import load
from train.config import Config
from train.engines.device import autocast, peak_memory_gib
from train.engines.footprint import Footprint, LiveBytes, block_footprints, head_footprint
from train.engines.memory import Memory, pass_of, predict_memory

REPOSITORY = Path(__file__).parents[3]


def adjusted(config: Config, checkpointing: str) -> Config:
    """A configuration with this activation checkpointing."""
    engine = replace(config.engine, activation_checkpointing=checkpointing)  # type: ignore[arg-type]
    return replace(config, engine=engine)


VARIANTS = (
    ["model=vanilla"],
    ["model=phd", "model.K=3", "model.copy_positions=flattened"],
    ["model=phd_cswa", "train.micro_batch=2"],
    ["model=phd_swa", "model.norm=pre", "model.tied=false"],
    ["model=naive_repeat", "optim.z_loss=1e-4"],
    ["model=free_pause"],
    ["model=loop"],
    ["model=sps", "model.copy_embedding=true"],
    ["model=hidden_decoding", "model.full_every=2"],
)


def predicted(
    settings: Config, dtype: torch.dtype, world_size: int = 1, device: str = "cpu"
) -> Memory:
    """The memory where nothing is computed again, unless the settings say what."""
    if settings.engine.activation_checkpointing == "auto":
        settings = adjusted(settings, "none")
    return predict_memory(settings, dtype, world_size, device)


def really_saved(config: Config, dtype: torch.dtype) -> int:
    """Bytes that exist between the passes of the real model, besides its weights and tokens."""
    model = Transformer(config.model).reset(0)
    rows = config.train.micro_batch_on()
    tokens = torch.zeros(rows, config.train.seq_len, dtype=torch.int64)
    live = LiveBytes()
    with live:
        with autocast(torch.device("cpu"), dtype):
            total = model.loss(tokens, tokens, config.optim.z_loss).total
        return live.bytes - total.nbytes


@pytest.mark.parametrize("overrides", VARIANTS, ids=" ".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_the_real_model_saves_is_predicted_to_the_byte(
    overrides: list[str], dtype: torch.dtype, config
) -> None:
    settings = adjusted(config(*overrides), "none")
    given = replace(pass_of(settings, dtype, 1, "cpu"), rounded=False)  # which engines do
    parts = [*block_footprints(given), head_footprint(given, settings.optim.z_loss)]
    # The embedding saves the tokens, which are there before, and for tables which rows they are.
    tables = given.model.K - 1 if given.model.hidden_input == "table" else 0
    rows = 8 * given.rows * given.tokens * tables
    # Autocast keeps a weight's cast for all passes of a loop, while each is predicted to save it.
    # Engines round weights once and save none; DeepSpeed's prediction is too high by this.
    groups = count_parameters(given.model)
    casts = dtype.itemsize * (groups["attention"] + groups["feed-forward"])
    again = casts * (given.model.passes - 1) if dtype == torch.bfloat16 else 0
    assert sum(part.saved for part in parts) + rows - again == really_saved(settings, dtype)


def test_weights_gradients_and_moments_are_float32(config) -> None:
    whole, cut = (config("train.global_batch=4", f"train.micro_batch={n}") for n in (4, 1))
    parameters = sum(count_parameters(whole.model).values())
    for settings in (whole, cut):
        memory = predicted(settings, torch.float32)
        assert memory.weights == 4 * parameters
        assert memory.moments == 8 * parameters
        assert memory.total == sum(memory)
    # The gradients of earlier micro-batches are there all the time, those of the first are not.
    assert predicted(cut, torch.float32).gradients >= 4 * parameters
    assert predicted(whole, torch.float32).gradients < 4 * parameters


def test_rows_cost_in_proportion_and_accumulated_ones_their_gradients_alone(config) -> None:
    settings = {
        (batch, rows): config(f"train.global_batch={batch}", f"train.micro_batch={rows}")
        for batch, rows in ((16, 2), (32, 2), (16, 8))
    }
    memory = {key: predicted(settings[key], torch.float32) for key in settings}
    assert memory[16, 2] == memory[32, 2]
    passes = [
        pass_of(adjusted(settings[key], "none"), torch.float32, 1, "cpu")
        for key in ((16, 2), (16, 8))
    ]
    small, large = (sum(part.saved for part in block_footprints(given)) for given in passes)
    assert large == 4 * small


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_the_more_is_computed_again_the_less_is_saved(compiled: bool) -> None:
    settings = [
        "size=151m",
        "model=vanilla",
        "model.layers=2",
        f"engine.compile={compiled}".lower(),
    ]
    saved = {}
    for mode in ("none", "selective", "full"):
        config = load([*settings, f"engine.activation_checkpointing={mode}"])
        given = pass_of(config, torch.bfloat16, 1, "cuda")
        saved[mode] = sum(part.saved for part in block_footprints(given))
        second = sum(part.saved for part in block_footprints(given, checkpoint_every=2))
        assert mode == "none" or saved[mode] < second < saved["none"]
    assert saved["selective"] < 0.75 * saved["none"]
    assert saved["full"] < 0.2 * saved["selective"]


@pytest.mark.parametrize(
    "overrides", [["model=vanilla"], ["model=phd_cswa", "engine.precision=fp32"]], ids=" ".join
)
def test_compiled_for_cuda_a_small_micro_batch_tells_of_any_other(overrides: list[str]) -> None:
    """For the CPU each is traced as it is."""
    config = load(["size=550m", "model.layers=2", "engine.compile=true", *overrides])
    dtype = torch.float32 if len(overrides) > 1 else torch.bfloat16
    given = pass_of(adjusted(config, "none"), dtype, 1, "cuda")
    assert given.rows > 1
    assert block_footprints(given) == block_footprints(replace(given, device="cpu"))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_weights_that_are_rounded_once_a_step_are_not_saved_for_each_pass(compiled: bool) -> None:
    config = adjusted(load(["size=151m", "model=vanilla", "model.layers=1"]), "none")
    once = replace(pass_of(config, torch.bfloat16, 1, "cuda"), compiled=compiled)
    assert once.rounded
    [kept], [cast] = (block_footprints(replace(once, rounded=rounded)) for rounded in (True, False))
    counts = count_parameters(config.model)
    assert cast.saved - kept.saved == 2 * (counts["attention"] + counts["feed-forward"])
    memory = predicted(config, torch.bfloat16, device="cuda")
    assert memory.weights == 4 * sum(counts.values()) + cast.saved - kept.saved


def test_the_loss_on_cuda_takes_what_it_says_itself() -> None:
    config = adjusted(load(["size=1b2"]), "none")
    given = pass_of(config, torch.bfloat16, 1, "cuda")
    states = 4 * 4096 * 2048
    itself = fused_loss_bytes(4 * 4096, 2048, 100_352, torch.bfloat16, torch.float32)
    forward = head_footprint(given, 0.0).forward
    assert 0 < forward - itself - (4 + 4 + 2) * states < 1 << 20  # norm in and out, and a scale


def test_shards_are_counted_and_what_is_gathered_of_them() -> None:
    config = load(["size=550m", "model=vanilla", "model.layers=4", "data.lanes=8"])
    parameters = sum(count_parameters(config.model).values())
    one, eight = (predicted(config, torch.bfloat16, n, "cuda") for n in (1, 8))
    assert eight.weights == 4 * parameters // 8
    assert eight.moments == one.moments // 8
    # Gradients of earlier micro-batches are reduced with those of the last.
    assert eight.gradients >= 4 * parameters
    never = load([*["size=550m", "model=vanilla", "model.layers=4", "data.lanes=8"],
                  "engine.reshard_after_forward=never"])  # fmt: skip
    gathered = predicted(never, torch.bfloat16, 8, "cuda").total - eight.total
    blocks = parameters - count_parameters(config.model)["embedding"]
    assert gathered == 2 * blocks // 4 * 2  # two more of four blocks, in bfloat16


def test_a_model_beyond_this_machine_is_predicted_in_seconds() -> None:
    config = load(["size=7b", "model=phd_cswa"])
    before, start = peak_memory_gib(torch.device("cpu")), process_time()
    memory = predicted(config, torch.bfloat16, device="cuda")
    assert process_time() - start < 60  # seconds of work, however busy the machine is
    assert peak_memory_gib(torch.device("cpu")) - before < 0.5
    assert memory.weights > 25 * 2**30
    assert memory.activations > 10 * 2**30


# On an H200, torch 2.11: `torch.cuda.max_memory_allocated` in GiB of a step of the size 1b2 with
# T = 4096, by variant, rows, whether compiled, and rows of logits at a time. The loss had another
# form then: it held these bytes in its forward and its backward pass.
MEASURED = {
    ("vanilla", 4, False, 167): 48.0,
    ("vanilla", 4, False, 4096): 52.1,
    ("vanilla", 4, True, 4096): 41.9,
    ("phd_cswa", 2, False, 4096): 50.9,
    ("phd_cswa", 2, True, 4096): 42.9,
}


def head_of_then(rows: int, at_once: int) -> Footprint:
    """The loss as it was when these figures were measured.

    The logits of two chunks in float32 and those of one in bfloat16, twice; the head's gradient
    twice and the head in bfloat16; the hidden states in float32 twice, and in bfloat16.
    """
    V, D, R = 100_352, 2048, rows * 4096
    logits = V * at_once * (4 + 4 + 2 + 2)
    saved = 4 * V * D + (4 + 2) * R * D
    return Footprint(
        forward=logits + (4 + 2 + 2) * V * D + (4 + 4 + 2) * R * D,
        saved=saved,
        casts=0,
        backward=saved + 4 * V * D + (2 + 4) * R * D,
        gradients=4 * V * D,
    )


@pytest.mark.parametrize("row", MEASURED, ids=str)
def test_peaks_that_were_measured_on_a_gpu_are_predicted(
    row: tuple[str, int, bool, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    variant, rows, compiled, at_once = row
    head = head_of_then(rows, at_once)
    monkeypatch.setattr("train.engines.memory.head_footprint", lambda *_: head)
    settings = [f"model={variant}", f"engine.compile={str(compiled).lower()}"]
    batch = ["data.lanes=1", f"train.global_batch={rows}", f"train.micro_batch={rows}"]
    memory = predicted(load(["size=1b2", *settings, *batch]), torch.bfloat16, device="cuda")
    assert memory.total / 2**30 == pytest.approx(MEASURED[row], rel=0.1)


PEAK = """
import sys, torch
from dataclasses import replace
from data.batch import Batch
from train.compose import load
from train.engines.fsdp import FsdpEngine
from train.distributed.process_groups import ProcessGroups
from train.engines.memory import fit, predict_memory
from train.loop import train_step

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
config = fit(config, torch.float32).config
print(status("VmHWM") - before, predict_memory(config, torch.float32).total)
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
    assert predicted(settings, torch.float32) == predicted(config(), torch.float32)
