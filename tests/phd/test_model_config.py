"""A config that cannot make a model says every reason at once; derived values follow from it."""

from math import ceil
from typing import Any, get_args

import pytest

from conf.errors import ConfigError
from phd.config import VARIANTS, CopyInput, ModelConfig, Variant

PROBLEMS = {
    "model.variant='phd_cswaa': expected one of vanilla, naive_repeat, phd, phd_swa, phd_cswa, "
    "pause, free_pause, sps, hidden_decoding": {"variant": "phd_cswaa"},
    "model.copy_input='own': expected one of auto, token, learned, table": {"copy_input": "own"},
    "model.window=-1: expected an integer of at least 0": {"variant": "sps", "window": -1},
    "model.passes=2: model.variant=phd goes through the layers once; set model.passes=1 or choose "
    "model=loop": {"variant": "phd", "passes": 2},
    "model.K=3: no slot of free_pause sees a hidden copy, so all but the last would be computed "
    "for nothing; set model.K=2 or choose model=pause or phd": {"variant": "free_pause", "K": 3},
    "model.span_unit='copies': expected one of hidden, token": {"span_unit": "copies"},
    "model.copy_positions='own': expected one of shared, flattened": {"copy_positions": "own"},
    "model.norm='post': expected one of reordered, pre, hybrid, hybrid_star": {"norm": "post"},
    "model.attention='fast': expected one of auto, reference, packed, fused, flex": {
        "attention": "fast"
    },
    "model.K=0: expected an integer of at least 1": {"K": 0},
    "model.window=0: expected an integer of at least 1": {"window": 0},
    "model.chunk=-3: expected an integer of at least 1": {"chunk": -3},
    "model.layers=0: expected an integer of at least 1": {"layers": 0},
    "model.vocab_size=0: expected an integer of at least 1": {"vocab_size": 0},
    "model.K=2: vanilla feeds each token once; set model.K=1 or choose "
    "model=naive_repeat, phd, phd_swa or phd_cswa": {"variant": "vanilla", "K": 2},
    "model.kv_heads=3: must divide model.heads=4, because each key/value head serves the same "
    "number of query heads": {"heads": 4, "kv_heads": 3},
    "model.head_dim=5: must be even, because RoPE rotates pairs of dimensions": {"head_dim": 5},
    "model.rope_theta=1.0: expected a number above 1": {"rope_theta": 1.0},
    "model.mup_base_dim=0: expected an integer of at least 1": {"mup_base_dim": 0},
    "model.mup_base_head_dim=-8: expected an integer of at least 1": {"mup_base_head_dim": -8},
    "model.norm_eps=0.0: expected a number above 0": {"norm_eps": 0.0},
}


@pytest.mark.parametrize(("problem", "settings"), PROBLEMS.items())
def test_a_bad_value_is_named_with_what_was_expected(
    problem: str, settings: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError) as caught:
        ModelConfig(**settings)
    assert list(map(str, caught.value.problems)) == [problem]


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        ModelConfig(K=0, window=0, kv_heads=0, head_dim=7, norm="post")  # type: ignore[arg-type]
    assert {(problem.key, problem.value) for problem in caught.value.problems} == {
        ("model.K", 0),
        ("model.window", 0),
        ("model.kv_heads", 0),
        ("model.head_dim", 7),
        ("model.norm", "post"),
    }


@pytest.mark.parametrize("chunk", [1, 2, 7, 8, 32])
@pytest.mark.parametrize("K", [2, 3, 4, 8])
def test_a_chunk_of_hidden_copies_is_rounded_up_to_whole_tokens(K: int, chunk: int) -> None:
    config = ModelConfig(variant="phd_cswa", K=K, chunk=chunk)
    assert config.chunk_tokens == ceil(chunk / (K - 1))
    assert ModelConfig(K=K, chunk=chunk, span_unit="token").chunk_tokens == chunk


@pytest.mark.parametrize("variant", ["naive_repeat", "phd", "phd_swa"])
def test_only_phd_cswa_has_chunks(variant: Any) -> None:
    assert ModelConfig(variant=variant, K=3).chunk_tokens is None
    assert ModelConfig(variant="phd_cswa", K=1).chunk_tokens is None


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("vanilla", {"variant": "vanilla", "K": 1}),
        ("naive_repeat-3", {"variant": "naive_repeat", "K": 3}),
        ("phd-3", {"variant": "phd", "K": 3}),
        ("phd_swa-5-16-inf", {"variant": "phd_swa", "K": 5}),
        ("phd_cswa-2-16-32", {}),
        ("phd_cswa-2-4t-8t", {"window": 4, "chunk": 8, "span_unit": "token"}),
        ("pause-3", {"variant": "pause", "K": 3}),
        ("free_pause-2", {"variant": "free_pause"}),
        ("loop-3", {"variant": "vanilla", "K": 1, "passes": 3}),
        ("loop-2-own", {"variant": "vanilla", "K": 1, "passes": 2, "loop_keys": "own"}),
        ("sps-2-0", {"variant": "sps", "window": 0}),
        ("hidden_decoding-2", {"variant": "hidden_decoding"}),
    ],
)
def test_runs_are_named_as_in_the_paper(name: str, settings: dict[str, Any]) -> None:
    model = ModelConfig(**settings)
    assert model.name == name
    assert ModelConfig(layers=7).as_variant(name).name == name
    assert model.as_variant("vanilla") == model.vanilla_twin


def test_every_variant_has_traits() -> None:
    assert tuple(VARIANTS) == get_args(Variant)
    assert {traits.copy_input for traits in VARIANTS.values()} == set(get_args(CopyInput))


def test_what_hidden_copies_are_fed_is_the_variants_own_unless_it_is_set() -> None:
    fed = {v: ModelConfig(variant=v, K=t.most_copies or 2) for v, t in VARIANTS.items()}
    others = {variant for variant, c in fed.items() if c.hidden_input != "token"}
    assert others == {"pause", "free_pause", "sps", "hidden_decoding"}
    assert ModelConfig(variant="sps", copy_input="token").hidden_input == "token"
    assert ModelConfig(variant="phd", copy_input="table").hidden_input == "table"
    assert ModelConfig(variant="pause", K=1).hidden_input == "token"


@pytest.mark.parametrize("name", ["phd", "phd_cswa", "vanilla-2", "phd-2-16-32-64", "PHD-2", ""])
def test_a_name_of_no_variant_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="expected vanilla, or a variant with its K"):
        ModelConfig().as_variant(name)
