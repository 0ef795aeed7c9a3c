"""Weights and shape to and from Hugging Face: OLMo 2 and Llama checkpoints, as plain dicts.

    here                       there                                  norm
    embed                      model.embed_tokens
    blocks.i.attention.q       model.layers.i.self_attn.q_proj        also k, v, o
    blocks.i.attention.q_norm  model.layers.i.self_attn.q_norm        reordered; also k
    blocks.i.attention_norm    model.layers.i.input_layernorm         pre
                               ...post_attention_layernorm            reordered
    blocks.i.ffn.gate          model.layers.i.mlp.gate_proj           also up, down
    blocks.i.ffn_norm          ...post_attention_layernorm            pre
                               ...post_feedforward_layernorm          reordered
    norm                       model.norm
    head                       lm_head                            untied; a tied one is embed

RoPE rotates the same pairs of a head in both, so weights need no permutation. What muP multiplies
by when our model computes is multiplied into weights there.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from phd.config import ModelConfig, Norm
from phd.model import Transformer

State = dict[str, Tensor]

MISFITS_SHOWN = 8


class Family(NamedTuple):
    """One of Hugging Face's model types, its wiring, and its names for the norms."""

    model_type: str
    architecture: str
    norm: Norm
    norms: dict[str, str]


FAMILIES = (
    Family(
        "olmo2",
        "Olmo2ForCausalLM",
        "reordered",
        {
            "attention.q_norm": "self_attn.q_norm",
            "attention.k_norm": "self_attn.k_norm",
            "attention_norm": "post_attention_layernorm",
            "ffn_norm": "post_feedforward_layernorm",
        },
    ),
    Family(
        "llama",
        "LlamaForCausalLM",
        "pre",
        {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"},
    ),
)
BY_NORM: dict[str, Family] = {family.norm: family for family in FAMILIES}
BY_TYPE = {family.model_type: family for family in FAMILIES}

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
MODULES = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
PROJECTIONS = {
    **{f"attention.{name}": f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")},
    **{f"ffn.{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}

# Fields of `ModelConfig` and the keys of a Hugging Face config that always hold them.
KEYS = {
    "layers": "num_hidden_layers",
    "dim": "hidden_size",
    "ffn_dim": "intermediate_size",
    "heads": "num_attention_heads",
    "vocab_size": "vocab_size",
    "max_seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
}


def from_hugging_face(
    hf_config: Mapping[str, Any], hf_state: Mapping[str, Tensor]
) -> tuple[ModelConfig, State]:
    """The vanilla model that a Hugging Face config and state dict describe.

    To start a PHD model from it, `dataclasses.replace` the config's variant, K and so on, and pass
    both to `starting_state`.

    Args:
        hf_config: `config.json` of an `olmo2` or `llama`, by transformers 4 or 5.
        hf_state: the weights of its `...ForCausalLM`, in any floating dtype.

    Returns:
        The config and the state dict of a `Transformer`, in float32 (float64 stays); weights
        that need no conversion share memory with those given.

    Raises:
        ValueError: if the model does what ours does not, or the weights do not fit the config.
    """
    config = _read_config(hf_config)
    names = _names(config)
    # Old checkpoints hold RoPE's frequencies as well, which follow from rope_theta.
    weights = {
        name: weight.to(torch.promote_types(weight.dtype, torch.float32))
        for name, weight in hf_state.items()
        if not name.endswith(".rotary_emb.inv_freq")
    }
    shapes = {names[name]: shape for name, shape in weight_shapes(config).items()}
    if config.tied:
        weights = _without_tied_head(weights)
    weights = _fitting(weights, shapes)
    return config, {ours: weights[theirs] for ours, theirs in names.items()}


def to_hugging_face(
    config: ModelConfig, state: Mapping[str, Tensor]
) -> tuple[dict[str, Any], State]:
    """The config and state dict of the `Olmo2ForCausalLM` or `LlamaForCausalLM` equal to a model.

    Args:
        config: of a model with K = 1 and `norm` reordered (OLMo 2) or pre (Llama).
        state: the state dict of its `Transformer`; the weights returned share its memory, but for
            those that muP's constants are multiplied into.

    Raises:
        ValueError: if neither class can compute what the model does, or the state does not fit.
    """
    if problems := _unwritable(config):
        raise ValueError("; ".join(problems))
    names = _names(config)
    weights = _with_constants(config, _fitting(state, weight_shapes(config)))
    there = {theirs: weights[ours] for ours, theirs in names.items()}
    return _write_config(config), {
        **there,
        HEAD: weights.get("head.weight", weights["embed.weight"]),
    }


def _with_constants(config: ModelConfig, weights: State) -> State:
    """The weights with which the same model without muP computes the same.

    Logits are linear in the final norm's weight, and queries in that of the last thing that makes
    them: their norm, or the projection where there is none.
    """
    queries = "q.weight" if config.norm == "pre" else "q_norm.weight"
    constants = {"norm.weight": 1 / config.width_ratio} | {
        f"blocks.{i}.attention.{queries}": config.query_gain for i in range(config.layers)
    }
    changed = {name: weights[name] * by for name, by in constants.items() if by != 1}
    return weights | changed


def starting_state(config: ModelConfig, state: Mapping[str, Tensor]) -> State:
    """The state dict with which a model of any variant starts from another variant's weights.

    Every copy goes through the same weights, so they stay what they are. Only the embeddings of
    copies that the other model does not have are new, and start at 0. So the originals compute what
    they compute there, unless they see hidden copies. An untied head starts as the embedding of a
    tied model. Of `copy_input`, a new table starts as the embedding, and a new vector as the mean
    of its rows.

    Args:
        config: the other model's, with any variant, K, window, chunk and copy settings.
        state: the other model's state dict, as `from_hugging_face` returns that of a vanilla one.

    Raises:
        ValueError: if the weights are those of another shape, wiring of norms, or tying.
    """
    if config.copy_embedding:
        vectors = state["embed.weight"].new_zeros(config.K, config.dim)
        given = state.get("copy_embed.weight", vectors)[: config.K]
        vectors[: len(given)] = given
        state = {**state, "copy_embed.weight": vectors}
    if config.hidden_input != "token":
        state = {**state, "copy_input.weight": _starting_input(config, state)}
    if not config.tied and "head.weight" not in state:
        state = {**state, "head.weight": state["embed.weight"].clone()}
    return _fitting(state, weight_shapes(config))


def _starting_input(config: ModelConfig, state: Mapping[str, Tensor]) -> Tensor:
    """What hidden copies are fed at first: the other model's, as far as it has that."""
    embed, given = state["embed.weight"], state.get("copy_input.weight")
    if config.hidden_input == "learned":
        return embed.mean(0, keepdim=True) if given is None else given
    tables = embed.repeat(config.K - 1, 1)
    if given is not None:
        given = given[: len(tables)]
        tables[: len(given)] = given
    return tables


def _names(config: ModelConfig) -> dict[str, str]:
    """The names of a vanilla model's weights: ours, and Hugging Face's for each."""
    parts = PROJECTIONS | BY_NORM[config.norm].norms
    names = {f"{ours}.weight": f"{theirs}.weight" for ours, theirs in MODULES.items()}
    if config.tied:
        del names["head.weight"]
    for i in range(config.layers):
        for ours, theirs in parts.items():
            names[f"blocks.{i}.{ours}.weight"] = f"model.layers.{i}.{theirs}.weight"
    return names


def weight_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """The shape of every weight of a model by name; the model is never allocated."""
    with torch.device("meta"):
        return {name: weight.shape for name, weight in Transformer(config).state_dict().items()}


def _without_tied_head(hf_state: State) -> State:
    """The weights without the head, which a tied model's checkpoint may hold a second time."""
    head, embed = hf_state.get(HEAD), hf_state.get(EMBED)
    if head is not None and embed is not None and not torch.equal(head, embed):
        raise ValueError(
            f"{HEAD} differs from {EMBED}, but tied embeddings make them one; set "
            "tie_word_embeddings to false in the config"
        )
    return {name: weight for name, weight in hf_state.items() if name != HEAD}


def _fitting(state: Mapping[str, Tensor], shapes: dict[str, torch.Size]) -> State:
    """The weights of `state`, if their names and shapes are exactly those of `shapes`."""
    if misfits := _misfits(state, shapes):
        lines = [f"  {misfit}" for misfit in misfits[:MISFITS_SHOWN]]
        if (rest := len(misfits) - MISFITS_SHOWN) > 0:
            lines.append(f"  and {rest} more")
        raise ValueError(
            f"{len(misfits)} weights do not fit the config; give both of one model:\n"
            + "\n".join(lines)
        )
    return dict(state)


def _misfits(state: Mapping[str, Tensor], shapes: dict[str, torch.Size]) -> list[str]:
    """The weights that are missing, unexpected or of another shape, with both shapes."""

    def words(shape: torch.Size | None) -> str:
        return "nothing" if shape is None else str(list(shape))

    given = {name: weight.shape for name, weight in state.items()}
    return [
        f"{name}: {words(shapes.get(name))} expected, {words(given.get(name))} given"
        for name in sorted(given.keys() | shapes.keys())
        if given.get(name) != shapes.get(name)
    ]


def _unwritable(config: ModelConfig) -> list[str]:
    """What Hugging Face's classes cannot compute."""
    found = []
    if config.K > 1:
        found.append(
            f"model.K={config.K}: Hugging Face's models feed each token once; "
            "set model=vanilla to write the model of the originals alone"
        )
    if config.passes > 1:
        found.append(
            f"model.passes={config.passes}: Hugging Face's models go through their layers once; "
            "write a model with model.passes=1"
        )
    if config.copy_embedding:
        found.append(
            "model.copy_embedding=True: Hugging Face's models have no copy embeddings; "
            "write a model without them"
        )
    if config.norm not in BY_NORM:
        known = " or ".join(f"{f.norm} ({f.architecture})" for f in FAMILIES)
        found.append(
            f"model.norm={config.norm!r}: Hugging Face has no model with this wiring; "
            f"write a model with {known}"
        )
    return found


def _write_config(config: ModelConfig) -> dict[str, Any]:
    family = BY_NORM[config.norm]
    return {
        "model_type": family.model_type,
        "architectures": [family.architecture],
        **{theirs: getattr(config, ours) for ours, theirs in KEYS.items()},
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "tie_word_embeddings": config.tied,
        "hidden_act": "silu",
        "attention_bias": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,  # transformers 4 reads it here
        # The classes' defaults name special tokens of other vocabularies, and a padding token
        # gets no gradient.
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


def _read_config(hf: Mapping[str, Any]) -> ModelConfig:
    model_type = hf.get("model_type")
    if model_type not in BY_TYPE:
        raise ValueError(
            f"model_type={model_type!r}: expected one of {', '.join(BY_TYPE)}; "
            "choose a checkpoint of one of these"
        )
    if problems := _unreadable(hf):
        raise ValueError("; ".join(problems))
    shape: dict[str, Any] = {ours: hf[theirs] for ours, theirs in KEYS.items()}
    return ModelConfig(
        variant="vanilla",
        K=1,
        size=model_type,
        **shape,
        # Absent or null where they follow from the others.
        kv_heads=hf.get("num_key_value_heads") or shape["heads"],
        head_dim=hf.get("head_dim") or shape["dim"] // shape["heads"],
        rope_theta=_rope(hf).theta,
        norm=BY_TYPE[model_type].norm,
        tied=hf.get("tie_word_embeddings", False),
    )


def _unreadable(hf: Mapping[str, Any]) -> list[str]:
    """What a Hugging Face config lacks, or asks for and our model does not compute."""
    found = [
        f"{key}: missing; take the config.json that belongs to the weights"
        for key in KEYS.values()
        if key not in hf
    ]
    found += [
        f"{key}=True: our projections have no biases; choose a checkpoint without them"
        for key in ("attention_bias", "mlp_bias")
        if hf.get(key)
    ]
    if (activation := hf.get("hidden_act", "silu")) != "silu":
        found.append(
            f"hidden_act={activation!r}: our feed-forward is SwiGLU, so expected 'silu'; "
            "choose a checkpoint with it"
        )
    rope = _rope(hf)
    if rope.type != "default":
        found.append(
            f"{rope.key}: RoPE of type {rope.type!r}, expected 'default'; "
            "choose a checkpoint whose RoPE is not scaled"
        )
    if hf.get("quantization_config"):
        found.append(
            "quantization_config: quantized weights cannot be trained further; choose the "
            "checkpoint in float32, bfloat16 or float16"
        )
    return found


class _Rope(NamedTuple):
    key: str
    type: str
    theta: float


def _rope(hf: Mapping[str, Any]) -> _Rope:
    """RoPE's type and theta, and the key that gives the type.

    transformers 5 keeps both under `rope_parameters`. Before it, theta stood beside the other
    keys, 10000 if absent, and `rope_scaling` held the type, once called `type`.
    """
    key = "rope_scaling" if hf.get("rope_scaling") else "rope_parameters"
    given = hf.get(key) or {}
    rope_type = given.get("rope_type", given.get("type", "default"))
    return _Rope(key, rope_type, float(given.get("rope_theta", hf.get("rope_theta", 10_000))))
