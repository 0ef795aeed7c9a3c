"""What comes from a cache equals the full forward pass, however the text was cut up."""

from dataclasses import dataclass, replace
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from phd.config import LoopKeys, ModelConfig, Variant
from phd.inference import equal_rows, ragged_rows
from phd.inference.cache import KVCache
from phd.inference.prefill import decode, extend, new_cache, prefill
from phd.model import Transformer
from tests.phd.small_models import KINDS, LIMIT, configs, examples, model_of, of_variant

variants = pytest.mark.parametrize("variant", get_args(Variant))


SHAPE = {"dim": 16, "heads": 4, "kv_heads": 2, "head_dim": 4, "max_seq_len": LIMIT}
# Which hidden copies a token sees is computed in tiles with these.
TILED = ("phd", "phd_swa", "phd_cswa", "sps")


@dataclass(frozen=True)
class Cuts:
    """How some rows are read: prompts, in pieces or not, and then so many tokens of each row.

    `read` gives the new tokens of each row, and for how many of them there are logits; where each
    row has one new token, it is decoded.
    """

    tokens: Tensor
    prompts: list[int]
    piece: int | None
    read: list[tuple[list[int], int]]


@st.composite
def cuts(draw: st.DrawFn) -> Cuts:
    B, T = draw(st.integers(1, 3)), draw(st.integers(2, 40))
    tokens = torch.randint(
        0, 17, (B, T), generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))
    )
    even = draw(st.booleans())
    first = draw(st.integers(1, T))
    prompts = [first if even else draw(st.integers(1, T)) for _ in range(B)]
    read, done = [], list(prompts)
    for _ in range(draw(st.integers(0, 12))):
        left = [T - n for n in done]
        most = draw(st.sampled_from([1, 1, 3, 9]))
        new = [min(most, n) if even else draw(st.integers(0, min(most, n))) for n in left]
        if max(new) == 0:
            continue
        read.append((new, draw(st.integers(0, min(n for n in new if n)))))
        done = [a + b for a, b in zip(done, new, strict=True)]
    return Cuts(tokens, prompts, draw(st.sampled_from([None, 1, 3, 7])), read)


def padded(tokens: Tensor, begins: list[int], counts: list[int], padding: int = 0) -> Tensor:
    """So many tokens of each row from its place on, and behind them what must not matter."""
    out = torch.full((len(counts), max(counts) + padding), 16)
    for row, (begin, count) in enumerate(zip(begins, counts, strict=True)):
        out[row, :count] = tokens[row, begin : begin + count]
    return out


def worst(model: Transformer, cut: Cuts, padding: int = 0) -> float:
    """The largest difference between the logits from a cache and those of the full forward."""
    tokens, rows = cut.tokens, range(len(cut.tokens))
    full = model.logits(tokens).detach()
    done = list(cut.prompts)
    prompt = padded(tokens, [0] * len(done), done)
    logits, cache = prefill(model, prompt, done, piece=cut.piece)
    differences = [logits[row] - full[row, done[row] - 1] for row in rows]
    for new, keep in cut.read:
        text = padded(tokens, done, new, padding)
        one = text.shape[1] == 1 == min(new)
        logits = (
            decode(model, text[:, 0], cache)[:, None]
            if one
            else extend(model, text, cache, new, keep=keep)
        )
        assert logits.shape == (len(new), 1 if one else keep, 17)
        done = [a + b for a, b in zip(done, new, strict=True)]
        kept = logits.shape[1]
        differences += [
            logits[row] - full[row, done[row] - kept : done[row]] for row in rows if new[row]
        ]
    assert cache.host_lengths == cache.lengths.tolist() == done
    return max(x.abs().max().item() for x in differences if x.numel())


@pytest.mark.parametrize("kind", KINDS)
@examples(250, tests=len(KINDS))
@given(data=st.data(), cut=cuts(), padding=st.integers(0, 2))
def test_logits_from_a_cache_are_those_of_the_full_forward(
    kind: str, data: st.DataObject, cut: Cuts, padding: int
) -> None:
    model = model_of(data.draw(configs(kind=kind, **SHAPE)))
    assert worst(model, cut, padding) < 1e-9


