"""The Triton kernel equals attention by its formula, and compiles for GPUs."""

import pytest
import torch

from phd.inference.kernels import split_kv
from phd.inference.kernels.split_kv import (
    KEYS_AT_ONCE,
    ROWS_AT_ONCE,
    ROWS_PER_CALL,
    SPLITS_AT_ONCE,
    split_attention,
)
from tests.gpu_compiler import Build, compile_for_gpus

SHAPES = [
    (2, 2, 8, 16, 100, 3),
    (1, 2, 70, 24, 300, None),
    (2, 1, 1, 64, 64, 1),
    (1, 1, 5, 96, 130, 9),
    (1, 1, 3, 16, 2300, 35),  # more splits than the merge reads together
]


@pytest.mark.usefixtures("triton_interpreter")
@pytest.mark.parametrize(("B", "G", "rows", "H", "keys", "splits"), SHAPES)
@pytest.mark.parametrize("limited", [True, False])
def test_the_kernel_equals_attention_by_its_formula(
    B: int, G: int, rows: int, H: int, keys: int, splits: int | None, limited: bool
) -> None:
    q, k, v = (torch.randn(B, G, n, H) for n in (rows, keys + 7, keys + 7))
    k, v = k[:, :, :keys], v[:, :, :keys]
    visible = torch.randint(1, keys + 1, (B, rows)) if limited else None
    out, lse = split_attention(q, k, v, visible, splits)
    scores = q @ k.mT * H**-0.5
    if visible is not None:
        hidden = torch.arange(keys) >= visible[:, None, :, None]
        scores = scores.masked_fill(hidden, -torch.inf)
    torch.testing.assert_close(out, scores.softmax(-1) @ v, rtol=0, atol=2e-6)
    torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=0, atol=2e-6)


@pytest.mark.usefixtures("triton_interpreter")
@pytest.mark.parametrize("limited", [True, False])
def test_more_rows_than_a_grid_takes_are_those_of_several_calls(
    limited: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = (torch.randn(2, 3, n, 16) for n in (101, 90, 90))
    visible = torch.randint(1, 91, (2, 101)) if limited else None
    whole = split_attention(q, k, v, visible)
    monkeypatch.setattr(split_kv, "ROWS_PER_CALL", 6 * 32)  # the last call has 5 of the 101 rows
    torch.testing.assert_close(split_attention(q, k, v, visible), whole, rtol=0, atol=1e-6)


def test_the_rows_of_a_call_fit_into_a_grid() -> None:
    assert ROWS_PER_CALL // ROWS_AT_ONCE <= 65_535


@pytest.mark.process
def test_the_kernel_compiles_for_gpus_without_spilling_registers() -> None:
    keys, parts, lses, counts = (
        torch.empty(8, dtype=dtype, device="meta")
        for dtype in (torch.bfloat16, torch.float32, torch.float32, torch.int64)
    )
    builds = [
        Build(
            "phd.inference.kernels.split_kv:_kernel",
            [keys, keys, keys, counts, parts, lses, 8, rows, H, 16, 8 * 4096 * H, 4096 * H, H, 0.1],
            {"ROWS": rows, "KEYS": KEYS_AT_ONCE, "WIDTH": width, "PRECISION": "tf32"},
        )
        for rows in (16, ROWS_AT_ONCE)
        for H, width in ((64, 64), (96, 128), (128, 128))
    ]
    builds += [
        Build(
            "phd.inference.kernels.split_kv:merge_kernel",
            [parts, lses, keys, lses, 180, 96, 44],
            {"WIDTH": 128, "SPLITS": SPLITS_AT_ONCE},
        )
    ]
    for build, compiled in zip(builds, compile_for_gpus(builds), strict=True):
        assert [one.spilled_bytes for one in compiled] == [0, 0], build
