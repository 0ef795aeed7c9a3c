"""What a sequence takes in the KV cache, of a variant and of those to compare it with."""

from dataclasses import replace
from typing import NamedTuple

import torch

from phd.config import ModelConfig
from phd.inference.cache import kv_bytes


class KVRow(NamedTuple):
    """The bytes of one sequence in the KV cache of a variant."""

    name: str
    total: int
    hidden: int
    ratio: float


def kv_rows(model: ModelConfig, context: int, dtype: torch.dtype) -> list[KVRow]:
    """The KV bytes of this variant, vanilla and naive repetition, at `context` tokens.

    A variant is shown once. With one copy nothing is repeated, and that is vanilla.
    """
    vanilla = model.vanilla_twin
    variants = [model, vanilla]
    if model.K > 1:
        variants.append(replace(model, variant="naive_repeat"))
    base = kv_bytes(vanilla, context, dtype).total
    rows = []
    for variant in dict.fromkeys(variants):
        cost = kv_bytes(variant, context, dtype)
        rows.append(KVRow(variant.name, cost.total, cost.hidden, cost.total / base))
    return rows
