"""The fused kernels compile for GPUs, fit there, and are part of torch.compile's graph.

`make soak-kernels` compiles every setting of the tables; here are some.
"""

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from phd.attention.blocks import LocalRule, has_kernels
from phd.attention.fused import Suffix, backward_launch, forward_launch
from phd.pattern import Pattern
from tests.gpu_compiler import Build, Compiled, compile_for_gpus

pytestmark = pytest.mark.process

ROOT = Path(__file__).parents[3]

# Chunks that fill a tile of keys, or leave it half empty; windows, which reach over its edge.
PATTERNS = {
    "cswa-2": Pattern("hidden", K=2, window=16, chunk_tokens=32),
    "cswa-3": Pattern("hidden", K=3, window=16, chunk_tokens=16),
    "cswa-4": Pattern("hidden", K=4, window=16, chunk_tokens=11),
    "swa-2": Pattern("hidden", K=2, window=16),
    "phd-4": Pattern("hidden", K=4),
}


class Setting(NamedTuple):
    """What a launch is chosen by."""

    pattern: str
    H: int
    dtype: torch.dtype
    last_copy_only: bool = False
    documents: bool = False

    def launches(self, B: int = 4, N: int = 32, G: int = 8, T: int = 4096) -> list[Build]:
        """Forward and backward; the strides are those of a training step."""
        pattern, lse = PATTERNS[self.pattern], torch.float32
        Q = 1 if self.last_copy_only else pattern.K

        def empty(heads: int, copies: int) -> Tensor:
            shape = (B, T, copies, heads, self.H)
            return torch.empty(shape, device="meta", dtype=self.dtype).permute(0, 3, 2, 1, 4)

        q, out, dq, dout = (empty(N, Q) for _ in range(4))
        k, v, dk, dv = (empty(G, pattern.K) for _ in range(4))
        result = out, torch.empty(B, N, Q, T, device="meta", dtype=lse)
        starts = torch.empty(B, T, dtype=torch.int64, device="meta") if self.documents else None
        rule = LocalRule.of(pattern)
        launches = {
            "forward": forward_launch((q, k, v), result, starts, rule),
            "backward": backward_launch((dq, dk, dv), (q, k, v), (*result, dout), starts, rule),
        }
        return [
            Build(
                f"phd.attention.fused:{name}_kernel",
                launch.arguments,
                launch.constants,
                launch.options["num_warps"],
                launch.options["num_stages"],
            )
            for name, launch in launches.items()
        ]


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SOME = (
    Setting("cswa-2", 64, BF16),
    Setting("cswa-4", 64, FP16, last_copy_only=True),
    Setting("swa-2", 64, BF16),
    Setting("cswa-2", 128, BF16),
    Setting("cswa-4", 96, BF16, documents=True),
    Setting("cswa-2", 64, FP32, documents=True),
)
EVERY = tuple(
    setting
    for setting in map(
        Setting._make,
        product(PATTERNS, (64, 96, 128, 256), (BF16, FP16, FP32), (False, True), (False, True)),
    )
    if has_kernels(setting.dtype, setting.H)
)
# Bytes that a thread may keep in memory for want of registers. float32 is for comparisons.
MOST_SPILLED = {BF16: 256, FP16: 256, FP32: 2048}


