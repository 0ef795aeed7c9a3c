"""The plan's numbers are right, and its warnings come when they should and not otherwise."""

import io

import pytest
import torch
from rich.console import Console

from phd.flops import training_flops_per_token
from phd.inference.cache import kv_bytes
from phd.model import count_parameters
from train.compose import load
from train.plan import Plan, kv_rows, make_plan, print_plan

CPU = "engine.device=cpu"


def plan_of(*overrides: str) -> Plan:
    return make_plan(load([CPU, *overrides]))


def printed(plan: Plan) -> str:
    text = io.StringIO()
    print_plan(plan, Console(file=text, width=600))
    return text.getvalue()


# What a setting should draw a warning of, and one that should not.
WARNINGS = {
    "model.dim=65536 model.ffn_dim=262144 model.layers=2 train.max_tokens=1e13": (
        "needs about",
        "the device has",
        "lower train.micro_batch",
    ),
    "train.max_steps=1": ("tokens per parameter", "the model will hardly have begun to learn"),
    "model.window=33": ("model.window=33 reaches past model.chunk=32", "the chunk limits it"),
    "model.chunk=256 model.window=1": ("model.chunk=256 covers the whole row", "phd_swa"),
    "model.K=1 model.window=1": ("model.K=1: phd_cswa with one copy is vanilla",),
    "optim.lr=0.03": ("optim.lr=0.03", "diverges"),
    "data.phases.x.after_tokens=1e12 data.phases.x.weights.python=2": (
        "data.phases.x.after_tokens=1000000000000: begins after the run's",
    ),
    "checkpoint.every=0": ("checkpoint.every=0", "a crash loses everything"),
}


@pytest.mark.parametrize("overrides", WARNINGS)
def test_nonsense_is_warned_of_once_by_its_key(overrides: str) -> None:
    plan = plan_of(*overrides.split())
    [warning] = plan.warnings
    assert all(part in warning for part in WARNINGS[overrides])
    assert printed(plan).count(f"warning: {warning}\n") == 1


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model=vanilla"],
        ["model=phd"],
        ["model=phd_swa", "model.window=33"],
        ["model=naive_repeat"],
        ["model.window=32", "model.chunk=255", "optim.lr=0.02"],
    ],
    ids=" ".join,
)
def test_what_makes_sense_draws_no_warning(overrides: list[str]) -> None:
    plan = plan_of(*overrides)
    assert plan.warnings == ()
    assert "warning" not in printed(plan)


@pytest.mark.parametrize("variant", ["vanilla", "phd", "phd_cswa"])
def test_flops_are_counted_for_this_variant_and_for_vanilla(variant: str) -> None:
    config = load([CPU, f"model={variant}"])
    plan = make_plan(config)
    assert plan.flops_per_token == training_flops_per_token(config.model, 256)
    vanilla = load([CPU, "model=vanilla"]).model
    assert plan.vanilla_flops_per_token == training_flops_per_token(vanilla, 256)
    assert plan.parameters == count_parameters(config.model)


def test_a_run_of_tokens_has_whole_steps_of_them() -> None:
    step = ["train.global_batch=16", "train.seq_len=256"]
    plan = plan_of(*step, f"train.max_tokens={100 * 4096 + 4095}")
    assert plan.tokens == 100 * 4096


LIMITS = {
    "train.max_steps=9 train.max_tokens=20480": "max_steps ends it; train.max_tokens allows 10",
    "train.max_steps=9 train.max_tokens=10240": "max_tokens ends it; train.max_steps allows 9",
    "train.max_steps=900 train.max_flops=1e12": "max_flops ends it; train.max_steps allows 900",
    "train.max_steps=9 train.max_time=60": "max_steps ends it; each start ends after train.max_time"
    "=60 s",
    "train.max_steps=9": "",
    "train.max_flops=1e12": "",
    "train.max_steps=5 train.max_tokens=10240": "",
}


