"""The engine's step equals a plain one: loss, gradient, clipping, accumulation, update."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from phd.model import Transformer
from tests.train.batches import batch_of
from train.checkpoint.reader import Checkpoint, flatten
from train.checkpoint.store import CheckpointStore
from train.config import Config
from train.distributed.process_groups import ProcessGroups
from train.engines.fsdp import FsdpEngine
from train.engines.optimizer import build_optimizer
from train.loop import train_step

ROWS = torch.randint(0, 320, (4, 33), generator=torch.Generator().manual_seed(1))


def alone(config: Config) -> FsdpEngine:
    return FsdpEngine(config, ProcessGroups())


def adjusted(config: Config, section: str, **settings: Any) -> Config:
    return replace(config, **{section: replace(getattr(config, section), **settings)})


def plain_gradient(model: Transformer, rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean loss over all rows at once, through logits, and its gradient by name."""
    logits = model.logits(rows[:, :-1])
    loss = cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    names, parameters = zip(*model.named_parameters(), strict=True)
    return loss.detach(), dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def norm(gradient: dict[str, Tensor]) -> Tensor:
    return torch.sqrt(sum(g.square().sum() for g in gradient.values()))


@pytest.mark.parametrize("clip", [None, 0.1, 1e9])
def test_a_step_is_adamw_on_the_clipped_gradient_of_the_mean_loss(
    clip: float | None, config
) -> None:
    settings = adjusted(config("model.K=3"), "optim", grad_clip=clip)
    engine = alone(settings)
    before = {name: p.detach().clone() for name, p in engine.model.named_parameters()}
    loss, gradient = plain_gradient(engine.model, ROWS)
    result = train_step(engine, batch_of(ROWS), lr=0.01)
    torch.testing.assert_close(result.loss, loss)
    torch.testing.assert_close(result.grad_norm, norm(gradient), rtol=1e-4, atol=0)

    scale = 1.0 if clip is None else min(1.0, clip / norm(gradient).item())
    optim = settings.optim
    for name, parameter in engine.model.named_parameters():
        # The first step of AdamW: both moments are the gradient's own, bias corrected.
        g = scale * gradient[name]
        decay = 0.0 if name == "embed.weight" else optim.weight_decay
        expected = before[name] * (1 - 0.01 * decay) - 0.01 * g / (g.abs() + optim.eps)
        clear = g.abs() > 1e-5  # where the sign of the gradient is no matter of rounding
        torch.testing.assert_close(
            parameter.detach()[clear], expected[clear], rtol=1e-4, atol=1e-5, msg=name
        )


def test_two_steps_equal_two_steps_of_plain_pytorch(config) -> None:
    settings = config("train.micro_batch=2")
    engine, model = alone(settings), Transformer(settings.model).reset(settings.seed)
    optimizer = build_optimizer(model, settings.optim)
    for lr in (0.01, 0.003):
        train_step(engine, batch_of(ROWS), lr)
        _, gradient = plain_gradient(model, ROWS)
        for name, parameter in model.named_parameters():
            parameter.grad = gradient[name]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    for ours, theirs in zip(engine.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_accumulation_changes_neither_loss_nor_gradient(
    micro_batch: int, z_loss: float, config
) -> None:
    whole = adjusted(config(), "optim", z_loss=z_loss)
    cut = adjusted(whole, "train", micro_batch=micro_batch)
    expected, gradient = plain_gradient(alone(whole).model, ROWS)
    results = []
    for settings in (whole, cut):
        result = train_step(alone(settings), batch_of(ROWS), lr=0.0)
        results.append((result.loss.item(), result.grad_norm.item()))
    assert results[1] == pytest.approx(results[0], rel=1e-6)
    assert results[1][0] == pytest.approx(expected.item(), rel=1e-6)
    if z_loss == 0:
        assert results[1][1] == pytest.approx(norm(gradient).item(), rel=1e-5)


def test_the_z_loss_steers_but_is_not_part_of_what_is_logged(config) -> None:
    settings = config()
    plain = train_step(alone(settings), batch_of(ROWS), lr=0.0)
    steered = train_step(alone(adjusted(settings, "optim", z_loss=0.1)), batch_of(ROWS), lr=0.0)
    torch.testing.assert_close(steered.loss, plain.loss)
    assert steered.grad_norm != pytest.approx(plain.grad_norm.item(), rel=1e-3)


def test_a_steps_gradient_leaves_nothing_for_the_next(config) -> None:
    engine = alone(config())
    first = train_step(engine, batch_of(ROWS), lr=0.0)
    second = train_step(engine, batch_of(ROWS), lr=0.0)
    assert torch.equal(second.grad_norm, first.grad_norm)


def test_equal_seeds_start_from_equal_weights_and_others_do_not(config) -> None:
    first, second, other = (alone(config(f"seed={seed}")) for seed in (3, 3, 4))
    assert torch.equal(first.model.embed.weight, second.model.embed.weight)
    assert not torch.equal(first.model.embed.weight, other.model.embed.weight)


def test_the_summed_loss_counts_what_the_mask_says(config) -> None:
    engine = alone(config("train.global_batch=6", "train.micro_batch=3"))
    mask = torch.rand(4, 32, generator=torch.Generator().manual_seed(0)) < 0.5
    logits = engine.model.logits(ROWS[:, :-1])
    each = cross_entropy(logits.flatten(0, 1), ROWS[:, 1:].flatten(), reduction="none")
    total, count = engine.evaluate(batch_of(ROWS, mask))
    assert count == mask.sum()
    assert total.item() == pytest.approx(each[mask.flatten()].sum().item(), rel=1e-6)
    total, count = engine.evaluate(batch_of(ROWS))
    assert count == mask.numel()
    assert total.item() == pytest.approx(each.sum().item(), rel=1e-6)


def test_the_loss_of_each_document_changes_no_sum(config) -> None:
    engine = alone(config("train.global_batch=6", "train.micro_batch=3"))
    mask = torch.rand(4, 32, generator=torch.Generator().manual_seed(0)) < 0.5
    numbers = torch.arange(4 * 32).view(4, 32) // 20
    batch = batch_of(ROWS, mask)._replace(documents=numbers.numpy())
    nats = torch.zeros(7, dtype=torch.float64)
    assert engine.evaluate(batch, document_nats=nats) == engine.evaluate(batch)
    logits = engine.model.logits(ROWS[:, :-1]).transpose(1, 2)
    each = cross_entropy(logits, ROWS[:, 1:], reduction="none") * mask
    apart = [each[numbers == number].sum().item() for number in range(7)]
    assert nats.tolist() == pytest.approx(apart, rel=1e-6)


@pytest.mark.parametrize("micro_batch", [2, 4])
def test_targets_that_are_padding_count_nowhere(config, micro_batch: int) -> None:
    mask = torch.arange(32) < torch.tensor([[32], [7], [20], [1]])
    settings = config("train.global_batch=4", f"train.micro_batch={micro_batch}")
    engine, twin = alone(settings), alone(settings)
    result = train_step(engine, batch_of(ROWS, mask), lr=0.0)
    logits = twin.model.logits(ROWS[:, :-1])
    loss = cross_entropy(logits[mask], ROWS[:, 1:][mask])
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in twin.model.parameters()]).norm()
    assert result.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    assert result.grad_norm.item() == pytest.approx(norm.item(), rel=1e-4)


