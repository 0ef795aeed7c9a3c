"""Our vanilla model is transformers' Olmo2 and Llama, and any such checkpoint can start a PHD."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from phd.config import ModelConfig
from phd.hf.convert import from_hugging_face, starting_state, to_hugging_face
from phd.model import Transformer

transformers = pytest.importorskip("transformers", reason="needs transformers")

V, T = 61, 19
MLP = "model.layers.1.mlp"
MODELS = {"olmo2": "Olmo2", "llama": "Llama"}
KV_HEADS = {"MHA": 4, "GQA": 2, "MQA": 1}

every_model = pytest.mark.parametrize("model_type", MODELS)
both_norms = pytest.mark.parametrize("norm", ["reordered", "pre"])


def original(model_type: str, **settings: Any) -> Any:
    """A small random model of transformers whose norms are not all ones."""
    shape = {
        "vocab_size": V,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 77.0},
        "initializer_range": 0.2,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    }
    torch.manual_seed(0)
    config = getattr(transformers, f"{MODELS[model_type]}Config")(**(shape | settings))
    model = getattr(transformers, f"{MODELS[model_type]}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model.eval()


def described(model: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return model.config.to_dict(), model.state_dict()


def ours(config: ModelConfig, state: dict[str, Tensor]) -> Transformer:
    model = Transformer(config)
    model.load_state_dict(state)
    return model


def random_model(**settings: Any) -> Transformer:
    """A small random model of ours."""
    shape: dict[str, Any] = {"layers": 2, "dim": 32, "ffn_dim": 48, "head_dim": 16, "vocab_size": V}
    return Transformer(ModelConfig(**{"variant": "vanilla", "K": 1, **shape, **settings})).reset(0)


def text(seed: int = 0) -> Tensor:
    return torch.randint(V, (2, T), generator=torch.Generator().manual_seed(seed))


def refusal(message: str) -> Any:
    """Expects a ValueError with exactly this message."""
    return pytest.raises(ValueError, match=rf"\A{re.escape(message)}\Z")


# The same function


@every_model
@pytest.mark.parametrize("heads", KV_HEADS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_logits_are_those_of_transformers(model_type: str, heads: str, tied: bool) -> None:
    theirs = original(model_type, num_key_value_heads=KV_HEADS[heads], tie_word_embeddings=tied)
    config, state = from_hugging_face(*described(theirs))
    logits = theirs(text()).logits
    assert logits.std() > 0.1
    torch.testing.assert_close(ours(config, state).logits(text()), logits, rtol=1e-5, atol=1e-5)


@every_model
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_loss_and_gradients_are_those_of_transformers(model_type: str, tied: bool) -> None:
    theirs = original(model_type, tie_word_embeddings=tied)
    model = ours(*from_hugging_face(*described(theirs)))
    their_loss = theirs(text(), labels=text()).loss
    loss = model.loss(text()[:, :-1], text()[:, 1:])
    torch.testing.assert_close(loss.total / loss.targets, their_loss, rtol=1e-6, atol=1e-6)

    their_loss.backward()
    (loss.total / loss.targets).backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    _, expected = from_hugging_face(theirs.config.to_dict(), gradients)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0, name
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)


@both_norms
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_what_we_write_gives_transformers_our_logits(norm: str, tied: bool) -> None:
    mup = {"mup_base_dim": 10, "mup_base_head_dim": 8}
    model = random_model(norm=norm, tied=tied, head_dim=24, rope_theta=77.0, norm_eps=1e-3, **mup)
    assert model.config.width_ratio == 3.2
    assert model.config.query_gain < 0.6
    hf_config, hf_state = to_hugging_face(model.config, model.state_dict())
    name = MODELS[hf_config["model_type"]]
    assert hf_config["architectures"] == [f"{name}ForCausalLM"]
    config = getattr(transformers, f"{name}Config")(**hf_config)
    theirs = getattr(transformers, f"{name}ForCausalLM")(config)
    theirs.load_state_dict(hf_state)
    torch.testing.assert_close(theirs(text()).logits, model.logits(text()), rtol=1e-5, atol=1e-5)


@every_model
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_there_and_back_is_bitwise(model_type: str, tied: bool) -> None:
    hf_config, hf_state = described(original(model_type, tie_word_embeddings=tied))
    config, state = from_hugging_face(hf_config, hf_state)
    config_back, state_back = to_hugging_face(config, state)
    assert state_back.keys() == hf_state.keys()
    assert all(torch.equal(state_back[name], hf_state[name]) for name in hf_state)
    # Olmo2's config has no head_dim of its own, and older versions read rope_theta beside it.
    said = hf_config.keys() & config_back.keys() - {"architectures"}
    assert len(said) >= 15
    assert {key: config_back[key] for key in said} == {key: hf_config[key] for key in said}


@both_norms
def test_back_and_there_is_bitwise(norm: str) -> None:
    model = random_model(norm=norm, tied=False, rope_theta=77.0, norm_eps=1e-4)
    config, state = from_hugging_face(*to_hugging_face(model.config, model.state_dict()))
    assert config == replace(model.config, size=config.size)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], weight) for name, weight in model.state_dict().items())


# The start of a PHD


VARIANTS: dict[str, dict[str, Any]] = {
    "naive_repeat": {"variant": "naive_repeat"},
    "phd": {"variant": "phd", "K": 3},
    "phd_swa": {"variant": "phd_swa", "K": 3, "window": 4},
    "phd_cswa": {"variant": "phd_cswa", "K": 3, "window": 4, "chunk": 6},
    "phd_cswa, tokens": {"variant": "phd_cswa", "K": 3, "span_unit": "token", "window": 2},
    "phd_cswa, copy embedding": {"variant": "phd_cswa", "K": 3, "copy_embedding": True},
}


@every_model
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "naive_repeat"])
def test_the_originals_of_a_phd_are_the_hidden_states_of_its_checkpoint(
    model_type: str, variant: str
) -> None:
    theirs = original(model_type)
    config, state = from_hugging_face(*described(theirs))
    config = replace(config, **VARIANTS[variant])
    model = ours(config, starting_state(config, state))
    streams: list[Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda _block, _inputs, x: streams.append(x))
    with torch.no_grad():
        model(text())
        hidden_states = theirs(text(), output_hidden_states=True).hidden_states
    for stream, hidden in zip(streams[:-1], hidden_states[1:-1], strict=True):
        torch.testing.assert_close(stream[:, 0], hidden, rtol=1e-5, atol=1e-5)
        assert not torch.equal(stream[:, 0], stream[:, -1])


@every_model
@pytest.mark.parametrize("variant", VARIANTS)
def test_one_copy_of_any_variant_is_the_checkpoint(model_type: str, variant: str) -> None:
    theirs = original(model_type)
    config, state = from_hugging_face(*described(theirs))
    config = replace(config, **{**VARIANTS[variant], "K": 1})
    logits = ours(config, starting_state(config, state)).logits(text())
    torch.testing.assert_close(logits, theirs(text()).logits, rtol=1e-5, atol=1e-5)


def test_copy_embeddings_start_at_zero_and_all_else_as_it_was() -> None:
    config, state = from_hugging_face(*described(original("olmo2")))
    config = replace(config, variant="phd", K=3, copy_embedding=True)
    start = starting_state(config, state)
    assert torch.equal(start.pop("copy_embed.weight"), torch.zeros(3, 32))
    assert start.keys() == state.keys()
    assert all(start[name] is state[name] for name in state)


def test_what_hidden_copies_are_fed_starts_as_the_embedding_or_its_mean() -> None:
    config, state = from_hugging_face(*described(original("olmo2")))
    embed = state["embed.weight"]
    learned = starting_state(replace(config, variant="sps", K=3), state)
    assert torch.equal(learned["copy_input.weight"], embed.mean(0, keepdim=True))
    decoding = replace(config, variant="hidden_decoding", K=3)
    tables = starting_state(decoding, state)
    assert torch.equal(tables["copy_input.weight"], torch.cat([embed, embed]))
    # So it begins as naive repetition.
    repeating = ours(replace(config, variant="naive_repeat", K=3), state)
    assert torch.equal(ours(decoding, tables).logits(text()), repeating.logits(text()))
    # Of a model that has tables, they are kept, and there is a new one for a further copy.
    tables["copy_input.weight"] = torch.randn(2 * len(embed), 32)
    more = starting_state(replace(decoding, K=4), tables)["copy_input.weight"]
    assert torch.equal(more, torch.cat([tables["copy_input.weight"], embed]))


def test_a_tied_checkpoint_may_start_an_untied_model_but_not_the_reverse() -> None:
    config, state = from_hugging_face(*described(original("olmo2", tie_word_embeddings=True)))
    model = ours(replace(config, tied=False), starting_state(replace(config, tied=False), state))
    assert model.head.weight is not model.embed.weight
    assert torch.equal(model.head.weight, model.embed.weight)

    config, state = from_hugging_face(*described(original("olmo2")))
    with pytest.raises(ValueError, match=r"head\.weight: nothing expected, \[61, 32\] given"):
        starting_state(replace(config, tied=True), state)


def test_weights_of_another_shape_or_wiring_start_nothing() -> None:
    config, state = from_hugging_face(*described(original("olmo2")))
    with pytest.raises(ValueError, match=r"blocks\.0\.ffn\.up\.weight: \[64, 32\] expected, \[48"):
        starting_state(replace(config, ffn_dim=64), state)
    with pytest.raises(ValueError, match=r"attention\.q_norm\.weight: nothing expected, \[32\]"):
        starting_state(replace(config, norm="pre"), state)


# What a config.json may look like


@every_model
def test_a_config_of_transformers_4_means_the_same(model_type: str) -> None:
    hf_config, hf_state = described(original(model_type))
    expected, _ = from_hugging_face(hf_config, hf_state)
    del hf_config["rope_parameters"]
    assert from_hugging_face(hf_config, hf_state)[0].rope_theta == 10_000
    hf_config |= {"rope_theta": 77, "rope_scaling": None, "head_dim": None}
    assert from_hugging_face(hf_config, hf_state)[0] == expected
    hf_config |= {"rope_scaling": {"rope_type": "default"}}
    assert from_hugging_face(hf_config, hf_state)[0] == expected


@pytest.mark.parametrize("absent", ["rope_theta", "rope_parameters"])
def test_a_config_of_ours_gives_theta_to_either_version(absent: str) -> None:
    model = random_model(rope_theta=77.0)
    hf_config, hf_state = to_hugging_face(model.config, model.state_dict())
    del hf_config[absent]
    assert from_hugging_face(hf_config, hf_state)[0].rope_theta == 77


def test_absent_keys_follow_from_the_others() -> None:
    hf_config, hf_state = described(original("llama", num_key_value_heads=4))
    expected, _ = from_hugging_face(hf_config, hf_state)
    for key in ("num_key_value_heads", "head_dim", "tie_word_embeddings", "hidden_act"):
        del hf_config[key]
    assert from_hugging_face(hf_config, hf_state)[0] == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_comes_in_as_float32(dtype: torch.dtype) -> None:
    hf_config, hf_state = described(original("llama", tie_word_embeddings=True).to(dtype))
    _, state = from_hugging_face(hf_config, hf_state)
    assert {weight.dtype for weight in state.values()} == {torch.float32}
    assert torch.equal(state["blocks.1.ffn.up.weight"].to(dtype), hf_state[f"{MLP}.up_proj.weight"])
    assert "head.weight" not in state


def test_a_tied_head_may_be_left_out_and_old_rope_buffers_are_passed_over() -> None:
    hf_config, hf_state = described(original("llama", tie_word_embeddings=True))
    _, expected = from_hugging_face(hf_config, hf_state)
    del hf_state["lm_head.weight"]
    hf_state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    _, state = from_hugging_face(hf_config, hf_state)
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)


# Refusals


BIAS = "=True: our projections have no biases; choose a checkpoint without them"
GELU = (
    "hidden_act='gelu': our feed-forward is SwiGLU, so expected 'silu'; choose a checkpoint with it"
)
SCALED = ", expected 'default'; choose a checkpoint whose RoPE is not scaled"
LLAMA_3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}
QUANTIZED = (
    "quantization_config: quantized weights cannot be trained further; "
    "choose the checkpoint in float32, bfloat16 or float16"
)
UNSUPPORTED: dict[str, dict[str, Any]] = {
    "model_type='qwen2': expected one of olmo2, llama; choose a checkpoint of one of these": {
        "model_type": "qwen2"
    },
    f"attention_bias{BIAS}": {"attention_bias": True},
    f"mlp_bias{BIAS}": {"mlp_bias": True},
    GELU: {"hidden_act": "gelu"},
    f"rope_parameters: RoPE of type 'llama3'{SCALED}": {"rope_parameters": LLAMA_3},
    f"rope_scaling: RoPE of type 'llama3'{SCALED}": {"rope_scaling": LLAMA_3},
    f"rope_scaling: RoPE of type 'linear'{SCALED}": {"rope_scaling": {"type": "linear"}},
    QUANTIZED: {"quantization_config": {"quant_method": "fp8"}},
    f"mlp_bias{BIAS}; {GELU}": {"hidden_act": "gelu", "mlp_bias": True},
}


@pytest.mark.parametrize("message", UNSUPPORTED)
def test_what_our_model_does_not_compute_is_refused_by_name(message: str) -> None:
    hf_config, hf_state = described(original("llama"))
    with refusal(message):
        from_hugging_face(hf_config | UNSUPPORTED[message], hf_state)


def test_a_config_without_its_shape_is_refused_by_the_missing_keys() -> None:
    hf_config, hf_state = described(original("llama"))
    del hf_config["hidden_size"], hf_config["rms_norm_eps"]
    what = "missing; take the config.json that belongs to the weights"
    with refusal(f"hidden_size: {what}; rms_norm_eps: {what}"):
        from_hugging_face(hf_config, hf_state)


def test_missing_unexpected_and_misshapen_weights_are_listed_with_both_shapes() -> None:
    hf_config, hf_state = described(original("llama"))
    del hf_state[f"{MLP}.up_proj.weight"]
    hf_state[f"{MLP}.up_proj.bias"] = torch.zeros(48)
    hf_state["model.norm.weight"] = torch.zeros(33)
    with refusal(
        "3 weights do not fit the config; give both of one model:\n"
        f"  {MLP}.up_proj.bias: nothing expected, [48] given\n"
        f"  {MLP}.up_proj.weight: [48, 32] expected, nothing given\n"
        "  model.norm.weight: [32] expected, [33] given"
    ):
        from_hugging_face(hf_config, hf_state)


def test_of_many_misfits_the_first_are_listed() -> None:
    hf_config, hf_state = described(original("llama"))
    with pytest.raises(ValueError, match="9 weights do not fit the config") as error:
        from_hugging_face(hf_config | {"intermediate_size": 50}, hf_state)
    lines = str(error.value).splitlines()
    assert len(lines) == 10
    assert lines[-1] == "  and 1 more"


def test_a_tied_config_with_a_head_of_its_own_is_refused() -> None:
    hf_config, hf_state = described(original("llama"))
    with refusal(
        "lm_head.weight differs from model.embed_tokens.weight, but tied embeddings make them "
        "one; set tie_word_embeddings to false in the config"
    ):
        from_hugging_face(hf_config | {"tie_word_embeddings": True}, hf_state)


WIRING = (
    "Hugging Face has no model with this wiring; "
    "write a model with reordered (Olmo2ForCausalLM) or pre (LlamaForCausalLM)"
)
EMBEDDING = "Hugging Face's models have no copy embeddings; write a model without them"
ONCE = (
    "Hugging Face's models feed each token once; "
    "set model=vanilla to write the model of the originals alone"
)
UNWRITABLE: dict[str, dict[str, Any]] = {
    f"model.norm='hybrid': {WIRING}": {"norm": "hybrid"},
    f"model.K=2: {ONCE}": {"variant": "phd", "K": 2},
    f"model.copy_embedding=True: {EMBEDDING}; model.norm='hybrid_star': {WIRING}": {
        "norm": "hybrid_star",
        "copy_embedding": True,
    },
}


@pytest.mark.parametrize("message", UNWRITABLE)
def test_what_hugging_face_does_not_compute_is_not_written(message: str) -> None:
    model = random_model(**UNWRITABLE[message])
    with refusal(message):
        to_hugging_face(model.config, model.state_dict())
