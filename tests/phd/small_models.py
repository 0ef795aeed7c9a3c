"""Models small enough for slow comparisons, with no weight that hides a mistake."""

import os
from dataclasses import replace
from typing import Any

import torch
from hypothesis import settings
from torch import nn

from phd.config import VARIANTS, ModelConfig, Variant
from phd.model import Transformer

VOCAB, LIMIT = 17, 64
SMALL = ModelConfig(
    K=3,
    window=4,
    chunk=8,
    layers=3,
    dim=16,
    ffn_dim=20,
    heads=4,
    kv_heads=2,
    head_dim=4,
    vocab_size=VOCAB,
    max_seq_len=LIMIT,
)

# Wide enough for the kernels of CUDA.
FOR_CUDA = replace(
    SMALL,
    window=16,
    chunk=32,
    dim=128,
    ffn_dim=256,
    head_dim=64,
    vocab_size=257,
    max_seq_len=600,
)


def examples(usual: int) -> settings:
    """Hypothesis's settings: always the same examples, or `make soak-rules`' number of new ones."""
    asked = os.environ.get("CASES")
    return settings(derandomize=asked is None, deadline=None, max_examples=int(asked or usual))


def of_variant(variant: Variant, **others: Any) -> ModelConfig:
    K = min(SMALL.K, VARIANTS[variant].most_copies or SMALL.K)
    return replace(SMALL, **{"variant": variant, "K": K, **others})


def model_of(config: ModelConfig = SMALL, dtype: torch.dtype = torch.float64) -> Transformer:
    """A model without norms of 1 and copy embeddings of 0."""
    model = Transformer(config).reset(0).to(dtype)
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if "norm" in name:
            nn.init.uniform_(weight, 0.5, 1.5, generator=generator)
    if config.copy_embedding:
        nn.init.normal_(model.copy_embed.weight, generator=generator)
    return model
