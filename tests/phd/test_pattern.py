"""Every answer that `Pattern` gives follows from the three rules, read slot by slot."""

from itertools import product
from math import ceil

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from phd.config import ModelConfig
from phd.pattern import Pattern

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
    if config.variant not in ("phd_swa", "phd_cswa") or s == 0 or r == 0:
        return False
    hidden = config.K - 1
    distance = n * hidden + s - 1 - (m * hidden + r - 1)
    by_token = config.span_unit == "token"
    chunk = config.chunk if by_token else ceil(config.chunk / hidden)
    if config.variant == "phd_cswa" and n // chunk != m // chunk:
        return False
    return distance >= 0 and (n - m if by_token else distance) < config.window


def sees(config: ModelConfig, n: int, s: int, m: int, r: int) -> bool:
    if config.variant == "naive_repeat":
        return (m, r) <= (n, s)
    return remembered(n, m, r) or own(n, s, m, r) or near(config, n, s, m, r)


def hidden_mask(pattern: Pattern, T: int) -> Tensor:
    """The hidden quadrant, numbered h: bool (T * (K-1), T * (K-1))."""
    hidden = pattern.mask(T)[1:, :, 1:]
    return hidden.permute(1, 0, 3, 2).reshape(T * (pattern.K - 1), -1)


@claim
@given(config=..., T=lengths)
def test_the_mask_is_the_three_rules(config: ModelConfig, T: int) -> None:
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
def test_a_hidden_copy_sees_the_last_so_many_hidden_copies_up_to_itself(
    pattern: Pattern, T: int
) -> None:
    assume(pattern.rule == "hidden")
    h = torch.arange(T * (pattern.K - 1))
    behind = h[:, None] - h
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
    s, n, r, m = pattern.mask(T).nonzero().unbind(1)
    assert pattern.span_tokens is not None
    furthest = int((n - m)[(s > 0) & (r > 0)].max()) + 1
    assert furthest == min(T, pattern.span_tokens)


@claim
@given(config=..., T=lengths)
def test_the_cache_holds_what_is_remembered_and_the_most_that_rule_3_shows_at_once(
    config: ModelConfig, T: int
) -> None:
    K = config.K
    if config.variant == "naive_repeat":
        expected = (T * K, 0)
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
