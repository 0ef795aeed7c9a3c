"""The kernels of a decoded token's attention equal the slow step, and compile for GPUs.

`make soak-kernels` compiles every setting; here are some.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phd.attention.blocks import Launch
from phd.config import ModelConfig
from phd.inference.cache import KVCache
from phd.inference.kernels.placement import QkvNorms, placement_launch
from phd.inference.kernels.token_attention import (
    BLOCKS,
    attention_launches,
    splits_of,
    token_blocks,
)
from phd.inference.kernels.token_cache import TokenCache, new_hidden_copies
from phd.rope import Rope
from tests.gpu_compiler import CAPABILITIES, Build, compile_for_gpus
from tests.phd.inference.token_twins import Twins, has_token_kernels

ROOT = Path(__file__).parents[3]
interpreted = pytest.mark.usefixtures("triton_interpreter")

ONE_HEAD = ModelConfig(
    variant="phd_swa",
    layers=2,  # all copies have queries in the first, and the last copy in the second
    dim=8,
    ffn_dim=8,
    heads=2,
    kv_heads=1,
    head_dim=6,
    vocab_size=5,
    max_seq_len=300,
)


@interpreted
@settings(derandomize=True, deadline=None, max_examples=6)
@given(
    config=st.from_type(ModelConfig).filter(has_token_kernels),
    lengths=st.lists(st.integers(0, 4) | st.integers(5, 120), min_size=1, max_size=2),
    tokens=st.integers(1, 3),
    spare=st.integers(0, 7),
    splits=st.integers(1, 5),
)
def test_tokens_equal_those_of_the_slow_step(
    config: ModelConfig, lengths: list[int], tokens: int, spare: int, splits: int
) -> None:
    twins = Twins(replace(config, layers=2), lengths, max(lengths) + tokens + spare)
    for _ in range(tokens):
        twins.add_token(splits)


# What random small models do not reach.
SPECIAL = {
    "more new hidden copies than the ring holds": (
        {"K": 20, "window": 3, "heads": 1},
        [40],
        torch.bfloat16,
    ),
    "a chunk that ends": (
        {"variant": "phd_cswa", "K": 3, "window": 20, "chunk": 8, "heads": 3},
        [7, 6],
        torch.float32,
    ),
    "copies with positions of their own": (
        {"K": 4, "window": 5, "copy_positions": "flattened", "norm": "hybrid"},
        [33, 7],
        torch.float32,
    ),
    "cached copies over the edge of a block": (
        {"variant": "naive_repeat", "K": 5},
        [25],
        torch.bfloat16,
    ),
    "a wide head, not a power of 2": ({"K": 2, "head_dim": 96}, [90], torch.bfloat16),
    # The merge adds up 32 at a time.
    "more splits than are merged at a time": (
        {"variant": "vanilla", "K": 1, "max_seq_len": 2010},
        [2000],
        torch.float32,
    ),
    # Copies 16 to 20 see a block more than the others.
    "several tiles of rows, and a ring of several blocks": (
        {"K": 21, "window": 13, "span_unit": "token", "heads": 8},
        [250],
        torch.bfloat16,
    ),
}


@interpreted
@pytest.mark.parametrize("name", SPECIAL)
def test_special_tokens_equal_those_of_the_slow_step(name: str) -> None:
    others, lengths, dtype = SPECIAL[name]
    config = ModelConfig(**{**vars(ONE_HEAD), **others})
    twins = Twins(config, lengths, max(lengths) + 2, dtype)
    for splits in (99, None):
        twins.add_token(splits)


@interpreted
@pytest.mark.parametrize("variant", ["naive_repeat", "phd_cswa"])
def test_a_full_row_writes_nothing_and_changes_no_other(variant: str) -> None:
    config = ModelConfig(**{**vars(ONE_HEAD), "variant": variant, "K": 2, "max_seq_len": 8})
    lengths, qkv = [8, 3], torch.randn(4, 24)
    both, alone = Twins(config, lengths, 8), Twins(config, lengths[1:], 8)
    alone.norms = both.norms
    for x, y in zip(
        (*alone.fast.originals, *alone.fast.ring),
        (*both.fast.originals, *both.fast.ring),
        strict=True,
    ):
        x.copy_(y[:, 1:])
    before = both.fast.originals[0].clone()
    out = both.fast_output(qkv, 0, last=False, splits=2)
    expected = alone.fast_output(qkv[2:], 0, last=False, splits=2)
    assert torch.equal(out[2:], expected)
    assert torch.equal(both.fast.originals[0][:, 1:], alone.fast.originals[0])
    assert torch.equal(both.fast.originals[0][:, 0], before[:, 0])
    assert out.isfinite().all()


def launches_of(
    H: int, K: int, B: int = 1, capacity: int = 1088, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Launch]:
    """The three kernels' launches for a size of DESIGN.md's table that has heads of H."""
    heads, kv_heads = {64: (32, 8), 96: (16, 4), 128: (32, 32), 256: (8, 4)}[H]
    config = ModelConfig(
        variant="phd_cswa", K=K, heads=heads, kv_heads=kv_heads, head_dim=H,
        span_unit="token" if K == 256 else "hidden",
    )  # fmt: skip
    cache = KVCache(config, B, capacity=capacity, dtype=dtype, device="meta")
    layer = TokenCache.of(cache, 0, new_hidden_copies(cache))
    with torch.device("meta"):
        rope = Rope(config)
        qkv = torch.empty(2, B * K, (heads + 2 * kv_heads) * H)
        q = torch.empty(B * K, heads * H, dtype=dtype)
        weights = torch.empty(heads * H, dtype=dtype), torch.empty(kv_heads * H, dtype=dtype)
    norms = QkvNorms(*weights, None, 1e-6, per_head=False)
    attention, merge, _ = attention_launches(q, layer, cache.pattern)
    placement = placement_launch(qkv, norms, rope, layer, cache.pattern, q)
    return {
        "placement:placement_kernel": placement,
        "token_attention:attention_kernel": attention,
        "token_attention:merge_kernel": merge,
    }


def build_of(kernel: str, launch: Launch) -> Build:
    options = launch.options["num_warps"], launch.options["num_stages"]
    name = f"phd.inference.kernels.{kernel}"
    return Build(name, launch.arguments, launch.constants, *options)


SOME = [(64, 2), (64, 256), (96, 16), (128, 1)]
EVERY = list(product((64, 96, 128, 256), (1, 2, 16, 256)))


@pytest.mark.process
def test_the_kernels_compile_for_gpus_without_spilling_registers() -> None:
    every = "CASES" in os.environ
    dtypes = (torch.bfloat16, torch.float16, torch.float32) if every else (torch.bfloat16,)
    builds = [
        build_of(kernel, launch)
        for (H, K), dtype in product(EVERY if every else SOME, dtypes)
        for kernel, launch in launches_of(H, K, dtype=dtype).items()
        if every or "attention_kernel" in kernel or K == 2
    ]
    capabilities = CAPABILITIES if every else CAPABILITIES[:1]
    for build, compiled in zip(builds, compile_for_gpus(builds, capabilities), strict=True):
        for one in compiled:
            print(build.kernel, build.constants["H"], build.constants["K"], *one)
            assert one.spilled_bytes == 0, (build, one)


# What Triton compiles a kernel by, without a GPU; the kernels' code is left out of it.
KEYS = """
import json, sys
from importlib import import_module
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

