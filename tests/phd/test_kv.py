"""The KV table says what a cache of each variant holds."""

from typing import Any

import pytest

from phd.config import ModelConfig
from phd.kv import kv_bytes

# layers 4, G 2, H 64: a slot's keys and values are 2 * 4 * 2 * 64 values of two bytes.
SLOT = 2048


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
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_a_cache_holds_the_originals_and_the_hidden_copies_in_reach(
    settings: dict[str, Any], hidden_slots: int
) -> None:
    shape = {"layers": 4, "kv_heads": 2, "head_dim": 64}
    found = kv_bytes(ModelConfig(**shape, **settings), 1000)
    assert found == (1000 * SLOT, hidden_slots * SLOT)
    assert found.total == (1000 + hidden_slots) * SLOT


def test_float32_takes_twice_the_bytes() -> None:
    config = ModelConfig()
    assert kv_bytes(config, 100, bytes_per_value=4).total == 2 * kv_bytes(config, 100).total
