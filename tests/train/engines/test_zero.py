"""DeepSpeed's ZeRO: every stage trains alike, and nothing of it shows in state or behaviour."""

import io
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import cache, partialmethod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.utils import counters

from conf.errors import ConfigError
from data.batch import Batch
from phd.block import Block
from phd.config import SamplingConfig
from phd.inference.generator import Generator, Request
from phd.initialization import initial_weights
from phd.loss import IGNORED
from phd.model import Transformer
from tests.train.batches import batch_of
from tests.train.many_ranks import run_ranks
from tests.train.uneven import COPIES, UNEVEN
from train.checkpoint.reader import Checkpoint, flatten
from train.checkpoint.store import CheckpointStore
from train.compose import load
from train.config import Config
from train.distributed.process_groups import ProcessGroups
from train.engines.limits import Limits
from train.engines.optimizer import build_optimizer
from train.engines.zero import DeepSpeedEngine, check_json, deepspeed_json, import_deepspeed, merged
from train.loop import train_step

WORLD, BATCH, LR = 2, 8, 0.01
STAGES = (0, 1, 2, 3)

# At stage 3 even the smallest weights are cut.
SMALL = (
    *("engine=deepspeed", *UNEVEN, *COPIES),
    *("train.max_steps=10", f"train.global_batch={BATCH}", "train.micro_batch=2"),
    *("optim.grad_clip=3.0", "optim.z_loss=0.01"),
    "engine.deepspeed.zero_optimization.stage3_param_persistence_threshold=0",
)
TOKENS = torch.randint(0, 61, (BATCH, 17), generator=torch.Generator().manual_seed(1))
MASK = torch.arange(16) < torch.tensor([[16], [3], [9], [1], [12], [16], [5], [2]])


def batch(step: int) -> Batch:
    """All ranks' rows of a step."""
    return batch_of(TOKENS.roll(step, 1), MASK.roll(step, 0))


@cache  # composing takes as long as some of the engines' steps
def configured(*overrides: str) -> Config:
    return load([*SMALL, *overrides])


@contextmanager
def opened(groups: ProcessGroups, *overrides: str) -> Iterator[DeepSpeedEngine]:
    engine = DeepSpeedEngine(configured(*overrides), groups)
    yield engine
    engine.close()


class Seen(NamedTuple):
    """A step as the loop sees it."""

    loss: float
    grad_norm: float
    applied: bool


def step(engine: DeepSpeedEngine, number: int, limits: Limits = Limits()) -> Seen:  # noqa: B008
    rank, world_size = engine.groups.rank, engine.groups.world_size
    share = Batch(*(None if x is None else x[rank::world_size] for x in batch(number)[:3]))
    result = train_step(engine, share, LR, limits)
    assert result is not None
    return Seen(result.loss.item(), result.grad_norm.item(), bool(result.applied))


def whole_state(engine: DeepSpeedEngine) -> dict[str, Tensor]:
    """The union of what the ranks would write, copied."""
    shares = engine.groups.gather({k: v.clone() for k, v in flatten(engine.state()).items()})
    return {name: tensor for share in shares for name, tensor in share.items()}


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    """Whether weights and moments are the same to the last bit."""
    names = {name for name in ours if not name.startswith("random.")}
    return names == {name for name in theirs if not name.startswith("random.")} and all(
        torch.equal(ours[name], theirs[name]) for name in names
    )


# What the ranks are asked; each function runs on all of them


def begun(groups: ProcessGroups, stage: int, _: Path) -> dict[str, Any]:
    with opened(groups, f"engine.stage={stage}") as engine:
        state = whole_state(engine)
        with torch.device("meta"):
            model = Transformer(engine.config.model)
        weights = {f"model.{name}": value for name, value in initial_weights(model, 0)}
        parameters = list(engine.model.parameters())
        return {
            "names": sorted(state),
            "as drawn": all(torch.equal(state[name], weights[name]) for name in weights),
            "moments": {float(state[n].abs().max()) for n in state if n.startswith("optimizer.")},
            "dtypes": {tensor.dtype for n, tensor in state.items() if not n.startswith("random")},
            "written twice": len(state) - sum(groups.gather(len(flatten(engine.state())))),
            "held": sum(p.numel() for p in parameters),
        }


