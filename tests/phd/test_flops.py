"""Counted FLOPs are torch's own count, with the dense mask's pairs replaced by the pattern's."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from phd.config import ModelConfig
from phd.flops import Flops, forward_flops, training_flops, training_flops_per_token
from phd.model import Transformer
from phd.pattern import patterns_of
from tests.phd.small_models import KINDS, configs, examples

claim = settings(derandomize=True, deadline=None, max_examples=50)
lengths = st.integers(1, 48)


def counted(config: ModelConfig, T: int, training: bool) -> Flops:
    """Torch's count of one row through the dense backend, whose attention alone is batched."""
    model = Transformer(replace(config, attention="reference"))
    tokens = torch.zeros(1, T, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        logits = model.logits(tokens)
        if training:
            logits.sum().backward()
    counts = counter.get_flop_counts()["Global"]
    products, batched = counts.pop(torch.ops.aten.mm), counts.pop(torch.ops.aten.bmm)
    assert not counts
    return Flops(products, batched)


@pytest.mark.parametrize("kind", KINDS)
@examples(50, tests=len(KINDS))
@given(data=st.data(), T=lengths)
def test_the_linear_part_is_what_torch_counts(kind: str, data: st.DataObject, T: int) -> None:
    config = data.draw(configs(kind=kind))
    assert forward_flops(config, T).linear == counted(config, T, training=False).linear


@pytest.mark.parametrize("kind", KINDS)
@examples(50, tests=len(KINDS))
@given(data=st.data(), T=lengths)
def test_a_pair_that_the_mask_allows_costs_what_torch_counts_for_it(
    kind: str, data: st.DataObject, T: int
) -> None:
    config = data.draw(configs(kind=kind))
    layers = [pattern.mask(T)[:, :, : pattern.key_copies] for pattern in patterns_of(config)]
    layers[-1] = layers[-1][-1]
    allowed, dense = sum(int(m.sum()) for m in layers), sum(m.numel() for m in layers)
    found, torchs = forward_flops(config, T), counted(config, T, training=False)
    assert found.attention * dense == torchs.attention * allowed
    assert found.total == found.linear + found.attention


@claim
@given(config=..., documents=st.lists(lengths, min_size=1, max_size=4))
def test_isolated_documents_cost_what_rows_of_their_own_cost(
    config: ModelConfig, documents: list[int]
) -> None:
    alone = [forward_flops(config, T) for T in documents]
    assert forward_flops(config, *documents) == tuple(map(sum, zip(*alone, strict=True)))
    assert training_flops(config, *documents) == 3 * sum(x.total for x in alone)
    per_token = training_flops_per_token(config, *documents)
    assert per_token * sum(documents) == pytest.approx(3 * sum(x.total for x in alone))


@claim
@given(config=..., T=lengths)
def test_a_training_step_costs_three_forward_passes(config: ModelConfig, T: int) -> None:
    forward, step = (counted(config, T, training).total for training in (False, True))
    assert step == 3 * forward
    assert training_flops_per_token(config, T) * T == 3 * forward_flops(config, T).total
