"""In transformers a PHD model computes what ours does: padded, cached, saved, generating."""

import copy
import json
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy

from phd.config import ModelConfig, Variant
from phd.inference.cache import KVCache
from phd.model import Transformer
from tests.phd.small_models import SMALL, VOCAB, model_of, of_variant

transformers = pytest.importorskip("transformers", reason="needs transformers")

from phd.hf.modeling import PhdCache, PhdConfig, PhdForCausalLM  # noqa: E402

V, PAD = VOCAB, 3
EMPTY = torch.empty(0, V, dtype=torch.float64)
variants = pytest.mark.parametrize("variant", get_args(Variant))


def theirs(config: ModelConfig = SMALL) -> PhdForCausalLM:
    return PhdForCausalLM.of(model_of(config)).eval()


def text(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


def generated(model: PhdForCausalLM, ids: Tensor, **given: Any) -> Any:
    settings = {"max_new_tokens": 11, "do_sample": False, "pad_token_id": PAD}
    # Without a mask, transformers takes every padding token in a prompt for padding.
    mask = {"attention_mask": torch.ones_like(ids)}
    return model.generate(ids, **(settings | mask | given))


def padded_left(rows: list[Tensor]) -> dict[str, Tensor]:
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), PAD)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, longest - len(row) :], mask[i, longest - len(row) :] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


def test_a_default_device_of_the_callers_own_moves_nothing() -> None:
    model, rows = theirs(), padded_left([text(9), text(5)])
    expected = model(**rows, use_cache=True)
    with torch.device("meta"):
        found = model(**rows, use_cache=True)
        plain = model(**rows)
    assert torch.equal(found.logits, expected.logits)
    close(plain.logits, expected.logits)


# The config


def test_a_config_holds_every_field_of_ours_and_keeps_it_in_its_file(tmp_path: Path) -> None:
    config = ModelConfig(**{**asdict(SMALL), "norm": "hybrid", "tied": False, "rope_theta": 77.0})
    PhdConfig(**asdict(config)).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert {f.name: written[f.name] for f in fields(ModelConfig)} == asdict(config)
    again = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(again) is PhdConfig
    assert again.model_config == config


def test_a_config_knows_the_names_that_transformers_reads() -> None:
    config = PhdConfig(hidden_size=32, tie_word_embeddings=False, head_dim=6)
    assert (config.dim, config.tied, config.head_dim) == (32, False, 6)
    config = PhdConfig(**asdict(SMALL))
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (16, 3, V)
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 2)
    assert (config.max_position_embeddings, config.tie_word_embeddings) == (64, True)


def test_a_config_that_makes_no_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.kv_heads=3: must divide model\.heads=4"):
        PhdConfig(**{**asdict(SMALL), "kv_heads": 3})


@pytest.mark.parametrize("norm", ["hybrid", "hybrid_star"])
def test_a_directory_of_hybrid_over_whole_projections_is_refused_by_name(
    norm: Any, tmp_path: Path
) -> None:
    model = theirs(replace(SMALL, norm=norm))
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(text(1, 9)).logits, model(text(1, 9)).logits)
    written = json.loads((tmp_path / "config.json").read_text())
    del written["qkv_norm"]  # as directories of that time do not have it
    (tmp_path / "config.json").write_text(json.dumps(written))
    for load in (transformers.AutoConfig, transformers.AutoModelForCausalLM, PhdForCausalLM):
        with pytest.raises(ValueError, match=rf"old form of norm='{norm}', which normalised whole"):
            load.from_pretrained(tmp_path)
    written["heads"] = written["kv_heads"] = 1  # both forms are one
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert transformers.AutoConfig.from_pretrained(tmp_path).norm == norm


# Logits