def resumed(groups: ProcessGroups, stage: int, folder: Path) -> dict[str, Any]:
    store = CheckpointStore(folder / str(stage), keep=1, groups=groups)
    with opened(groups, f"engine.stage={stage}") as engine:
        before = [step(engine, number) for number in range(3)]
        store.save(3, engine.state(), {})
        store.wait()
        drawn = torch.rand(3)
        evaluation = engine.evaluate(batch(9))
        after = [step(engine, number) for number in range(3, 6)]
        state = whole_state(engine)
    checkpoint = store.newest()
    assert checkpoint is not None
    with opened(groups, f"engine.stage={stage}", "seed=9") as engine:
        step(engine, 8)
        engine.restore(checkpoint)
        return {
            "before": before,
            "after": after,
            "evaluation": [x.item() for x in evaluation or ()],
            "same random numbers": torch.equal(torch.rand(3), drawn),
            "same evaluation": [x.item() for x in engine.evaluate(batch(9)) or ()],
            "same steps": [step(engine, number) for number in range(3, 6)],
            "same state": same(whole_state(engine), state),
        }


def exchanged(groups: ProcessGroups, stage: int, folder: Path) -> list[Seen]:
    """The steps after the checkpoint that the stage before (before 0: stage 3) has written."""
    checkpoint = Checkpoint.open(folder / str((stage - 1) % 4) / "step_00000003")
    with opened(groups, f"engine.stage={stage}", "seed=9") as engine:
        engine.restore(checkpoint)
        return [step(engine, number) for number in range(3, 6)]


def spoilt(groups: ProcessGroups, stage: int, _: Path) -> dict[str, Any]:
    """Steps that must not be applied, one after the other, and a good one after each."""
    outcomes: dict[str, Any] = {}

    def nothing(*_: Any) -> None:
        return None

    def in_gradient(_: nn.Module, __: Any, out: Tensor) -> None:
        if out.requires_grad and groups.rank == 1:
            out.register_hook(lambda gradient: gradient * torch.nan)

    def in_loss(_: nn.Module, __: Any, out: Tensor) -> Tensor | None:
        return out * torch.inf if groups.rank == 0 else None

    with opened(groups, f"engine.stage={stage}") as engine:
        step(engine, 0)
        spoilers: dict[str, tuple[Callable[..., Any], Limits]] = {
            "gradient of a rank": (in_gradient, Limits()),
            "loss of a rank": (in_loss, Limits()),
            "loss too high": (nothing, Limits(loss=1.0)),
            "norm too high": (nothing, Limits(grad_norm=1e-3)),
        }
        for number, (name, (spoil, limits)) in enumerate(spoilers.items(), 1):
            state = whole_state(engine)
            handle = engine.model.norm.register_forward_hook(spoil)
            bad = step(engine, number, limits)
            handle.remove()
            unchanged = same(whole_state(engine), state)
            good = step(engine, number)
            outcomes[name] = (bad, unchanged, good.applied, same(whole_state(engine), state))
    return outcomes


def given_up(groups: ProcessGroups, stage: int, _: Path) -> dict[str, Any]:
    """A step that ends between its two micro-batches, and the one after it."""
    with opened(groups, f"engine.stage={stage}") as engine:
        step(engine, 0)
        state = whole_state(engine)
        result = train_step(
            engine, batch(1).shard(groups.rank, WORLD), LR, stop_requested=lambda: True
        )
        unchanged = same(whole_state(engine), state)
        after = step(engine, 1)
        return {"result": result, "unchanged": unchanged, "after": after}


def greedy(model: Transformer) -> list[int]:
    """What a model writes through its cache."""
    prompt, greedy = TOKENS[0, :5].tolist(), SamplingConfig(temperature=0)
    [tokens] = Generator(model).generate([Request(prompt, max_tokens=6, sampling=greedy)])
    return tokens


def used(groups: ProcessGroups, stage: int, _: Path) -> dict[str, Any]:
    with opened(groups, f"engine.stage={stage}") as engine:
        step(engine, 0)
        state = whole_state(engine)
        with engine.summon_full_params() as model, torch.no_grad():
            logits = model.logits(TOKENS[:2])
            written = greedy(model)
        twin = Transformer(engine.config.model)
        twin.load({n.removeprefix("model."): x for n, x in state.items() if n.startswith("model.")})
        difference = (logits - twin.logits(TOKENS[:2])).abs().max().item()
        expected = greedy(twin)
        weights = dict(initial_weights(twin, 5))
        applied = step(engine, 1).applied
        engine.load(weights)
        loaded = whole_state(engine)
        twin.load(weights)
        with engine.summon_full_params() as model, torch.no_grad():
            logits = model.logits(TOKENS[:2])
        numbers = np.arange(TOKENS[:, 1:].numel()).reshape(BATCH, 16) // 20
        nats = torch.zeros(7, dtype=torch.float64)
        rows = batch(0)._replace(documents=numbers)
        each = twin.loss(TOKENS[:, :-1], TOKENS[:, 1:], per_target=True).per_target
        expected_nats = np.bincount(numbers.ravel(), (each * MASK).numpy(force=True).ravel())
        return {
            "same sums": engine.evaluate(rows, document_nats=nats) == engine.evaluate(rows),
            "documents' losses": (nats.tolist(), expected_nats.tolist()),
            "difference": difference,
            "writes": (written, expected),
            "trains on": applied,
            "loaded": all(torch.equal(loaded[f"model.{name}"], x) for name, x in weights.items()),
            "difference after loading": (logits - twin.logits(TOKENS[:2])).abs().max().item(),
        }


