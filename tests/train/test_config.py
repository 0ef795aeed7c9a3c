"""Claims about `train.config` and `conf.validation`: what a config says, and what it refuses."""

import json
from copy import deepcopy
from dataclasses import replace
from math import inf
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conf.errors import ConfigError
from conf.validation import defaults, keys, settings_of
from data.config import DataConfig, FilesSource, PythonSource
from train.config import Config
from train.settings.run import RunConfig
from train.settings.train import DEFAULT_STEPS, TrainConfig

PYTHON = {"data": {"sources": {"python": {"kind": "python"}}}}

# Under nearly every test, so that other defaults do not change what it claims.
BASE = {
    "data.sources.python": {"kind": "python"},
    "data.lanes": 8,
    "model.heads": 4,
    "model.kv_heads": 2,
    "model.vocab_size": 4096,
    "model.max_seq_len": 4096,
    "train.global_batch": 16,
    "train.seq_len": 256,
    "schedule.warmup_fraction": 0.05,
    "schedule.decay_fraction": 0.2,
}


def tree(settings: dict[str, Any]) -> dict[str, Any]:
    """Nests dotted keys, on top of those of BASE."""
    nested: dict[str, Any] = {}
    for key, value in (BASE | settings).items():
        *sections, name = key.split(".")
        node = nested
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = deepcopy(value)
    return nested


def config(settings: dict[str, Any] | None = None) -> Config:
    return Config.from_dict(tree(settings or {}))


def hints(cls: Any, path: str = "") -> dict[str, Any]:
    """The types of all settings of plain sections, by full name."""
    found: dict[str, Any] = {}
    for setting in settings_of(cls):
        if len(setting.sections) == 1 and not setting.named:
            found |= hints(setting.sections[0], f"{path}{setting.name}.")
        elif not setting.sections:
            found[path + setting.name] = setting.hint
    return found


