"""The model equals a slow implementation, and has the properties that the three rules imply."""

from dataclasses import replace
from functools import partial
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from phd.config import VARIANTS, CopyInput, ModelConfig, Norm, Variant
from phd.model import Transformer
from phd.pattern import Pattern
from tests.phd.small_models import KINDS, configs, examples, model_of

claim = settings(derandomize=True, deadline=None, max_examples=100)
SMALL = ModelConfig(
    K=3,
    window=4,
    chunk=8,
    layers=3,
    dim=24,
    ffn_dim=40,
    heads=4,
    kv_heads=2,
    head_dim=8,
    vocab_size=29,
    max_seq_len=60,
)
T = 18
norms = pytest.mark.parametrize("norm", get_args(Norm))
variants = pytest.mark.parametrize("variant", get_args(Variant))


def of_variant(variant: Variant, **settings: Any) -> ModelConfig:
    K = min(SMALL.K, VARIANTS[variant].most_copies or SMALL.K)
    return replace(SMALL, **{"variant": variant, "K": K, **settings})


def random_tokens(B: int = 2, tokens: int = T) -> Tensor:
    return torch.randint(0, SMALL.vocab_size, (B, tokens))


class SlowTwin:
    """The model by the book: every copy in every layer, a dense mask, one weight of a name each."""

    def __init__(self, model: Transformer) -> None:
        self.config = model.config
        self.weights = dict(model.named_parameters())

    def logits(self, tokens: Tensor) -> Tensor:
        c = self.config
        x = F.embedding(tokens, self.weights["embed.weight"])[:, None]
        x = x.repeat(1, c.K, 1, 1)
        for s in range(1, c.K):
            match c.hidden_input:
                case "learned":
                    x[:, s] = self.weights["copy_input.weight"]
                case "table":
                    table = self.weights["copy_input.weight"].view(c.K - 1, c.vocab_size, c.dim)
                    x[:, s] = F.embedding(tokens, table[s - 1])
        if self.config.copy_embedding:
            x = x + self.weights["copy_embed.weight"][:, None, :]
        first_pass: list[Tensor] = []
        for i in range(c.passes * c.layers):
            first_pass.append(x)
            is_first = i < c.layers or c.loop_keys == "own"
            x = self.block(i % c.layers, x, x if is_first else first_pass[i % c.layers])
        head = "embed.weight" if self.config.tied else "head.weight"
        logits = self.normalised("norm", x[:, -1]) @ self.weights[head].T
        return logits if c.mup_base_dim is None else logits * c.mup_base_dim / c.dim

    def block(self, layer: int, x: Tensor, keys: Tensor) -> Tensor:
        name, norm = f"blocks.{layer}", self.config.norm
        attend = partial(self.attention, f"{name}.attention")
        feed = partial(self.feed_forward, f"{name}.ffn")
        n1 = partial(self.normalised, f"{name}.attention_norm")
        n2 = partial(self.normalised, f"{name}.ffn_norm")
        if norm == "reordered":
            x = x + n1(attend(x, keys))
            return x + n2(feed(x))
        if norm == "pre" or (norm == "hybrid_star" and layer == 0):
            x = x + attend(n1(x), n1(keys))
            return x + feed(n2(x))
        y = n2(x + attend(x, keys))
        return y + feed(y)

    def attention(self, name: str, x: Tensor, keys: Tensor) -> Tensor:
        c = self.config
        q, k, v = (self.linear(f"{name}.{w}", y) for w, y in (("q", x), ("k", keys), ("v", keys)))
        if c.norm == "reordered":  # over whole projections
            q, k = self.normalised(f"{name}.q_norm", q), self.normalised(f"{name}.k_norm", k)
        q, k, v = (y.unflatten(-1, (-1, c.head_dim)) for y in (q, k, v))  # (B, K, T, heads, H)
        if c.norm in ("hybrid", "hybrid_star"):  # per head
            q, k = self.normalised(f"{name}.q_norm", q), self.normalised(f"{name}.k_norm", k)
            v = self.normalised(f"{name}.v_norm", v)
        q, k = self.rotated(q), self.rotated(k)
        mask = Pattern.of(c, int(name.split(".")[1])).mask(x.shape[2])
        heads = []
        for i in range(c.heads):
            g = i // (c.heads // c.kv_heads)
            scores = torch.einsum("bsnh,brmh->bsnrm", q[..., i, :], k[..., g, :])
            scale = 1 / c.head_dim**0.5
            if c.mup_base_dim is not None and c.mup_base_head_dim is not None:
                scale = c.mup_base_head_dim**0.5 / c.head_dim
            scores = (scores * scale).masked_fill(~mask, -torch.inf)
            p = scores.flatten(3).softmax(-1).view_as(scores)
            heads.append(torch.einsum("bsnrm,brmh->bsnh", p, v[..., g, :]))
        return self.linear(f"{name}.o", torch.cat(heads, -1))

    def rotated(self, x: Tensor) -> Tensor:
        c, (K, tokens) = self.config, x.shape[1:3]
        n, s = torch.arange(tokens), torch.arange(K)[:, None]
        position = n.expand(K, tokens) if c.copy_positions == "shared" else n * K + s
        frequency = c.rope_theta ** -(torch.arange(0, c.head_dim, 2) / c.head_dim).double()
        angle = position[..., None, None] * frequency
        # In float32, as the model keeps them.
        cos, sin = (y.float().double() for y in (angle.cos(), angle.sin()))
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def feed_forward(self, name: str, x: Tensor) -> Tensor:
        gate, up = self.linear(f"{name}.gate", x), self.linear(f"{name}.up", x)
        return self.linear(f"{name}.down", gate * gate.sigmoid() * up)

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.weights[f"{name}.weight"].T

    def normalised(self, name: str, x: Tensor) -> Tensor:
        mean_square = x.square().mean(-1, keepdim=True) + self.config.norm_eps
        return x / mean_square.sqrt() * self.weights[f"{name}.weight"]


