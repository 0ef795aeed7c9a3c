"""A captured step decodes as the plain one does, whatever the lengths are."""

from functools import partial
from typing import get_args

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from phd.config import Variant
from phd.inference.cache import KVCache
from phd.inference.cuda_graph import Decoder
from phd.inference.prefill import one_step, prefill
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


@pytest.mark.compile
@variants
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_its_work_is_one_graph_for_all_lengths(variant: Variant) -> None:
    torch.compiler.reset()
    model = model_of_40(variant)
    full = model.logits(TOKENS)
    _, cache = prefill(model, TOKENS[:, :9], capacity=40)
    counter = CompileCounterWithBackend("aot_eager")
    work = torch.compile(
        partial(one_step, static=True), backend=counter, fullgraph=True, dynamic=False
    )
    with torch.no_grad():
        for n in range(9, 15):
            logits = work(model, TOKENS[:, n], cache)
            torch.testing.assert_close(logits, full[:, n], rtol=0, atol=1e-9)
            cache.advance([1, 1])
    assert counter.frame_count == 1


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of its compiler
def test_more_models_and_shapes_are_compiled_than_torch_would() -> None:
    torch.compiler.reset()
    with torch._dynamo.config.patch(recompile_limit=2):
        for capacity in range(10, 14):
            model = model_of(of_variant("vanilla", max_seq_len=40, layers=1))
            _, cache = prefill(model, TOKENS[:, :9], capacity=capacity)
            logits = Decoder(model, cache, compiled=True)(TOKENS[:, 9])
            torch.testing.assert_close(logits, model.logits(TOKENS)[:, 9], rtol=0, atol=1e-9)
        assert torch._dynamo.config.recompile_limit == 2
