"""Every answer that `Pattern` gives follows from the three rules, read slot by slot."""

from itertools import product
from math import ceil

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from phd.config import VARIANTS, ModelConfig, Variant
from phd.pattern import Pattern, patterns_of
from tests.phd.small_models import configs, examples

claim = settings(derandomize=True, deadline=None, max_examples=80)
lengths = st.integers(1, 12)


def remembered(n: int, m: int, r: int) -> bool:
    """Rule 1: every slot sees the originals up to its own token."""
    return r == 0 and m <= n


def own(n: int, s: int, m: int, r: int) -> bool:
    """Rule 2: a token's own hidden copies, causally."""
    return m == n and 1 <= r <= s


def near(config: ModelConfig, n: int, s: int, m: int, r: int) -> bool:
    """Rule 3: hidden copies within the window and the chunk."""
    if config.variant == "sps":
        return r >= 1 and (m, r) <= (n, s) and n - m <= config.window
    if config.variant not in ("phd_swa", "phd_cswa") or r == 0:
        return False
    if s == 0 and not config.originals_see_hidden:
        return False
    hidden = config.K - 1
    distance = n * hidden + s - 1 - (m * hidden + r - 1)
    by_token = config.span_unit == "token"
    chunk = config.chunk if by_token else ceil(config.chunk / hidden)
    if config.variant == "phd_cswa" and n // chunk != m // chunk:
        return False
    return distance >= 0 and (n - m if by_token else distance) < config.window


def sees(config: ModelConfig, n: int, s: int, m: int, r: int) -> bool:
    if config.variant in ("naive_repeat", "pause", "hidden_decoding"):
        return (m, r) <= (n, s)
    if config.variant == "free_pause":
        return remembered(n, m, r)
    return remembered(n, m, r) or own(n, s, m, r) or near(config, n, s, m, r)


def hidden_mask(pattern: Pattern, T: int) -> Tensor:
    """Which hidden copies, numbered h, the local copies see: bool (T * local, T * (K-1))."""
    local = pattern.local_copies
    return pattern.mask(T)[-local:, :, 1:].permute(1, 0, 3, 2).reshape(T * local, -1)


@pytest.mark.parametrize("variant", VARIANTS)
@examples(90, tests=len(VARIANTS))
@given(data=st.data(), T=lengths)
def test_the_mask_is_the_three_rules(variant: Variant, data: st.DataObject, T: int) -> None:
    config = data.draw(configs(kind=variant))
    K = config.K
    slots = list(product(range(K), range(T)))
    expected = torch.tensor([[sees(config, n, s, m, r) for r, m in slots] for s, n in slots])
    assert torch.equal(Pattern.of(config).mask(T), expected.view(K, T, K, T))


@claim
@given(pattern=..., T=lengths)
def test_one_slot_at_a_time_the_predicate_agrees_with_the_mask(pattern: Pattern, T: int) -> None:
    mask = pattern.mask(T)
    for s, n, r, m in product(*map(range, mask.shape)):
        assert pattern.allows(n, s, m, r) == mask[s, n, r, m]


@claim
@given(pattern=..., T=lengths)
def test_a_local_copy_sees_the_last_so_many_hidden_copies_up_to_itself_or_before_it(
    pattern: Pattern, T: int
) -> None:
    assume(pattern.rule == "hidden")
    hidden = pattern.K - 1
    copies = torch.arange(pattern.K - pattern.local_copies, pattern.K)
    place = (torch.arange(T)[:, None] * hidden + copies - 1).flatten()
    behind = place[:, None] - torch.arange(T * hidden)
    seen = pattern.visible_hidden_copies(torch.arange(T)).T.flatten()[:, None]
    assert torch.equal(hidden_mask(pattern, T), (behind >= 0) & (behind < seen))


@claim
@given(pattern=..., T=lengths)
def test_the_tokens_seen_of_each_copy_are_an_interval(pattern: Pattern, T: int) -> None:
    token = torch.arange(T)
    for s, r in product(range(pattern.K), repeat=2):
        low, high = (x[:, None] for x in pattern.visible_tokens(s, r, token))
        assert torch.equal(pattern.mask(T)[s, :, r], (token >= low) & (token <= high))


@claim
@given(pattern=..., T=lengths, data=st.data())
def test_pairs_counts_the_mask(pattern: Pattern, T: int, data: st.DataObject) -> None:
    copies = data.draw(st.integers(1, pattern.K))
    assert pattern.pairs(T, copies) == pattern.mask(T)[-copies:].sum()
    assert pattern.pairs(T) == pattern.mask(T).sum()