def test_isolated_documents_cost_what_they_cost_alone(config) -> None:
    engine = alone(config("train.global_batch=4", "train.micro_batch=2"))
    cu_seqlens = torch.tensor([[0, 9, 32], [0, 1, 32], [0, 20, 32], [0, 31, 32]])
    place = torch.arange(32)
    starts = torch.where(place < cu_seqlens[:, 1:2], 0, cu_seqlens[:, 1:2])
    total, count = engine.evaluate(batch_of(ROWS, starts=starts))
    apart = 0.0
    for row, (_, border, _) in zip(ROWS, cu_seqlens.tolist(), strict=True):
        for start, stop in ((0, border), (border, 32)):
            logits = engine.model.logits(row[None, start:stop])[0]
            apart += cross_entropy(logits, row[start + 1 : stop + 1], reduction="sum").item()
    assert count == 4 * 32
    assert total.item() == pytest.approx(apart, rel=1e-5)


def test_in_bf16_weights_moments_and_gradients_stay_float32(config) -> None:
    engine = alone(config("engine.precision=bf16"))
    exact = alone(config())
    assert (engine.dtype, exact.dtype) == (torch.bfloat16, torch.float32)
    result = train_step(engine, batch_of(ROWS), lr=0.01)
    expected = train_step(exact, batch_of(ROWS), lr=0.01).loss
    assert result.loss.dtype == torch.float32
    assert result.loss != expected
    torch.testing.assert_close(result.loss, expected, rtol=1e-2, atol=0)
    tensors = flatten({k: v for k, v in engine.state().items() if k != "random"})
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


# State


def saved(engine: FsdpEngine, store: CheckpointStore, step: int) -> Checkpoint:
    store.save(step, engine.state(), {})
    store.wait()
    checkpoint = store.newest()
    assert checkpoint is not None
    return checkpoint


def test_a_restored_engine_goes_on_bitwise(config, tmp_path) -> None:
    first, second = alone(config()), alone(config("seed=9"))
    train_step(first, batch_of(ROWS), lr=0.01)
    train_step(second, batch_of(ROWS.flip(0)), lr=0.01)
    checkpoint = saved(first, CheckpointStore(tmp_path, keep=1), 1)
    drawn = torch.rand(3)
    second.restore(checkpoint)
    assert torch.equal(torch.rand(3), drawn)
    for engine in (first, second):
        train_step(engine, batch_of(ROWS), lr=0.01)
    ours, theirs = flatten(second.state()), flatten(first.state())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("model.ffn_dim=32", "float32 [24, 16] in the checkpoint, float32 [32, 16] in this run"),
        ("model.layers=3", "nothing in the checkpoint, float32"),
        ("model.tied=false", "model.head.weight: nothing in the checkpoint"),
        ("model.norm=pre", "in the checkpoint, nothing in this run"),
    ],
)
def test_a_checkpoint_of_another_shape_is_refused_and_nothing_changed(
    override: str, told: str, config, tmp_path
) -> None:
    checkpoint = saved(alone(config()), CheckpointStore(tmp_path, keep=1), 1)
    engine = alone(config(override))
    before = engine.model.embed.weight.clone()
    with pytest.raises(ValueError, match="is of another model") as error:
        engine.restore(checkpoint)
    assert told in str(error.value)
    assert torch.equal(engine.model.embed.weight, before)


def test_names_in_a_checkpoint_are_the_models_own(config) -> None:
    engine = alone(config())
    names = dict(engine.model.named_parameters())
    state = flatten(engine.state())
    assert {n.removeprefix("model.") for n in state if n.startswith("model.")} == set(names)
    assert not any("_orig_mod" in name or "module." in name for name in state)
    moments = {f"optimizer.{n}.{m}" for n in names for m in ("step", "exp_avg", "exp_avg_sq")}
    assert {name for name in state if name.startswith("optimizer.")} == moments