def in_bf16(groups: ProcessGroups, stage: int, _: Path) -> dict[str, Any]:
    with opened(groups, f"engine.stage={stage}", "engine.precision=bf16") as engine:
        steps = [step(engine, number) for number in range(3)]
        state = whole_state(engine)
        return {
            "steps": steps,
            "dtypes": {x.dtype for n, x in state.items() if not n.startswith("random.")},
            "tables": {engine.model.rope.cos.dtype, engine.model.rope.sin.dtype},
        }


def otherwise(groups: ProcessGroups, stage: int, _: Path) -> dict[str, list[Seen]]:
    """The same three steps under settings that may change nothing in them."""
    settings = {"offloaded": ["engine.offload_optimizer=true"]} if stage else {}
    if stage == 3:
        settings["offloaded"].append("engine.offload_parameters=true")
        settings["recomputed"] = ["engine.activation_checkpointing=full"]
    seen = {}
    for name, overrides in settings.items():
        with opened(groups, f"engine.stage={stage}", *overrides) as engine:
            seen[name] = [step(engine, number) for number in range(3)]
    return seen


CASES = (begun, resumed, exchanged, spoilt, given_up, used, in_bf16, otherwise)


def everything(groups: ProcessGroups, folder: Path) -> dict[str, list[Any]]:
    """All cases in one life of the processes; what is printed comes with them."""
    printed = io.StringIO()
    with redirect_stdout(printed):
        # Case by case, because some build on what another stage has written.
        seen = {c.__name__: [c(groups, stage, folder) for stage in STAGES] for c in CASES}
    return {**seen, "printed": [printed.getvalue()]}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[Any]]]:
    """By rank, by case, by stage."""
    return run_ranks(WORLD, everything, tmp_path_factory.mktemp("checkpoints"))


def plain_steps(config: Config, steps: int) -> list[Seen]:
    """Steps of plain PyTorch on the whole batch."""
    model = Transformer(config.model).reset(config.seed)
    optimizer = build_optimizer(model, config.optim)
    seen = []
    for number in range(steps):
        tokens, targets = map(torch.from_numpy, (batch(number).inputs, batch(number).targets))
        loss = model.loss(tokens, targets, config.optim.z_loss)
        (loss.total / loss.targets).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.optim.grad_clip or torch.inf)
        for group in optimizer.param_groups:
            group["lr"] = LR
        optimizer.step()
        optimizer.zero_grad()
        seen.append(Seen((loss.cross_entropy / loss.targets).item(), norm.item(), True))
    return seen


@pytest.fixture(scope="module")
def twin() -> list[Seen]:
    return plain_steps(configured(), 6)


def close(ours: list[Seen], theirs: list[Seen], rel: float = 1e-5) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert one == pytest.approx(other, rel=rel)


@pytest.mark.process
@pytest.mark.parametrize("stage", STAGES)
def test_every_rank_sees_the_steps_of_plain_pytorch(stage: int, answers, twin) -> None:
    clip = configured().optim.grad_clip
    assert min(seen.grad_norm for seen in twin) < clip < max(seen.grad_norm for seen in twin)
    for answer in answers:
        resumption = answer["resumed"][stage]
        close([*resumption["before"], *resumption["after"]], twin)


@pytest.mark.process
@pytest.mark.parametrize("stage", STAGES)
def test_a_run_starts_from_the_drawn_weights_and_no_moments(stage: int, answers) -> None:
    names = [name for name, _ in Transformer(configured().model).named_parameters()]
    state = [f"model.{name}" for name in names]
    state += [f"optimizer.{n}.{key}" for n in names for key in ("exp_avg", "exp_avg_sq", "step")]
    for answer in answers:
        seen = answer["begun"][stage]
        assert seen["names"] == sorted([*state, "random.cpu"])
        assert seen["as drawn"]
        assert seen["moments"] == {0.0}
        assert seen["dtypes"] == {torch.float32}
        assert seen["written twice"] == 0