def problems(settings: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as refusal:
        config(settings)
    return list(map(str, refusal.value.problems))


def test_nothing_given_is_every_default() -> None:
    assert Config.from_dict(PYTHON) == Config(
        data=DataConfig(sources={"python": PythonSource(kind="python")})
    )


def test_the_plain_defaults_are_the_dataclasses_defaults() -> None:
    plain = defaults(Config)
    plain["data"] |= PYTHON["data"]
    assert Config.from_dict(plain) == Config.from_dict(PYTHON)
    by_kind = {"data": None, "engine": None}
    assert plain | by_kind == Config.from_dict(PYTHON).to_dict() | by_kind


def test_a_config_survives_json() -> None:
    before = config(
        {
            "data.sources.own": {"kind": "files", "paths": ["a.txt", "b"]},
            "train.max_time": "2h",
            "train.max_steps": 9,
            "optim.betas": [0.8, 0.99],
            "hooks.sample.prompt": "a = 'x: y'\n",
        }
    )
    assert isinstance(before.data.sources["own"], FilesSource)
    plain = json.loads(json.dumps(before.to_dict()))
    assert plain == before.to_dict()
    assert Config.from_dict(plain) == before


@pytest.mark.parametrize(
    ("key", "value", "meant"),
    [
        ("train.max_tokens", 3e11, 300_000_000_000),
        ("optim.lr", 1, 1.0),
        ("optim.grad_clip", None, None),
        ("optim.betas", [0, 0.5], (0.0, 0.5)),
        ("train.max_time", "30m", 1800.0),
        ("train.max_time", "1.5h", 5400.0),
        ("train.max_time", 90, 90.0),
    ],
)
def test_values_mean_what_they_look_like(key: str, value: Any, meant: Any) -> None:
    section, name = key.split(".")
    extra = {"train.max_steps": 300} if name == "max_time" else {}
    read = getattr(getattr(config({key: value} | extra), section), name)
    assert read == meant
    assert type(read) is type(meant)


# Settings, and the one line they lead to, in parts.
WORDING: list[tuple[Any, ...]] = [
    ({"model.windw": 3}, "model.windw: unknown key. Did you mean model.window?"),
    ({"model.k": 3}, "model.k: unknown key. Did you mean model.K?"),
    ({"modl.K": 3}, "modl.K: unknown key. Did you mean model.K?"),
    ({"lr": 1e-3}, "lr: unknown key. Did you mean optim.lr?"),
    (
        {"hooks.wandb.zzz": 1},
        "hooks.wandb.zzz: unknown key; there is hooks.wandb.{mode, project, group, tags}",
    ),
    (
        {"data.sources.python": {"kind": "python", "paths": "x"}},
        "data.sources.python.paths: unknown key; there is ",
        "data.sources.python.{weight, epochs, kind, packages}",
    ),
    ({"model.K": "two"}, "model.K='two': expected an integer"),
    ({"model.K": True}, "model.K=true: expected an integer"),
    ({"model.K": "3"}, "model.K='3': expected an integer"),
    ({"model.K": 2.5}, "model.K=2.5: expected an integer"),
    ({"model.K": None}, "model.K=null: expected an integer"),
    ({"engine.compile": 1}, "engine.compile=1: expected auto or true or false"),
    (
        {"engine.compile": "atuo"},
        "engine.compile='atuo': expected auto or true or false. ",
        "Did you mean auto?",
    ),
    ({"run.name": 3}, "run.name=3: expected text or null"),
    ({"optim.betas": [0.9]}, "optim.betas=[0.9]: expected [a number, a number]"),
    (
        {"train.max_time": "2 hours"},
        "train.max_time='2 hours': expected a number of seconds, 30m, 2h or null",
    ),
    (
        {"schedule.kind": "cosin"},
        "schedule.kind='cosin': expected one of cosine, linear, wsd, wsd_s, constant. ",
        "Did you mean cosine?",
    ),
    ({"hooks.kv": 3}, "hooks.kv=3: expected settings such as hooks.kv.context"),
    (
        {"data.sources.own": {"kind": "file"}},
        "data.sources.own.kind='file': expected one of python, files, datasets, tokens. ",
        "Did you mean files?",
    ),
    (
        {"data.sources.python.wieght": 2},
        "data.sources.python.wieght: unknown key. Did you mean ",
        "data.sources.python.weight?",
    ),
    (
        {"data.sources.python.weight": -1},
        "data.sources.python.weight=-1.0: expected a number of at ",
        "least 0",
    ),
    (
        {"data.sources.own.paths": "x"},
        "data.sources.own.kind: has to be given, one of python, ",
        "files, datasets, tokens",
    ),
    (
        {"data.sources.python.weight": float("inf")},
        "data.sources.python.weight=inf: expected ",
        "a number of at least 0",
    ),
    ({"data.sources": 3}, "data.sources=3: expected settings by name, such as data.sources.NAME"),
    (
        {"data.phases.end": {"weights": {"python": 2}}},
        "data.phases.end.after_tokens=0: expected an ",
        "integer of at least 1",
    ),
    (
        {"data.phases.end": {"after_tokens": 9, "weights": {"web": 2}}},
        "data.phases.end.weights.web: ",
        "no such source; expected one of python",
    ),
    (
        {"data.phases.end": {"after_tokens": 9, "weights": 2}},
        "data.phases.end.weights=2: expected a ",
        "number for each name",
    ),
    ({"data.sources.own": {"kind": "files"}}, "data.sources.own.paths: has to be given"),
    ({"tokenizer.path": "???"}, "tokenizer.path: has to be given"),
    ({"model.K": 0}, "model.K=0: expected an integer of at least 1"),
    ({"seed": -1}, "seed=-1: expected an integer of at least 0"),
    ({"optim.lr": 0}, "optim.lr=0.0: expected a number above 0"),
    ({"optim.lr": float("nan")}, "optim.lr=nan: expected a number above 0"),
    ({"optim.z_loss": -1}, "optim.z_loss=-1.0: expected a number of at least 0"),
    (
        {"optim.betas": [0.9, 1]},
        "optim.betas=[0.9, 1.0]: expected two numbers from 0 to below 1",
    ),
    ({"optim.momentum": 1}, "optim.momentum=1.0: expected a number from 0 to below 1"),
    ({"optim.ns_steps": 0}, "optim.ns_steps=0: expected an integer of at least 1"),
    ({"train.max_time": 0}, "train.max_time=0.0: expected more than 0 seconds"),
    ({"checkpoint.keep": 0}, "checkpoint.keep=0: expected an integer of at least 1"),
    ({"hooks.sample.every": -1}, "hooks.sample.every=-1: expected an integer of at least 0"),
    (
        {"schedule.final_ratio": 2},
        "schedule.final_ratio=2.0: expected a number from 0 to 1",
    ),
    (
        {"run.name": "a/b"},
        "run.name='a/b': expected letters, digits and _ . + - only, because it names a directory; ",
        "run.dir may be any path",
    ),
    (
        {"run.name": ".mine"},
        "run.name='.mine': expected a name that does not begin with a point, because it names a ",
        "directory; run.dir may be any path",
    ),
    (
        {"model.kv_heads": 3},
        "model.kv_heads=3: must divide model.heads=4, because each key/value head serves the same ",
        "number of query heads",
    ),
    (
        {"train.micro_batch": 3},
        "train.micro_batch=3: must divide train.global_batch=16",
    ),
    (
        {"train.max_tokens": 100},
        "train.max_tokens=100: less than one step, which is train.global_batch=16 rows of ",
        "train.seq_len=256 tokens = 4096",
    ),
    (
        {"train.global_batch": 10},
        "train.global_batch=10: not divisible by data.lanes=8; choose a multiple of 8, or ",
        "data.lanes from 1, 2, 5, 10",
    ),
    (
        {"train.seq_len": 8192},
        "train.seq_len=8192: longer than RoPE's table of model.max_seq_len=4096; raise that or ",
        "lower this",
    ),
    (
        {"tokenizer.vocab_size": 5000},
        "tokenizer.vocab_size=5000: the model has embeddings for model.vocab_size=4096 only; ",
        "raise that or lower this",
    ),
    (
        {"schedule.warmup_steps": 5, "schedule.warmup_tokens": 6},
        "schedule.warmup_tokens=6: schedule.warmup_steps=5 already says how long; set one to null",
    ),
    (
        {"schedule.warmup_steps": 11, "train.max_steps": 10},
        "schedule.warmup_steps=11: the warm-up takes 11 steps, but the run has 10; shorten it, or ",
        "raise train.max_steps",
    ),
    (
        {"schedule.warmup_steps": 11, "train.max_steps": 40, "train.max_flops": 1e12},
        "schedule.warmup_steps=11: the warm-up takes 11 steps, but the run has 7; shorten it, or ",
        "raise train.max_flops",
    ),
    (
        {"train.max_flops": 1e9},
        "train.max_flops=1000000000.0: less than one step, which is train.global_batch=16 rows of ",
        "train.seq_len=256 tokens and takes 1.29e+11 FLOPs; raise it, or make the batch or the ",
        "model smaller",
    ),
    (
        {"train.max_tokens_per_parameter": 1e-4},
        "train.max_tokens_per_parameter=0.0001: less than one step, which is ",
        "train.global_batch=16 rows of train.seq_len=256 tokens = 4096, of a model of 3410816 ",
        "parameters; raise it, or make the batch or the model smaller",
    ),
    *(
        ({f"train.{name}": value}, f"train.{name}={value}: expected a number above 0, or null")
        for name in ("max_flops", "max_tokens_per_parameter")
        for value in (0.0, -1e20, inf)
    ),
    (
        {"schedule.warmup_tokens": 4096 * 9, "train.max_steps": 10, "schedule.kind": "wsd"},
        "schedule.warmup_tokens=36864: the warm-up takes 9 steps and the decay 2, ",
        "but the run has 10; shorten it, or raise train.max_steps",
    ),
    (
        {"train.max_time": "1h"},
        "train.max_time=3600.0: schedule.kind=cosine has to know the run's length in steps; also ",
        "set train.max_steps, train.max_tokens or train.max_flops, or choose schedule=constant",
    ),
    (
        {"hooks.sample.tokens": 4096},
        "hooks.sample.tokens=4096: leaves no room for the prompt in model.max_seq_len=4096; ",
        "choose less",
    ),
    (
        {"model.attention": "flex", "engine.device": "cpu"},
        "model.attention='flex': FlexAttention has no backward pass on the device cpu; choose ",
        "model.attention=packed",
    ),
    (
        {"model.attention": "fused", "engine.device": "cpu"},
        "model.attention='fused': there are no Triton kernels on the device cpu; choose ",
        "model.attention=packed",
    ),
]


@pytest.mark.parametrize("case", WORDING, ids=[str(case[0]) for case in WORDING])
def test_a_fault_is_told_in_one_line(case: tuple[Any, ...]) -> None:
    settings, *parts = case
    assert problems(settings) == ["".join(parts)]


# One of each sort, no two of which touch the same setting.
INDEPENDENT = [
    ({"model.windw": 3}, "model.windw"),
    ({"K": 3}, "K"),
    ({"modl.dim": 3}, "modl.dim"),
    ({"model.dim": 0}, "model.dim"),
    ({"model.norm": "post"}, "model.norm"),
    ({"model.layers": 0}, "model.layers"),
    ({"model.kv_heads": 3}, "model.kv_heads"),
    ({"model.head_dim": 2.5}, "model.head_dim"),
    ({"data.holdout": 2}, "data.holdout"),
    ({"data.lane": 3}, "data.lane"),
    ({"tokenizer.vocab_size": 5000}, "tokenizer.vocab_size"),
    ({"train.micro_batch": 7}, "train.micro_batch"),
    ({"train.seq_len": 5000}, "train.seq_len"),
    ({"train.max_steps": 0}, "train.max_steps"),
    ({"optim.eps": 0}, "optim.eps"),
    ({"optim.betas": 0.9}, "optim.betas"),
    ({"schedule": 3}, "schedule"),
    ({"hooks.wandb.mode": "on"}, "hooks.wandb.mode"),
    ({"hooks.kv.context": 0}, "hooks.kv.context"),
    ({"seed": -1}, "seed"),
]


@given(st.lists(st.sampled_from(INDEPENDENT), min_size=1, unique_by=lambda fault: fault[1]))
def test_any_set_of_faults_is_told_completely_and_nothing_else(faults: list[Any]) -> None:
    settings = {key: value for fault, _ in faults for key, value in fault.items()}
    told = sorted(problem.replace("=", ":").partition(":")[0] for problem in problems(settings))
    assert told == sorted(key for _, key in faults)


def test_two_settings_that_do_not_fit_are_also_held_against_a_third() -> None:
    found = problems({"train.global_batch": 10, "train.micro_batch": 4})
    assert [line.partition(":")[0] for line in found] == [
        "train.micro_batch=4",
        "train.global_batch=10",
    ]


@pytest.mark.parametrize(
    "settings",
    [
        {"train.max_steps": "ten", "schedule.warmup_steps": 1000},
        {"train.max_stps": 10_000, "schedule.warmup_steps": 1000},
        {"data.lanes": 0, "train.global_batch": 10},
        {"model.max_seq_len": 0, "train.seq_len": 5000},
    ],
)
def test_a_value_that_cannot_be_read_raises_no_second_problem(settings: dict[str, Any]) -> None:
    assert len(problems(settings)) == 1


def test_the_error_counts_its_lines() -> None:
    with pytest.raises(ConfigError) as refusal:
        config({"model.K": 0, "seed": "x"})
    assert str(refusal.value) == (
        "2 problems in the configuration:\n"
        "  seed='x': expected an integer from 0 to below 2^64\n"
        "  model.K=0: expected an integer of at least 1"
    )
    assert str(ConfigError(["a"], "the arguments")) == "1 problem in the arguments:\n  a"


def test_a_part_alone_refuses_what_the_whole_refuses() -> None:
    with pytest.raises(ValueError, match=r"train\.global_batch=0"):
        TrainConfig(global_batch=0)
    with pytest.raises(ValueError, match=r"train\.seq_len=8192"):
        Config(
            data=DataConfig(sources={"python": PythonSource(kind="python")}),
            train=TrainConfig(seq_len=8192),
        )


def test_every_setting_has_one_full_name() -> None:
    names = keys(Config)
    assert len(names) == len(set(names))
    assert {"seed", "run.dir", "model.K", "hooks.wandb.mode", "data.sources.*.paths"} <= set(names)


def test_the_first_bound_ends_the_run() -> None:
    def bounded(**bounds: float) -> int | None:
        settings = {f"train.{name}": value for name, value in bounds.items()}
        batch = {"train.global_batch": 16, "train.seq_len": 256}
        return config({**batch, "schedule.kind": "constant", **settings}).total_steps

    step = config({"train.global_batch": 16, "train.seq_len": 256}).flops_per_step
    assert bounded() == DEFAULT_STEPS
    assert bounded(max_steps=7) == 7
    assert bounded(max_tokens=9 * 4096 + 4095) == 9
    assert bounded(max_flops=9.5 * step) == 9
    assert bounded(max_steps=5, max_tokens=9 * 4096) == 5
    assert bounded(max_steps=50, max_tokens=9 * 4096) == 9
    assert bounded(max_steps=50, max_tokens=9 * 4096, max_flops=4.0 * step) == 4
    assert bounded(max_steps=50, max_tokens=9 * 4096, max_flops=40.0 * step) == 9
    tokens = config().parameters  # for one token per parameter
    assert bounded(max_tokens_per_parameter=1.0) == tokens // 4096
    assert bounded(max_tokens_per_parameter=20.0, max_tokens=9 * 4096) == 9
    assert bounded(max_time=60.0) is None
    assert bounded(max_time=60.0, max_steps=3) == 3
    assert bounded(max_time=60.0, max_flops=3.0 * step) == 3


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "constant"])
def test_flops_give_a_length_that_every_schedule_knows(kind: str) -> None:
    settings = {"train.max_flops": 50.5 * config().flops_per_step, "schedule.kind": kind}
    by_flops, by_steps = config(settings), config({"train.max_steps": 50, "schedule.kind": kind})
    assert by_flops.total_steps == 50
    assert (by_flops.warmup_steps, by_flops.decay_steps) == (
        by_steps.warmup_steps,
        by_steps.decay_steps,
    )


