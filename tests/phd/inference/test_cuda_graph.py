"""A captured step decodes what the full forward gives, at all lengths."""

from typing import get_args

import pytest
import torch

from phd.config import Variant
from phd.inference.cache import KVCache
from phd.inference.cuda_graph import Decoder
from phd.inference.prefill import prefill
from phd.model import Transformer
from tests.phd.small_models import model_of, of_variant

variants = pytest.mark.parametrize("variant", get_args(Variant))
TOKENS = torch.randint(0, 17, (2, 40), generator=torch.Generator().manual_seed(0))


def model_of_40(variant: Variant) -> Transformer:
    return model_of(of_variant(variant, max_seq_len=40))


def begun(model: Transformer, capacity: int) -> tuple[KVCache, list[int]]:
    """A cache of two prompts of unequal length."""
    lengths = [9, 4]
    return prefill(model, TOKENS[:, :9], lengths, capacity=capacity)[1], lengths


@variants
@pytest.mark.parametrize("capacity", [9, 40])  # one grows, one has room from the start
def test_it_decodes_what_the_full_forward_gives(variant: Variant, capacity: int) -> None:
    model = model_of_40(variant)
    full = model.logits(TOKENS)
    cache, lengths = begun(model, capacity)
    decoder = Decoder(model, cache)
    for _ in range(31):
        logits = decoder(torch.stack([TOKENS[row, n] for row, n in enumerate(lengths)]))
        expected = torch.stack([full[row, n] for row, n in enumerate(lengths)])
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)
        lengths = [n + 1 for n in lengths]
        assert cache.host_lengths == cache.lengths.tolist() == lengths
    with pytest.raises(ValueError, match="a row of 41 tokens is longer"):
        decoder(TOKENS[:, 0])