@pytest.mark.parametrize("kind", KINDS)
@examples(100, tests=len(KINDS))
@given(data=st.data(), B=st.integers(1, 2), tokens=st.integers(1, 30))
def test_the_loss_and_every_gradient_equal_those_of_the_slow_twin(
    kind: str, data: st.DataObject, B: int, tokens: int
) -> None:
    config = data.draw(configs(kind=kind))
    model = model_of(config)
    row, targets = torch.randint(0, config.vocab_size, (2, B, tokens))
    logits = SlowTwin(model).logits(row)
    torch.testing.assert_close(model.logits(row), logits, rtol=1e-9, atol=1e-9)
    slow = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    total = model.loss(row, targets).total
    torch.testing.assert_close(total, slow, rtol=1e-10, atol=0)
    names, weights = zip(*model.named_parameters(), strict=True)
    gradients = (torch.autograd.grad(x, weights) for x in (total, slow))
    for name, ours, expected in zip(names, *gradients, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-8, msg=f"{name}: {{}}".format)


def originals(model: Transformer, tokens: Tensor) -> list[Tensor]:
    """What the originals compute: each layer's stream, and in the last their keys and values."""
    seen: list[Tensor] = []

    def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: ARG001
        seen.append(output[:, 0])

    last = model.blocks[-1].get_submodule("attention")
    for module in (*model.blocks[:-1], last.get_submodule("k"), last.get_submodule("v")):
        module.register_forward_hook(record)
    model(tokens)
    return seen


@norms
@pytest.mark.parametrize("variant", ["phd", "phd_swa", "phd_cswa", "free_pause"])
def test_originals_compute_what_vanilla_computes(variant: Variant, norm: Norm) -> None:
    tokens = random_tokens()
    found = originals(model_of(of_variant(variant, norm=norm)), tokens)
    expected = originals(model_of(of_variant("vanilla", norm=norm)), tokens)
    assert len(found) == SMALL.layers + 1
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@norms
@variants
def test_one_copy_of_any_variant_is_vanilla(variant: Variant, norm: Norm) -> None:
    tokens = random_tokens()
    found = model_of(of_variant(variant, K=1, norm=norm)).logits(tokens)
    assert torch.equal(found, model_of(of_variant("vanilla", norm=norm)).logits(tokens))


@norms
def test_a_window_of_one_with_two_copies_is_plain_phd(norm: Norm) -> None:
    tokens = random_tokens()
    windowed = model_of(of_variant("phd_swa", K=2, window=1, norm=norm))
    plain = model_of(of_variant("phd", K=2, norm=norm))
    torch.testing.assert_close(windowed.logits(tokens), plain.logits(tokens))