@pytest.mark.parametrize("K", [1, 2, 3, 5])
@pytest.mark.parametrize("variant", ["phd", "phd_swa", "phd_cswa", "naive_repeat"])
def test_runs_of_equal_flops_differ_by_less_than_a_step(variant: str, K: int) -> None:
    found = config({"model.variant": variant, "model.K": K, "train.max_flops": 3e13})
    assert found.total_steps is not None
    assert 0 <= 3e13 - found.total_steps * found.flops_per_step < found.flops_per_step


@pytest.mark.parametrize(
    "bound", [{}, {"max_tokens": 1_000_000}, {"max_flops": 3e13}, {"max_steps": 9, "max_time": 60}]
)
@pytest.mark.parametrize("other", ["phd_cswa-2", "phd_swa-3-4-inf", "phd_cswa-3-4t-8t", "vanilla"])
def test_a_run_may_take_the_flops_of_another_model(other: str, bound: dict[str, float]) -> None:
    settings = {f"train.{name}": value for name, value in bound.items()}
    own = config({"model.variant": "naive_repeat", **settings, "train.flops_of": other})
    twin = replace(own, model=own.flops_model, train=replace(own.train, flops_of=None))
    assert twin.model.name.startswith(other)
    spent, allowed = ((run.total_steps or 0) * run.flops_per_step for run in (own, twin))
    assert allowed - own.flops_per_step < spent <= allowed
    assert own.shortest_limits == ["train.flops_of"]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"train.flops_of": "phd_cswa"}, "expected vanilla, or a variant with its K, such as"),
        ({"train.flops_of": "phd-0"}, "is no such model: model.K=0: expected an integer"),
        (
            {"train.flops_of": "phd-2", "train.max_time": 9.0, "schedule.kind": "constant"},
            "only time ends the run, which has no FLOPs to share; set train.max_steps",
        ),
        ({"train.flops_of": "vanilla", "train.max_steps": 1}, "its FLOPs are less than one step"),
    ],
)
def test_flops_that_no_model_has_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        config(settings)
    [problem] = map(str, refusal.value.problems)
    assert problem.startswith(f"train.flops_of='{settings['train.flops_of']}': {told}")


