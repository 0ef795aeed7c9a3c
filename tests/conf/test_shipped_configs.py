"""Claims about `conf/`: every file composes to a config that means what its name says."""

from dataclasses import replace
from typing import Any, get_args

import pytest
import yaml

from conf.errors import ConfigError
from conf.validation import flatten_keys
from data.config import DataConfig, FilesSource, PythonSource
from phd.config import ModelConfig, Variant
from train.compose import CONF, check, load
from train.conf_files import CLUSTERS, load_yaml, recipe_of
from train.config import Config

CHOICES = [
    (file.parent.name, file.stem)
    for file in sorted(CONF.glob("*/*.yaml"))
    if file.parent.name not in ("sweep", CLUSTERS)
]
SWEEPS = [file.stem for file in sorted(CONF.glob("sweep/*.yaml"))]

# What some choices leave to the user to give.
GIVEN = {
    ("data", "files"): ["data.sources.files.paths=[corpus]"],
    ("data", "tokens"): ["data.sources.tokens.path=tokens/python"],
    ("tokenizer", "file"): ["tokenizer.path=llama.model"],
    ("experiment", "anneal"): ["run.start_from=runs/first"],
    ("schedule", "wsd_s"): ["schedule.decays=[80,160,320]"],
}

# The table of sizes: layers, D, FFN, N, G, H, V, tied.
SIZES = {
    "151m": (12, 768, 2048, 12, 3, 64, 100352, True),
    "550m": (16, 1536, 4096, 16, 4, 96, 100352, True),
    "1b2": (16, 2048, 8192, 32, 8, 64, 100352, True),
    "7b": (32, 4096, 11008, 32, 32, 128, 100352, False),
}


def test_without_overrides_the_files_change_no_default() -> None:
    assert load() == Config(data=DataConfig(sources={"python": PythonSource(kind="python")}))


def test_every_group_has_choices() -> None:
    groups = {folder.name for folder in CONF.iterdir() if list(folder.glob("*.yaml"))}
    own = {"model", "size", "data", "tokenizer", "optim", "schedule", "engine", "hooks"}
    assert groups == own | {"experiment", "sweep", "recipe", CLUSTERS}


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_choice_composes_and_comes_back_from_its_plain_values(
    group: str, choice: str
) -> None:
    config = load([f"{group}={choice}", *GIVEN.get((group, choice), [])])
    assert Config.from_dict(config.to_dict()) == config


def test_what_a_choice_leaves_open_has_to_be_given() -> None:
    with pytest.raises(ConfigError, match=r"data\.sources\.files\.paths: has to be given"):
        load(["data=files"])


@pytest.mark.parametrize("variant", get_args(Variant))
def test_a_model_is_named_after_its_variant(variant: str) -> None:
    model = load([f"model={variant}"]).model
    copies = 1 if variant == "vanilla" else 2
    assert (model.variant, model.K) == (variant, copies)


@pytest.mark.parametrize("size", SIZES)
def test_a_size_is_the_tables(size: str) -> None:
    m = load([f"size={size}"]).model
    shape = (m.layers, m.dim, m.ffn_dim, m.heads, m.kv_heads, m.head_dim, m.vocab_size, m.tied)
    assert (m.size, shape) == (size, SIZES[size])


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "constant"])
def test_a_schedule_is_named_after_its_kind(kind: str) -> None:
    assert load([f"schedule={kind}"]).schedule.kind == kind


def test_groups_and_keys_mean_what_they_say_together() -> None:
    shape = ["model=phd_cswa", "model.K=3", "model.window=16", "model.chunk=32", "size=550m"]
    config = load([*shape, "data=fineweb_edu"])
    assert config.name == "phd_cswa-3-16-32-550m-fineweb_edu"
    assert config.model.layers == 16
    source = config.data.sources["fineweb_edu"]
    assert isinstance(source, FilesSource)
    assert "HuggingFaceFW/fineweb-edu/sample/10BT" in str(source.paths)