dtypes = {"*bf16": torch.bfloat16, "*fp32": torch.float32, "*i64": torch.int64}
backend = make_backend(GPUTarget("cuda", 90, 32))
keys = []
for order in json.load(sys.stdin):
    module, _, name = order["kernel"].partition(":")
    kernel = getattr(import_module(module), name)
    arguments = [
        torch.empty(8, dtype=dtypes[x]) if isinstance(x, str) else x for x in order["arguments"]
    ]
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    options = {"num_warps": order["warps"], "num_stages": order["stages"]}
    keys.append(str(bind(*arguments, **order["constants"], **options)[1:]))
print(json.dumps(keys))
"""


@pytest.mark.process
def test_one_compilation_serves_all_lengths_capacities_and_batches() -> None:
    sizes = (1, 1088), (1, 16), (2, 4096), (3, 1), (64, 777)
    orders = [
        build_of(kernel, launch).described()
        for batch, capacity in sizes
        for kernel, launch in launches_of(64, 16, batch, capacity).items()
    ]
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", KEYS],
        input=json.dumps(orders),
        env=environment | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    keys = json.loads(done.stdout)
    assert len(keys) == 3 * len(sizes)
    assert len(set(keys)) == 3
    assert keys == keys[:3] * len(sizes)


@pytest.mark.parametrize(("itemsize", "width"), BLOCKS)
def test_programs_fill_a_device_and_do_not_crowd_it(itemsize: int, width: int) -> None:
    """132 multiprocessors, 8 key heads of 4 query heads each, 1024 tokens."""
    for K in (1, 2, 16):
        blocks = token_blocks(4 * K, width, itemsize)
        tiles, most = -(-4 * K // blocks.rows), -(-1024 // blocks.keys) + 1
        assert splits_of(blocks, 132, tiles * 8, most) * tiles * 8 > 0.9 * 132
        assert splits_of(blocks, 132, tiles * 8 * 64, most) == 1


def test_tables_of_blocks_grow_by_rows() -> None:
    for choices in BLOCKS.values():
        rows = [blocks.rows for blocks in choices]
        assert rows == sorted(rows)
        for blocks in choices:  # so that a program of the merge has rows of one tile
            assert blocks.rows % blocks.merged_rows == 0
