"""On a GPU a step is the CPU's, does not make the host wait, and is skipped where it is bad."""

import pytest
import torch

from phd.inference.generator import Generator, Request
from tests.train.batches import batch_of
from train.compose import load
from train.config import Config
from train.distributed.process_groups import ProcessGroups
from train.engines.fsdp import FsdpEngine
from train.engines.limits import Limits
from train.engines.memory import predict_memory
from train.loop import train_step
from train.run import open_engine

pytestmark = [
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs an NVIDIA GPU and a CUDA build of torch"
    ),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a proto:UserWarning"),
]
ROWS = torch.randint(0, 320, (4, 65), generator=torch.Generator().manual_seed(1))


def config_on(device: str, *others: str) -> Config:
    small = ("data=files", "data.sources.files.paths=unread.jsonl", "data.lanes=1", "model.K=3")
    steps = ("train.max_steps=9", "train.global_batch=4", "train.micro_batch=2", "train.seq_len=64")
    shape = ("model.vocab_size=320", "hooks=quiet", "hooks.sample.tokens=4")
    device = f"engine.device={device}"
    return load([*small, *steps, *shape, device, "engine.compile=false", *others])


@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
def test_steps_are_those_of_the_cpu(checkpointing: str) -> None:
    others = (f"engine.activation_checkpointing={checkpointing}", "engine.precision=bf16")
    engines = [
        FsdpEngine(config_on("cuda", *others), ProcessGroups()),
        FsdpEngine(config_on("cpu"), ProcessGroups()),
    ]
    for _ in range(3):
        ours, exact = (train_step(engine, batch_of(ROWS), 1e-3) for engine in engines)
        assert ours.loss.item() == pytest.approx(exact.loss.item(), rel=1e-2)
        assert ours.grad_norm.item() == pytest.approx(exact.grad_norm.item(), rel=3e-2)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_text_between_steps_changes_neither_weights_nor_their_memory() -> None:
    engine, silent = (FsdpEngine(config_on("cuda"), ProcessGroups()) for _ in range(2))
    for _ in range(3):
        where = [x.data_ptr() for x in engine.model.parameters()]
        with engine.summon_full_params() as model:
            [text] = Generator(model, batch=1).generate([Request([1, 2], max_tokens=4)])
        assert len(text) == 4
        assert [x.data_ptr() for x in engine.model.parameters()] == where
        ours, exact = (train_step(each, batch_of(ROWS), 1e-3) for each in (engine, silent))
        assert ours.loss.item() == pytest.approx(exact.loss.item(), rel=1e-4)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not:UserWarning")
@pytest.mark.parametrize("documents", [False, True], ids=["rows", "documents"])
@pytest.mark.parametrize("compile", ["false", "auto"])
def test_a_step_does_not_make_the_host_wait(compile: str, documents: bool) -> None:
    engine = FsdpEngine(config_on("cuda", f"engine.compile={compile}"), ProcessGroups())
    assert engine.compiled == (compile == "auto")
    starts = torch.arange(64).div(20, rounding_mode="floor").mul(20).expand(4, 64).contiguous()
    batch = batch_of(ROWS, starts=starts if documents else None)
    for _ in range(2):
        train_step(engine, batch, 1e-3)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            train_step(engine, batch, 1e-3, Limits(loss=100.0))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_bad_step_changes_no_bit() -> None:
    engine = FsdpEngine(config_on("cuda"), ProcessGroups())
    train_step(engine, batch_of(ROWS), 1e-3)
    held = [(x, x.clone()) for tensors in engine._checkpoint_tensors() for x in tensors.values()]
    for limits in (Limits(loss=0.1), Limits(grad_norm=1e-6)):
        assert not train_step(engine, batch_of(ROWS), 1e-3, limits).applied
        assert all(torch.equal(x, before) for x, before in held)


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("variant", ["model=vanilla model.K=1", "model=phd_cswa model.K=3"])
def test_the_predicted_peak_is_what_a_step_allocates(
    variant: str, compiled: bool, checkpointing: str
) -> None:
    shape = ("size=151m", "model.vocab_size=32768", "train.seq_len=2048", *variant.split())
    batch = ("data.lanes=1", "train.global_batch=8", "train.micro_batch=4")
    config = config_on(
        "cuda",
        *(*shape, *batch, "hooks.sample.tokens=4", "engine.precision=bf16"),
        *(f"engine.compile={str(compiled).lower()}",),
        f"engine.activation_checkpointing={checkpointing}",
    )
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    engine = FsdpEngine(config, ProcessGroups())
    batches = batch_of(torch.randint(0, 32768, (8, 2049)))
    train_step(engine, batches, 1e-3)  # compiles and tunes
    torch.cuda.reset_peak_memory_stats()
    train_step(engine, batches, 1e-3)
    measured = torch.cuda.max_memory_allocated() - before
    predicted = predict_memory(engine.config, torch.bfloat16, device="cuda").total
    assert predicted == pytest.approx(measured, rel=0.1)


def test_the_engine_chooses_the_micro_batch_by_the_memory_of_the_device() -> None:
    engine = open_engine(config_on("cuda", "train.micro_batch=auto"), ProcessGroups())
    assert engine.micro_batch == 4
    assert engine.config.engine.activation_checkpointing == "none"
