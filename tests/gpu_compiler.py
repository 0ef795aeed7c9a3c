"""Compiles Triton kernels for GPUs where there is none, and tells what they take of a processor.

Triton's compiler and NVIDIA's assembler are in Triton's wheel. This finds what Triton's interpreter
does not: code that does not compile, registers that spill into memory, too much shared memory.
"""

import atexit
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from traceback import format_exc
from typing import Any, NamedTuple

import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]

CAPABILITIES = (90, 80)
"""H100 and H200, A100."""

SHARED_BYTES = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}
"""The most shared memory that a block of threads may have (CUDA C++ Programming Guide, Technical
Specifications per Compute Capability)."""

POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"} | {
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.float64: "*fp64",
}


@dataclass(frozen=True)
class Build:
    """A kernel and the arguments of one launch.

    Attributes:
        kernel: module and name of a `triton.jit` function, as `phd.attention.fused:forward_kernel`.
        arguments: those that are not `tl.constexpr`, in their order. Tensors may be on the device
            `meta`; they count as aligned to 16 bytes.
        constants: the `tl.constexpr` ones by name.
        warps, stages: the launch's `num_warps` and `num_stages`.
    """

    kernel: str
    arguments: Sequence[Tensor | float | None]
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 3

    def described(self) -> dict[str, Any]:
        """The same for JSON: a tensor is its pointer's type."""
        arguments = [POINTERS[x.dtype] if isinstance(x, Tensor) else x for x in self.arguments]
        return vars(self) | {"arguments": arguments}


class Compiled(NamedTuple):
    """What one thread (registers, spilled bytes) and one block of threads (shared memory) take."""

    capability: int
    registers: int
    spilled_bytes: int
    shared_bytes: int


def compile_for_gpus(
    builds: Sequence[Build], capabilities: Sequence[int] = CAPABILITIES
) -> list[list[Compiled]]:
    """Compile each build for each capability; raises if one does not compile.

    A result must fit in the shared memory of a block.
    """
    orders = [
        build.described() | {"capability": capability}
        for build in builds
        for capability in capabilities
    ]
    compiler = _compiler()
    assert compiler.stdin is not None
    assert compiler.stdout is not None
    line = ""
    with suppress(BrokenPipeError):  # it died before
        compiler.stdin.write(json.dumps(orders) + "\n")
        compiler.stdin.flush()
        line = compiler.stdout.readline()
    if not line:
        _compiler.cache_clear()  # the next call starts another
        compiler.communicate()
        raise AssertionError(f"the compiler has died with exit code {compiler.returncode}")
    answer = json.loads(line)
    assert "error" not in answer, answer["error"]
    found = [Compiled(*result) for result in answer["found"]]
    for order, one in zip(orders, found, strict=True):
        assert one.shared_bytes <= SHARED_BYTES[one.capability], (order, one)
    return [found[i : i + len(capabilities)] for i in range(0, len(found), len(capabilities))]


@cache
def _compiler() -> "subprocess.Popen[str]":
    """The process that compiles for all tests of this one, because it takes seconds to start.

    It is another one, because this one may have imported Triton as its interpreter.
    """
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment | {"PYTHONPATH": path},
        text=True,
    )
    atexit.register(process.communicate)  # it ends when it has nothing more to read
    return process


def _answer(line: str) -> dict[str, Any]:
    """What the orders of a line have become."""
    try:
        return {"found": [_compile(order) for order in json.loads(line)]}
    except Exception:
        return {"error": format_exc()}


def _compile(order: dict[str, Any]) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, _, name = order["kernel"].partition(":")
    kernel = getattr(import_module(module), name)
    # As a launch specializes: 1 is a constant, and multiples of 16 are known as such.
    signature, constants, attributes = {}, {}, {}
    arguments = iter(order["arguments"])
    for i, parameter in enumerate(kernel.params):
        if parameter.is_constexpr:
            value = order["constants"].get(parameter.name, parameter.default)
        else:
            value = next(arguments)
        special = not parameter.do_not_specialize
        known = value is None or value is True or value is False or (special and value == 1)
        if parameter.is_constexpr or known:
            signature[parameter.name], constants[(i,)] = "constexpr", value
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            is_pointer = isinstance(value, str)
            narrow = is_pointer or -(2**31) <= value < 2**31
            signature[parameter.name] = value if is_pointer else "i32" if narrow else "i64"
            if is_pointer or (special and value % 16 == 0):
                attributes[(i,)] = [["tt.divisibility", 16]]
    assert next(arguments, None) is None, "more arguments than parameters"
    capability = order["capability"]
    result = triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": order["warps"], "num_stages": order["stages"]},
    )
    registers, spilled = _assembled(result.asm["ptx"], capability)
    return Compiled(capability, registers, spilled, result.metadata.shared)


def _assembled(ptx: str, capability: int) -> tuple[int, int]:
    """(registers, spilled bytes), as the assembler reports them."""
    import triton

    assembler = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    target = re.search(r"\.target (\w+)", ptx)
    assert target, f"no target in the code for {capability}"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [assembler, "-v", f"--gpu-name={target[1]}", file.name, "-o", "/dev/null"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    registers = re.search(r"Used (\d+) registers", done.stderr)
    spilled = re.search(r"(\d+) bytes spill stores", done.stderr)
    assert registers, done.stderr
    assert spilled, done.stderr
    return int(registers[1]), int(spilled[1])


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a compiler prints is no answer
    for line in sys.stdin:
        print(json.dumps(_answer(line)), file=answers, flush=True)