@pytest.mark.parametrize("size", SIZES)
def test_a_size_brings_its_recipe_and_lets_everything_be_overridden(size: str) -> None:
    config = load([f"size={size}"])
    assert config.train.tokens_per_step == 1024 * 4096
    assert (config.optim.lr, config.warmup_steps) == (3e-4, -(-8_400_000_000 // 2**22))
    small = ["train.max_steps=10", "schedule.warmup_tokens=null", "train.seq_len=128"]
    config = load([f"size={size}", *small, "train.global_batch=256", "optim.lr=1e-3"])
    assert (config.total_steps, config.optim.lr) == (10, 1e-3)
    assert config.train.tokens_per_step == 256 * 128


@pytest.mark.parametrize("size", SIZES)
def test_a_size_names_the_recipe_that_it_chooses(size: str) -> None:
    recipe = recipe_of(size)
    assert recipe is not None
    assert recipe.name == "olmo2"
    values = flatten_keys(load([f"size={size}"]).to_dict())
    assert recipe.settings == {key: values[key] for key in recipe.settings}
    assert {"optim.lr", "train.global_batch", "train.max_tokens"} <= recipe.settings.keys()
    others = flatten_keys(load([f"size={size}", "recipe=default"]).to_dict())
    # The recipe alone differs, and with it the default name.
    differing = {key for key in values if values[key] != others[key]} - {"run.name"}
    assert differing == recipe.settings.keys() - (
        {"train.max_tokens"} if size in ("1b2", "7b") else set()
    )


def test_the_size_tiny_chooses_no_recipe_but_may_have_one() -> None:
    assert recipe_of("tiny") is None
    assert recipe_of("smoke") is None
    assert load(["recipe=default"]) == load()
    config = load(["recipe=olmo2"])
    assert (config.model, config.train.tokens_per_step) == (load().model, 1024 * 4096)


PAPER: dict[str, dict[str, Any]] = {
    "paper_151m": {"name": "naive_repeat-2-151m-olmo_mix", "steps": 100_000_000_000 // 2**22},
    "paper_550m": {"name": "phd_swa-2-16-inf-550m-olmo_mix", "steps": 300_000_000_000 // 2**22},
    "paper_1b2": {"name": "phd_cswa-2-16-32-1b2-olmo_mix", "steps": 500_000_000_000 // 2**22},
}


@pytest.mark.parametrize("experiment", PAPER)
def test_the_papers_experiments_have_its_settings(experiment: str) -> None:
    config = load([f"experiment={experiment}"])
    assert {"dclm", "wiki"} < set(config.data.sources)
    assert {"name": config.name, "steps": config.total_steps} == PAPER[experiment]
    assert config.train.tokens_per_step == 1024 * 4096
    assert config.warmup_steps == -(-8_400_000_000 // 2**22)
    optim, schedule = config.optim, config.schedule
    assert (optim.lr, optim.betas, optim.eps) == (3e-4, (0.9, 0.95), 1e-8)
    assert (optim.weight_decay, optim.grad_clip) == (0.1, 1.0)
    assert (schedule.kind, schedule.final_ratio) == ("cosine", 0.1)


def test_hybridnorms_experiment_has_the_settings_of_its_authors() -> None:
    config = load(["experiment=hybridnorm_1b2"])
    # dense_model/configs/exps/1.2B-dense-HybriedNorm.yaml, in its words; `mlp_hidden_size` counts
    # gate and up together.
    m, optim, schedule, tokens = config.model, config.optim, config.schedule, 1024 * 4096
    found = {
        "d_model": m.dim, "n_heads": m.heads, "n_kv_heads": m.kv_heads, "n_layers": m.layers,
        "mlp_hidden_size": 2 * m.ffn_dim, "weight_tying": m.tied, "rope_theta": m.rope_theta,
        "layer_norm_eps": m.norm_eps, "max_sequence_length": config.train.seq_len,
        "embedding_size": m.vocab_size, "init_std": (2.5 * m.dim) ** -0.5, "seed": config.seed,
        "learning_rate": optim.lr, "weight_decay": optim.weight_decay, "eps": optim.eps,
        "betas": optim.betas, "t_warmup": config.warmup_steps * tokens,
        "t_max": config.train.max_tokens,
        "alpha_f": schedule.final_ratio, "scheduler": schedule.kind,
        "global_train_batch_size": config.train.global_batch,
        "device_train_microbatch_size": config.train.micro_batch, "max_grad_norm": optim.grad_clip,
    }  # fmt: skip
    assert found == {
        "d_model": 2048, "n_heads": 32, "n_kv_heads": 8, "n_layers": 16,
        "mlp_hidden_size": 16384, "weight_tying": True, "rope_theta": 500_000,
        "layer_norm_eps": 1e-5, "max_sequence_length": 4096,
        "embedding_size": 100352, "init_std": pytest.approx(0.013975424859373685), "seed": 6198,
        "learning_rate": 3e-4, "weight_decay": 0.1, "eps": 1e-8,
        "betas": (0.9, 0.95), "t_warmup": 8_388_608_000, "t_max": 1_000_000_000_000,
        "alpha_f": 0.1, "scheduler": "cosine",
        "global_train_batch_size": 1024,
        "device_train_microbatch_size": 4, "max_grad_norm": 1.0,
    }  # fmt: skip
    assert (m.variant, m.norm, m.head_init) == ("vanilla", "hybrid", "fan_in")
    star = load(["experiment=hybridnorm_1b2", "model.norm=hybrid_star", "model=phd_cswa"]).model
    assert (star.variant, star.K, star.norm, star.norm_eps) == ("phd_cswa", 2, "hybrid_star", 1e-5)


def test_an_experiment_yields_to_the_command_line() -> None:
    config = load(["experiment=paper_550m", "model=vanilla", "size=151m", "optim.lr=1e-3"])
    assert (config.name, config.optim.lr) == ("vanilla-151m-olmo_mix-lr_0.001", 1e-3)


def test_an_experiment_may_be_written_with_a_plus() -> None:
    assert load(["+experiment=smoke"]) == load(["experiment=smoke"])


def test_the_default_run_takes_at_most_six_minutes_at_2100_tokens_a_second() -> None:
    """A slow machine with two cores does no more; two minutes are left to install and to start."""
    config = load([])
    assert config.total_steps is not None
    evaluations = -(-config.total_steps // config.eval.every)
    evaluated = evaluations * config.eval.rows * config.train.seq_len
    # An evaluation has no backward pass, which takes two thirds of a step.
    work = config.total_steps * config.train.tokens_per_step + evaluated / 3
    assert work / 2100 <= 6 * 60


PHD = "phd_cswa-2-16-32"
OVER_K = ["vanilla-tiny", *(f"phd_cswa-{K}-16-32-tiny" for K in (2, 3, 5))]

# The name of what takes other FLOPs than the run's own.
EQUAL = "flops_of_phd_cswa-2"

LADDER = ("1m3", "2m6", "5m8", "16m", "34m")

SWEPT = {
    "k": OVER_K,
    "k_equal_flops": [
        *(f"vanilla-tiny-{EQUAL}", "phd_cswa-2-16-32-tiny"),
        *(f"phd_cswa-{K}-16-32-tiny-{EQUAL}" for K in (3, 5)),
    ],
    "variants": [
        *("vanilla-tiny", "naive_repeat-2-tiny", "phd-2-tiny", "phd_swa-2-16-inf-tiny"),
        *("phd_cswa-2-16-32-tiny", "phd_cswa-3-16-32-tiny"),
        *(f"vanilla-tiny-{EQUAL}", "vanilla-tiny-layers_5"),
    ],
    "ablations": [
        *("phd_cswa-2-16-32-tiny", "phd_cswa-2-16-32-tiny-copy_positions_flattened"),
        "phd_cswa-2-16-32-tiny-copy_embedding_true",
        *("phd_cswa-3-16-32-tiny", "phd_cswa-3-16t-32t-tiny"),
    ],
    "neighbours": [
        *("vanilla-tiny", "phd_cswa-2-16-32-tiny", "phd-2-tiny", "phd_swa-2-16-inf-tiny"),
        *("naive_repeat-2-tiny", "hidden_decoding-2-tiny-copy_positions_flattened"),
        *("pause-2-tiny", "free_pause-2-tiny", "sps-2-16-tiny", "sps-2-0-tiny", "loop-2-tiny"),
    ],
    "seeds": [f"phd_cswa-2-16-32-tiny{seed}" for seed in ("", "-seed_1", "-seed_2")],
    "size": [f"{name}-{size}" for size in ("micro", "tiny") for name in ("vanilla", PHD)],
    "window": [f"phd_swa-2-{window}-inf-tiny" for window in (1, 2, 4, 16)],
    "chunk": ["phd_cswa-2-16-16-tiny", "phd_cswa-2-16-32-tiny", "phd_swa-2-16-inf-tiny"],
    "ladder": [f"phd_cswa-2-16-32-{size}-python_packages" for size in LADDER],
    # The default run's own rate, 0.003, is no difference.
    "lr": [f"phd_cswa-2-16-32-tiny{lr}" for lr in ("-lr_0.0003", "-lr_0.001", "", "-lr_0.01")],
}

SWEPT["mup"] = [
    f"vanilla-tiny{shape}-mup_base_dim_64-lr_{lr}"
    for shape in (
        *("-dim_64-ffn_dim_192-heads_1-kv_heads_1", "-dim_128-ffn_dim_384-heads_2"),
        *("-kv_heads_4", "-dim_512-ffn_dim_1536-heads_8-kv_heads_8"),
    )
    for lr in (0.001, 0.002, 0.004, 0.008, 0.016, 0.032)
]


@pytest.mark.parametrize("sweep", SWEEPS)
def test_a_sweep_is_its_points_each_in_its_own_directory(sweep: str) -> None:
    jobs = check([f"+sweep={sweep}"]).jobs
    assert [job.name for job in jobs] == SWEPT[sweep]
    assert [str(job.run_dir) for job in jobs] == [f"runs/{name}" for name in SWEPT[sweep]]


def test_the_sweep_of_mup_grows_all_widths_alike() -> None:
    sweep = load_yaml("sweep/mup.yaml")
    swept = yaml.safe_load(f"[{sweep['hydra']['sweeper']['params']['++together']}]")
    shapes = [
        ModelConfig(
            **{key.removeprefix("model."): value for key, value in point.items()}, **sweep["model"]
        )
        for point in swept
    ]
    assert [shape.width_ratio for shape in shapes] == [1, 2, 4, 8]
    assert {(s.ffn_dim / s.dim, s.heads * s.head_dim / s.dim) for s in shapes} == {(3, 1)}
    assert {(s.kv_heads / s.heads, s.query_gain) for s in shapes} == {(1, 1)}


def test_the_sweep_of_ablations_compares_units_that_differ() -> None:
    *_, hidden, token = (job.model for job in check(["+sweep=ablations"]).jobs)
    assert (hidden.span_unit, token.span_unit) == ("hidden", "token")
    assert hidden == replace(token, span_unit="hidden")
    assert hidden.chunk_tokens != token.chunk_tokens


@pytest.mark.parametrize("overrides", [["size=151m", "train.max_tokens=2e11"], ["size=micro"]])
def test_a_sweep_at_equal_flops_takes_those_of_two_copies(overrides: list[str]) -> None:
    jobs = check(["+sweep=k_equal_flops", *overrides]).jobs
    assert [job.model.K for job in jobs] == [1, 2, 3, 5]
    flops = [(job.total_steps or 0) * job.flops_per_step for job in jobs]
    assert jobs[1].total_steps == load(overrides).total_steps
    for job, spent in zip(jobs, flops, strict=True):
        assert 0 <= flops[1] - spent < job.flops_per_step


@pytest.mark.parametrize(
    "overrides",
    [
        *(["size=550m"], ["train.seq_len=512", "model.window=4"]),
        *(["size=1m3"], ["size=1m3", "train.max_tokens=1e7"]),  # their length is of parameters
    ],
)
def test_the_sweep_of_variants_compares_at_equal_tokens_and_at_equal_flops(
    overrides: list[str],
) -> None:
    *equal, cswa, _, longer, deeper = check(["+sweep=variants", *overrides]).jobs
    assert replace(cswa, hooks=load().hooks) == load(overrides)
    assert {job.total_steps for job in [*equal, cswa, deeper]} == {cswa.total_steps}
    spent, allowed = ((job.total_steps or 0) * job.flops_per_step for job in (longer, cswa))
    assert allowed - longer.flops_per_step < spent <= allowed
    # One layer less, and it would take fewer FLOPs than PHD.
    less = replace(deeper, model=replace(deeper.model, layers=deeper.model.layers - 1))
    assert less.flops_per_step < cswa.flops_per_step <= deeper.flops_per_step
    for job in (longer, deeper):
        assert (job.model.variant, job.model.dim) == ("vanilla", cswa.model.dim)


@pytest.mark.parametrize("size", LADDER)
def test_a_rung_of_the_ladder_follows_its_rule(size: str) -> None:
    config = load([f"size={size}"])
    blocks = config.parameters - config.model.vocab_size * config.model.dim
    ratio = blocks / 108e6
    assert config.optim.lr == pytest.approx(0.0047 * ratio ** (-1 / 3), rel=0.005)
    rows = 160 * 2048 * ratio ** (2 / 3) / config.train.seq_len
    assert config.train.global_batch == 16 * round(rows / 16)
    assert config.total_steps == int(20 * config.parameters) // config.train.tokens_per_step
    assert config.warmup_steps == round(config.total_steps / 20)


def test_rungs_differ_in_size_and_what_follows_from_it_alone() -> None:
    ladder = [flatten_keys(load([f"size={size}"]).to_dict()) for size in LADDER]
    differing = {key for key in ladder[0] if len({str(rung[key]) for rung in ladder}) > 1}
    shape = {"size", "layers", "dim", "ffn_dim", "heads", "kv_heads", "head_dim"}
    own = {f"model.{name}" for name in shape} | {"train.global_batch", "optim.lr", "run.name"}
    assert differing <= own
    sizes = [rung["model.dim"] for rung in ladder]
    assert sizes == sorted(sizes)


def test_the_ladder_takes_a_text_models_and_lengths() -> None:
    given = ["size=1m3,16m", "model=vanilla,phd_cswa", "data=python"]
    lengths = "train.max_tokens_per_parameter=5,80"
    jobs = check(["+sweep=ladder", *given, lengths], multirun=True).jobs
    assert len({job.name for job in jobs}) == 2 * 2 * 2
    assert {name for job in jobs for name in job.data.sources} == {"python"}
    assert {
        round(job.total_steps * job.train.tokens_per_step / job.parameters) for job in jobs
    } == {*(5, 80)}


def test_a_sweep_keeps_the_other_settings() -> None:
    jobs = check(["+sweep=k", "experiment=smoke", "optim.lr=1e-3"], multirun=True).jobs
    assert [job.model.K for job in jobs] == [1, 2, 3, 5]
    assert {(job.model.size, job.optim.lr) for job in jobs} == {("smoke", 1e-3)}
