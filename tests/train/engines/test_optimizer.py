"""AdamW decays what it should, and its state has the names of the parameters."""

import pytest
import torch
from torch import Tensor

from phd.config import ModelConfig
from phd.model import Transformer
from train.engines.optimizer import build_optimizer, is_embedding
from train.settings.optim import OptimConfig

LR, DECAY = 0.25, 0.5


def optimizer_state(
    model: Transformer, optimizer: torch.optim.Optimizer
) -> dict[str, dict[str, Tensor]]:
    return {name: optimizer.state[parameter] for name, parameter in model.named_parameters()}


def model_of(**settings: object) -> Transformer:
    shape = {"layers": 2, "dim": 8, "ffn_dim": 12, "heads": 2, "kv_heads": 1, "head_dim": 4}
    return Transformer(ModelConfig(**shape, vocab_size=11, **settings)).reset(0)


@pytest.mark.parametrize("tied", [True, False])
def test_without_a_gradient_everything_decays_but_embeddings(tied: bool) -> None:
    model = model_of(tied=tied, copy_embedding=True)
    torch.nn.init.normal_(model.copy_embed.weight)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, OptimConfig(lr=LR, weight_decay=DECAY))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    embeddings = {"embed.weight", "copy_embed.weight"}
    assert embeddings < before.keys()
    for name, parameter in model.named_parameters():
        kept = 1.0 if name in embeddings else 1 - LR * DECAY
        torch.testing.assert_close(parameter.detach(), kept * before[name])


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