@claim
@given(pattern=..., T=lengths)
def test_no_hidden_copy_sees_further_than_span_tokens(pattern: Pattern, T: int) -> None:
    assume(pattern.rule == "hidden" and pattern.chunk_tokens is None)
    _, n, r, m = pattern.mask(T).nonzero().unbind(1)
    furthest = int((n - m)[r > 0].max()) + 1
    assert furthest == min(T, pattern.span_tokens)


@claim
@given(config=..., T=lengths)
def test_the_cache_holds_what_is_remembered_and_the_most_that_rule_3_shows_at_once(
    config: ModelConfig, T: int
) -> None:
    K, W = config.K, config.window
    tokens_seen = config.variant == "sps" or (
        config.originals_see_hidden and config.span_unit == "token"
    )
    if config.variant in ("naive_repeat", "pause", "hidden_decoding"):
        expected = (T * K, 0)
    elif config.variant in ("phd_swa", "phd_cswa", "sps") and tokens_seen:
        # What the tokens after these, however many, see of one another's hidden copies.
        slots, later = list(product(range(T + 9), range(1, K))), range(T + 9)
        shown = [sum(near(config, n, 0, m, r) for m, r in slots if m < n) for n in later]
        expected = (T, min(max(shown), T * (K - 1)))
        assert W > T + 8 or config.variant == "phd_cswa" or max(shown) <= W * (K - 1)
    else:
        slots = list(product(range(T), range(1, K)))
        shown = [sum(near(config, n, s, m, r) for m, r in slots) for n, s in slots]
        expected = (T, max(shown, default=0))
    assert Pattern.of(config).cached_slots(T) == expected


@claim
@given(pattern=..., T=st.integers(1, 5))
def test_the_drawing_shows_the_mask(pattern: Pattern, T: int) -> None:
    size = pattern.K * T
    rows = [line.split()[1:] for line in pattern.draw(T).splitlines()[1:]]
    drawn = torch.tensor([[cell != "." for cell in row] for row in rows])
    assert torch.equal(drawn, pattern.mask(T).view(size, size))


@claim
@given(config=..., T=lengths)
def test_keys_that_no_slot_sees_are_not_computed_and_all_others_are(
    config: ModelConfig, T: int
) -> None:
    pattern = Pattern.of(config)
    is_seen = pattern.mask(T).flatten(0, 1).any(0).any(1)
    assert is_seen.tolist() == [r < pattern.key_copies for r in range(pattern.K)]


@claim
@given(config=..., T=lengths)
def test_originals_are_vanilla_where_they_see_no_hidden_copy(config: ModelConfig, T: int) -> None:
    pattern, token = Pattern.of(config), torch.arange(T)
    mask = pattern.mask(T)[0]
    assert torch.equal(mask[:, 0], token[:, None] >= token)
    sees_hidden = bool(mask[:, 1:].any())
    assert not (pattern.originals_are_vanilla and sees_hidden)
    # Of the first tokens there are no hidden copies to see.
    if T > 1 and pattern.chunk_tokens != 1:
        assert pattern.originals_are_vanilla is not sees_hidden


NOT_VANILLA = {"naive_repeat", "pause", "hidden_decoding", "sps"}


def test_the_variants_whose_originals_are_not_vanillas_are_these() -> None:
    found = {
        name
        for name, traits in VARIANTS.items()
        if not Pattern.of(
            ModelConfig(variant=name, K=traits.most_copies or 3)
        ).originals_are_vanilla
    }
    assert found == NOT_VANILLA


def test_layers_of_streams_show_each_copy_its_own_past_and_the_others_all() -> None:
    config = ModelConfig(variant="hidden_decoding", K=3, layers=8, full_every=3)
    patterns = patterns_of(config)
    assert [p.rule == "flat" for p in patterns] == [i in (2, 5, 7) for i in range(8)]
    slots = list(product(range(3), range(5)))
    expected = torch.tensor([[r == s and m <= n for r, m in slots] for s, n in slots])
    assert torch.equal(patterns[0].mask(5).view(15, 15), expected)


def test_sps_without_a_window_is_plain_phd() -> None:
    sps = ModelConfig(variant="sps", window=0)
    assert Pattern.of(sps) == Pattern.of(ModelConfig(variant="phd"))


@claim
@given(w=st.integers(1, 6), K=st.integers(2, 4))
def test_sps_is_phd_swa_whose_originals_see_hidden_copies(w: int, K: int) -> None:
    sps = ModelConfig(variant="sps", K=K, window=w)
    swa = ModelConfig(
        variant="phd_swa", K=K, window=w + 1, span_unit="token", originals_see_hidden=True
    )
    assert Pattern.of(sps) == Pattern.of(swa)
