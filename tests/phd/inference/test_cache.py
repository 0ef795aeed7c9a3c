"""The cache holds what its variant remembers, and not a byte more."""

from typing import Any

import pytest
import torch

from phd.config import ModelConfig
from phd.inference.cache import KVCache, kv_bytes

SHAPE: dict[str, Any] = {"layers": 4, "kv_heads": 2, "head_dim": 64}
# A slot's keys and values, 2 * layers * G * H values of two bytes.
SLOT = 2 * 4 * 2 * 64 * 2


def cache_of(batch: int = 1, capacity: int = 8, **settings: Any) -> KVCache:
    return KVCache(ModelConfig(**SHAPE, **settings), batch, capacity=capacity)


@pytest.mark.parametrize(
    ("settings", "hidden_slots"),
    [
        ({"variant": "vanilla", "K": 1}, 0),
        ({"variant": "naive_repeat", "K": 3}, 2000),
        ({"variant": "phd", "K": 3}, 0),
        ({"variant": "phd_swa", "K": 3, "window": 16}, 16),
        ({"variant": "phd_swa", "K": 3, "window": 5000}, 2000),
        ({"variant": "phd_swa", "K": 3, "window": 16, "span_unit": "token"}, 32),
        ({"variant": "phd_cswa", "K": 3, "window": 16, "chunk": 32}, 16),
        ({"variant": "phd_cswa", "K": 4, "window": 16, "chunk": 7}, 9),
        ({"variant": "phd_cswa", "K": 3, "window": 16, "chunk": 5, "span_unit": "token"}, 10),
        ({"variant": "phd_cswa", "K": 1}, 0),
        ({"variant": "pause", "K": 3}, 2000),
        ({"variant": "vanilla", "K": 1, "passes": 3}, 0),
        ({"variant": "vanilla", "K": 1, "passes": 3, "loop_keys": "own"}, 2000),
        ({"variant": "hidden_decoding", "K": 2}, 1000),
        ({"variant": "free_pause", "K": 2}, 0),
        ({"variant": "sps", "K": 2, "window": 0}, 0),
        ({"variant": "sps", "K": 2, "window": 16}, 16),
        ({"variant": "sps", "K": 3, "window": 16}, 32),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_a_cache_holds_the_originals_and_the_hidden_copies_in_reach(
    settings: dict[str, Any], hidden_slots: int
) -> None:
    config = ModelConfig(**SHAPE, **settings)
    found = kv_bytes(config, 1000, torch.bfloat16)
    assert found == ((1000 + hidden_slots) * SLOT, hidden_slots * SLOT)
    cache = KVCache(config, capacity=1000, dtype=torch.bfloat16)
    allocated = [x.untyped_storage().nbytes() for x in (*cache.originals, *cache.ring)]
    assert cache.nbytes == sum(allocated) == found.total


@pytest.mark.parametrize("context", [1, 50, 1000, 4096])
def test_no_context_costs_more_than_vanilla_and_a_window(context: int) -> None:
    def size(**settings: Any) -> int:
        return kv_bytes(ModelConfig(**SHAPE, **settings), context, torch.bfloat16).total

    vanilla = size(variant="vanilla", K=1)
    assert size(variant="phd", K=5) == vanilla == context * SLOT
    assert size(variant="naive_repeat", K=5) == 5 * vanilla
    for variant in ("phd_swa", "phd_cswa", "sps"):
        assert size(variant=variant, K=2) == vanilla + min(16, context) * SLOT


def test_rows_have_their_own_bytes() -> None:
    assert cache_of(3).nbytes == 3 * cache_of(1).nbytes


def test_a_cache_grows_by_blocks_and_forgets_nothing() -> None:
    cache = cache_of(capacity=3, variant="phd_swa", K=3, window=9)
    assert cache.ring[0].shape[3] == 6
    before = [x.normal_().clone() for x in (*cache.originals, *cache.ring)]
    cache.reserve(3)
    assert cache.capacity == 3
    cache.reserve(4)
    assert cache.capacity == 256
    assert cache.ring[0].shape[3] == 9
    for old, new in zip(before, (*cache.originals, *cache.ring), strict=True):
        assert torch.equal(new[:, :, :, : old.shape[3]], old)
        assert not new[:, :, :, old.shape[3] :].any()
    cache.reserve(257)
    assert cache.capacity == 512
    cache.reserve(5000)  # more than max_seq_len is padding
    assert cache.capacity == 5000


def test_rows_are_chosen_with_all_that_they_remember() -> None:
    cache = cache_of(3, variant="phd_cswa", K=2)
    cache.advance([4, 1, 2])
    for x in (*cache.originals, *cache.ring):
        x.copy_(torch.arange(3.0)[:, None, None, None])
    cache.select(torch.tensor([2, 0, 2, 1]))
    assert cache.host_lengths == cache.lengths.tolist() == [2, 4, 2, 1]
    for x in (*cache.originals, *cache.ring):
        assert x[0, :, 0, 0, 0].tolist() == x[1, :, 1, -1, -1].tolist() == [2, 0, 2, 1]


@pytest.mark.parametrize("cuts", [[1] * 9, [2, 1, 5], [7, 3], [30]])
def test_each_slot_of_the_ring_holds_the_hidden_copy_of_its_number(cuts: list[int]) -> None:
    sliced, by_row = (cache_of(2, variant="phd_swa", K=2, window=4) for _ in range(2))
    layer, written = 1, 0
    G, H = SHAPE["kv_heads"], SHAPE["head_dim"]
    for new in cuts:
        number = torch.arange(written, written + new, dtype=torch.float32)
        k = number[None, None, :, None].expand(2, G, -1, H)
        sliced.write_ring_slice(layer, k, -k, written + new)
        numbers = by_row.ring_numbers(torch.full((2, 1), written + new))
        source, is_new = (numbers - written).clamp(min=0), numbers >= written
        by_row.write_ring_rows(layer, k, -k, source, is_new)
        written += new
        for cache in (sliced, by_row):
            keys, values = cache.ring[layer]
            held = numbers >= 0
            assert torch.equal(keys[:, 0, :, 0][held], numbers[held].float())
            assert torch.equal(values, -keys)
            assert not cache.ring[0].any()