@pytest.mark.process
def test_at_stage_3_a_rank_holds_no_whole_weight_between_steps(answers) -> None:
    total = sum(p.numel() for p in Transformer(configured().model).parameters())
    for answer in answers:
        assert [seen["held"] for seen in answer["begun"]] == [total, total, total, 0]


@pytest.mark.process
@pytest.mark.parametrize("stage", STAGES)
def test_a_restored_run_goes_on_bitwise(stage: int, answers) -> None:
    for answer in answers:
        seen = answer["resumed"][stage]
        assert seen["same evaluation"] == seen["evaluation"]
        assert seen["same steps"] == seen["after"]
        assert seen["same state"]
        assert seen["same random numbers"]


@pytest.mark.process
def test_evaluation_counts_every_row_once(answers) -> None:
    [total, count] = answers[0]["resumed"][0]["evaluation"]
    assert count == (batch(9).targets != IGNORED).sum()
    for answer in answers:
        for seen in answer["resumed"]:
            assert seen["evaluation"] == pytest.approx([total, count], rel=1e-5)


@pytest.mark.process
@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_of_one_stage_goes_on_in_another(stage: int, answers, twin) -> None:
    for answer in answers:
        close(answer["exchanged"][stage], twin[3:])


@pytest.mark.process
@pytest.mark.parametrize("stage", STAGES)
def test_a_bad_step_costs_itself_alone_on_all_ranks(stage: int, answers) -> None:
    for answer in answers:
        for name, (bad, unchanged, good, unchanged_by_good) in answer["spoilt"][stage].items():
            assert (name, bad.applied, unchanged) == (name, False, True)
            assert (name, good, unchanged_by_good) == (name, True, False)
    told = [answer["spoilt"][stage] for answer in answers]
    for seen in told:
        assert seen["gradient of a rank"][0].loss == pytest.approx(
            told[0]["gradient of a rank"][0].loss
        )
        assert not torch.tensor(seen["gradient of a rank"][0].grad_norm).isfinite()
        assert not torch.tensor(seen["loss of a rank"][0].loss).isfinite()


@pytest.mark.process
@pytest.mark.parametrize("stage", STAGES)
def test_a_step_that_is_given_up_leaves_no_trace(stage: int, answers) -> None:
    for answer in answers:
        seen = answer["given_up"][stage]
        assert seen["result"] is None
        assert seen["unchanged"]
        assert seen["after"] == answer["resumed"][stage]["before"][1]


@pytest.mark.process
@pytest.mark.parametrize("stage", STAGES)
def test_the_model_can_be_used_between_steps_and_after_new_weights(stage: int, answers) -> None:
    for answer in answers:
        seen = answer["used"][stage]
        assert seen["difference"] < 1e-5
        found, expected = seen["writes"]
        assert found == expected
        assert seen["trains on"]
        assert seen["loaded"]
        assert seen["same sums"]
        found, expected = seen["documents' losses"]
        assert found == pytest.approx(expected, abs=1e-4)
        assert seen["difference after loading"] < 1e-5


@pytest.mark.process
@pytest.mark.parametrize("stage", STAGES)
def test_bf16_scales_gradients_as_fp32_and_keeps_weights_exact(stage: int, answers, twin) -> None:
    for answer in answers:
        seen = answer["in_bf16"][stage]
        close(seen["steps"], twin[:3], rel=0.05)
        assert seen["steps"][0].loss != pytest.approx(twin[0].loss, rel=1e-6)
        assert seen["dtypes"] == seen["tables"] == {torch.float32}


@pytest.mark.process
@pytest.mark.parametrize("stage", STAGES)
def test_recomputing_and_offloading_change_nothing(stage: int, answers, twin) -> None:
    for answer in answers:
        assert len(answer["otherwise"][stage]) == [0, 1, 1, 2][stage]
        for steps in answer["otherwise"][stage].values():
            close(steps, twin[:3])


@pytest.mark.process
def test_deepspeed_prints_nothing(answers) -> None:
    assert [answer["printed"] for answer in answers] == [[""]] * WORLD


# One process


@pytest.mark.parametrize("stage", STAGES)
def test_a_lone_process_trains_as_plain_pytorch_and_leaves_nothing_behind(
    stage: int, twin, capfd
) -> None:
    linear = nn.functional.linear
    for _ in range(2):
        with opened(ProcessGroups(), f"engine.stage={stage}") as engine:
            close([step(engine, number) for number in range(3)], twin[:3])
        assert not dist.is_initialized()
        assert nn.functional.linear is linear
    assert capfd.readouterr().out == ""