@settings(deadline=None, max_examples=30)
@given(config=..., data=st.data())
def test_logits_are_ours_wherever_the_padding_is_and_however_the_text_is_cut(
    config: ModelConfig, data: st.DataObject
) -> None:
    model = theirs(config)
    B, T = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 40))
    ids = text(B, T)
    draw_row = st.lists(st.booleans() | st.just(True), min_size=T, max_size=T)
    mask = torch.tensor([data.draw(draw_row) for _ in range(B)]).long()
    rows = [row[seen == 1] for row, seen in zip(ids, mask, strict=True)]
    expected = torch.cat([model.model.logits(row[None])[0] for row in rows if len(row)] or [EMPTY])

    close(expected, model(ids, attention_mask=mask).logits[mask == 1])
    cuts = [0, *sorted(data.draw(st.sets(st.integers(1, T), max_size=4)) - {T}), T]
    cache, parts = None, []
    for begin, end in pairwise(cuts):
        out = model(
            ids[:, begin:end],
            attention_mask=mask[:, :end],
            past_key_values=cache,
            use_cache=True,
        )
        cache = out.past_key_values
        parts.append(out.logits)
    assert cache.get_seq_length() == T
    assert cache.kv.host_lengths == mask.sum(1).tolist()
    close(expected, torch.cat(parts, 1)[mask == 1])


@pytest.mark.parametrize("use_cache", [False, True])
def test_only_the_logits_to_keep_are_computed(use_cache: bool) -> None:
    model, ids = theirs(), text(2, 9)
    mask = torch.ones(2, 9)
    mask[0, :3] = 0
    whole = model(ids, attention_mask=mask).logits
    for keep, columns in ((1, [8]), (4, [5, 6, 7, 8]), (torch.tensor([7, 4]), [7, 4])):
        out = model(ids, attention_mask=mask, use_cache=use_cache, logits_to_keep=keep)
        close(out.logits, whole[:, columns])


def test_padding_gets_what_the_token_before_it_got() -> None:
    model, ids = theirs(), text(1, 7)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0, 0]])
    for use_cache in (False, True):
        last = model(ids, attention_mask=mask, use_cache=use_cache).logits[0, -1]
        close(last, model.model.logits(ids[:, :4])[0, -1])


def test_return_dict_false_gives_a_tuple() -> None:
    model, ids = theirs(), text(1, 5)
    [logits] = model(ids, return_dict=False)
    close(logits, model.model.logits(ids))


# Learning


def test_loss_and_gradients_are_those_of_the_next_tokens() -> None:
    model, twin, ids = theirs().train(), model_of(), text(2, 12)
    labels = ids.masked_fill(text(2, 12, seed=1) < 5, -100)
    loss = model(ids, labels=labels).loss
    loss.backward()
    logits = twin.logits(ids)
    expected = cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for name, weight in twin.named_parameters():
        torch.testing.assert_close(model.model.get_parameter(name).grad, weight.grad)


def test_padding_teaches_nothing() -> None:
    rows = [text(5), text(9, seed=1)]
    losses, batch = [], padded_left(rows)
    model = theirs()
    for row in rows:
        losses += [model(row[None], labels=row[None]).loss] * (len(row) - 1)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    # The first token of the padded row would be predicted from padding alone.
    labels[0, 4] = -100
    torch.testing.assert_close(model(**batch, labels=labels).loss, torch.stack(losses).mean())


# Generating


@variants
def test_greedy_text_is_that_of_full_forward_passes(variant: Variant) -> None:
    model, ids = theirs(of_variant(variant)), text(2, 13)
    expected = ids
    for _ in range(11):
        expected = torch.cat([expected, model.model.logits(expected)[:, -1:].argmax(-1)], 1)
    assert torch.equal(generated(model, ids), expected)
    assert torch.equal(generated(model, ids, use_cache=False), expected)


def test_generating_feeds_each_token_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, fed = theirs(), []
    extend = KVCache.advance

    def advance(cache: KVCache, tokens: list[int]) -> None:
        fed.append(list(tokens))
        extend(cache, tokens)

    monkeypatch.setattr(KVCache, "advance", advance)
    generated(model, text(2, 13), max_new_tokens=4)
    assert fed == [[13, 13], [1, 1], [1, 1], [1, 1]]


