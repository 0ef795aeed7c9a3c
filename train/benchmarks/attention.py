"""Forward and backward of one layer's attention: PHD's variants, vanilla and naive repetition."""

from math import ceil
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from phd.attention.attend import attend
from phd.config import Backend, ModelConfig
from phd.pattern import Pattern
from train.benchmarks.timing import Result, Times, Work, beside

HEADS, KV_HEADS, HEAD_DIM = 8, 2, 64
"""N, G and H: grouped-query attention with 4 query heads for each key head, as in size 550m."""

SEQ_LENS = (1024, 2048)
COPIES = (2, 3, 4)


def bench_attention(repeat: int, device: torch.device) -> Result:
    """Forward and backward at B = 1, N = 8, G = 2, H = 64; W = 16 and C = 32.

    Args:
        repeat: turns of each piece of work. The dense mask gets a quarter of them.
        device: where it is measured; FlexAttention is included on CUDA only.
    """
    rows: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    for T in SEQ_LENS:
        vanilla = _vanilla_work(T, device)
        works: dict[str, Work] = {}
        for K in COPIES:
            config = ModelConfig(variant="phd_cswa", K=K)
            works[f"packed_K{K}"] = _attention_work(config, "packed", T, device)
        naive = ModelConfig(variant="naive_repeat", K=3)
        works["naive_K3"] = _attention_work(naive, "packed", T, device)
        config = ModelConfig(variant="phd_cswa", K=3)
        if device.type == "cuda":
            works["flex_K3"] = _attention_work(config, "flex", T, device)
        times = beside("vanilla", vanilla, works, repeat, device)
        # The dense mask takes up to 53 times as long as vanilla (T = 2048, two CPU cores) and
        # gigabytes of memory, which would disturb the others. So it has turns of its own.
        dense = _attention_work(config, "reference", T, device)
        slow = {"dense_mask_K3": dense}
        times = times.with_works_of(beside("vanilla", vanilla, slow, ceil(repeat / 4), device))
        rows += [{"T": T, "work": name} | times.columns(name) for name in times.seconds]
        ratios |= _attention_ratios(T, times)
    return Result(rows, ratios)


def _attention_ratios(T: int, times: Times) -> dict[str, float]:
    """PHD's attention over vanilla's, and naive repetition's over PHD's, as the table has them."""
    over_vanilla = {name: times.ratio(name).median for name in times.seconds}
    ratios = {f"packed_over_vanilla_K{K}_T{T}": over_vanilla[f"packed_K{K}"] for K in COPIES}
    naive = over_vanilla["naive_K3"] / over_vanilla["packed_K3"]
    return ratios | {f"naive_over_packed_K3_T{T}": naive}


def _inputs(K: int, T: int, device: torch.device) -> tuple[list[Tensor], Tensor]:
    """q, k, v and the gradient of the output, each (1, heads, K, T, H)."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k, v, dout = (
        torch.randn(1, heads, K, T, HEAD_DIM, device=device, dtype=dtype)
        for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)
    )
    return [x.requires_grad_() for x in (q, k, v)], dout


def _attention_work(config: ModelConfig, backend: Backend, T: int, device: torch.device) -> Work:
    inputs, dout = _inputs(config.K, T, device)
    pattern = Pattern.of(config)
    q, k, v = inputs
    return lambda: torch.autograd.grad(attend(q, k, v, pattern, backend), inputs, dout)


def _vanilla_work(T: int, device: torch.device) -> Work:
    """PyTorch's own causal attention, with the kernel that it chooses."""
    inputs, dout = _inputs(1, T, device)
    q, k, v, dout = (x.detach().squeeze(2) for x in (*inputs, dout))
    inputs = [x.requires_grad_() for x in (q, k, v)]

    def work() -> None:
        out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        torch.autograd.grad(out, inputs, dout)

    return work
