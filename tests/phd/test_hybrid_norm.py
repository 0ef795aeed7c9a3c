"""`hybrid` and `hybrid_star` are HybridNorm (arXiv 2503.04598), as its authors compute it."""

from math import sqrt
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from phd.block import is_old_hybrid
from phd.config import ModelConfig
from phd.model import Transformer, count_parameters
from tests.phd.small_models import SMALL, model_of

V = SMALL.vocab_size
norms = pytest.mark.parametrize("norm", ["hybrid", "hybrid_star"])
SHAPES = [
    {"heads": 4, "kv_heads": 2, "head_dim": 8, "dim": 32, "norm_eps": 1e-5},
    {"heads": 6, "kv_heads": 1, "head_dim": 2, "dim": 12, "norm_eps": 0.3},
    {"heads": 2, "kv_heads": 2, "head_dim": 10, "dim": 20, "norm_eps": 1e-6, "tied": False},
    {"heads": 1, "kv_heads": 1, "head_dim": 16, "dim": 16, "norm_eps": 0.1},
]


def config_of(norm: Literal["hybrid", "hybrid_star"], **shape: Any) -> ModelConfig:
    settings = {"variant": "vanilla", "K": 1, "layers": 3, "ffn_dim": 28, "vocab_size": V}
    return ModelConfig(**{**settings, "max_seq_len": 16, "norm": norm, **shape})


class Reference:
    """BryceZhuo/HybridNorm's dense model, a token and a head at a time, in the words of its config.

    Its flags for HybridNorm are use_query_norm, use_key_norm, use_value_norm, attn_norm=False,
    ffn_norm=True and ffn_residual_after_norm=True. HybridNorm* sets for block 0, by
    norm_pos_special_config, attn_norm=True and ffn_residual_after_norm=False. q, k and v are cut
    into heads first, and then each head is normalised with the one weight of its kind.
    """

    def __init__(self, model: Transformer) -> None:
        self.config = model.config
        self.weights = dict(model.named_parameters())

    def logits(self, tokens: list[int]) -> Tensor:
        stream = [self.weights["embed.weight"][token] for token in tokens]
        for layer in range(self.config.layers):
            stream = self.block(layer, stream)
        head = self.weights["embed.weight" if self.config.tied else "head.weight"]
        return torch.stack([head @ self.norm(x, "norm") for x in stream])

    def block(self, layer: int, stream: list[Tensor]) -> list[Tensor]:
        special = self.config.norm == "hybrid_star" and layer == 0
        attn_norm, ffn_residual_after_norm = special, not special
        at = f"blocks.{layer}"
        inputs = [self.norm(x, f"{at}.attention_norm") for x in stream] if attn_norm else stream
        mixed = self.attention(f"{at}.attention", inputs)
        stream = [x + y for x, y in zip(stream, mixed, strict=True)]
        normed = [self.norm(x, f"{at}.ffn_norm") for x in stream]
        residual = normed if ffn_residual_after_norm else stream
        return [r + self.swiglu(f"{at}.ffn", y) for r, y in zip(residual, normed, strict=True)]

    def attention(self, at: str, inputs: list[Tensor]) -> list[Tensor]:
        c, H = self.config, self.config.head_dim
        fused = torch.cat([self.weights[f"{at}.{name}.weight"] for name in "qkv"])
        sizes = [c.heads * H, c.kv_heads * H, c.kv_heads * H]
        q, k, v = [], [], []  # by position, then by head
        for n, x in enumerate(inputs):
            for kind, whole, found in zip("qkv", (fused @ x).split(sizes), (q, k, v), strict=True):
                heads = [self.norm(head, f"{at}.{kind}_norm") for head in whole.split(H)]
                found.append(heads if kind == "v" else [self.rotary(h, n) for h in heads])
        outputs = []
        for n in range(len(inputs)):
            found = []
            for i in range(c.heads):
                g = i // (c.heads // c.kv_heads)
                scores = torch.stack([q[n][i] @ k[m][g] for m in range(n + 1)]) / sqrt(H)
                shares = scores.exp() / scores.exp().sum()
                found.append(sum(shares[m] * v[m][g] for m in range(n + 1)))
            outputs.append(self.weights[f"{at}.o.weight"] @ torch.cat(found))
        return outputs

    def rotary(self, x: Tensor, position: int) -> Tensor:
        half = len(x) // 2
        frequency = self.config.rope_theta ** (-torch.arange(half).double() / half)
        # In float32, as the model keeps them.
        cos = (position * frequency).cos().float().double().repeat(2)
        sin = (position * frequency).sin().float().double().repeat(2)
        return x * cos + torch.cat([-x[half:], x[:half]]) * sin

    def swiglu(self, at: str, x: Tensor) -> Tensor:
        gate, up = self.weights[f"{at}.gate.weight"] @ x, self.weights[f"{at}.up.weight"] @ x
        return self.weights[f"{at}.down.weight"] @ (gate / (1 + (-gate).exp()) * up)

    def norm(self, x: Tensor, name: str) -> Tensor:
        variance = x.pow(2).mean()
        return self.weights[f"{name}.weight"] * (x / (variance + self.config.norm_eps).sqrt())


@norms
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_gradients_are_those_of_hybridnorms_authors(norm: Any, shape: Any) -> None:
    model = model_of(config_of(norm, **shape))
    tokens = torch.randint(0, V, (9,), generator=torch.Generator().manual_seed(1))
    ours, theirs = model.logits(tokens[None])[0], Reference(model).logits(tokens.tolist())
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    names, weights = zip(*model.named_parameters(), strict=True)
    upstream = torch.randn(ours.shape, dtype=torch.float64)
    gradients = (torch.autograd.grad((y * upstream).sum(), weights) for y in (ours, theirs))
    for name, found, expected in zip(names, *gradients, strict=True):
        torch.testing.assert_close(
            found, expected, rtol=1e-8, atol=1e-9, msg=f"{name}: {{}}".format
        )


@norms
@pytest.mark.parametrize("shape", SHAPES)
def test_one_weight_as_long_as_a_head_serves_all_heads_of_a_kind(norm: Any, shape: Any) -> None:
    config = config_of(norm, **shape)
    with torch.device("meta"):
        weights = Transformer(config).state_dict()
    lengths = {
        name: len(w) for name, w in weights.items() if ".attention." in name and "norm" in name
    }
    assert len(lengths) == 3 * config.layers
    assert set(lengths.values()) == {config.head_dim}
    wide = 1 if norm == "hybrid" else 2  # the first block of hybrid_star norms its input, too
    expected = config.layers * (3 * config.head_dim + config.dim) + wide * config.dim
    assert count_parameters(config)["norms"] == expected


@norms
def test_autocast_normalises_heads_in_float32_and_attends_in_half_precision(norm: Any) -> None:
    model = model_of(config_of(norm, **SHAPES[0]), torch.float32)
    tokens = torch.arange(12)[None]
    expected = model.logits(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(tokens)
    assert found.dtype == torch.float32
    torch.testing.assert_close(model.predict(found), expected, rtol=0, atol=0.1)


@norms
def test_the_old_form_is_told_by_the_shape_of_its_weights(norm: Any) -> None:
    name = "blocks.0.attention.q_norm.weight"
    many, one = config_of(norm, **SHAPES[0]), config_of(norm, **SHAPES[3])
    assert is_old_hybrid(many, {name: (4 * 8,)})
    assert not is_old_hybrid(many, {name: (8,)})
    assert not is_old_hybrid(one, {name: (16,)})  # with one head both forms are one
    assert not is_old_hybrid(ModelConfig(), {name: (4 * 64,)})