@norms
@pytest.mark.parametrize("window", [1, 4, 100])
def test_one_chunk_for_the_whole_row_is_no_chunk(window: int, norm: Norm) -> None:
    tokens = random_tokens()
    hidden_copies = T * (SMALL.K - 1)
    chunked = of_variant("phd_cswa", window=window, chunk=hidden_copies, norm=norm)
    found = model_of(chunked).logits(tokens)
    expected = model_of(of_variant("phd_swa", window=window, norm=norm)).logits(tokens)
    torch.testing.assert_close(found, expected)
    cut = model_of(replace(chunked, chunk=hidden_copies - 2)).logits(tokens)
    assert (window == 1) == torch.allclose(cut[:, -1], expected[:, -1])


@norms
def test_naive_repetition_is_vanilla_on_repeated_tokens(norm: Norm) -> None:
    tokens = random_tokens()
    repeating = of_variant("naive_repeat", copy_positions="flattened", norm=norm)
    repeated = tokens.repeat_interleave(SMALL.K, 1)
    vanilla = model_of(of_variant("vanilla", norm=norm)).logits(repeated)
    found = model_of(repeating).logits(tokens)
    torch.testing.assert_close(found, vanilla[:, SMALL.K - 1 :: SMALL.K])


@claim
@given(config=..., tokens=st.integers(1, 30), data=st.data())
def test_changing_a_token_changes_no_output_before_it(
    config: ModelConfig, tokens: int, data: st.DataObject
) -> None:
    t = data.draw(st.integers(0, tokens - 1))
    model, row = model_of(config), torch.randint(0, config.vocab_size, (1, tokens))
    changed = row.clone()
    changed[:, t] = (row[:, t] + 1) % config.vocab_size
    before, after = model(row), model(changed)
    assert torch.equal(before[:, :t], after[:, :t])
    assert not torch.allclose(before[:, t], after[:, t])


