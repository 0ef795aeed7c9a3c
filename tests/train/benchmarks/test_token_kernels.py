"""Every kernel of a token is timed beside torch's kernels for the same work."""

from collections.abc import Callable
from itertools import pairwise, product
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from conf.errors import ConfigError
from phd.config import ModelConfig
from phd.inference.kernels.products import ProductBlocks
from train import bench
from train.bench import BenchArguments
from train.benchmarks import ceiling, token_kernels
from train.benchmarks.timing import Result
from train.benchmarks.token_kernels import (
    CONTEXTS,
    OURS,
    ROWS,
    TORCH,
    Case,
    attention_case,
    bench_decode,
    cases,
    placement_case,
    product_case,
    product_in,
    products_of,
    residual_case,
    shapes_of,
)

CPU = torch.device("cpu")
SHAPE = {"layers": 1, "dim": 32, "ffn_dim": 48, "heads": 4, "kv_heads": 2, "head_dim": 16}
SIZE = ModelConfig(**SHAPE, size="small", vocab_size=40, window=3, chunk=6)

pytestmark = pytest.mark.usefixtures("triton_interpreter")


@pytest.fixture(autouse=True)
def little_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ceiling.COPIED_BYTES, "cpu", 1 << 12)
    monkeypatch.setattr(token_kernels, "HOT_CALLS", 2)
    monkeypatch.setattr(token_kernels, "TRIED", (ProductBlocks(16, 16, 4, 2),) * 2)
    monkeypatch.setattr(token_kernels, "TRIED_SPLITS", (2,))


def both(case: Case) -> list[Any]:
    """What torch's kernel and ours return."""
    return [summed(case.calls[by][0]()) for by in (TORCH, OURS)]


def summed(x: torch.Tensor) -> torch.Tensor:
    """Of partial sums, the product."""
    return x.sum(0) if x.dim() == 3 else x


@pytest.mark.parametrize(("number", "rows"), [*product(range(5), (1, 3))])
def test_a_product_is_that_of_torch_and_reads_its_weight(number: int, rows: int) -> None:
    shape = products_of(SIZE)[number]
    case = product_case(shape, rows, CPU, tune=True)
    expected, found = both(case)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for calls in case.calls.values():
        torch.testing.assert_close(summed(calls[0]()), expected, rtol=1e-4, atol=1e-5)
    outs, fan_in = shape.outs, shape.fan_in
    weight = outs * fan_in * (2 if shape.gated else 1)
    assert case.bytes_moved == 4 * (weight + rows * fan_in + rows * outs)


def test_the_products_are_those_of_a_layer_and_the_head() -> None:
    shapes = [(shape.outs * (2 if shape.gated else 1), shape.fan_in) for shape in products_of(SIZE)]
    assert shapes == [(64 + 2 * 32, 32), (32, 64), (2 * 48, 32), (32, 48), (40, 32)]


def test_a_product_in_other_blocks_is_the_same() -> None:
    x, weight = torch.randn(3, 70), torch.randn(50, 70)
    for blocks in (ProductBlocks(16, 32, 4, 2), ProductBlocks(64, 16, 8, 3, splits=3)):
        found = summed(product_in(blocks, x, weight, gated=False))
        torch.testing.assert_close(found, x @ weight.T, rtol=1e-4, atol=1e-4)


