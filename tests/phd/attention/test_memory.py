"""Training with the packed backend never holds anything quadratic in the row."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import phd.attention.tiles
from phd.config import ModelConfig
from phd.model import Transformer
from phd.segments import Segments

# Every tensor that a step at T = 1024 needs is smaller than a bool mask of T x T would be.
SHAPE: dict[str, Any] = {
    "layers": 2,
    "dim": 32,
    "ffn_dim": 64,
    "heads": 2,
    "kv_heads": 1,
    "head_dim": 16,
    "vocab_size": 128,
}


class LargestTensor(TorchDispatchMode):
    """The bytes of the largest tensor that any operation made, forward or backward."""

    nbytes = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        results = operation(*args, **kwargs or {})
        for result in tree_leaves(results):
            if isinstance(result, torch.Tensor):
                self.nbytes = max(self.nbytes, result.untyped_storage().nbytes())
        return results


def largest_tensor_of_a_step(T: int, segments: Segments | None = None, **settings: Any) -> int:
    model = Transformer(ModelConfig(**SHAPE, K=3, max_seq_len=T, **settings)).reset(0)
    tokens, targets = torch.randint(0, SHAPE["vocab_size"], (2, 1, T))
    with LargestTensor() as largest:
        model.loss(tokens, targets, segments=segments).total.backward()
    return largest.nbytes


models = pytest.mark.parametrize(
    "settings",
    [
        {"variant": "naive_repeat"},
        {"variant": "phd"},
        {"variant": "phd_swa"},
        {"variant": "phd_cswa"},
        {"variant": "phd_cswa", "copy_positions": "flattened", "copy_embedding": True},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)


@models
def test_a_packed_step_makes_nothing_as_large_as_a_mask_of_the_row(
    settings: dict[str, Any],
) -> None:
    T = 1024
    assert largest_tensor_of_a_step(T, attention="packed", **settings) < T * T


@models
def test_nor_does_it_when_the_row_holds_documents(settings: dict[str, Any]) -> None:
    T = 1024
    cu_seqlens = torch.tensor([[0] * 5 + [5] * 700 + [705] * (T - 705)])
    segments = Segments.of(cu_seqlens)
    assert largest_tensor_of_a_step(T, segments, attention="packed", **settings) < T * T


@pytest.mark.parametrize("variant", ["phd_swa", "phd_cswa"])
def test_scores_of_a_window_longer_than_the_row_are_computed_in_parts(
    variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    T = 2048
    monkeypatch.setattr(phd.attention.tiles, "SCORES_AT_ONCE", T * T // 8)
    found = largest_tensor_of_a_step(T, variant=variant, window=T + 1, chunk=3 * T)
    assert found < T * T


def test_the_measure_catches_the_dense_mask() -> None:
    T = 256
    assert largest_tensor_of_a_step(T, variant="phd_cswa", attention="reference") >= (3 * T) ** 2