def influence(config: ModelConfig, n: int) -> Tensor:
    """Whether each slot's stream after the first block moves token n's output: bool (K, T)."""
    model, streams = model_of(config), []

    def cut(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:  # noqa: ARG001
        streams.append(output.detach().requires_grad_())
        return streams[0]

    model.blocks[0].register_forward_hook(cut)
    output = model(random_tokens(B=1))[0, n]
    (gradient,) = torch.autograd.grad((output * torch.randn_like(output)).sum(), streams)
    return (gradient[0] != 0).any(-1)


@norms
@variants
def test_in_one_layer_exactly_the_slots_that_the_mask_shows_move_an_output(
    variant: Variant, norm: Norm
) -> None:
    config = of_variant(variant, layers=2, norm=norm)
    mask = Pattern.of(config).mask(T)
    for n in (0, 7, 8, T - 1):
        expected = mask[-1, n]
        expected[-1, n] = True  # by the residual stream, also where it does not see itself
        assert torch.equal(influence(config, n), expected)


@pytest.mark.parametrize("settings", [{"chunk": 8}, {"chunk": 4, "span_unit": "token"}])
def test_hidden_copies_of_one_chunk_never_influence_another(settings: dict[str, Any]) -> None:
    config = of_variant("phd_cswa", window=100, layers=4, **settings)
    n = torch.arange(T)
    for token in (0, 3, 4, 9, T - 1):
        moved = influence(config, token)
        assert torch.equal(moved[0], n <= token)
        assert torch.equal(moved[1:].all(0), (n <= token) & (n // 4 == token // 4))
        assert torch.equal(moved[1:].any(0), moved[1:].all(0))


def test_where_originals_see_hidden_copies_chunks_do_leak() -> None:
    config = of_variant("phd_cswa", window=100, layers=4, originals_see_hidden=True)
    moved, n = influence(config, T - 1), torch.arange(T)
    # All but the hidden copies of a chunk's last token, after which the chunk has no original.
    is_last = (n % 4 == 3) & (n // 4 != (T - 1) // 4)
    assert torch.equal(~moved, torch.stack([torch.zeros_like(is_last), is_last, is_last]))


def test_sps_without_a_window_is_plain_phd_with_a_learned_input() -> None:
    tokens = random_tokens()
    sps = model_of(of_variant("sps", K=2, window=0))
    learned = model_of(of_variant("phd", K=2, copy_input="learned"))
    assert torch.equal(sps.logits(tokens), learned.logits(tokens))
    token = model_of(of_variant("phd", K=2))
    assert not torch.allclose(sps.logits(tokens), token.logits(tokens))


@pytest.mark.parametrize("copy_input", ["token", "learned", "table"])
def test_naive_repetition_of_one_token_is_vanilla_of_what_its_copies_are_fed(
    copy_input: CopyInput,
) -> None:
    """Hidden Decoding and pause tokens are a vanilla model of a longer text."""
    tokens, K, V = random_tokens(), SMALL.K, SMALL.vocab_size
    config = of_variant("naive_repeat", copy_positions="flattened", copy_input=copy_input)
    model = model_of(replace(config, tied=False))
    longer = replace(config, variant="vanilla", K=1, vocab_size=K * V, tied=False)
    weights = dict(model.named_parameters())
    embed = weights["embed.weight"]
    match copy_input:
        case "token":
            rows = embed.repeat(K, 1)
        case "learned":
            rows = torch.cat([embed, weights["copy_input.weight"].repeat((K - 1) * V, 1)])
        case "table":
            rows = torch.cat([embed, weights["copy_input.weight"]])
    text = (tokens[:, :, None] + torch.arange(K) * V).flatten(1)
    own = {name: x for name, x in weights.items() if not name.startswith("copy_input")}
    head = torch.cat([weights["head.weight"], torch.zeros((K - 1) * V, SMALL.dim)])
    vanilla = model_of(longer).load({**own, "embed.weight": rows, "head.weight": head})
    found = vanilla.logits(text)[:, K - 1 :: K, :V]
    torch.testing.assert_close(model.logits(tokens), found, rtol=1e-9, atol=1e-9)


def test_the_gradient_of_a_learned_vector_in_half_precision_is_rounded_once() -> None:
    """As sharded weights are: gathered in half precision, while the stream is in float32."""
    model = model_of(of_variant("pause"), torch.bfloat16)
    inputs = model.embedded(random_tokens())
    weight = torch.randn_like(inputs)
    (gradient,) = torch.autograd.grad((inputs * weight).sum(), [model.copy_input.weight])
    assert torch.equal(gradient[0], weight[:, 1:].sum((0, 1, 2)).bfloat16())


@norms
def test_a_loop_with_keys_of_its_own_is_a_deeper_vanilla_with_the_same_layers(norm: Norm) -> None:
    tokens = random_tokens()
    # With hybrid_star the first block has another wiring, in each pass.
    if norm == "hybrid_star":
        return
    loop = model_of(of_variant("vanilla", norm=norm, passes=2, loop_keys="own"))
    deeper = model_of(of_variant("vanilla", norm=norm, layers=2 * SMALL.layers))
    weights = dict(loop.named_parameters())
    for i in range(SMALL.layers):
        for name, weight in loop.blocks[i].named_parameters():
            weights[f"blocks.{i + SMALL.layers}.{name}"] = weight
    torch.testing.assert_close(loop.logits(tokens), deeper.load(weights).logits(tokens))


def test_under_autocast_the_loss_stays_close_and_the_stream_stays_in_float32() -> None:
    model, (tokens, targets) = Transformer(SMALL).reset(0), torch.stack([random_tokens()] * 2)
    expected = model.loss(tokens, targets).total
    with torch.autocast("cpu", torch.bfloat16):
        found, hidden = model.loss(tokens, targets).total, model(tokens)
    assert found.dtype == hidden.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=0)


def test_a_row_longer_than_the_rope_table_is_refused_with_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"^model\.max_seq_len=60: .* 61 tokens .* raise model\."):
        Transformer(SMALL)(random_tokens(tokens=61))


@pytest.mark.parametrize("positions", ["shared", "flattened"])
@pytest.mark.parametrize("variant", [v for v, x in VARIANTS.items() if x.most_copies is None])
def test_copies_that_are_switched_make_the_model_that_is_built_with_them(
    variant: Variant, positions: Any
) -> None:
    tables = VARIANTS[variant].copy_input == "table"
    K = 5 if tables else SMALL.K  # tables are not made later
    model = Transformer(of_variant(variant, copy_positions=positions, K=K)).reset(3)
    tokens = random_tokens(tokens=60)
    for K in (1, 2, 5, 3):  # 5: flattened positions need a longer table
        built = Transformer(of_variant(variant, copy_positions=positions, K=K)).reset(3)
        assert model.set_copies(K).config == built.config
        if tables and K > 1:
            built.copy_input.weight.data = model.copy_input.weight.data[
                : (K - 1) * SMALL.vocab_size
            ]
        assert torch.equal(model.logits(tokens), built.logits(tokens))
