"""AdamW decays what it should, and its state has the names of the parameters."""

from typing import Any

import pytest
import torch
from torch import Tensor

from phd.config import ModelConfig
from phd.model import Transformer
from train.engines.optimizer import build_optimizer, is_embedding, set_lr
from train.settings.optim import OptimConfig

LR, DECAY = 0.25, 0.5
MATRICES = ("q.weight", "k.weight", "v.weight", "o.weight", "gate.weight", "up.weight")
MATRICES += ("down.weight",)


def optimizer_state(
    model: Transformer, optimizer: torch.optim.Optimizer
) -> dict[str, dict[str, Tensor]]:
    return {name: optimizer.state[parameter] for name, parameter in model.named_parameters()}


def model_of(**settings: object) -> Transformer:
    shape = {"layers": 2, "dim": 8, "ffn_dim": 12, "heads": 2, "kv_heads": 1, "head_dim": 4}
    return Transformer(ModelConfig(**shape, vocab_size=11, **settings)).reset(0)


@pytest.mark.parametrize(
    ("tied", "copy_input"), [(True, "learned"), (False, "learned"), (True, "table")]
)
def test_without_a_gradient_everything_decays_but_embeddings(tied: bool, copy_input: str) -> None:
    model = model_of(tied=tied, copy_embedding=True, copy_input=copy_input)
    torch.nn.init.normal_(model.copy_embed.weight)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, OptimConfig(lr=LR, weight_decay=DECAY))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    embeddings = {"embed.weight", "copy_embed.weight", "copy_input.weight"}
    assert embeddings < before.keys()
    for name, parameter in model.named_parameters():
        kept = 1.0 if name in embeddings else 1 - LR * DECAY
        torch.testing.assert_close(parameter.detach(), kept * before[name])


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({}, 1 / 4),
        ({"kind": "muon"}, 1 / 2),
        ({"kind": "muon", "muon_lr": 1.5 * LR}, 1 / 2),
        ({"kind": "muon", "adjust_lr": "original"}, 1),
    ],
)
@pytest.mark.parametrize("decay", [0.0, DECAY])
def test_with_mup_updates_of_matrices_go_by_the_width_and_their_decay_does_not(
    settings: dict[str, Any], scale: float, decay: float
) -> None:
    """With m = 8 / 2, AdamW's updates are 1/4 of what they were, Muon's 1/2, or all of it."""
    shape: dict[str, Any] = {"tied": False, "norm": "hybrid"}
    config = OptimConfig(lr=2 * LR, weight_decay=decay, **settings)
    models = model_of(**shape), model_of(**shape, mup_base_dim=2)
    models[1].load(dict(models[0].named_parameters()))
    before = {name: p.detach().clone() for name, p in models[0].named_parameters()}
    for model in models:
        optimizer = build_optimizer(model, config, width_ratio=model.config.width_ratio)
        set_lr(optimizer, LR)
        for seed, parameter in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(seed)
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    matrices = 0
    for (name, plain), ours in zip(
        models[0].named_parameters(), models[1].parameters(), strict=True
    ):
        matrix = name.endswith(MATRICES)
        lr = LR * (config.muon_lr or config.lr) / config.lr if matrix else LR
        kept = before[name] * (1.0 if is_embedding(name) else 1 - lr * decay)
        update = (plain.detach() - kept) * (scale if matrix else 1)
        torch.testing.assert_close(ours.detach(), kept + update, rtol=1e-5, atol=1e-6)
        assert update.abs().max() > 0.01
        matrices += matrix
    assert matrices == 14


def test_a_model_as_wide_as_its_base_is_trained_as_one_without_mup() -> None:
    models = model_of(), model_of(mup_base_dim=8, mup_base_head_dim=4)
    tokens = torch.arange(10)[None]
    for model in models:
        config, ratio = OptimConfig(lr=LR, weight_decay=DECAY), model.config.width_ratio
        optimizer = build_optimizer(model, config, width_ratio=ratio)
        assert len(optimizer.param_groups) == 2
        for _ in range(3):
            model.loss(tokens[:, :-1], tokens[:, 1:]).total.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))
    assert torch.equal(*(model.logits(tokens) for model in models))


def test_an_untied_head_is_no_embedding() -> None:
    names = [name for name, _ in model_of(tied=False, copy_embedding=True).named_parameters()]
    assert [name for name in names if is_embedding(name)] == ["embed.weight", "copy_embed.weight"]
    assert "head.weight" in names


def test_it_is_torchs_adamw_with_the_given_settings() -> None:
    ours, theirs = model_of(), model_of()
    config = OptimConfig(lr=LR, betas=(0.8, 0.9), eps=1e-3, weight_decay=DECAY)
    optimizer = build_optimizer(ours, config)
    decayed = [p for name, p in theirs.named_parameters() if name != "embed.weight"]
    groups = [{"params": decayed}, {"params": [theirs.embed.weight], "weight_decay": 0.0}]
    twin = torch.optim.AdamW(groups, lr=LR, betas=(0.8, 0.9), eps=1e-3, weight_decay=DECAY)
    for step in range(3):
        for model in (ours, theirs):
            generator = torch.Generator().manual_seed(step)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        twin.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_its_state_is_there_before_the_first_step_under_the_parameters_names() -> None:
    model = model_of()
    state = optimizer_state(model, build_optimizer(model, OptimConfig()))
    assert state.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        assert set(state[name]) == {"step", "exp_avg", "exp_avg_sq"}
        assert state[name]["step"] == 0
        for moment in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(state[name][moment], torch.zeros_like(parameter))


def test_what_is_loaded_into_the_state_is_what_the_next_step_uses() -> None:
    """A checkpoint is loaded in place, so the tensors must be the optimizer's own."""
    first, second = model_of(), model_of()
    optimizers = [build_optimizer(model, OptimConfig(lr=LR)) for model in (first, second)]

    def step(model: Transformer, optimizer: torch.optim.Optimizer) -> None:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()

    step(first, optimizers[0])
    with torch.no_grad():
        for ours, theirs in zip(second.parameters(), first.parameters(), strict=True):
            ours.copy_(theirs)
        saved = optimizer_state(first, optimizers[0])
        for name, tensors in optimizer_state(second, optimizers[1]).items():
            for key, tensor in tensors.items():
                tensor.copy_(saved[name][key])
    for model, optimizer in zip((first, second), optimizers, strict=True):
        step(model, optimizer)
    assert all(map(torch.equal, first.parameters(), second.parameters()))