def test_time_alone_bounds_a_constant_schedule() -> None:
    unbounded = config({"train.max_time": "30m", "schedule.kind": "constant"})
    assert (unbounded.total_steps, unbounded.warmup_steps, unbounded.decay_steps) == (
        None,
        0,
        0,
    )


def test_a_run_is_named_after_its_model_and_lives_under_runs() -> None:
    assert config().name == "phd_cswa-2-16-32-tiny"
    assert str(config().run_dir) == "runs/phd_cswa-2-16-32-tiny"
    assert str(config({"run.name": "mine"}).run_dir) == "runs/mine"
    elsewhere = config({"run.dir": "/data/x", "model.variant": "vanilla", "model.K": 1})
    assert (elsewhere.name, str(elsewhere.run_dir)) == ("vanilla-tiny", "/data/x")
    assert elsewhere.run == RunConfig(dir="/data/x")


INTEGERS = [key for key, hint in hints(Config).items() if int in (hint, *get_args(hint))]


@pytest.mark.parametrize("value", [10**20, -(10**20), 1e20, 2**64])
def test_an_integer_beyond_64_bits_is_told_by_its_name(value: float) -> None:
    assert len(INTEGERS) > 30
    for key in INTEGERS:
        found = problems({key: value})
        assert any(line.startswith(f"{key}=") and "expected an integer" in line for line in found)


def test_a_seed_has_64_bits() -> None:
    assert config({"seed": 2**64 - 1}).seed == 2**64 - 1
    found = problems({"seed": 2**64})
    assert found == [f"seed={2**64}: expected an integer from 0 to below 2^64"]


@pytest.mark.parametrize("value", [0.0, -1.0, 1e30])
@pytest.mark.parametrize(
    "key", ["faults.step_timeout", "faults.exit_timeout", "data.remote.timeout_s"]
)
def test_a_time_that_nothing_can_wait_for_is_told_by_its_name(key: str, value: float) -> None:
    [problem] = problems({key: value})
    assert problem.startswith(f"{key}=")