def test_a_checkpoint_of_another_shape_is_refused_and_nothing_changed(tmp_path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    with opened(ProcessGroups()) as engine:
        store.save(1, engine.state(), {})
        store.wait()
    checkpoint = store.newest()
    assert checkpoint is not None
    with opened(ProcessGroups(), "model.ffn_dim=32", "seed=9") as engine:
        state = whole_state(engine)
        with pytest.raises(ValueError, match="is of another model"):
            engine.restore(checkpoint)
        assert same(whole_state(engine), state)


# Both are raised within torch.compile, about what DeepSpeed does.
@pytest.mark.compile
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_blocks_train_as_plain_ones(monkeypatch) -> None:
    # It traces, functionalises and differentiates as the default backend does, and builds no C++.
    compiled = partialmethod(nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(Block, "compile", compiled)
    torch.compiler.reset()
    counters.clear()
    # Without an evaluation, whose graphs the first step would compile as well. DeepSpeed is around
    # the graphs, so these are those of the attention that has the smallest.
    settings = ("engine.stage=2", "engine.compile=true", "data.holdout=0")
    with opened(ProcessGroups(), *settings, "model.attention=reference") as engine:
        found = [step(engine, number) for number in range(2)]
    assert counters["stats"]["unique_graphs"] > 0
    close(found, plain_steps(configured(), 2))


def test_compiling_weights_that_come_and_go_is_refused() -> None:
    with pytest.raises(ValueError, match=r"engine\.compile=true: .* at engine\.stage=3"):
        DeepSpeedEngine(configured("engine.stage=3", "engine.compile=true"), ProcessGroups())


def test_a_process_without_deepspeed_is_told_how_to_get_it(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ValueError, match=r"pip install \"phd-transformer\[deepspeed\]\""):
        import_deepspeed(torch.device("cpu"))


def test_a_process_cannot_change_deepspeeds_device(monkeypatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    import_deepspeed(torch.device("cpu"))
    with pytest.raises(ValueError, match=r"engine\.device='cuda': .* already works on cpu"):
        import_deepspeed(torch.device("cuda"))


# DeepSpeed's own configuration


def json(*overrides: str, world_size: int = 2) -> dict[str, Any]:
    config = configured("train.micro_batch=2", *overrides)
    return deepspeed_json(config, world_size, torch.float32)


def test_portions_are_the_runs() -> None:
    made = json()
    assert made["train_micro_batch_size_per_gpu"] == 2
    assert made["gradient_accumulation_steps"] == 2


def test_the_users_keys_go_over_the_made_ones() -> None:
    made = json(
        "engine.offload_optimizer=true",
        "engine.deepspeed.zero_optimization.overlap_comm=true",
        "engine.deepspeed.zero_optimization.offload_optimizer.pin_memory=false",
        "engine.deepspeed.wall_clock_breakdown=true",
    )
    zero = made["zero_optimization"]
    assert (zero["stage"], zero["overlap_comm"]) == (2, True)
    assert zero["offload_optimizer"] == {"device": "cpu", "pin_memory": False}
    assert made["wall_clock_breakdown"]


def test_weights_are_offloaded_where_they_are_cut() -> None:
    zero = json("engine.stage=3", "engine.offload_parameters=true")["zero_optimization"]
    assert zero["offload_param"] == {"device": "cpu", "pin_memory": True}
    assert "offload_optimizer" not in zero


def test_merging_leaves_both_as_they_were() -> None:
    below, above = {"a": {"b": 1}}, {"a": {"c": 2}}
    assert merged(below, above) == {"a": {"b": 1, "c": 2}}
    assert (below, above) == ({"a": {"b": 1}}, {"a": {"c": 2}})


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("zero_optimization.reduce_bucket_size=-1", "reduce_bucket_size: .* greater than 0"),
        ("zero_optimization.bucket=5", "bucket: Extra inputs are not permitted"),
    ],
)
def test_what_deepspeed_refuses_is_told_in_one_line(override: str, told: str) -> None:
    import_deepspeed(torch.device("cpu"))
    with pytest.raises(ConfigError) as error:
        check_json(json(f"engine.deepspeed.{override}"))
    [line] = map(str, error.value.problems)
    assert re.match(rf"engine\.deepspeed\.(.*\.)?{told}", line), line
    assert "\n" not in line


def test_what_would_save_weights_under_other_names_is_refused() -> None:
    key = "engine.deepspeed.zero_optimization.round_robin_gradients"
    with pytest.raises(ConfigError, match=f"{key}.* the weights of one parameter as those of"):
        configured(f"{key}=true")