def test_attention_of_vanillas_token_is_torchs() -> None:
    """With more copies ours sees their hidden copies as well, which torch's does not."""
    case = attention_case(SIZE, 1, 20, CPU, tune=True)
    expected, found = both(case)
    torch.testing.assert_close(found, expected.reshape(1, -1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(case.calls["splits=2"][0](), found, rtol=1e-4, atol=1e-5)
    cached = 2 * 2 * 20 * 16 * 4
    assert case.bytes_moved == cached + 2 * 4 * 16 * 4
    # Three copies, of which two are new, and a ring of three.
    more = attention_case(SIZE, 3, 20, CPU, tune=False)
    hidden = 2 * 2 * 16 * 4
    assert more.bytes_moved == cached + 3 * hidden + 2 * 2 * hidden + 3 * 2 * 4 * 16 * 4


@pytest.mark.parametrize("K", [1, 3])
def test_norms_rope_and_the_write_are_torchs(K: int) -> None:
    expected, found = both(placement_case(SIZE, K, CPU))
    expected = expected[0, :, :, 0].transpose(0, 1).reshape(K, -1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_end_of_a_sublayer_is_torchs() -> None:
    case = residual_case(SIZE, 3, CPU)
    first, second, third = (case.calls[by][0]().clone() for by in (TORCH, OURS, TORCH))
    # Each adds the same to the residual stream.
    torch.testing.assert_close(second - first, third - second, rtol=1e-5, atol=1e-5)
    assert (second - first).abs().mean() > 0.5
    assert case.bytes_moved == 4 * 4 * 3 * 32


def test_there_is_a_row_for_every_kernel_by_torch_and_by_us() -> None:
    shapes = shapes_of([SIZE], CPU, (2,), (20,), tune=True)
    kept: list[Result] = []
    result = bench_decode(shapes, 1, CPU, keep=kept.append)
    # One more case each time.
    assert len(kept) == len(list(cases(SIZE, shapes, CPU)))
    assert all(len(a.rows) < len(b.rows) for a, b in pairwise(kept))
    assert kept[-1] == result
    kernels = [shape.name for shape in products_of(SIZE)]
    kernels += ["attention at 20", "q/k norm, RoPE, cache", "residual and norm"]
    found = {(row["kernel"], row["rows"], row["by"]) for row in result.rows}
    tried = "outs=16 depth=16 warps=4 stages=2 splits=1"
    expected = {(kernel, K, by) for kernel in kernels for K in (1, 2) for by in (TORCH, OURS)}
    expected |= {(kernel, K, tried) for kernel in kernels[:5] for K in (1, 2)}
    expected |= {("attention at 20", K, "splits=2") for K in (1, 2)}
    assert found == expected
    rows = {(row["kernel"], row["rows"], row["by"]): row for row in result.rows}
    for (kernel, K, by), row in rows.items():
        theirs = rows[kernel, K, TORCH]
        assert row["us"] == pytest.approx(theirs["us"] * row["x_torch"])
        moved = row["gb_per_s"] * row["us"]
        assert moved == pytest.approx(theirs["gb_per_s"] * theirs["us"])
        name = f"small {kernel}, {K} rows"
        if by == OURS:
            assert result.ratios[f"{name}: ours / torch"] == row["x_torch"]
            if (kernel, K, tried) in rows:
                ratio = rows[kernel, K, tried]["us"] / row["us"]
                assert result.ratios[f"{name}: {tried} / ours"] == pytest.approx(ratio)


def test_blocks_that_do_not_fit_are_left_out_but_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    def too_large() -> None:
        raise triton.OutOfResources(2, 1, "shared memory")

    def case_with(name: str) -> Callable[..., Any]:
        calls = {TORCH: [lambda: None], OURS: [lambda: None], name: [too_large]}
        return lambda *_: iter([Case("a kernel", 1, 8, calls)])

    # On the CPU nothing is called before it is timed, as it is on CUDA.
    monkeypatch.setattr(token_kernels.Graph, "__init__", lambda self, calls, _: _call(self, calls))
    shapes = shapes_of([SIZE], CPU)
    monkeypatch.setattr(token_kernels, "cases", case_with("outs=64"))
    assert [row["by"] for row in bench_decode(shapes, 1, CPU).rows] == [TORCH, OURS]
    monkeypatch.setattr(token_kernels, "cases", case_with(OURS))
    with pytest.raises(triton.OutOfResources):
        bench_decode(shapes, 1, CPU)


def _call(graph: token_kernels.Graph, calls: token_kernels.Calls) -> None:
    graph.calls, graph.graph = calls, None
    for call in calls:
        call()


def test_what_is_asked_takes_the_place_of_what_is_usual() -> None:
    usual = shapes_of([SIZE], CPU)
    assert (usual.rows, usual.contexts, usual.tune) == (ROWS["cpu"], CONTEXTS["cpu"], False)
    asked = shapes_of([SIZE], CPU, (16, 2), (9,), tune=True)
    assert (asked.rows, asked.contexts, asked.tune) == ((1, 2, 16), (9,), True)


def test_a_cpu_without_the_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_kernels, "is_interpreted", lambda: False)
    with pytest.raises(ConfigError, match="Triton's kernels run on CUDA, or slowly with TRITON_"):
        bench.main(BenchArguments(name="decode", device="cpu"))


def test_every_kernel_of_a_token_is_a_case() -> None:
    """Without measuring anything."""
    shapes = shapes_of([SIZE], CPU, (2,), (20,))
    assert len(list(cases(SIZE, shapes, CPU))) == 2 * (5 + 1 + 1 + 1)
