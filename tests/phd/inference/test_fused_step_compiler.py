"""How many kernels a decoded token is, and how often they are compiled.

Triton's compiler needs no GPU. So a step runs here with kernels that are compiled and not started.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parents[3]

SCRIPT = """
import json, sys, time
from dataclasses import replace
import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction
from phd.config import ModelConfig
from phd.inference.fused_step import FusedStep
from phd.inference.prefill import new_cache
from phd.model import Transformer

class Driver:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)
    def get_current_device(self):
        return 0
    def get_current_stream(self, device):
        return 0

triton.runtime.driver.set_active(Driver())
launched, compiled = [], set()
run = JITFunction.run

def compile_alone(self, *args, grid, warmup, **kwargs):
    kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
    launched.append(self.__name__)
    compiled.add(kernel)
    return kernel

JITFunction.run = compile_alone

class Kernels(TorchDispatchMode):
    # Operators that compute: views and empty tensors start no kernel.
    free = ("view", "expand", "empty", "slice", "select", "transpose", "permute", "t",
            "as_strided", "detach", "unsqueeze", "squeeze", "alias", "split", "_unsafe_view",
            "new_empty", "empty_like")
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().removeprefix("aten::").split(".")[0]
        if name not in self.free:
            launched.append(name)
        return function(*args, **(kwargs or {}))

settings = json.loads(sys.argv[1])
told = []
for batch, capacity, length, model_settings in settings:
    told.append([])
    for layers in (2, 3):
        config = ModelConfig(layers=layers, **model_settings)
        with torch.device("meta"):
            model = Transformer(config).to(torch.bfloat16)
        model.to_empty(device="cpu").fuse_projections().rope.build(torch.device("cpu"))
        cache = new_cache(model, batch, capacity)
        cache.lengths.fill_(length)
        step = FusedStep(model, cache)
        launched.clear()
        before, start = len(compiled), time.perf_counter()
        with torch.no_grad(), Kernels():
            step(torch.zeros(batch, dtype=torch.int64))
        told[-1].append((list(launched), len(compiled) - before, time.perf_counter() - start))
print(json.dumps(told))
"""

SIZE_1B2 = {
    "dim": 2048,
    "ffn_dim": 8192,
    "heads": 32,
    "kv_heads": 8,
    "head_dim": 64,
    "vocab_size": 4096,
    "max_seq_len": 16384,
}


class Step(NamedTuple):
    """The kernels and operators of one step, how many kernels were compiled for it, and seconds."""

    launched: list[str]
    compiled: int
    seconds: float

    def per_layer(self, fewer: "Step") -> list[str]:
        """What one layer more has started."""
        return sorted((Counter(self.launched) - Counter(fewer.launched)).elements())


def steps(*settings: tuple[int, int, int, dict[str, Any]]) -> list[tuple[Step, Step]]:
    """For each (batch, capacity, length, model settings), the step of 2 layers and of 3."""
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    with TemporaryDirectory() as cache:
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, json.dumps(settings)],
            env=environment | {"PYTHONPATH": path, "TRITON_CACHE_DIR": cache},
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    return [(Step(*two), Step(*three)) for two, three in json.loads(done.stdout)]


NINE = [
    *("attention_kernel", "end_kernel", "end_kernel"),
    *("few_rows_kernel",) * 4,
    *("merge_kernel", "placement_kernel"),
]


@pytest.mark.process
@pytest.mark.compile
def test_a_layer_is_nine_kernels_which_are_compiled_once() -> None:
    model: dict[str, Any] = {"variant": "phd_cswa", **SIZE_1B2}
    vanilla, first, other, many = steps(
        (1, 1024, 1000, {**model, "variant": "vanilla", "K": 1}),
        (1, 1024, 1000, {**model, "K": 2}),
        (3, 4096, 7, {**model, "K": 2}),
        (1, 1024, 1000, {**model, "K": 256, "span_unit": "token"}),
    )
    for two, three in (vanilla, first, other):
        assert three.per_layer(two) == NINE
    assert many[1].per_layer(many[0]) == sorted(
        [*NINE[:3], *("mm",) * 4, "merge_kernel", "placement_kernel", "silu_kernel"]
    )
    for two, three in (vanilla, first, other, many):
        print(two.compiled, two.seconds, two.launched)
        assert three.compiled == 0, "one layer more compiles nothing"
    assert other[0].compiled == 0, "another batch, capacity or length compiles nothing"
    assert first[0].compiled > 0
