"""In transformers a PHD model computes what ours does: padded, cached, saved, generating."""

import copy
import json
import warnings
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from phd.config import ModelConfig, Variant
from phd.inference.cache import KVCache
from phd.inference.cuda_graph import Decoder
from phd.model import Transformer
from tests.phd.small_models import SMALL, VOCAB, model_of, of_variant

transformers = pytest.importorskip("transformers", reason="needs transformers")

from transformers.generation.streamers import BaseStreamer  # noqa: E402

from phd.hf.modeling import PhdCache, PhdConfig, PhdForCausalLM  # noqa: E402

V, PAD = VOCAB, 3
EMPTY = torch.empty(0, V, dtype=torch.float64)
needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs an NVIDIA GPU and a CUDA build of torch"
)
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
    # A file's weights lie at any address, for which a processor may round sums otherwise.
    again = copy.deepcopy(again)
    ours, read = dict(model.named_parameters()), dict(again.named_parameters())
    assert ours.keys() == read.keys()
    assert all(torch.equal(read[name], weight) for name, weight in ours.items())
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


def text_steps(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The tokens of each step that goes through a `Decoder`, as they come."""
    steps: list[Tensor] = []
    step = Decoder.__call__

    def recorded(decoder: Decoder, tokens: Tensor) -> Tensor:
        steps.append(tokens.clone())
        return step(decoder, tokens)

    monkeypatch.setattr(Decoder, "__call__", recorded)
    return steps


class Streamer(BaseStreamer):
    """Keeps what `generate` streams."""

    def __init__(self) -> None:
        self.tokens: list[list[int]] = []

    def put(self, value: Tensor) -> None:
        self.tokens.append(value.flatten().tolist())

    def end(self) -> None:
        self.tokens.append([])


HOW: dict[str, dict[str, Any]] = {
    "greedy": {},
    "scores": {"return_dict_in_generate": True, "output_logits": True, "output_scores": True},
    "samples": {"do_sample": True, "num_return_sequences": 2, "top_k": 9, "temperature": 2.0},
    "end": {"do_sample": True, "eos_token_id": [2, 5, 8], "repetition_penalty": 1.3},
    "processors": {"no_repeat_ngram_size": 2, "min_new_tokens": 9, "eos_token_id": 4},
}


@variants
@pytest.mark.parametrize("how", HOW)
def test_a_captured_step_changes_nothing_of_what_is_generated(
    variant: Variant, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, settings = theirs(of_variant(variant)), HOW[how]
    batch = padded_left([text(3), text(14, seed=1), text(9, seed=2)])
    ids, rows = batch.pop("input_ids"), 3 * settings.get("num_return_sequences", 1)
    steps = text_steps(monkeypatch)

    def run(**given: Any) -> Any:
        torch.manual_seed(0)
        return generated(model, ids, **batch, **settings, **given)

    cache = model.new_cache(rows, 24, captured=True)
    found = run(past_key_values=cache)
    assert len(steps) == cache.get_seq_length() - 14 > 1
    assert (cache.kv.capacity, max(cache.kv.host_lengths)) == (24, cache.get_seq_length())
    expected = run()
    assert len(steps) == cache.get_seq_length() - 14
    if how != "scores":
        assert torch.equal(found, expected)
        return
    assert torch.equal(found.sequences, expected.sequences)
    # Logits of earlier steps are not what the last one left.
    close(torch.stack(found.logits), torch.stack(expected.logits))
    close(torch.stack(found.scores), torch.stack(expected.scores))


def test_captured_steps_are_streamed() -> None:
    model, ids = theirs(), text(1, 9)
    streamed: list[list[list[int]]] = []
    for captured in (True, False):
        streamer, cache = Streamer(), model.new_cache(1, 20, captured=captured)
        out = generated(model, ids, past_key_values=cache, streamer=streamer)
        assert [token for tokens in streamer.tokens for token in tokens] == out[0].tolist()
        assert len(streamer.tokens) == 1 + 11 + 1
        streamed.append(streamer.tokens)
    assert streamed[0] == streamed[1]


def test_a_beam_search_captures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids, steps = theirs(), text(2, 9), text_steps(monkeypatch)
    cache = model.new_cache(6, 20, captured=True)
    found = generated(model, ids, num_beams=3, past_key_values=cache)
    assert torch.equal(found, generated(model, ids, num_beams=3, use_cache=False))
    assert not steps
    # Once rows stay where they are, steps are captured again, with as many rows as there are.
    cache.batch_select_indices(torch.tensor([4, 0]))
    for n in range(3):
        model(text(2, 1, seed=n), past_key_values=cache)
    assert [len(tokens) for tokens in steps] == [2, 2]


def test_what_is_not_one_token_of_each_row_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids, steps = theirs(), text(2, 12), text_steps(monkeypatch)
    mask = torch.ones_like(ids)
    mask[0, 9] = 0
    cache, whole = model.new_cache(2, 12, captured=True), model(ids, attention_mask=mask).logits
    cuts = [0, 8, 9, 10, 12]  # a prompt, one token of each row, of one row alone, two of each
    parts = [
        model(ids[:, a:b], attention_mask=mask[:, :b], past_key_values=cache).logits
        for a, b in pairwise(cuts)
    ]
    close(torch.cat(parts, 1)[mask == 1], whole[mask == 1])
    assert len(steps) == 1


class Adapter(nn.Module):
    """Something beside a projection, as LoRA puts there."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.calls = layer, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layer(x) * 1.5


def test_hooks_and_adapters_within_the_model_run_for_every_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, ids, steps = theirs(), text(1, 9), text_steps(monkeypatch)
    model.model.fuse_projections()
    plain, calls = model(ids).logits, []
    ffn = model.model.blocks[1].ffn
    handle = ffn.gate.register_forward_hook(lambda *call: calls.append(1) or 1.5 * call[2])

    def run() -> Tensor:
        return generated(model, ids, past_key_values=model.new_cache(1, 20, captured=True))

    hooked = run()
    assert (len(calls), steps) == (11, [])
    handle.remove()
    ffn.gate = Adapter(ffn.gate)
    assert torch.equal(run(), hooked)
    assert (ffn.gate.calls, steps) == (11, [])
    assert (model(ids).logits - plain).abs().max() > 1e-3
    ffn.gate = ffn.gate.layer
    assert torch.equal(run(), generated(model, ids))
    assert len(steps) == 10


def test_weights_that_have_moved_are_captured_again() -> None:
    model, other, ids = theirs(), theirs(), text(2, 9)
    cache = model.new_cache(2, 20, captured=True)
    model(ids, past_key_values=cache)
    decoder = cache.decoder(model)
    assert cache.decoder(model) is decoder
    other.model.fuse_projections()
    assert cache.decoder(model) is decoder
    for change in (
        lambda: model.to(torch.float64),
        lambda: model.set_input_embeddings(model.get_input_embeddings()),
    ):
        change()
        assert cache.decoder(model) is not decoder
        decoder = cache.decoder(model)
    assert cache.decoder(other) is not decoder


def test_a_cache_serves_again_without_another_capture() -> None:
    model = theirs()
    cache = model.new_cache(2, 24, captured=True)
    decoder = cache.decoder(model)
    for seed, length in enumerate((9, 5, 13)):
        ids = text(2, length, seed=seed)
        found = generated(model, ids, past_key_values=cache)
        assert torch.equal(found, generated(model, ids))
        assert cache.decoder(model) is decoder
        cache.reset()


def test_generate_leaves_room_for_all_that_it_may_write() -> None:
    model, ids = theirs(), text(2, 9)
    for new, room in ((5, 13), (100, 64)):  # the last token is not fed; max_seq_len is 64
        expected = generated(model, ids, max_new_tokens=min(new, 56))
        cut = {"max_new_tokens": new, "stopping_criteria": [lambda ids, _: ids.shape[1] >= 65]}
        out = generated(model, ids, **cut, return_dict_in_generate=True)
        assert torch.equal(out.sequences, expected)
        assert out.past_key_values.kv.capacity == room


@pytest.mark.parametrize("use_cache", [True, False])
def test_generate_lets_the_mask_of_the_prompt_alone_be_read(use_cache: bool) -> None:
    model, batch = theirs(), padded_left([text(3), text(14, seed=1)])
    unread: list[bool] = []
    model.register_forward_pre_hook(
        lambda *call: unread.append(call[2].get("no_padding", False)), with_kwargs=True
    )
    generated(model, batch.pop("input_ids"), **batch, use_cache=use_cache)
    assert unread == [False] + [use_cache] * 10  # without a cache the padding comes every time


def test_a_mask_of_no_padding_is_not_read() -> None:
    model, ids, step = theirs(), text(2, 9), text(2, 1, seed=1)
    mask = torch.ones(2, 10, device="meta")
    caches = [model(ids, use_cache=True).past_key_values for _ in range(2)]
    found = model(step, past_key_values=caches[0], attention_mask=mask, no_padding=True)
    close(found.logits, model(step, past_key_values=caches[1]).logits)


def test_a_long_prompt_is_cut_into_chunks() -> None:
    model, ids = theirs(), text(2, 13)
    assert torch.equal(generated(model, ids, prefill_chunk_size=4), generated(model, ids))


def test_a_captured_step_fuses_weights_and_changes_no_file(tmp_path: Path) -> None:
    model, ids = theirs(), text(2, 9)
    written = []
    for name in ("before", "after"):
        model.save_pretrained(tmp_path / name)
        written.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
        first = generated(model, ids, past_key_values=model.new_cache(2, 20, captured=True))
        layers = model.model.blocks[0].attention
        assert len({x.weight.untyped_storage().data_ptr() for x in (layers.q, layers.k)}) == 1
    assert written[0] == written[1]
    assert torch.equal(generated(PhdForCausalLM.from_pretrained(tmp_path / "after"), ids), first)


@variants
def test_a_padded_batch_is_each_row_alone(variant: Variant) -> None:
    model = theirs(of_variant(variant))
    rows = [text(n, seed=n) for n in (1, 13, 8)]
    batch = padded_left(rows)
    out = generated(model, batch.pop("input_ids"), **batch)
    for row, whole in zip(rows, out, strict=True):
        assert torch.equal(generated(model, row[None])[0], whole[13 - len(row) :])


@pytest.mark.parametrize("captured", [True, False])
def test_text_goes_on_from_a_cache_that_was_returned(captured: bool) -> None:
    model, ids = theirs(), text(2, 9)
    whole = generated(model, ids, max_new_tokens=15)
    first = generated(
        model,
        ids,
        max_new_tokens=6,
        return_dict_in_generate=True,
        past_key_values=model.new_cache(2, 9, captured=captured),
    )
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


@needs_cuda
def test_generate_on_cuda_captures_its_steps_and_waits_once_for_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, batch = theirs().float().cuda(), padded_left([text(3), text(14, seed=1)])
    batch = {name: x.cuda() for name, x in batch.items()}
    ids, steps, waits = batch.pop("input_ids"), text_steps(monkeypatch), []
    slow = generated(model, ids, past_key_values=model.new_cache(2, 50, captured=False), **batch)
    assert not steps
    for new in (11, 31):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                found = generated(model, ids, **batch, max_new_tokens=new)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        waits.append(sum("synchronizing" in str(warning.message) for warning in said))
        assert torch.equal(found[:, : slow.shape[1]], slow)
    assert len(steps) == 10 + 30
    assert waits[1] - waits[0] == 20  # transformers asks after each token whether all rows ended


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


@pytest.mark.parametrize(
    "config",
    [
        of_variant("vanilla", passes=2),
        of_variant("vanilla", passes=2, loop_keys="own"),
        of_variant("hidden_decoding", full_every=2),
        of_variant("phd_cswa", originals_see_hidden=True, copy_input="table"),
    ],
    ids=["loop", "loop-own", "streams", "originals_see_hidden"],
)
def test_settings_of_the_neighbours_come_back_and_decode_as_the_full_forward(
    config: ModelConfig, tmp_path: Path
) -> None:
    model, ids = theirs(config), text(2, 9)
    model.save_pretrained(tmp_path)
    again = PhdForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert again.config.model_config == config
    close(again(ids).logits, model(ids).logits)
    assert torch.equal(generated(again, ids), generated(model, ids, use_cache=False))


def test_tables_of_hidden_copies_keep_their_vocabulary() -> None:
    model = theirs(of_variant("hidden_decoding"))
    with pytest.raises(ValueError, match=r"copy_input=table cannot be given another vocabulary"):
        model.resize_token_embeddings(V + 3)


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


def test_continuous_batching_with_pages_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\Acontinuous batching of transformers: .*Generator"):
        theirs().generate_batch([[1, 2, 3], [4, 5]], max_new_tokens=3)