@pytest.mark.parametrize("kind", TILED)
@settings(derandomize=True, deadline=None, max_examples=35)
@given(data=st.data(), cut=cuts())
def test_hidden_copies_of_a_prompt_may_be_cut_into_tiles(
    kind: str, data: st.DataObject, cut: Cuts
) -> None:
    config = data.draw(configs(kind=kind, **SHAPE))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(equal_rows, "QUERIES_PER_TILE", 1)
        assert worst(model_of(config), cut) < 1e-9


def test_a_mask_of_all_pairs_is_refused_where_it_would_be_large(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, tokens = model_of(of_variant("sps")), torch.randint(0, 17, (2, 30))
    whole, _ = prefill(model, tokens, [30, 7])
    monkeypatch.setattr(ragged_rows, "MOST_PAIRS", 2 * 3 * 10 * (2 * 10 + 8))
    with pytest.raises(ValueError, match=r"^2 rows of unequal lengths .* 30 new tokens: .*`piece`"):
        prefill(model, tokens, [30, 7])
    in_pieces, _ = prefill(model, tokens, [30, 7], piece=10)
    torch.testing.assert_close(in_pieces, whole)
    prefill(model_of(of_variant("phd_swa")), tokens, [30, 7])


@variants
@pytest.mark.parametrize("prompt", [7, 8, 9])  # around a chunk's border, of 4 tokens
def test_in_float32_too(variant: Variant, prompt: int) -> None:
    model = model_of(of_variant(variant), torch.float32)
    tokens = torch.randint(0, 17, (2, 30), generator=torch.Generator().manual_seed(prompt))
    read = [([1, 1], 1)] * 12 + [([5, 5], 5)]
    assert worst(model, Cuts(tokens, [prompt, prompt], None, read)) < 1e-4


@variants
def test_half_precision_is_as_near_as_the_full_forward_itself(variant: Variant) -> None:
    exact = model_of(of_variant(variant), torch.float32)
    tokens = torch.randint(0, 17, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        full = exact.logits(tokens).float()
        logits, cache = prefill(exact, tokens[:, :20])
        found = [logits]
        found += [decode(exact, tokens[:, n], cache) for n in range(20, 30)]
    assert cache.originals[0].dtype == torch.bfloat16
    off = (torch.stack(found, 1).float() - full[:, 19:]).abs().max()
    assert off < 2 * (full - exact.logits(tokens)).abs().max()


@variants
def test_fused_projections_give_the_same_logits(variant: Variant) -> None:
    config = of_variant(variant)
    tokens = torch.randint(0, 17, (2, 30), generator=torch.Generator().manual_seed(0))
    model, fused = (Transformer(config).reset(0).double() for _ in range(2))
    fused.fuse_projections()
    torch.testing.assert_close(fused.logits(tokens), model.logits(tokens), rtol=0, atol=1e-12)
    with torch.inference_mode():
        assert worst(fused, Cuts(tokens, [9, 9], None, [([1, 1], 1)] * 5 + [([5, 5], 5)])) < 1e-9


@variants
def test_decoding_reads_cached_slots_once_for_all_copies(variant: Variant) -> None:
    model = model_of(of_variant(variant))
    tokens = torch.zeros(1, 61, dtype=torch.long)
    _, cache = prefill(model, tokens[:, :60])
    with torch.profiler.profile(record_shapes=True) as profile:
        decode(model, tokens[:, 60], cache)
    kernels = (
        event.input_shapes[1]
        for event in profile.events()
        if event.name == "aten::_scaled_dot_product_flash_attention_for_cpu"
    )
    long = [shape for shape in kernels if shape[2] >= 60]
    assert len(long) == model.config.layers


@variants
def test_rows_may_be_chosen_and_doubled_between_steps(variant: Variant) -> None:
    model = model_of(of_variant(variant))
    tokens = torch.randint(0, 17, (3, 20), generator=torch.Generator().manual_seed(0))
    full = model.logits(tokens)
    _, cache = prefill(model, tokens[:, :9], [9, 4, 7])
    rows = torch.tensor([2, 0, 2])
    cache.select(rows)
    text = padded(tokens[rows], [7, 9, 7], [3, 5, 3])
    logits = extend(model, text, cache, [3, 5, 3])[:, 0]
    expected = torch.stack([full[2, 9], full[0, 13], full[2, 9]])
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)


class Reads:
    """What a prefill computes, counted: rows of a block's feed-forward, and of the LM head."""

    def __init__(self, config: ModelConfig, tokens: int) -> None:
        model = model_of(config)
        self.slots: list[int] = []
        self.heads: list[int] = []
        for block in model.blocks:
            block.ffn.register_forward_hook(lambda _, x, __: self.slots.append(x[0].shape[-2]))
        model.norm.register_forward_hook(lambda _, x, __: self.heads.append(x[0].shape[-2]))
        prefill(model, torch.zeros(1, tokens, dtype=torch.long))


@pytest.mark.parametrize(
    ("settings", "hidden"),
    [
        ({"variant": "vanilla", "K": 1}, [0, 0, 0]),
        ({"variant": "phd", "K": 4}, [3, 3, 3]),  # of the last token
        # W = 4 at K = 2: 3 slots further back for each layer above.
        ({"variant": "phd_swa", "K": 2, "window": 4}, [10, 7, 4]),
        ({"variant": "phd_swa", "K": 2, "window": 1}, [1, 1, 1]),
        # The last chunk of 5 tokens has 3 of the 38.
        ({"variant": "phd_cswa", "K": 2, "window": 4, "chunk": 5}, [3, 3, 3]),
        ({"variant": "phd_cswa", "K": 3, "window": 99, "chunk": 10}, [6, 6, 6]),
    ],
    ids=lambda value: str(value.get("variant")) if isinstance(value, dict) else "",
)
def test_a_prefill_computes_hidden_copies_only_where_the_future_can_see_them(
    settings: dict[str, Any], hidden: list[int]
) -> None:
    config = replace(of_variant("phd_cswa"), layers=4, **settings)
    reads = Reads(config, tokens=38)
    assert reads.slots == [*(38 + slots for slots in hidden), 1]
    assert reads.heads == [1]


def test_naive_repetition_computes_everything() -> None:
    assert Reads(of_variant("naive_repeat"), tokens=38).slots == [114, 114, 1]


@pytest.mark.parametrize(("loop_keys", "alone"), [("first", [1] * 7), ("own", [38] * 6 + [1])])
def test_later_passes_of_a_loop_compute_only_what_a_later_token_or_a_logit_needs(
    loop_keys: LoopKeys, alone: list[int]
) -> None:
    reads = Reads(of_variant("vanilla", passes=3, loop_keys=loop_keys), tokens=38)
    assert reads.slots == [38, 38, *alone]
    assert reads.heads == [1]


def test_with_sps_a_prompt_needs_all_hidden_copies_but_those_of_the_last_layer() -> None:
    # Those of the last 4 tokens, which are seen by the last token and by those after it.
    assert Reads(of_variant("sps", K=2, window=3), tokens=38).slots == [76, 38 + 4, 1]
    assert Reads(of_variant("sps", K=2, window=0), tokens=38).slots == [39, 39, 1]


def test_a_row_longer_than_the_model_knows_positions_for_is_refused() -> None:
    model = model_of(of_variant("phd"))
    with pytest.raises(ValueError, match=r"model\.max_seq_len=64: a row of 65 tokens is longer"):
        prefill(model, torch.zeros(1, 65, dtype=torch.long))
    _, cache = prefill(model, torch.zeros(1, 64, dtype=torch.long))
    before = [x.clone() for x in cache.originals]
    with pytest.raises(ValueError, match="a row of 65 tokens is longer"):
        decode(model, torch.zeros(1, dtype=torch.long), cache)
    assert cache.host_lengths == [64]
    assert all(map(torch.equal, cache.originals, before))


def test_a_new_cache_is_in_the_precision_of_the_model() -> None:
    cache = new_cache(model_of(of_variant("phd_swa")), batch=2, capacity=10)
    assert isinstance(cache, KVCache)
    assert {x.dtype for x in (*cache.originals, *cache.ring)} == {torch.float64}