@pytest.mark.parametrize("limits", LIMITS)
def test_of_several_limits_the_plan_says_which_ends_the_run(limits: str) -> None:
    text = printed(plan_of(*limits.split()))
    assert ("ends it" in text) == bool(LIMITS[limits])
    assert LIMITS[limits] in text


def test_a_run_that_only_time_ends_has_no_tokens_to_tell() -> None:
    plan = plan_of("train.max_time=90s", "schedule=constant")
    assert plan.tokens is None
    assert "90 s" in printed(plan)


def test_the_plan_says_what_the_run_will_cost() -> None:
    overrides = ["model.K=3", "train.max_steps=1000", "run.dir=/some/where"]
    overrides += ["train.global_batch=16", "train.micro_batch=4", "train.seq_len=256"]
    plan = plan_of(*overrides)
    text = printed(plan)
    parameters = sum(plan.parameters.values())
    ratio = plan.flops_per_token / plan.vanilla_flops_per_token
    for expected in (
        "the plan: phd_cswa-3-16-32-tiny",
        f"{parameters / 1e6:.3g}M: embedding 1.05M, attention",
        "4,096 tokens = 16 rows x 256, 3 slots each, in 4 forward passes",
        f"1,000 steps = 4.1M tokens, {4096000 / parameters:.2f} per parameter",
        f"{4096000 * plan.flops_per_token:.2e} FLOPs",
        f"{ratio:.2f} x vanilla's",
        f"about {plan.memory.total / 2**20:.3g} MiB",
        f"activations {plan.memory.activations / 2**20:.3g} MiB",
        "/some/where",
    ):
        assert expected in text


def test_the_plan_says_what_a_size_sets_besides_the_model() -> None:
    text = printed(plan_of("size=550m", "optim.lr=1e-3"))
    for expected in (
        "size=550m chose recipe=olmo2; they set data.lanes=256, train.max_tokens=3e11,",
        "train.global_batch=1024,",
        "this run replaces: optim.lr=0.001 (recipe: 0.0003)",
    ):
        assert expected in text
    assert "train.max_tokens=5e11" in printed(plan_of("size=1b2"))  # which the size itself sets
    assert "replaces" not in printed(plan_of("size=151m"))
    assert "recipe" not in printed(plan_of("size=tiny"))


def test_groups_without_parameters_are_not_shown() -> None:
    assert "head" not in printed(plan_of())
    assert "head 1.05M" in printed(plan_of("model.tied=false"))


@pytest.mark.parametrize("variant", ["vanilla", "phd", "phd_swa", "phd_cswa", "naive_repeat"])
def test_the_kv_table_sets_a_variant_beside_vanilla_and_repetition(variant: str) -> None:
    model = load([f"model={variant}", *(["model.K=3"] if variant != "vanilla" else [])]).model
    rows = {row.name: row for row in kv_rows(model, 1000, torch.bfloat16)}
    base = kv_bytes(model.vanilla_twin, 1000, torch.bfloat16).total
    repetition = [] if variant == "vanilla" else ["naive_repeat-3"]
    assert list(rows) == list(dict.fromkeys([model.name, "vanilla", *repetition]))
    assert (rows["vanilla"].total, rows["vanilla"].ratio) == (base, 1.0)
    assert [rows[name].ratio for name in repetition] == [3.0] * len(repetition)
    cost = kv_bytes(model, 1000, torch.bfloat16)
    assert rows[model.name][1:] == (cost.total, cost.hidden, cost.total / base)


@pytest.mark.parametrize("variant", ["vanilla", "phd", "phd_swa", "phd_cswa"])
def test_with_one_copy_the_kv_table_has_no_row_of_repetition(variant: str) -> None:
    model = load([f"model={variant}", "model.K=1"]).model
    rows = kv_rows(model, 1000, torch.bfloat16)
    assert [row.name for row in rows] == list(dict.fromkeys([model.name, "vanilla"]))
    assert {row.ratio for row in rows} == {1.0}