@variants
@pytest.mark.parametrize(
    "how",
    [
        {"num_beams": 4, "num_return_sequences": 3},
        {"num_beams": 3, "do_sample": True, "temperature": 2.0},
        {"do_sample": True, "num_return_sequences": 4},
        {"do_sample": True, "top_k": 5, "top_p": 0.7, "eos_token_id": 2},
    ],
    ids=["beams", "sampled beams", "samples", "top k and p"],
)
def test_a_cache_changes_nothing_of_what_is_generated(variant: Variant, how: dict) -> None:
    model = theirs(of_variant(variant))
    batch = padded_left([text(3), text(14, seed=1), text(9, seed=2)])
    ids, outputs = batch.pop("input_ids"), []
    for use_cache in (True, False):
        torch.manual_seed(0)
        outputs.append(generated(model, ids, **batch, **how, use_cache=use_cache))
    assert torch.equal(*outputs)


@variants
def test_a_padded_batch_is_each_row_alone(variant: Variant) -> None:
    model = theirs(of_variant(variant))
    rows = [text(n, seed=n) for n in (1, 13, 8)]
    batch = padded_left(rows)
    out = generated(model, batch.pop("input_ids"), **batch)
    for row, whole in zip(rows, out, strict=True):
        assert torch.equal(generated(model, row[None])[0], whole[13 - len(row) :])


def test_text_goes_on_from_a_cache_that_was_returned() -> None:
    model, ids = theirs(), text(2, 9)
    whole = generated(model, ids, max_new_tokens=15)
    first = generated(model, ids, max_new_tokens=6, return_dict_in_generate=True)
    kept = copy.deepcopy(first.past_key_values)
    for cache in (first.past_key_values, kept):
        assert cache.get_seq_length() == 14
        again = generated(model, first.sequences, max_new_tokens=9, past_key_values=cache)
        assert torch.equal(again, whole)


def test_a_cache_selects_repeats_and_forgets_rows() -> None:
    model, ids = theirs(), text(2, 9)
    cache = model(ids, use_cache=True).past_key_values
    assert (len(cache), cache.batch_size, cache.get_max_length()) == (3, 2, 64)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0, 1]))
    more = text(3, 2, seed=1)
    rows = torch.cat([ids[[1, 0, 0]], more], 1)
    out = model(more, past_key_values=cache)
    assert out.past_key_values is cache
    close(out.logits, model.model.logits(rows)[:, -2:])
    cache.reset()
    close(model(rows, past_key_values=cache).logits, model.model.logits(rows))


# Saving and loading


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("copy_embedding", [True, False])
def test_a_saved_model_comes_back_whole(tied: bool, copy_embedding: bool, tmp_path: Path) -> None:
    model = theirs(replace(SMALL, tied=tied, copy_embedding=copy_embedding))
    model.save_pretrained(tmp_path)
    again, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(report.values()), report
    assert type(again) is PhdForCausalLM
    assert again.dtype == torch.float64
    assert not again.training
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight)
    close(again(text(2, 9)).logits, model(text(2, 9)).logits)


def test_tables_stay_exact_in_half_precision(tmp_path: Path) -> None:
    model = theirs()
    model.save_pretrained(tmp_path)
    loaded = PhdForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    fresh = Transformer(SMALL).rope
    for half in (loaded, model.to(torch.bfloat16), copy.deepcopy(model).half().bfloat16()):
        assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
        assert half.model.rope.cos.dtype == torch.float32
        assert torch.equal(half.model.rope.cos, fresh.cos)
        assert torch.equal(half.model.rope.sin, fresh.sin)


def test_half_precision_computes_learns_and_generates() -> None:
    exact, half = theirs(), theirs().to(torch.bfloat16)
    ids = text(2, 9)
    for use_cache in (False, True):
        logits = half(ids, use_cache=use_cache).logits
        assert logits.dtype == torch.bfloat16
        torch.testing.assert_close(logits.double(), exact(ids).logits, rtol=0, atol=0.1)
    assert generated(half, ids).shape == (2, 20)
    half(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in half.parameters())


