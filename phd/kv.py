"""What the key/value cache of a variant costs at inference."""

from typing import NamedTuple

from phd.config import ModelConfig
from phd.pattern import Pattern


class KVBytes(NamedTuple):
    """Bytes of keys and values of one sequence, over all layers."""

    originals: int
    hidden: int

    @property
    def total(self) -> int:
        return self.originals + self.hidden


def kv_bytes(config: ModelConfig, context: int, bytes_per_value: int = 2) -> KVBytes:
    """Cache of one sequence of `context` tokens: 2 L G H values for every slot that is kept.

    bytes_per_value: 2 for bfloat16 and float16, 4 for float32.
    """
    slot = 2 * config.layers * config.kv_heads * config.head_dim * bytes_per_value
    originals, hidden = Pattern.of(config).cached_slots(context)
    return KVBytes(originals * slot, hidden * slot)