class Prefill(NamedTuple):
    """A launch for the last tokens of a prompt."""

    pattern: str
    H: int
    dtype: torch.dtype
    tokens: int
    last_copy_only: bool = False

    def build(self, N: int = 16, G: int = 4) -> Build:
        """The keys and values follow those of 8192 originals, as in the slots of a layer."""
        pattern = PATTERNS[self.pattern]
        hidden, S = pattern.K - 1, self.tokens

        def by_copy(heads: int, copies: int, dtype: torch.dtype = self.dtype) -> Tensor:
            whole = torch.empty(1, heads, 8192 + S * copies, self.H, device="meta", dtype=dtype)
            return whole[:, :, 8192:].unflatten(2, (S, copies)).transpose(2, 3)

        Q = 1 if self.last_copy_only else hidden
        q, k, v, out = (by_copy(*sizes) for sizes in ((N, Q), (G, hidden), (G, hidden), (N, Q)))
        lse = torch.empty(1, N, -(-S * Q // 16) * 16, device="meta")[..., : S * Q]
        lse = lse.unflatten(2, (S, Q)).transpose(2, 3)
        suffix = Suffix(8192 - S, 8192 - S)
        launch = forward_launch((q, k, v), (out, lse), None, LocalRule.of(pattern), suffix)
        warps, stages = launch.options["num_warps"], launch.options["num_stages"]
        kernel = "phd.attention.fused:forward_kernel"
        return Build(kernel, launch.arguments, launch.constants, warps, stages)


PREFILLS = (
    Prefill("cswa-2", 64, BF16, 17),
    Prefill("cswa-4", 96, BF16, 7, last_copy_only=True),
)


@pytest.fixture(scope="module")
def compiled() -> dict[tuple[NamedTuple, str], list[Compiled]]:
    """What each setting's kernels take, by setting and kernel; one process compiles them all."""
    settings = EVERY if "CASES" in os.environ else SOME
    builds: list[tuple[NamedTuple, str, Build]] = [
        (setting, name, build)
        for setting in settings
        for name, build in zip(("forward", "backward"), setting.launches(), strict=True)
    ]
    builds += [(prefill, "forward", prefill.build()) for prefill in PREFILLS]
    found = compile_for_gpus([build for *_, build in builds])
    return {(order, name): x for (order, name, _), x in zip(builds, found, strict=True)}


def test_the_kernels_compile_for_gpus_and_hardly_spill_registers(compiled) -> None:
    for (setting, name), found in compiled.items():
        if not isinstance(setting, Setting):
            continue
        for one in found:
            print(name, *setting, *one)
            assert one.spilled_bytes <= MOST_SPILLED[setting.dtype], (setting, name, one)


def test_the_kernel_compiles_for_the_end_of_a_prompt(compiled) -> None:
    for prefill in PREFILLS:
        assert [one.spilled_bytes for one in compiled[prefill, "forward"]] == [0, 0], prefill


# Triton's compiler without a GPU, for a graph that is made and not run.
GRAPHS = """
import json
import torch
import triton
from torch._dynamo.backends.common import aot_autograd
from triton.backends.compiler import GPUTarget
from phd.attention.packed import _Packed
from phd.pattern import Pattern
from phd.segments import Segments

class Driver:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

graphs = []

def compiler(graph, inputs):
    graphs.append(graph)
    outputs = [x if x is None else x.meta["val"] for x in graph.graph.output_node().args[0]]
    def run(arguments):
        arguments.clear()
        return [
            None if x is None else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
            for x in outputs
        ]
    run._boxed_call = True
    return run

triton.runtime.driver.set_active(Driver())
pattern = Pattern("hidden", K=3, window=9, chunk_tokens=7)
segments = Segments.of(torch.tensor([[0] * 20 + [20] * 44] * 2))
attend = torch.compile(_Packed.apply, backend=aot_autograd(fw_compiler=compiler), fullgraph=True)
for documents in (None, segments):
    q, k, v = (torch.randn(2, heads, 3, 64, 64, requires_grad=True) for heads in (4, 2, 2))
    attend(q, k, v, pattern, documents, True).sum().backward()
print(json.dumps([
    [node.kwargs["tensors_to_clone"] for node in graph.graph.nodes if "triton" in str(node.target)]
    for graph in graphs
]))
"""


@pytest.mark.compile
def test_torch_compile_sees_the_kernels_and_what_they_change() -> None:
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", GRAPHS],
        env=environment | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    forward, backward = [["out", "lse"]], [["dq", "dk", "dv"]]
    assert json.loads(done.stdout) == [forward, backward] * 2, done.stderr