def test_new_weights_are_drawn_as_ours_are_and_by_torchs_seed() -> None:
    def new(seed: int) -> PhdForCausalLM:
        torch.manual_seed(seed)
        return PhdForCausalLM(PhdConfig(**asdict(SMALL)))

    torch.manual_seed(5)
    expected = Transformer(SMALL).reset(int(torch.randint(2**62, ())))
    for name, weight in new(5).model.named_parameters():
        assert torch.equal(weight, expected.get_parameter(name))
    assert torch.equal(new(5).model.embed.weight, new(5).model.embed.weight)
    assert not torch.equal(new(5).model.embed.weight, new(6).model.embed.weight)


def test_only_what_a_checkpoint_does_not_have_is_drawn(tmp_path: Path) -> None:
    model = theirs()
    model.save_pretrained(tmp_path)
    config = PhdConfig(**asdict(replace(SMALL, tied=False, copy_embedding=True)))
    torch.manual_seed(0)
    more, report = PhdForCausalLM.from_pretrained(tmp_path, config=config, output_loading_info=True)
    assert report["missing_keys"] == {"model.copy_embed.weight", "model.head.weight"}
    assert torch.equal(more.model.copy_embed.weight, torch.zeros(3, 16).double())
    assert 0.1 < more.model.head.weight.std() < 0.2  # 1 / sqrt(2.5 D) = 0.158
    for name, weight in model.model.named_parameters():
        assert torch.equal(more.model.get_parameter(name), weight)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_vocabulary_can_grow(tied: bool, tmp_path: Path) -> None:
    model, ids = theirs(replace(SMALL, tied=tied)), text(2, 9)
    before = model(ids).logits
    model.resize_token_embeddings(V + 3)
    after = model(ids).logits
    assert after.shape == (2, 9, V + 3)
    assert model.model.config == model.config.model_config
    assert model.model.config.vocab_size == V + 3
    close(after[..., :V], before)
    model.save_pretrained(tmp_path)
    close(PhdForCausalLM.from_pretrained(tmp_path)(ids).logits, after)


# What is refused

REFUSED: dict[str, tuple[Callable[[Tensor], dict[str, Any]], str]] = {
    "embeddings": (lambda ids: {"input_ids": None, "inputs_embeds": ids}, "input_ids=None"),
    "inputs_embeds": (lambda ids: {"input_ids": ids, "inputs_embeds": ids}, "inputs_embeds"),
    "states": (lambda ids: {"input_ids": ids, "output_hidden_states": True}, "output_hidden_s"),
    "attentions": (lambda ids: {"input_ids": ids, "output_attentions": True}, "output_attent"),
    "positions": (lambda ids: {"input_ids": ids, "position_ids": ids}, "position_ids"),
    "nothing": (lambda ids: {"input_ids": ids[:, :0]}, r"input_ids of shape \(2, 0\)"),
    "learning": (lambda ids: {"input_ids": ids, "labels": ids, "use_cache": True}, "labels with"),
    "mask": (
        lambda ids: {"input_ids": ids, "attention_mask": ids[:, None, None]},
        r"attention_mask of shape \(2, 1, 1, 5\)",
    ),
    "cache": (
        lambda ids: {"input_ids": ids, "past_key_values": transformers.DynamicCache()},
        "past_key_values is a DynamicCache: expected a PhdCache",
    ),
    "length": (
        lambda ids: {"input_ids": ids.repeat(1, 20), "use_cache": True},
        "model.max_seq_len=64: a row of 100 tokens is longer",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_model_does_not_do_is_refused_by_name(name: str) -> None:
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=rf"\A{message}"):
        theirs()(**call(text(2, 5)))


def test_a_cache_is_not_cut_back() -> None:
    model = theirs()
    cache = model(text(1, 5), use_cache=True).past_key_values
    assert isinstance(cache, PhdCache)
    assert not cache.is_croppable
    with pytest.raises(ValueError, match="a PHD cache cannot forget its last tokens"):
        cache.crop(1)
    with pytest.raises(ValueError, match="not supported with stateful models"):
        generated(model, text(1, 5), assistant_model=model)
